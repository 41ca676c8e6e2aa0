"""What each source says about its workers, as specs: what a worker is before anybody changes it.

    flags, variables, file   worker_urls        --> configured_specs
    the same                 prefill, decode    --> paired_specs
    launch_server            a replica's URL    --> replica_specs
    Kubernetes, file, DNS    `discovery`        --> on top of `WorkerDefaults.spec`
    control plane            the request's body --> admin.workers, on top of `WorkerDefaults.spec`

`ConfiguredWorkers` is what this start says. The state file (`restart`) keeps only what happened since, and compares
with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from sglang_router.routing.roles import DECODE, PREFILL
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec

_UNTOLD: Mapping[str, str] = MappingProxyType({})


class WorkerDefaults(msgspec.Struct, frozen=True):
    """What the options say about every worker, where nothing else is said of it.

    api_key   its key (--worker-api-key)
    dp_aware  its data-parallel ranks become workers (--dp-aware)
    health    its health checks
    """

    api_key: str | None
    dp_aware: bool
    health: HealthRules

    def spec(self, url: str, source: Source) -> WorkerSpec:
        """Return the spec of a worker with these defaults."""
        return WorkerSpec(url=url, api_key=self.api_key, dp_aware=self.dp_aware, health=self.health, source=source)


class ConfiguredWorkers:
    """The workers that flags or file name at this start, and the defaults for all others.

    looking  the sources that look for workers from this start on
    """

    def __init__(
        self, defaults: WorkerDefaults, specs: Iterable[WorkerSpec] = (), looking: Iterable[Source] = ()
    ) -> None:
        self.defaults = defaults
        self.looking = frozenset(looking)
        self._specs = {spec.url: spec for spec in specs}

    @property
    def specs(self) -> list[WorkerSpec]:
        """In the order in which they are named."""
        return list(self._specs.values())

    def named(self, url: str) -> WorkerSpec | None:
        """Return what flags or file say about this worker; None when they do not name it."""
        return self._specs.get(url)


def configured_specs(
    urls: Iterable[str], defaults: WorkerDefaults, models: Mapping[str, str] = _UNTOLD, *, from_file: bool
) -> list[WorkerSpec]:
    """Return the specs of the workers in `--worker-urls`.

    models     what their models are called (`--worker-model`), by URL
    from_file  a --config file set that option
    """
    source = Source.FILE if from_file else Source.FLAGS
    specs = [defaults.spec(url, source) for url in urls]
    for spec in specs:
        spec.model_id = models.get(spec.url)
    return specs


def paired_specs(
    prefill: Iterable[tuple[str, int | None]],
    decode: Iterable[str],
    defaults: WorkerDefaults,
    source_of: Callable[[str], Source],
) -> list[WorkerSpec]:
    """Return the specs of the workers in `--prefill`, with their bootstrap ports, and in `--decode`.

    source_of  returns what set an option
    """
    found = []
    for url, port in prefill:
        spec = defaults.spec(url, source_of("prefill_urls"))
        spec.worker_type, spec.bootstrap_port = PREFILL, port
        found.append(spec)
    for url in decode:
        spec = defaults.spec(url, source_of("decode_urls"))
        spec.worker_type = DECODE
        found.append(spec)
    return found


def replica_specs(url: str, runtime: str, ranks: int, defaults: WorkerDefaults) -> list[WorkerSpec]:
    """Return the specs of a replica: one worker, or one for each of its data-parallel ranks.

    The launcher knows the ranks, so the engine is not asked for them: `dp_aware` is off.
    """
    numbers: Sequence[int | None] = range(ranks) if ranks > 1 else [None]
    return [
        WorkerSpec(
            url=url,
            dp_rank=rank,
            api_key=defaults.api_key,
            runtime=runtime,
            health=defaults.health,
            source=Source.REPLICAS,
        )
        for rank in numbers
    ]
