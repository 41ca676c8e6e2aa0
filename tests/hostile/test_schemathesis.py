"""schemathesis against the real control plane, while clients are served. `scripts/fuzz-control-plane` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import engine_processes
from hostile.arena import POLITE
from hostile.fuzz import ENGINES, FLAGS, fuzz, operations, polite, strict
from routers import router_process

pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")

SEED = ("--seed", "4", "--max-examples", "3")


def test_the_control_plane_keeps_its_word_and_nobody_notices(tmp_path: Path) -> None:
    """Two engines serve polite clients, a third one is for schemathesis."""
    with engine_processes(3, *ENGINES) as urls, router_process(urls, *FLAGS) as router:
        document = strict(router)
        client = polite(router)
        client.start()
        try:
            run = fuzz(router, document, urls[:2], tmp_path, "--exclude-tag", "Inference", *SEED)
        finally:
            client.stop()
        assert run.status == 0, run.output
        assert run.complete, run.output
        assert run.operations == sum("Inference" not in each["tags"] for each in operations(document))
        assert run.cases > 300
        assert not client.failures
        assert len(client.waits) > 50
        assert client.longest < POLITE
        workers = router.workers()
        assert all(workers[url]["is_healthy"] for url in urls[:2])
        assert all(url.startswith("http://127.0.0.") for url in workers)


def test_without_a_key_there_is_no_way_in(tmp_path: Path) -> None:
    """Each operation is tried with the key, without one, and with a wrong one."""
    flags = ("--control-plane-api-keys", "ops:Operator:admin:a-key", *FLAGS)
    checks = ("--checks", "ignored_auth,status_code_conformance,response_headers_conformance", "--phases=fuzzing")
    out = ("--exclude-tag", "Inference", "--exclude-path", "/pause_generation")
    with engine_processes(1, *ENGINES) as urls, router_process(urls, *flags, healthy=False) as router:
        document = strict(router, "a-key")
        run = fuzz(router, document, (), tmp_path, "-H", "Authorization: Bearer a-key", *checks, *out, *SEED)
        assert run.status == 0, run.output
        assert run.complete, run.output
        document["paths"]["/health"]["get"]["security"] = [{"control": []}]
        run = fuzz(
            router, document, (), tmp_path, "-H", "Authorization: Bearer a-key", *checks, "--include-path=/health"
        )
        assert (run.status, run.operations) == (1, 1), run.output  # it would be found
        assert "without authentication" in run.output


def test_a_broken_promise_would_be_seen(tmp_path: Path) -> None:
    with engine_processes(1, *ENGINES) as urls, router_process(urls, *FLAGS) as router:
        document = strict(router)
        document["components"]["schemas"]["Loads"]["required"].append("promised")
        run = fuzz(router, document, urls, tmp_path, "--include-path=/get_loads", "--phases=fuzzing", *SEED)
    assert (run.status, run.operations) == (1, 1), run.output
    assert "promised" in run.output


def test_a_run_that_ends_early_has_tested_nothing(tmp_path: Path) -> None:
    with engine_processes(1, *ENGINES) as urls, router_process(urls, *FLAGS) as router:
        run = fuzz(router, {"no": "document"}, urls, tmp_path, *SEED)
    assert run.status != 0
    assert (run.complete, run.operations, run.cases) == (False, 0, 0), run.output
