"""URLs of stores: their forms, what is refused, and that no password is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.config import RouterArgs, parse
from sglang_router.config.effective import effective
from sglang_router.config.store_urls import CLUSTER, SENTINEL, SINGLE, StoreURL, parse_store_url
from sglang_router.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "parts", "shown"),
    [
        ("redis://h", StoreURL(SINGLE, False, (("h", 6379),)), "redis://h:6379"),
        ("valkey://H:1/2", StoreURL(SINGLE, False, (("h", 1),), database=2), "redis://h:1/2"),
        ("rediss://:p%40w@h", StoreURL(SINGLE, True, (("h", 6379),), password="p@w"), "rediss://h:6379"),
        ("valkeys://u:p:w@[::1]:7", StoreURL(SINGLE, True, (("::1", 7),), "u", "p:w"), "rediss://[::1]:7"),
        (
            "redis+sentinel://u:a@b@x,y:9/mine/3",
            StoreURL(SENTINEL, False, (("x", 26379), ("y", 9)), "u", "a@b", "mine", 3),
            "redis+sentinel://x:26379,y:9/mine/3",
        ),
        (
            "rediss+cluster://x,y:9/",
            StoreURL(CLUSTER, True, (("x", 6379), ("y", 9))),
            "rediss+cluster://x:6379,y:9",
        ),
    ],
)
def test_forms(text: str, parts: StoreURL, shown: str) -> None:
    found = parse_store_url(text)
    assert found == parts
    assert found.shown == shown


@pytest.mark.parametrize(
    "text",
    [
        *("", "h", "h:6379", "http://h", "redis:h", "redis://", "redis://h h", "redis://h?db=1", "redis://h#x"),
        *("redis://secret@h", "redis://h:0", "redis://h:65536", "redis://h:x", "redis://h/x", "redis://h/1/2"),
        *("redis://a,b", "redis+sentinel://a", "redis+sentinel://a/", "redis+sentinel://a/s/x", "redis+cluster://a/1"),
        *("redis+other://a", "redis://:secret@", "redis://::1", "redis://h/-1", "redis://h/²", "redis://:secret@a b"),
    ],
)
def test_what_cannot_be_a_store_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--shared-state", text], {}).checked() if text else parse_or_refuse(text)
    assert "secret" not in str(caught.value)


def parse_or_refuse(text: str) -> None:
    try:
        parse_store_url(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_store_url("redis://" + text)
    except ValueError:
        return
    assert found.hosts
    assert parse_store_url(found.shown).hosts == found.hosts


def test_the_password_is_in_nothing_that_shows_options() -> None:
    args = RouterArgs(shared_state="redis://u:hunter2@h").checked()
    assert "hunter2" not in repr(args) + str(effective(args))
