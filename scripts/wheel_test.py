"""Test an installed wheel as its user does: router and engines as processes, requests, and who answered them.

scripts/wheel runs this file with the Python of an environment that holds the wheel and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines import engine_processes
from routers import router_process

COMPILED = "compiled by mypyc"
PROMPTS = 20


def main() -> None:
    """Raises: AssertionError for whatever does not work."""
    command = [str(Path(sys.executable).with_name("sglang-router")), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert said.endswith(f"({COMPILED})"), f"sglang-router --version said: {said}"
    with engine_processes(2, "--speed", "0") as urls, router_process(urls) as router:
        build = router.get("/version").json()["build"]
        assert build == COMPILED, f"GET /version said: {build}"
        for number in range(PROMPTS):
            body = {"prompt": f"Prompt {number % 5}: " + 200 * "word ", "max_tokens": 8, "stream": number % 2 == 1}
            answer = router.post("/v1/completions", body)
            assert answer.status == 200, answer
            assert answer.body.endswith(b"data: [DONE]\n\n") == body["stream"], answer
        samples = router.samples()
        assert samples.total("sgl_router_requests_total", route="/v1/completions") == PROMPTS, samples.all
    print(f"wheel: installed, {said}; {PROMPTS} requests answered")


if __name__ == "__main__":
    main()
