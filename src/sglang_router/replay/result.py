"""What became of the requests of one run, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang_router.replay.bounds import alone, least_mean
from sglang_router.replay.engine import Gaps
from sglang_router.replay.setup import Setup
from sglang_router.routing.fleet import Fleet


class EngineRun(NamedTuple):
    """One process of an engine. Times in seconds.

    name       of its worker
    speed      as in the setup
    busy       in which it computed
    alive      from its start to its end, or to that of the run
    evicted    tokens
    retracted  requests
    """

    name: str
    speed: float
    busy: float
    alive: float
    evicted: int
    retracted: int


class Sharing(NamedTuple):
    """What it took that several routers share what they know: means of each router, per second.

    messages  that it told
    size      of them, in bytes
    entries   most that a replica of placements had
    dropped   by all routers
    agreed    strangers that all routers together placed where every router would have placed them
    """

    messages: float
    size: float
    entries: int
    dropped: int
    agreed: int


class Served:
    """One request of a run. Times in seconds after its start; negative: never.

    reusable  tokens of the prompt that an unlimited cache shared by all engines would hold
    cached    tokens of the prompt that the engine found in its cache
    output    tokens of the answer
    worker    who got it
    error     why it was not answered; "" when it was
    """

    __slots__ = ("arrival", "cached", "end", "error", "first", "output", "prompt", "reusable", "worker")

    def __init__(self, arrival: float, prompt: int, output: int, reusable: int) -> None:
        self.arrival = arrival
        self.prompt = prompt
        self.output = output
        self.reusable = reusable
        self.cached = 0
        self.first = self.end = -1.0
        self.worker = ""
        self.error = ""

    def __repr__(self) -> str:
        return f"<Served {self.arrival:.3f} {self.first:.3f} {self.end:.3f} {self.worker} {self.error}>"

    @property
    def ttft(self) -> float:
        """Seconds until its first token."""
        return self.first - self.arrival

    @property
    def pace(self) -> float:
        """Mean seconds between its tokens; 0.0 for fewer than two."""
        return (self.end - self.first) / (self.output - 1) if self.output > 1 else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the sorted values does not exceed; 0.0 without any."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


class Result:
    """One run of one policy.

    served   the requests, in the order of their arrival
    gaps     the pauses between tokens
    engines  those that ran at any time, in the order of their start
    seconds  of virtual time, from the start to the last event
    wall     seconds that the run took
    loads    for each second, the time and the requests in flight of each worker
    sharing  None: nothing was shared
    """

    def __init__(self, policy: str, seed: int, setup: Setup) -> None:
        self.policy = policy
        self.seed = seed
        self.setup = setup
        self.served: list[Served] = []
        self.gaps = Gaps()
        self.engines: list[EngineRun] = []
        self.seconds = 0.0
        self.wall = 0.0
        self.loads: list[tuple[float, tuple[int, ...]]] = []
        self.sharing: Sharing | None = None

    def __repr__(self) -> str:
        return f"<Result {self.policy} seed {self.seed}: {len(self.served)} requests in {self.seconds:.1f} s>"

    def sample(self, now: float, fleets: Sequence[Fleet]) -> None:
        """Note the load of each worker: all requests there, whichever router sent them."""
        loads: dict[str, int] = {}
        for fleet in fleets:
            for worker in fleet:
                loads[worker.url] = loads.get(worker.url, 0) + worker.own_load
        self.loads.append((now, tuple(loads.values())))

    def figures(self, slo_ttft: float, slo_itl: float) -> dict[str, float]:
        """Return the figures by name, in the order in which they are shown."""
        answered = [one for one in self.served if not one.error]
        ttft = sorted(one.ttft for one in answered)
        whole = sorted(one.end - one.arrival for one in answered)
        prompts = sum(one.prompt for one in answered) or 1
        good = sum(one.ttft <= slo_ttft and one.pace <= slo_itl for one in answered)
        span = max((one.end for one in answered), default=0.0) or 1.0
        work = [engine.busy / (engine.alive or 1.0) for engine in self.engines]
        least = self._least_times(answered)
        mean, bound = sum(ttft) / (len(ttft) or 1), self._least_mean(answered, least)
        hit, reusable = sum(one.cached for one in answered) / prompts, sum(one.reusable for one in answered) / prompts
        sharing = {} if self.sharing is None else self.sharing._asdict()
        return {
            "requests": len(self.served),
            "failed": len(self.served) - len(answered),
            "hit": hit,
            "hit_bound": reusable,
            "hit_regret": reusable - hit,
            "ttft_mean": mean,
            "ttft_mean_bound": bound,
            "ttft_regret": mean / (bound or 1.0),
            "ttft_p50": quantile(ttft, 0.5),
            "ttft_p90": quantile(ttft, 0.9),
            "ttft_p90_bound": quantile(sorted(least), 0.9),
            "ttft_p99": quantile(ttft, 0.99),
            "itl_p99": self.gaps.quantile(0.99),
            "e2e_p90": quantile(whole, 0.9),
            "output_per_s": sum(one.output for one in answered) / span,
            "requests_per_s": len(answered) / span,
            "balance": max(work) * len(work) / (sum(work) or 1.0),
            "slo": good / (len(self.served) or 1),
            "evicted": sum(engine.evicted for engine in self.engines),
            "retracted": sum(engine.retracted for engine in self.engines),
            "makespan": span,
            "wall_requests_per_s": len(self.served) / (self.wall or 1.0),
            **{f"shared_{name}": value for name, value in sharing.items()},
        }

    def _least_times(self, answered: Sequence[Served]) -> list[float]:
        """Return what the time to first token of each request is at least, see `replay.bounds`."""
        setup, fastest = self.setup, max(engine.speed for engine in self.engines)
        return [alone(one.prompt - one.reusable, setup.cost, setup.limits, fastest) for one in answered]

    def _least_mean(self, answered: Sequence[Served], least: Sequence[float]) -> float:
        """Return what the mean time to first token is at least."""
        speeds = {engine.name: engine.speed for engine in self.engines}
        rate = self.setup.cost.prefill_tokens_per_s * sum(speeds.values())
        jobs = [(one.arrival, (one.prompt - one.reusable) / rate) for one in answered]
        return max(sum(least) / (len(least) or 1), least_mean(jobs))
