"""What was heard of other routers between two prompts of this one."""

from __future__ import annotations

from sglang_router.routing.heard import Heard


def test_only_what_is_heard_between_two_sendings_is_between_their_first_bytes() -> None:
    heard = Heard()
    assert not heard.any
    heard.more(5, 500)
    heard.begin()
    heard.sent("a")
    heard.more(2, 70)
    heard.sent("b")
    heard.more(1, 1000)
    assert heard.began("a")
    assert heard.between == (0, 0)
    heard.go_on()
    assert heard.began("b")
    assert (heard.any, heard.between) == (True, (2, 70))
    heard.go_on()
    assert heard.between == (0, 0)


def test_nothing_heard_since_a_stream_was_sent() -> None:
    heard = Heard()
    heard.more(1, 10)
    heard.sent("a")
    assert not heard.began("a")


def test_streams_that_begin_together_may_do_so_in_any_order() -> None:
    heard = Heard()
    heard.sent("first")
    heard.more(1, 10)
    heard.sent("second")
    heard.began("second")
    heard.began("first")
    assert heard.between == (1, 10)
    heard.go_on()
    assert heard.between == (0, 0)


def test_a_stream_that_is_gone_is_forgotten() -> None:
    heard = Heard()
    heard.more(3, 30)
    heard.sent("a")
    heard.gone("a")
    heard.gone("never sent")
    assert heard.began("a")
    assert (heard.between, repr(heard)) == ((0, 0), "<Heard 3 requests, 30 bytes>")
