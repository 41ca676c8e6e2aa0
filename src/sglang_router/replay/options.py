"""The options of `sglang-router replay`: one line each; flags, defaults and help are derived from it.

Flags that are not in this table are options of the router, and count for all policies. A policy can have more of its
own: `--policies cache_aware,cache_aware:cache-threshold=0.2` compares the two.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sglang_router.config import HelpFormatter, RouterArgs, parse
from sglang_router.config.flags import OptionParser
from sglang_router.config.option import did_you_mean
from sglang_router.engine.scheduler import BatchLimits, CostModel
from sglang_router.errors import ConfigError
from sglang_router.replay.generator import SHAPES
from sglang_router.replay.longest_prefix import LongestPrefix
from sglang_router.replay.setup import FleetChange, Setup
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Policy

KINDS: dict[str, type[Policy]] = {**POLICIES, LongestPrefix.name: LongestPrefix}
"""The policies that can be replayed, by name."""


_SWITCHES = {
    "--independent": "let the routers share nothing",
    "--disconnected": "the same, because their store is away: they agree on what is new",
    "--json": "print the figures as JSON",
    "--quiet": "write nothing to standard error but mistakes",
}


class Contender:
    """One of the compared policies.

    label  as it was given: `cache_aware`, or with options of its own `cache_aware:cache-threshold=0.2`
    kind   its class
    args   the options of its router
    """

    def __init__(self, label: str, kind: type[Policy], args: RouterArgs) -> None:
        self.label = label
        self.kind = kind
        self.args = args

    def __repr__(self) -> str:
        return f"<Contender {self.label}>"


def _option(default: Any, help: str, metavar: str = "N", read: Callable[[str], Any] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar, "read": read or type(default)})


def _numbers(text: str) -> tuple[float, ...]:
    """Read `1,1,0.4`: numbers above 0."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < number < math.inf for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, as 1,1,0.4")
    return found


def _moments(text: str) -> tuple[tuple[int, float], ...]:
    """Read `1@30,2@60`: workers, and times."""
    try:
        pairs = [word.partition("@") for word in text.split(",")]
        found = tuple((int(worker), float(at)) for worker, _, at in pairs)
    except ValueError:
        found = ()
    if not found or not all(worker >= 0 and 0 <= at < math.inf for worker, at in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of WORKER@SECONDS, as 0@30,1@45")
    return found


@dataclass(frozen=True)
class ReplayOptions:
    """The options of one comparison. Each field but `trace`, `contenders` and switches is the flag of the same name."""

    trace: str
    contenders: tuple[Contender, ...] = ()
    json: bool = False
    quiet: bool = False
    independent: bool = False
    disconnected: bool = False
    policies: str = _option("cache_aware,round_robin", "policies to compare, each perhaps with :option=value", "NAMES")
    workers: int = _option(8, "engines at the start")
    cache_tokens: int = _option(300_000, "slots of each engine's KV cache, in tokens")
    speeds: tuple[float, ...] = _option((1.0,), "speeds of the engines, in turn: 1,1,1,0.4", "LIST", _numbers)
    seeds: int = _option(1, "runs of each policy, each with another seed")
    seed: int = _option(1, "the first seed")
    requests: int = _option(0, "stop after this many requests of the trace; 0: all of them")
    speedup: float = _option(1.0, "divide the times of a trace, for more requests per second", "X")
    live: int = _option(64, "agent sessions that are live at once")
    think_cap: float = _option(300.0, "longest pause of an agent session between answer and request", "SECONDS")
    join: tuple[float, ...] = _option((), "times at which a worker joins: 30,60", "LIST", _numbers)
    leave: tuple[tuple[int, float], ...] = _option((), "workers that leave, and when: 0@40,3@50", "LIST", _moments)
    restart: tuple[tuple[int, float], ...] = _option((), "workers that restart, and when: 1@45", "LIST", _moments)
    restart_secs: float = _option(20.0, "how long a worker that restarts is away", "SECONDS")
    slo_ttft: float = _option(1.0, "the time to first token that a request should have at most", "SECONDS")
    slo_itl: float = _option(0.05, "the mean time per further token that it should have at most", "SECONDS")
    prefill_tokens_per_s: float = _option(8000.0, "prompt tokens that an engine computes per second", "X")
    decode_base_ms: float = _option(6.0, "fixed duration of a forward pass", "MS")
    decode_ms_per_request: float = _option(0.35, "more duration of a pass per request that it decodes", "MS")
    chunked_prefill_size: int = _option(2048, "most prompt tokens computed in one pass")
    max_running_requests: int = _option(256, "most requests in an engine's batch")
    routers: int = _option(1, "routers, to which the requests come in turn")
    shared_delay_ms: float = _option(40.0, "how long it takes until what one router tells has reached the others", "MS")
    shared_blocks: int = _option(1 << 18, "most beginnings of prompts that a router knows of the placements of all")
    report: str = _option("", "write a report with charts to this file", "FILE.html", str)

    @property
    def about(self) -> str:
        """The engines in words."""
        speeds = "" if set(self.speeds) == {1.0} else f", speeds {_shown(self.speeds)} in turn"
        changes = [f"{n} that {what}" for n, what in ((len(self.join), "join"), (len(self.leave), "leave")) if n]
        changes += [f"{len(self.restart)} that restart"] * bool(self.restart)
        alone = " that share nothing" if self.independent or self.disconnected else ""
        return (
            f"{self.workers} engines with {self.cache_tokens:,} tokens of KV cache each and"
            f" {self.prefill_tokens_per_s:,.0f} prompt tokens per second{speeds}"
            + (f"; {', '.join(changes)}" if changes else "")
            + (f"; {self.routers} routers{alone}" if self.routers > 1 else "")
        )

    def setup(self, args: RouterArgs, page: int) -> Setup:
        """Return what is simulated. Raises: ConfigError, when a cache does not hold a page of the load."""
        if self.cache_tokens < page:
            raise ConfigError(f"--cache-tokens must be at least {page}: a page of this load")
        changes = [FleetChange("join", at) for at in self.join]
        changes += [FleetChange("leave", at, worker) for worker, at in self.leave]
        changes += [FleetChange("restart", at, worker, self.restart_secs) for worker, at in self.restart]
        return Setup(
            args=args,
            workers=self.workers,
            cache_tokens=self.cache_tokens,
            page=page,
            speeds=self.speeds,
            cost=CostModel(self.prefill_tokens_per_s, self.decode_base_ms / 1e3, self.decode_ms_per_request / 1e3),
            limits=BatchLimits(self.chunked_prefill_size, self.max_running_requests),
            changes=tuple(sorted(changes, key=lambda change: change.at)),
            routers=self.routers,
            shared_delay=None if self.independent else self.shared_delay_ms / 1e3,
            shared_blocks=self.shared_blocks,
            disconnected=self.disconnected,
        )


def listed() -> list[tuple[str, str, str]]:
    """Return flag, help and default of each option, for the documentation."""
    rows = [
        ("--" + each.name.replace("_", "-"), each.metadata["help"], _shown(each.default))
        for each in fields(ReplayOptions)
        if "help" in each.metadata
    ]
    return [*rows, *((flag, help, "off") for flag, help in _SWITCHES.items())]


def new_parser(prog: str) -> OptionParser:
    """Return the parser of what follows the trace."""
    parser = OptionParser(
        prog=prog,
        usage="%(prog)s TRACE [options] [options of the router]",
        description="Replay a load against simulated engines, in virtual time, and compare policies.\n\n"
        "TRACE is a file: a decision log of the router, a Mooncake trace (JSON lines), an Azure trace (CSV), agent\n"
        f"sessions (JSON lines); plain or .gz. Or gen:NAME for a generated load: {', '.join(SHAPES)}.\n"
        f"Policies: {', '.join(KINDS)}.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for each in (each for each in fields(ReplayOptions) if "help" in each.metadata):
        parser.add_argument(
            "--" + each.name.replace("_", "-"),
            type=each.metadata["read"],
            default=each.default,
            metavar=each.metadata["metavar"],
            help=each.metadata["help"] + f" [default: {_shown(each.default)}]",
        )
    for flag, help in _SWITCHES.items():
        parser.add_argument(flag, action="store_true", help=help)
    return parser


def parse_options(argv: Sequence[str], prog: str = "sglang-router replay") -> ReplayOptions:
    """Read the options. Raises: ConfigError; SystemExit(0) after --help."""
    parser = new_parser(prog)
    trace, *words = argv or ["-h"]
    if trace in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    if trace.startswith("-"):
        raise ConfigError("the trace must come first: sglang-router replay TRACE [options]")
    found, rest = parser.parse_known_args(words)
    _check(found)
    contenders = tuple(contender(label, rest) for label in found.policies.split(","))
    return ReplayOptions(trace, contenders, **vars(found))


def contender(label: str, words: Sequence[str]) -> Contender:
    """Return the policy of a label, with its options and those of `words`. Raises: ConfigError."""
    name, *own = label.split(":")
    if name not in KINDS:
        raise ConfigError(f"unknown policy {name!r}{did_you_mean(name, KINDS) or ': choose from ' + ', '.join(KINDS)}")
    flags = [word for each in own for word in f"--{each}".split("=", 1)]
    args = parse([*words, *flags], {}).checked()
    if "policy" in args.given:
        raise ConfigError("--policy has no effect here; name the policies in --policies")
    return Contender(label, KINDS[name], args)


_LEAST = {
    "workers": 1,
    "seeds": 1,
    "routers": 1,
    "shared_blocks": 1,
    "shared_delay_ms": 0,
    "live": 1,
    "chunked_prefill_size": 1,
    "max_running_requests": 1,
    "requests": 0,
    "think_cap": 0,
    "restart_secs": 0,
    "slo_ttft": 0,
    "slo_itl": 0,
    "decode_base_ms": 0,
    "decode_ms_per_request": 0,
}


def _check(found: argparse.Namespace) -> None:
    """Raise ConfigError for a number that makes no sense."""
    for name, least in _LEAST.items():
        if not least <= getattr(found, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
    for name in ("speedup", "prefill_tokens_per_s", "cache_tokens"):
        if not 0 < getattr(found, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
    workers = found.workers + len(found.join)
    for flag, moments in (("--leave", found.leave), ("--restart", found.restart)):
        for worker, _ in moments:
            if worker >= workers:
                raise ConfigError(f"{flag}: there is no worker {worker}; they are numbered from 0 to {workers - 1}")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(str(each) for each in default) or "none"
    return "none" if default == "" else str(default)
