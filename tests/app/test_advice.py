"""What the router says at its start about options that probably do not do what was meant."""

from __future__ import annotations

import pytest

from sglang_router.app.advice import advice
from sglang_router.config import RouterArgs
from sglang_router.config.keys import ClientKey

KEY = ClientKey("alice", "k")
UNREACHABLE = "nothing outside this container can reach it; add --host 0.0.0.0"
OPEN = "inference is open to everybody who can reach port 30000"


def said(args: RouterArgs, *files: str, **environ: str) -> str:
    return "\n".join(advice(args, environ, files.__contains__))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_container_that_nobody_can_reach(host: str) -> None:
    """With the default host, a router in a pod answered nobody, and did not say why."""
    args = RouterArgs(host=host)
    assert said(args) == ""
    assert UNREACHABLE in said(args, "/.dockerenv")
    assert UNREACHABLE in said(args, "/run/.containerenv")
    assert UNREACHABLE in said(args, KUBERNETES_SERVICE_HOST="10.0.0.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "fe80::1", "router.example"])
def test_f39_open_inference_is_said(host: str) -> None:
    """A router on all addresses without keys let everybody use the engines without a word."""
    assert said(RouterArgs(host=host), "/.dockerenv").startswith(OPEN)
    assert said(RouterArgs(host=host, api_key=[KEY])) == ""
    assert said(RouterArgs(host=host, api_key_file="keys")) == ""


def test_kv_events_need_a_policy_that_asks_what_is_cached_and_their_switch() -> None:
    assert said(RouterArgs(kv_events=True)) == ""
    assert "--policy round_robin does not ask" in said(RouterArgs(kv_events=True, policy="round_robin"))
    alone = RouterArgs(kv_events_tokenizer="tokenizer.json").checked()
    assert "no effect without --kv-events" in said(alone)


def test_selectors_need_the_switch_and_those_of_roles_replace_the_other() -> None:
    some = {"app": "engine"}
    assert said(RouterArgs(selector=some)) == "selectors of pods have no effect without --service-discovery"
    assert said(RouterArgs(service_discovery=True, selector=some)) == ""
    both = RouterArgs(service_discovery=True, selector=some, prefill_selector={"role": "prefill"})
    assert said(both) == "--selector is not used beside --prefill-selector and --decode-selector"
