"""What the options say of single models: one record for each model that has settings of its own.

    --config FILE                                     flags
      models:                                           --model-alias gpt-4=llama-70b
        llama-70b:                                      --model-fallback llama-70b=llama-8b
          policy: cost            --+                            |
          cache-threshold: 0.3      +--> ModelTable <------------+
          aliases: [gpt-4]        --+
          fallback: llama-8b
          max-concurrent-requests: 64

Aliases lead to models, not to other aliases, once the table is made. The fallbacks of a model are the whole chain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from sglang_router.config.key_files import KeyTerms, terms_of
from sglang_router.config.option import did_you_mean
from sglang_router.config.urls import parse_worker_url
from sglang_router.errors import ConfigError

POLICY_OPTIONS = (
    "policy",
    "cache_threshold",
    "balance_abs_threshold",
    "balance_rel_threshold",
    "max_tree_size",
    "max_idle_secs",
    "assignment_mode",
    "prefix_hash_bytes",
    "hash_load_factor",
    "cost_load_cap",
)
"""Options that a model may have for itself; the others have the value that holds for all."""
TERMS = ("requests_per_second", "burst", "max_concurrent_requests", "tokens_per_minute", "priority")
"""Limits of a model, and the priority of its requests, as of a key: see `config.key_files`."""
LONGEST_CHAIN = 8
"""Fallbacks of a model, one after the other."""
_LONGEST_NAME = 256

Accept = Callable[[str, object, str], Any]
"""Checks the value of an option: its name, the value, where it stands."""


class ModelSettings(msgspec.Struct, frozen=True):
    """The settings of one model.

    policy_options  its policy and the options of that, where they differ from those of all models
    aliases         other names of the model
    fallback        the model that stands in for it; None: no other one
    terms           its limits and the priority of its requests
    """

    policy_options: dict[str, Any] = {}
    aliases: tuple[str, ...] = ()
    fallback: str | None = None
    terms: KeyTerms = KeyTerms()


class ModelTable(msgspec.Struct, frozen=True):
    """See the module.

    settings   by model
    aliases    the model of each alias
    fallbacks  the models that stand in for a model, in the order in which they are tried
    """

    settings: dict[str, ModelSettings]
    aliases: dict[str, str]
    fallbacks: dict[str, tuple[str, ...]]


def worker_models(given: Mapping[str, str], urls: Collection[str]) -> dict[str, str]:
    """Return what workers are called, by the normal form of their URLs.

    given  --worker-model;  urls: of the workers that are there

    Raises: ConfigError, for a worker that is not there.
    """
    found = {}
    for url, name in given.items():
        normal = parse_worker_url(url)
        if normal not in urls:
            raise ConfigError(f"--worker-model names {url}, which --worker-urls does not; add it there")
        found[normal] = _named(name, "--worker-model")
    return found


def model_table(
    models: Mapping[str, Mapping[str, Any]],
    aliases: Mapping[str, str],
    fallbacks: Mapping[str, str],
    accept: Accept,
) -> ModelTable:
    """Return the table that the options make.

    Raises: ConfigError, when two of them contradict each other, or a setting is no good.
    """
    settings = {_named(name, "models"): _settings(name, given, accept) for name, given in models.items()}
    meant = _names(aliases, "--model-alias")
    instead = _names(fallbacks, "--model-fallback")
    for name, each in settings.items():
        for alias in each.aliases:
            if meant.setdefault(_named(alias, f"models: {name}"), name) != name:
                raise ConfigError(f"{alias} is an alias of {meant[alias]} and of {name}; a name can lead to one model")
        other = each.fallback
        if other is not None and instead.setdefault(name, _named(other, f"models: {name}")) != other:
            raise ConfigError(f"{name} has two fallbacks, {instead[name]} and {other}; give only one of them")
    meant = {alias: _end(alias, meant) for alias in meant}
    for name in (*settings, *instead):
        if name in meant:
            raise ConfigError(f"{name} is an alias of {meant[name]}; give settings and fallbacks to {meant[name]}")
    ends = {name: meant.get(other, other) for name, other in instead.items()}
    return ModelTable(settings, meant, {name: _chain(name, ends) for name in ends})


def _named(name: str, where: str) -> str:
    """Return the name of a model. Raises: ConfigError, for what can be none."""
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ConfigError(f"{where}: {name[:80]!r} cannot be the name of a model")
    return name


def _names(given: Mapping[str, str], where: str) -> dict[str, str]:
    return {_named(name, where): _named(other, where) for name, other in given.items()}


def _settings(name: str, given: Mapping[str, Any], accept: Accept) -> ModelSettings:
    """Return the settings of one model. Raises: ConfigError."""
    where = f"models: {name}"
    known = {field.name for field in msgspec.structs.fields(ModelSettings)} - {"policy_options", "terms"}
    options = {key: accept(key, value, f"{where}: {key}") for key, value in given.items() if key in POLICY_OPTIONS}
    present = {key: value for key, value in given.items() if key not in POLICY_OPTIONS and value is not None}
    others = {key: value for key, value in present.items() if key not in TERMS}
    for key in others:
        if key not in known:
            hint = did_you_mean(key, {*known, *POLICY_OPTIONS, *TERMS})
            raise ConfigError(f"{where}: {key!r} is no setting of a model{hint}")
    if isinstance(others.get("aliases"), str):
        others["aliases"] = [others["aliases"]]
    try:
        found = msgspec.convert({**others, "policy_options": options}, ModelSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    return msgspec.structs.replace(found, terms=terms_of(where, {key: present[key] for key in TERMS if key in present}))


def _end(alias: str, aliases: Mapping[str, str]) -> str:
    """Return the model to which an alias leads. Raises: ConfigError, when it leads to itself."""
    seen = [alias]
    while (name := aliases.get(seen[-1])) is not None:
        if name in seen:
            raise ConfigError(f"the alias {alias} leads to itself: {' -> '.join([*seen, name])}")
        seen.append(name)
    return seen[-1]


def _chain(model: str, fallbacks: Mapping[str, str]) -> tuple[str, ...]:
    """Return what stands in for a model, one after the other. Raises: ConfigError, for a circle, or for too many."""
    chain = [model]
    while (name := fallbacks.get(chain[-1])) is not None:
        if name in chain:
            raise ConfigError(f"the fallback of {model} leads back: {' -> '.join([*chain, name])}")
        chain.append(name)
        if len(chain) > LONGEST_CHAIN + 1:
            raise ConfigError(f"{model} has more than {LONGEST_CHAIN} fallbacks, one after the other")
    return tuple(chain[1:])
