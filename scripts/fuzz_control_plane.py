"""The work of scripts/fuzz-control-plane: three engines, a router, a client that sends requests, and schemathesis."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from engines import engine_processes
from hostile.fuzz import ENGINES, FLAGS, fuzz, polite, strict
from routers import router_process

_EXAMPLES = ("--max-examples", "50")
_WITHIN = 3600.0


def main(flags: list[str]) -> int:
    """Run it and print a report; `flags` go to schemathesis. Raises: AssertionError if the router does not end
    cleanly."""
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_processes(3, *ENGINES) as urls,
        router_process(urls, *FLAGS) as router,
    ):
        client = polite(router)
        client.start()
        try:
            run = fuzz(router, strict(router), urls[:2], Path(folder), *_EXAMPLES, *flags, within=_WITHIN)
        finally:
            client.stop()
    print(run.output)
    print(
        f"{run.cases} requests; the client meanwhile: {len(client.waits)} answers, longest wait {client.longest:.3f} s"
    )
    for failure in client.failures:
        print(f"it was not served: {failure}")
    return 1 if run.status or not run.complete or client.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
