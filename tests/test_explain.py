"""`sglang-router explain`: what it prints of a record, and what it says when there is none."""

from __future__ import annotations

import ast
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from decision_records import A, record
from routers import free_port, plain_worker
from sglang_router import explain
from sglang_router.commands.asking import KEY_VARIABLE, NO_ROUTER, NOT_ALLOWED, URL_VARIABLE
from sglang_router.errors import ConfigError
from sglang_router.explain import BRANCHES, NOT_FOUND
from sglang_router.routing import policies
from sglang_router.routing.assignment import HOLDER
from sglang_router.routing.considered import Considered
from sglang_router.routing.decision_record import DecisionAttempt, DecisionRecord, ShadowChoice
from sglang_router.routing.excluded import REASONS
from sglang_router.routing.sessions import BRANCH

B, C = "http://10.0.0.8:30000", "http://10.0.0.9:30000"


def text(made: DecisionRecord) -> str:
    return "\n".join(explain.lines(made)) + "\n"


def test_the_model_that_served_is_told_where_it_is_another_one() -> None:
    assert "  served by llama-8b, which" in text(record(served_model="llama-8b"))
    assert "served by" not in text(record())


def test_a_table_for_people() -> None:
    attempt = DecisionAttempt(
        attempt=1,
        at=0.0004,
        worker=A,
        branch="hit",
        matched=3000,
        total=4000,
        text_bytes=4010,
        candidates=2,
        considered=[Considered(B, 0, 0.25, 1.5, 12), Considered(A, 3000, 0.5, 0.75, 3)],
        excluded=[Considered(C, 0, None, None, 0, "draining")],
        outcome="served",
        shadow=ShadowChoice("least_load", B, "least", 0),
    )
    made = record(attempts=(attempt,), prompt_tokens=1000, cached_tokens=750, completion_tokens=64)
    assert (
        text(made)
        == """\
Request r-1
  what      chat, stream, model tiny, session s-1, 5120 bytes, at 2025-11-27 21:44:12.250 UTC
  worker    http://10.0.0.7:30000, by cache_aware: hit (it is believed to have the longest part of the prompt cached)
  cache     75% (3,000 of 4,000) of the prompt was believed to be cached there
  outcome   served, status 200, first byte after 95.0 ms, 1.50 s in all
  tokens    1000 of prompt, 75% (750 of 1,000) of them cached, as the engine says, 64 of completion

Attempt 1, after 0.4 ms, among 2 candidates: served
      worker                               cached      wait  cost  in flight
  ->  http://10.0.0.7:30000  75% (3,000 of 4,000)  500.0 ms  0.75          3  chosen: hit
      http://10.0.0.8:30000       0% (0 of 4,000)  250.0 ms   1.5         12
      http://10.0.0.9:30000                                                0  it drains: it gets no new requests
    least_load would have chosen http://10.0.0.8:30000: least (it had the fewest requests in flight)
"""
    )


def test_a_record_without_details_says_how_to_get_them() -> None:
    told = text(record(worker=None, branch="", outcome="unrouted", status=503, code="x", first_byte=None, total=0))
    assert "  worker    none was asked\n" in told
    assert "  outcome   unrouted, status 503, error x, 1.50 s in all\n" in told
    assert "x-sglang-router-explain: 1" in told
    assert "cache" not in told


def test_columns_without_figures_are_left_out_and_what_is_not_in_the_table_is_counted() -> None:
    attempt = DecisionAttempt(2, 1.25, A, "turn", 0, 0, 10, 40, [Considered(A, 0, None, None, 1)], [])
    told = text(record(attempts=(attempt,), retries=1, outcome="running", status=0, policy="round_robin"))
    assert "Attempt 2, after 1.25 s, among 40 candidates, in flight\n" in told
    assert "      worker                 in flight\n  ->  http://10.0.0.7:30000          1  chosen: turn\n" in told
    assert "    and 39 candidates more\n" in told
    assert "  outcome   running, 1 retry, first byte" in told


def test_a_shadow_that_agrees_or_compares_costs() -> None:
    shadow = ShadowChoice("cost", B, "cheapest", 10, 0, 0.5, 0.625)
    attempt = DecisionAttempt(1, 0.0, A, "hit", 0, 10, 10, 1, [Considered(A)], [], "served", shadow)
    assert f"cost would have chosen {B}: cheapest, at a cost of 0.5 in place of 0.625\n" in text(
        record(attempts=(attempt,))
    )
    shadow.worker = A
    assert "cost would have chosen the same worker: cheapest" in text(record(attempts=(attempt,)))


def test_what_clients_chose_does_not_move_the_cursor() -> None:
    told = text(record(id="a\x1b[2Jb", model="m\r", session="s\n\x85"))
    assert "a\\x1b[2Jb" in told
    assert all(line.isprintable() for line in told.splitlines())


def test_every_branch_of_a_policy_is_explained() -> None:
    """The words are literals of the policies: a new one wants a line in BRANCHES."""
    folder = Path(policies.__file__).parent
    nodes = [node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    said: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, ast.Call):
            if ast.unparse(node.func).rpartition(".")[2] in ("Choice", "least_loaded", "in_turn", "_assign"):
                said += node.args[1:]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(".branch"):
            said += [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
    found = {each.value for each in said if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    assert found >= {"hit", "miss", "turn", "vacant", "spill", "capped"}
    assert found | {BRANCH, HOLDER} <= BRANCHES.keys()


# -- the command, without a router -------------------------------------------------------------------------------------


UNKNOWN = {"x-smg-error-code": "decision_not_found"}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = explain.main(words, "sglang-router explain")
    told = capsys.readouterr()
    return status, told.out, told.err


def test_json_for_a_terminal_is_the_same_json(capsys: pytest.CaptureFixture[str]) -> None:
    made = record(id="a\x9b31m\u202e\U000e0001", model="\u00e9\u4f60", session="\x7f\n")
    with plain_worker({"/decisions/r-1": (200, {}, msgspec.json.encode(made))}) as server:
        status, out, _ = run(capsys, "r-1", "--json", "--url", server.url)
    assert status == 0
    assert msgspec.json.decode(out, type=DecisionRecord) == made
    assert out.replace("\n", "").isprintable()
    assert '"\u00e9\u4f60"' in out


def test_nothing_that_answers_moves_the_cursor_or_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "\x1b[2J"
    made = record(worker=odd, policy=odd, outcome=odd, code=odd, endpoint=odd, at=1e300, duration=-1.0)
    assert "at 1e+300 seconds after 1970" in text(made)
    assert text(made).replace("\n", "").isprintable()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as client:
                client.recv(65536)
                client.sendall(b"\x1b[2J no HTTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        status, out, err = run(capsys, "r-1", "--url", f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert (status, out) == (NO_ROUTER, "")
    assert "no router answers at" in err
    assert err.rstrip("\n").isprintable()


def test_where_no_router_answers(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    status, out, err = run(capsys, "r-1", "--url", url, "--api-key", "secret-1")
    assert (status, out) == (NO_ROUTER, "")
    assert err.startswith(f"error: no router answers at {url}: ")
    assert "secret" not in err


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        ((200, {}, b"<html>"), NO_ROUTER, "is no router that explains decisions"),
        ((200, {}, b"{}"), NO_ROUTER, "is no router that explains decisions"),
        ((200, {}, b'{"id":"\xff"}'), NO_ROUTER, "is no router that explains decisions"),
        ((200, {}, b'{"a":' * 10_000), NO_ROUTER, "is no router that explains decisions"),
        ((302, {"location": "http://127.0.0.1:1/"}, b""), NO_ROUTER, "cannot explain decisions: status 302."),
        ((404, {}, b'{"error":{"message":"\xff"}}'), NO_ROUTER, "cannot explain decisions: status 404."),
        ((401, {}, b'{"error":' * 10_000), NOT_ALLOWED, "does not let this key read decisions."),
        ((404, {}, b"nothing"), NO_ROUTER, "cannot explain decisions: status 404."),
        ((503, {}, b""), NO_ROUTER, "status 503"),
        (
            (404, {"x-smg-error-code": "decision_not_found"}, b'{"error":{"message":"Gone."}}'),
            NOT_FOUND,
            "keeps no decision about r-1: the id is wrong, ",
        ),
        (
            (409, {}, b'{"error":{"message":"None are kept."}}'),
            NOT_FOUND,
            "keeps no decisions. It says: None are kept.",
        ),
        ((401, {}, b'{"error":{"message":"No."}}'), NOT_ALLOWED, "does not let this key read decisions. It says: No."),
        ((403, {}, b""), NOT_ALLOWED, "does not let this key read decisions."),
    ],
)
def test_what_an_answer_means(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[int, dict[str, str], bytes],
    status: int,
    message: str,
) -> None:
    with plain_worker({"/decisions/r-1": answer}) as server:
        monkeypatch.setenv(URL_VARIABLE, server.url)
        monkeypatch.setenv(KEY_VARIABLE, "secret-1")
        got, out, err = run(capsys, "r-1")
        assert server.seen["/decisions/r-1"]["authorization"] == "Bearer secret-1"
    assert (got, out) == (status, "")
    assert message in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--url", "10.0.0.1:30000"), "--url is not a URL"),
        (("--url", "http://me:secret@127.0.0.1"), "--url is not a URL"),
        (("--url", "http://127.0.0.1:many"), "--url is not a URL"),
        (("--url", "http://127.0.0.1/\u00e9"), "--url is not a URL"),
        (("--url", "http://a..b"), "--url is not a URL"),
        (("--url", f"http://{'a' * 70}"), "--url is not a URL"),
        (("--api-key", "secret\n"), ""),
        (("--api-key", "secr\xe9t"), "--api-key is not visible ASCII"),
        (("--url", "https://127.0.0.1", "--ca-cert", "/nowhere"), "--ca-cert /nowhere: No such file"),
    ],
)
def test_options_that_cannot_be_used(words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, f"http://127.0.0.1:{free_port()}")
    if not message:  # a newline at the end of a key, as from a file, is no part of it
        assert explain.main(("r-1", *words), "x") == NO_ROUTER
        return
    with pytest.raises(ConfigError) as told:
        explain.main(("r-1", *words), "x")
    assert message in str(told.value)
    assert "secret" not in str(told.value)


def test_the_page_has_each_reason_for_which_a_worker_is_no_candidate() -> None:
    page = (Path(__file__).parent.parent / "docs" / "explaining.md").read_text("utf-8")
    assert [name for name in REASONS if f"`{name}`" not in page] == []
