"""Workers that the router finds by itself, as users start it: Kubernetes, a file, DNS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from discovery_scenes import kubeconfig, write_anew
from fake_kube import KubeThread
from routers import RouterProcess, plain_worker, router_process, start_router

Answers = dict[str, tuple[int, dict[str, str], bytes]]
QUICK = ("--worker-startup-check-interval", "0.05", "--log-format", "json")


def found(router: RouterProcess) -> dict[str, str]:
    """URL and origin of each worker that is healthy."""
    return {url: shown["origin"]["name"] for url, shown in router.workers().items() if shown["is_healthy"]}


def origins(router: RouterProcess) -> list[str]:
    """Where the workers came from that were added, by the log."""
    return [line["origin"] for line in router.records() if line["message"] == "worker added"]


def report(router: RouterProcess) -> dict[str, object]:
    (told,) = router.get("/workers").json()["discovery"]
    assert isinstance(told, dict)
    return told


def test_pods_serve_as_soon_as_they_are_ready_and_a_cut_link_loses_nothing(tmp_path: Path) -> None:
    answers: Answers = {"GET /health": (200, {}, b""), "POST /generate": (200, {}, b'{"text":"hi"}')}
    with plain_worker(answers) as one, plain_worker(answers) as two, KubeThread() as kube:
        api = kube.api
        kube.run(api.start())
        api.tokens = {"t"}
        ports = [str(each.server_address[1]) for each in (one, two)]

        def pod(name: str, port: str) -> None:
            kube.do(lambda: api.create(name, "127.0.0.1", annotations={"sglang.ai/worker-ports": port}))

        pod("p1", ports[0])
        config = kubeconfig(tmp_path / "config", {"server": api.url}, {"token": "t"})
        flags = ("--service-discovery", "--selector", "app=engine", "--service-discovery-namespace", "llm")
        with router_process([], *flags, "--kubeconfig", config, *QUICK) as router:
            router.until(lambda: found(router) == {one.url: "llm/p1"})
            assert router.post("/generate", {"text": "x"}).status == 200
            samples = router.samples()
            assert samples.total("smg_discovery_workers_discovered", source="kubernetes") == 1
            assert samples.total("sgl_router_discovery_failing", source="kubernetes") == 0

            kube.do(lambda: setattr(api, "away", True), lambda: api.cut(), lambda: api.delete("p1"))
            pod("p2", ports[1])
            router.until(lambda: report(router)["error"] is not None)
            assert router.post("/generate", {"text": "x"}).status == 200  # what is known goes on
            assert router.samples().total("sgl_router_discovery_failing", source="kubernetes") == 1
            kube.do(lambda: setattr(api, "away", False))
            router.until(lambda: found(router) == {two.url: "llm/p2"} and len(router.workers()) == 1)
            router.until(lambda: report(router)["error"] is None)
            router.until(lambda: origins(router) == ["llm/p1", "llm/p2"])


def test_a_missing_role_is_said_in_the_log(tmp_path: Path) -> None:
    with KubeThread() as kube:
        kube.run(kube.api.start())
        kube.api.refusal = 403, "pods is forbidden"
        config = kubeconfig(tmp_path / "config", {"server": kube.api.url}, {"token": "t0ken"})
        flags = ("--service-discovery", "--selector", "app=engine", "--kubeconfig", config)
        with router_process([], *flags, *QUICK) as router:
            router.until(lambda: "needs a ClusterRole" in str(report(router)["error"]))
            assert router.get("/readiness").status == 503
            text = " ".join(line["message"] for line in router.records())
            assert "The router needs a ClusterRole to get, list and watch pods" in text
            assert "t0ken" not in text


def test_it_does_not_start_where_there_is_no_kubernetes(tmp_path: Path) -> None:
    flags = ("--service-discovery", "--selector", "app=engine")
    variables = {"HOME": "/nowhere", "KUBECONFIG": "", "KUBERNETES_SERVICE_HOST": ""}
    with pytest.raises(AssertionError, match="this is no pod with a service account, and there is no kubeconfig"):
        start_router([], *flags, log=tmp_path / "log", variables=variables)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_file_is_followed_while_the_router_serves(tmp_path: Path, processes: int) -> None:
    answers: Answers = {"GET /health": (200, {}, b""), "POST /generate": (200, {}, b'{"text":"hi"}')}
    path = tmp_path / "workers.json"
    more = ("--relay-processes", str(processes)) if processes else ()
    with plain_worker(answers) as one, plain_worker(answers) as two:
        path.write_text(json.dumps({"workers": [one.url]}))
        with router_process([], "--discovery-file", str(path), *QUICK, *more) as router:
            router.until(lambda: found(router) == {one.url: str(path)})
            assert router.post("/generate", {"text": "x"}).status == 200
            write_anew(path, json.dumps({"workers": [two.url]}))
            router.until(lambda: found(router) == {two.url: str(path)})
            assert router.post("/generate", {"text": "x"}).status == 200
            write_anew(path, "{")
            router.until(lambda: report(router)["error"] is not None)
            assert list(router.workers()) == [two.url]


def test_names_are_looked_up() -> None:
    answers: Answers = {"GET /health": (200, {}, b"")}
    with plain_worker(answers) as worker:
        name = f"localhost:{worker.server_address[1]}"
        with router_process([], "--discovery-dns", name, *QUICK) as router:
            router.until(lambda: found(router) == {worker.url: name})
            assert report(router)["looks_at"] == name


def test_workers_that_were_found_come_back_with_the_state_file(tmp_path: Path) -> None:
    """While the API server is away, a router that is started anew serves with what the last one knew."""
    answers: Answers = {"GET /health": (200, {}, b""), "POST /generate": (200, {}, b'{"text":"hi"}')}
    with plain_worker(answers) as one, KubeThread() as kube:
        api = kube.api
        kube.run(api.start())
        port = str(one.server_address[1])
        kube.do(lambda: api.create("p1", "127.0.0.1", annotations={"sglang.ai/worker-ports": port}))
        config = kubeconfig(tmp_path / "config", {"server": api.url}, {"token": "t"})
        flags = ("--service-discovery", "--selector", "app=engine", "--kubeconfig", config, *QUICK)
        state = ("--state-file", str(tmp_path / "state"))
        with router_process([], *flags, *state) as router:
            router.until(lambda: found(router) == {one.url: "llm/p1"})
            before = router.workers()[one.url]["id"]
        kube.do(lambda: setattr(api, "away", True), lambda: api.cut())
        with router_process([], *flags, *state) as router:
            router.until(lambda: found(router) == {one.url: "llm/p1"})
            assert report(router)["listed_secs"] is None
            assert router.post("/generate", {"text": "x"}).status == 200
            kube.do(lambda: setattr(api, "away", False))
            router.until(lambda: report(router)["error"] is None)
            assert router.workers()[one.url]["id"] == before
            kube.do(lambda: api.delete("p1"))
            router.until(lambda: not router.workers())
