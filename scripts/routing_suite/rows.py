"""The loads, as tables: those that are replayed, those that routers get as processes, and those for real engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

AGENTS = "agent_sessions.jsonl.gz"
MOONCAKE = "mooncake_synthetic_trace.jsonl"
AZURE = "azure_llm_2023_conv.csv"
GENERATOR = "gen:"


class SuiteError(Exception):
    """The run cannot continue. The text is for the user."""


class Replayed(NamedTuple):
    """One load in virtual time. trace: `gen:...`, or the name of a file in the folder of traces; flags: of
    `sglang-router replay`."""

    name: str
    trace: str
    flags: tuple[str, ...]

    @property
    def sessions(self) -> bool:
        """Whether its requests belong to sessions."""
        return self.trace.startswith(f"{GENERATOR}sessions") or self.trace.endswith(AGENTS)


class Lived(NamedTuple):
    """One load in real time. trace: what `gen:` is followed by.

    cache     slots of each engine's KV cache, in tokens
    speeds    of the engines: as many as there are
    restart   seconds after which the second engine is killed; 0.0: never
    down      seconds until it is started again
    sessions  the requests belong to sessions
    """

    name: str
    trace: str
    cache: int = 300_000
    speeds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    restart: float = 0.0
    down: float = 8.0
    sessions: bool = False

    @property
    def about(self) -> str:
        """The load and its engines, in words."""
        speeds = ", ".join(f"{speed:g}" for speed in self.speeds)
        restart = f"; the second one is killed after {self.restart:g} s and back {self.down:g} s later"
        return (
            f"`{GENERATOR}{self.trace}`, {len(self.speeds)} engines with {self.cache:,} slots, speeds {speeds}"
            f"{restart if self.restart else ''}"
        )


class Engined(NamedTuple):
    """One load for real engines. A word of the generator is five tokens of their model.

    engine   of `real_engines.engines.ENGINES`
    engines  how many
    trace    what `gen:` is followed by
    flags    added to those of the engine
    """

    name: str
    engine: str
    engines: int
    trace: str
    flags: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """The load and its engines, in words."""
        added = f" with `{' '.join(self.flags)}`" if self.flags else ""
        return f"`{GENERATOR}{self.trace}` (a word is five tokens), {self.engines} x {self.engine}{added}"


def _load(name: str, trace: str, flags: str) -> Replayed:
    return Replayed(name, trace, tuple(flags.split()))


_FOUR = "--workers 4 --cache-tokens 300000"
_SCARCE = "--workers 4 --cache-tokens 48000"
REPLAYED = (
    _load("64 groups x 8", "gen:groups,requests=512,rate=16", _FOUR),
    _load("64 groups x 16", "gen:groups,requests=1024,rate=16", _FOUR),
    _load("64 groups x 8, scarce cache", "gen:groups,requests=512,rate=16", _SCARCE),
    _load("64 groups x 16, scarce cache", "gen:groups,requests=1024,rate=16", _SCARCE),
    _load("one hot prefix", "gen:hot-prefix,rate=20", _FOUR),
    _load("short groups, long strangers", "gen:strangers,rate=8", _FOUR),
    _load("four engines, one at 0.4x", "gen:groups,rate=16", f"{_FOUR} --speeds 1,1,1,0.4"),
    _load("four engines at 0.85x", "gen:groups,rate=16", f"{_FOUR} --speeds 0.85"),
    _load("sessions, one system prompt", "gen:sessions,rate=2.5", _FOUR),
    _load("flash crowds", "gen:bursts,rate=10", _FOUR),
    _load("join, leave, restart", "gen:groups,rate=16", f"{_FOUR} --join 60 --restart 1@100 --leave 0@150"),
    _load("agents, 1 M, 64 live", AGENTS, "--workers 8 --cache-tokens 1000000 --live 64"),
    _load("agents, 2 M, 64 live", AGENTS, "--workers 8 --cache-tokens 2000000 --live 64"),
    _load("agents, 1 M, 128 live", AGENTS, "--workers 8 --cache-tokens 1000000 --live 128"),
    _load("agents, 2 M, 128 live", AGENTS, "--workers 8 --cache-tokens 2000000 --live 128"),
    _load("Mooncake synthetic", MOONCAKE, "--workers 8 --cache-tokens 307200 --prefill-tokens-per-s 16000"),
    _load("Azure conversations", AZURE, "--workers 8 --cache-tokens 300000"),
)
_SLOW = (1.0, 1.0, 1.0, 0.4)
LIVED = (
    Lived("64 groups x 8", "groups,requests=512,rate=16"),
    Lived("64 groups x 16", "groups,requests=1024,rate=16"),
    Lived("64 groups x 8, scarce cache", "groups,requests=512,rate=16", cache=48_000),
    Lived("64 groups x 16, scarce cache", "groups,requests=1024,rate=16", cache=48_000),
    Lived("one hot prefix", "hot-prefix,requests=700,rate=20"),
    Lived("short groups, long strangers", "strangers,requests=320,rate=8"),
    Lived("four engines, one at 0.4x", "groups,requests=640,rate=16", speeds=_SLOW),
    Lived("sessions, one system prompt", "sessions,requests=640,rate=2.5,turns=6,think=3", sessions=True),
    Lived("flash crowds", "bursts,requests=480,rate=10,every=20"),
    Lived("one engine restarts", "groups,requests=640,rate=16", restart=15.0),
)

_REAL_GROUPS = "groups,groups=24,prefix=320,tail=32,output=8,requests=240,rate=5"
ENGINED = (
    Engined("3 x SGLang, scarce cache", "sglang", 3, _REAL_GROUPS, ("--max-total-tokens", "16384")),
    Engined("3 x SGLang", "sglang", 3, _REAL_GROUPS, ("--max-total-tokens", "40960")),
    Engined("2 x vLLM", "vllm", 2, _REAL_GROUPS),
    Engined("2 x llama.cpp", "llamacpp", 2, "groups,groups=8,prefix=320,tail=32,output=8,requests=160,rate=4"),
)


def replayed(folder: Path | None, only: str) -> Iterator[Replayed]:
    """Give the loads that can be replayed here, with the paths of their traces."""
    for load in REPLAYED:
        if only not in load.name:
            continue
        if load.trace.startswith(GENERATOR):
            yield load
        elif folder is not None and (folder / load.trace).is_file():
            yield load._replace(trace=str(folder / load.trace))
