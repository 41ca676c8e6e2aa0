"""The options of prefill and decode workers, from each place where they can stand, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_router.app import settings
from sglang_router.config import RouterArgs, parse
from sglang_router.errors import ConfigError
from sglang_router.routing.source import Source

A, B, C = "http://a:1", "http://b:2", "http://c:3"
BOTH = ("--pd-disaggregation", "--prefill", A, "--decode", B)


def read(*words: str, environ: dict[str, str] | None = None) -> RouterArgs:
    return parse(words, environ or {}).checked()


def specs(args: RouterArgs) -> list[tuple[str, str, int | None, Source]]:
    found = settings.configured_workers(args).specs
    return [(spec.url, spec.worker_type, spec.bootstrap_port, spec.source) for spec in found]


def test_flags_as_the_reference_has_them() -> None:
    """Each --prefill names one worker and its port; a third word is ignored."""
    args = read(
        *("--pd-disaggregation", "--prefill", "http://A:1/", "9000", "more"),
        *("--prefill", B, "none", "--decode", C, "--policy", "random", "--prefill-policy", "cache_aware"),
    )
    assert args.prefill_urls == [(A, 9000), (B, None)]
    assert specs(args) == [
        (A, "prefill", 9000, Source.FLAGS),
        (B, "prefill", None, Source.FLAGS),
        (C, "decode", None, Source.FLAGS),
    ]
    assert (args.policy, args.prefill_policy, args.decode_policy) == ("random", "cache_aware", None)


def test_a_file_and_variables(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(f"pd_disaggregation: true\nprefill: [[{A}, 9000], {B}]\ndecode: [{C}]\n")
    args = read("--config", str(file))
    assert [each[1:] for each in specs(args)] == [
        ("prefill", 9000, Source.FILE),
        ("prefill", None, Source.FILE),
        ("decode", None, Source.FILE),
    ]
    environ = {"SGLANG_ROUTER_PREFILL": f"{A} {B}", "SGLANG_ROUTER_DECODE": C, "SGLANG_ROUTER_PD_DISAGGREGATION": "1"}
    assert [each[0] for each in specs(read(environ=environ))] == [A, B, C]


def test_a_namespace_of_another_program() -> None:
    found = SimpleNamespace(router_pd_disaggregation=True, router_prefill_urls=[(A, None)], router_decode_urls=[B])
    args = RouterArgs.from_cli_args(found, use_router_prefix=True).checked()
    assert [each[1] for each in specs(args)] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prefill", A), "--prefill cannot be used without --pd-disaggregation; give it as well"),
        (("--prefill", A, "--decode", B), "--prefill and --decode cannot be used without --pd-disaggregation"),
        (("--pd-disaggregation", "--prefill", A), "--prefill needs --decode as well"),
        (("--pd-disaggregation", "--decode", A), "--decode needs --prefill as well"),
        ((*BOTH, "--decode", A), "http://a:1 is named twice, as workers of different kinds"),
        ((*BOTH, "--worker-urls", B), "http://b:2 is named twice"),
        ((*BOTH, "--prefill", A, "9"), "worker URL http://a:1 is given twice"),
        ((*BOTH, "--prefill", C, "port"), "is not a URL with an optional port number or 'none'"),
        ((*BOTH, "--prefill", C, "0"), "bootstrap port 0 of http://c:3 must be from 1 to 65535"),
        ((*BOTH, "--prefill", "c:3"), "must begin with http:// or https://"),
        ((*BOTH, "--prefill-policy", "bucket"), "the policy bucket is not available"),
        ((*BOTH, "--decode-policy", "bucket"), "is not one of"),
        ((*BOTH, "--pd-kv-connector", "mooncake"), "mooncake"),
        ((*BOTH, "--pd-uncached-token-threshold", "-1"), "of at least 0"),
    ],
)
def test_mistakes(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        read(*words)
        told = "nothing"
    except ConfigError as error:
        told = str(error)
    except SystemExit:
        told = capsys.readouterr().err
    assert said in told


def test_workers_may_come_later() -> None:
    assert specs(read("--pd-disaggregation")) == []
    assert [each[1] for each in specs(read("--pd-disaggregation", "--worker-urls", A, B))] == ["regular", "regular"]


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ((), {"uncached_tokens": 0, "by_cost": False, "connector": ""}),
        (("--pd-uncached-token-threshold", "512"), {"uncached_tokens": 512}),
        (("--policy", "cost"), {"by_cost": True}),
        (("--policy", "cost", "--decode-policy", "least_load"), {"by_cost": False}),
        (("--prefill-policy", "cost", "--decode-policy", "cost"), {"by_cost": True}),
        (("--pd-kv-connector", "nixl"), {"connector": "nixl", "pushes": False}),
        (("--pd-kv-connector", "nixl_push"), {"connector": "nixl", "pushes": True}),
    ],
)
def test_rules(words: tuple[str, ...], rules: dict[str, Any]) -> None:
    found = settings.pair_rules(read(*BOTH, *words))
    assert {name: getattr(found, name) for name in rules} == rules
