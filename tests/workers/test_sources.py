"""Sources: what flags, a file, the launcher say about their workers, and who names them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_router.app.settings import configured_workers
from sglang_router.config import parse
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.workers.sources import ConfiguredWorkers, WorkerDefaults, configured_specs, replica_specs

A, B = "http://a:1", "http://b:2"
DEFAULTS = WorkerDefaults("key", True, HealthRules(interval=3.0))


def test_only_the_api_does_not_name_its_workers_again() -> None:
    assert [source for source in Source if not source.told_again] == [Source.API]


@pytest.mark.parametrize(("from_file", "source"), [(False, Source.FLAGS), (True, Source.FILE)])
def test_what_options_say_of_the_workers_they_name(from_file: bool, source: Source) -> None:
    configured = ConfiguredWorkers(DEFAULTS, configured_specs([A, B], DEFAULTS, from_file=from_file))
    assert [spec.url for spec in configured.specs] == [A, B]
    spec = configured.named(A)
    assert spec == DEFAULTS.spec(A, source)
    assert (spec.api_key, spec.dp_aware, spec.health.interval) == ("key", True, 3.0)
    assert configured.named("http://c:3") is None


def test_a_replica_is_one_worker_or_one_for_each_rank() -> None:
    (whole,) = replica_specs(A, "vllm", 1, DEFAULTS)
    assert (whole.dp_rank, whole.dp_aware, whole.runtime, whole.source) == (None, False, "vllm", Source.REPLICAS)
    ranks = replica_specs(A, "sglang", 3, DEFAULTS)
    assert [(spec.url, spec.dp_rank, spec.api_key) for spec in ranks] == [(A, rank, "key") for rank in range(3)]


def test_who_names_a_worker_is_known_from_the_start(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(f"worker_urls: [{A}]\n")
    for words, environ, source in [
        (["--worker-urls", A], {}, Source.FLAGS),
        ([], {"SGLANG_ROUTER_WORKER_URLS": A}, Source.FLAGS),
        (["--config", str(file)], {}, Source.FILE),
        (["--config", str(file), "--worker-urls", A], {}, Source.FLAGS),
    ]:
        (spec,) = configured_workers(parse(words, environ).checked()).specs
        assert spec.source is source, (words, environ)
