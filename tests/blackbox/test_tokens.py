"""Tokens of an identity provider, by the real command and a real issuer on loopback: roles, rotation, an issuer that is
away, several processes. And that a token is shown nowhere and reaches no worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from routers import WITHIN, Answer, PlainWorker, RouterProcess, environment, plain_worker, router_process
from tokens_made import AUDIENCE, DISCOVERY, KEYS, Issuer

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
JSON = {"content-type": "application/json"}
MAPPED = ("--jwt-role-mapping", "Ops=admin", "Dev=user")


@pytest.fixture
def worker() -> Iterator[PlainWorker]:
    with plain_worker({CHAT: (200, JSON, b'{"id": "c"}')}) as each:
        yield each


@pytest.fixture
def server() -> Iterator[PlainWorker]:
    with plain_worker({}) as each:
        yield each


def told(answer: Answer) -> str:
    return f"{answer.status} {answer.headers.get('x-smg-error-code', '')}".strip()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def with_tokens(server: PlainWorker) -> tuple[str, ...]:
    return ("--jwt-issuer", server.url, "--jwt-audience", AUDIENCE, *MAPPED)


def knows_keys(router: RouterProcess, token: str) -> bool:
    """Whether the router has the key of a token."""
    return router.get("/workers", **bearer(token)).status != 503


@pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "several"])
def test_roles_of_tokens_beside_keys(worker: PlainWorker, server: PlainWorker, more: tuple[str, ...]) -> None:
    issuer = Issuer(server.url)
    server.answers = issuer.documents()
    admin, user = issuer.token(roles=["Ops"], name="Alice A."), issuer.token(roles=["Dev"], sub="bob")
    nobody, late = issuer.token(), issuer.token(roles=["Ops"], exp=1)
    flags = (*with_tokens(server), "--api-key", "carol client-key", "--control-plane-api-keys", "o:O:admin:ops-key")
    with router_process([worker.url], *flags, *more, key="ops-key") as router:
        router.until(lambda: all(knows_keys(router, admin) for _ in range(4)))
        router.until(lambda: all(router.post(CHAT, BODY, **bearer(user)).status == 200 for _ in range(4)))
        drain = f"/workers/{router.worker(worker.url)['id']}/drain"
        resume = drain.replace("drain", "resume")
        assert [told(router.get("/workers", **bearer(each))) for each in (admin, user, nobody, late)] == [
            *("200", "200", "403 forbidden", "401 invalid_token")
        ]
        assert told(router.post(drain, None, **bearer(user))) == "403 forbidden"
        assert [told(router.post(each, None, **bearer(admin))) for each in (drain, resume)] == ["200", "200"]
        assert told(router.post(drain, {"a": 1}, **bearer(late))) == "401 invalid_token"
        asked = [router.post(CHAT, BODY, **bearer(each)) for each in (admin, user, nobody, late, "client-key")]
        assert [told(each) for each in asked] == ["200", "200", "403 forbidden", "401 invalid_token", "200"]
        router.until(lambda: router.log().count("client=jwt:") >= 2)
        router.until(lambda: "client=carol" in router.log())
        counted = router.samples().by("sgl_router_client_requests_total", "client")
        assert counted["carol"] == 1
        assert counted["jwt"] >= 2
        log = router.log()
        assert 'by=jwt:alice name="Alice A." role=admin' in log
        assert "by=jwt:bob name" not in log
        for secret in (admin, user, nobody, late):
            assert secret not in log + str(worker.seen) + router.get("/metrics").body.decode()


@pytest.mark.parametrize("more", [(), ("--relay-processes", "2")], ids=["one process", "several"])
def test_clients_with_tokens_have_limits_and_are_told(
    worker: PlainWorker, server: PlainWorker, more: tuple[str, ...], tmp_path: Path
) -> None:
    """Only keys had limits."""
    issuer = Issuer(server.url)
    server.answers = issuer.documents()
    told_by_worker = {**JSON, "x-ratelimit-limit-requests": "9", "x-ratelimit-of": "b"}
    worker.answers = {CHAT: (200, told_by_worker, b'{"id": "c"}')}
    slow = {"requests_per_second": 0.001}
    path = tmp_path / "keys.json"
    path.touch(0o600)
    tokens = [{"subject": "alice", "burst": 3, **slow}, {"subject": "*", **slow, "models": ["m"]}]
    path.write_text(json.dumps({"keys": [{"name": "ops", "key": "ops-key"}], "tokens": tokens}))
    with router_process(
        [worker.url], *with_tokens(server), "--api-key-file", str(path), *more, healthy=False
    ) as router:
        alice = issuer.token(roles=["Dev"])
        router.until(lambda: all(router.get("/workers", **bearer(alice)).status == 200 for _ in range(4)))
        router.until(lambda: router.post(CHAT, BODY, **bearer("ops-key")).status == 200)

        def ask(subject: str, model: str = "m") -> Answer:
            token = issuer.token(roles=["Dev"], sub=subject)
            return router.post(CHAT, {**BODY, "model": model}, **bearer(token))

        answers = [ask(each) for each in ("alice", "alice", "alice", "alice", "bob", "bob", "carol")]
        assert [told(each) for each in answers] == [
            *("200", "200", "200", "429 requests_limited", "200", "429 requests_limited", "200")
        ]
        limits = [each.headers["x-ratelimit-limit-requests"] for each in answers]
        left = [each.headers["x-ratelimit-remaining-requests"] for each in answers]
        assert limits == ["3", "3", "3", "3", "1", "1", "1"]
        assert left == ["2", "1", "0", "0", "0", "0", "0"]
        assert "x-ratelimit-of" not in answers[0].headers, "the worker's own say nothing of this client"
        assert "the subject bob" in answers[5].json()["error"]["message"]
        assert told(ask("dave", "n")) == "403 model_not_allowed"
        plain = router.post(CHAT, BODY, **bearer("ops-key"))
        assert plain.headers["x-ratelimit-limit-requests"] == "9", "a key without limits"


def test_a_key_that_is_rotated_and_an_issuer_that_is_away(worker: PlainWorker, server: PlainWorker) -> None:
    issuer = Issuer(server.url)
    first = issuer.token(roles=["Ops"])
    with router_process([worker.url], *with_tokens(server), healthy=False) as router:
        assert told(router.get("/workers")) == "401 missing_api_key"
        answer = router.get("/workers", **bearer(first))
        assert (told(answer), answer.headers["retry-after"]) == ("503 token_keys_unavailable", "1")
        assert router.post(CHAT, BODY).status in (200, 503), "inference needs no key"
        server.answers = issuer.documents()
        router.until(lambda: router.get("/workers", **bearer(first)).status == 200)
        issuer.rotate("b")
        server.answers = issuer.documents()
        router.until(lambda: router.get("/workers", **bearer(issuer.token(roles=["Ops"]))).status == 200)
        asked = server.asked[KEYS]
        for number in range(20):
            router.get("/workers", **bearer(issuer.token(kid=f"stranger-{number}")))
        assert server.asked[KEYS] <= asked + 1, "a stranger cannot make the router ask the issuer often"
        server.answers = dict.fromkeys((DISCOVERY, KEYS), (500, JSON, b""))
        assert router.get("/workers", **bearer(first)).status == 200


def test_a_token_reaches_no_worker_where_inference_needs_no_key(worker: PlainWorker, server: PlainWorker) -> None:
    issuer = Issuer(server.url)
    server.answers = issuer.documents()
    with router_process([worker.url], *with_tokens(server), "--forward-headers", "all", healthy=False) as router:
        mine, other = issuer.token(roles=["Ops"]), issuer.token(aud="engine")
        router.until(lambda: router.post(CHAT, BODY, **bearer(mine)).status == 200)
        assert mine not in str(worker.seen[CHAT])
        router.post(CHAT, BODY, **bearer(other), cookie=f"token={mine}")
        assert worker.seen[CHAT]["authorization"] == f"Bearer {other}", "a token for the engine passes as it did"
        assert mine not in str(worker.seen[CHAT])


def test_without_the_package_the_router_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['jwt'] = None; from sglang_router.launch_router import main; sys.exit(main())"
    words = ("--jwt-issuer", "https://auth.example.com", "--jwt-audience", "a", "--port", "18099")
    done = subprocess.run(
        [sys.executable, "-c", hidden, *words], env=environment(), capture_output=True, text=True, timeout=WITHIN
    )
    assert done.returncode == 2
    assert "--jwt-issuer needs the package PyJWT[crypto]" in done.stderr
    assert "pip install 'sglang-router[jwt]'" in done.stderr
