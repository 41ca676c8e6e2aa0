"""What the options say of single models: aliases, fallbacks, settings; and what they must not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_router.config import RouterArgs
from sglang_router.config.args import parse
from sglang_router.config.models import LONGEST_CHAIN, ModelTable
from sglang_router.errors import ConfigError

FILE = """
worker-urls: [http://a:1]
model-alias: {g: gpt-4}
models:
  llama-70b:
    policy: Cost
    cache-threshold: 0.3
    aliases: [gpt-4, big]
    fallback: mini
  llama-8b:
    aliases: mini
  plain:
"""


def table(*words: str) -> ModelTable:
    return parse(words, {}).checked().model_table()


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        table(*words)
    return str(error.value)


def test_file_and_flags_make_one_table(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FILE)
    found = table("--config", str(path), "--model-fallback", "llama-8b=tiny")
    assert found.aliases == {"g": "llama-70b", "gpt-4": "llama-70b", "big": "llama-70b", "mini": "llama-8b"}
    assert found.fallbacks == {"llama-70b": ("llama-8b", "tiny"), "llama-8b": ("tiny",)}
    assert found.settings["llama-70b"].policy_options == {"policy": "cost", "cache_threshold": 0.3}
    assert found.settings["plain"].policy_options == {}


def test_flags_add_up() -> None:
    found = table("--model-alias", "a=m", "b=m", "--model-alias", "c=b", "--model-fallback", "m=n", "n=o")
    assert found.aliases == {"a": "m", "b": "m", "c": "m"}
    assert found.fallbacks == {"m": ("n", "o"), "n": ("o",)}


def test_json_is_what_a_variable_takes() -> None:
    args = parse([], {"SGLANG_ROUTER_MODELS": '{"m": {"aliases": ["a"]}}', "SGLANG_ROUTER_MODEL_ALIAS": "b=m c=m"})
    assert args.checked().model_table().aliases == {"a": "m", "b": "m", "c": "m"}


def test_a_checked_copy_can_be_checked_again() -> None:
    args = RouterArgs(models={"m": {"policy": "cost", "aliases": ["a"]}}).checked()
    assert args.checked().model_table() == args.model_table()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model-alias", "a=b", "b=a"], "the alias a leads to itself: a -> b -> a"),
        (["--model-alias", "a=a"], "the alias a leads to itself: a -> a"),
        (["--model-fallback", "a=b", "b=c", "c=b"], "the fallback of a leads back: a -> b -> c -> b"),
        (["--model-fallback", "a=x", "--model-alias", "x=a"], "the fallback of a leads back: a -> a"),
        (["--model-fallback", "a=b", "--model-alias", "a=m"], "a is an alias of m; give settings and fallbacks to m"),
        (["--models", '{"a":{"policy":"cost"}}', "--model-alias", "a=m"], "a is an alias of m"),
        (["--models", '{"a":{"aliases":["x"]},"b":{"aliases":["x"]}}'], "x is an alias of a and of b"),
        (["--models", '{"a":{"fallback":"x"}}', "--model-fallback", "a=b"], "a has two fallbacks, b and x"),
        (["--models", '{"a":{"polic":"cost"}}'], "'polic' is no setting of a model; did you mean policy?"),
        (["--models", '{"a":{"port":3}}'], "'port' is no setting of a model"),
        (["--models", '{"a":{"cache-threshold":3}}'], "models: a: cache_threshold: 3 is not a number from 0 to 1"),
        (["--models", '{"a":{"policy":"fast"}}'], "models: a: policy: 'fast' is not one of"),
        (["--models", '{"a":{"aliases":3}}'], "models: a: Expected `array`"),
        (["--models", '{"a":{"fallback":["b"]}}'], "models: a: Expected `str | null`"),
        (["--models", '{"a":3}'], "is not a mapping of models to their settings"),
        (["--models", "{"], "is not a mapping of models to their settings"),
        (["--model-alias", "a"], "is not a list of key=value"),
        (["--model-alias", "a="], "cannot be the name of a model"),
        (["--model-alias", "a=" + "x" * 300], "cannot be the name of a model"),
        (["--worker-model", "http://a:1=m"], "--worker-model names http://a:1, which --worker-urls does not"),
        (["--worker-model", "a:1=m"], "must begin with http:// or https://"),
    ],
)
def test_what_contradicts_itself_is_refused_at_the_start(words: list[str], message: str) -> None:
    assert message in refused(*words)


def test_a_chain_of_fallbacks_is_bounded() -> None:
    chain = [f"m{n}=m{n + 1}" for n in range(LONGEST_CHAIN + 1)]
    assert len(table("--model-fallback", *chain[:-1]).fallbacks["m0"]) == LONGEST_CHAIN
    assert "more than 8 fallbacks" in refused("--model-fallback", *chain)


def test_workers_are_named_by_their_urls_in_any_spelling() -> None:
    args = parse(["--worker-urls", "http://A:1/", "--worker-model", "http://a:1/=m"], {}).checked()
    assert args.worker_model == {"http://a:1/": "m"}
