"""`RouterArgs`: all options of one router, typed. It is made from flags, from a namespace, or by hand.

    parse(argv, environ) ----------+
    RouterArgs.from_cli_args(ns) --+--> RouterArgs --checked()--> a copy ready to start with, or ConfigError
    RouterArgs(port=8000) ---------+

Starting a router does not change the instance, so it can be changed and used again.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sglang_router.config import checks, compat, keys, live
from sglang_router.config.flags import GIVEN, PREFIX, add_flags, new_parser
from sglang_router.config.models import ModelTable, model_table, worker_models
from sglang_router.config.option import flag_of
from sglang_router.config.reserved import ReservedOptions
from sglang_router.config.sources import MergedValues, merge, read_file
from sglang_router.config.table import ALIASES, OPTIONS, accept
from sglang_router.errors import ConfigError

_ABSENT = object()


@dataclass(repr=False)
class RouterArgs(ReservedOptions):
    """The options, explained in `docs/options.md`.

    given      names of the options that a flag, variable or file set
    from_file  names of those among them whose value a file set; from_environment: a variable
    slips      what looks like a mistake and changes nothing, as sentences
    assumed    names of the options whose value --compat set
    """

    given: frozenset[str] = field(default=frozenset(), compare=False)
    from_file: frozenset[str] = field(default=frozenset(), compare=False)
    from_environment: frozenset[str] = field(default=frozenset(), compare=False)
    slips: tuple[str, ...] = field(default=(), compare=False)
    assumed: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def scale_range(self) -> tuple[int, int] | None:
        """Fewest and most workers; None without --autoscale."""
        if self.autoscale is None:
            return None
        low, _, high = self.autoscale.partition(":")
        return int(low), int(high)

    @property
    def scales_to_zero(self) -> bool:
        """Whether autoscaling may stop the last worker, so that a request has to start one."""
        return self.scale_range is not None and self.scale_range[0] == 0

    @property
    def access_log(self) -> bool:
        """Whether the router writes a log line for each request."""
        return not self.disable_access_log

    @staticmethod
    def add_cli_args(
        parser: argparse.ArgumentParser, use_router_prefix: bool = False, exclude_host_port: bool = False
    ) -> None:
        """Add the flags to any parser: `--policy`, or `--router-policy` with `use_router_prefix`.

        `--worker-urls`, `--host` and `--port` never get the prefix. `exclude_host_port` omits the latter two.
        """
        add_flags(parser, use_router_prefix=use_router_prefix, exclude_host_port=exclude_host_port)

    @classmethod
    def from_cli_args(
        cls, args: object, use_router_prefix: bool = False, environ: Mapping[str, str] = os.environ
    ) -> RouterArgs:
        """Make it from a namespace, or from any object with attributes `<name>`, or first `router_<name>` with
        `use_router_prefix`.

        Missing attributes get their defaults. Attributes set by `add_cli_args` count as flags: the environment and
        `--config` fill in those that were not on the command line. Of any other object, all attributes are used as
        they are.

        Raises: ConfigError.
        """
        found = _attributes(args, use_router_prefix)
        flags_given = getattr(args, GIVEN, None)
        if flags_given is None:
            return cls(**found)
        flags = {
            name: value
            for name, value in found.items()
            if name in flags_given or value != (OPTIONS[name].default if name in OPTIONS else None)
        }
        merged = merge(flags, environ)
        return _of(cls, merged)

    def checked(self) -> RouterArgs:
        """Return a copy with every value checked, aliases resolved and dependent values computed.

        Raises: ConfigError if a value is invalid, two values conflict, or an option needs a feature that this version
        does not have.
        """
        final = copy.copy(self)
        final._read_file()
        for name, option in OPTIONS.items():
            setattr(final, name, accept(name, getattr(final, name), option.flag))
        final._resolve_aliases()
        final.given = self.given | {name for name in OPTIONS if final._differs(name)} - self.assumed
        final._assume()
        final._reject_unavailable()
        final._derive()
        final._mirror_aliases()
        return final

    def _validate_router_args(self) -> None:
        """Check the options. It is the reference's name for that, and some frameworks call it.

        Raises: ConfigError.
        """
        self.checked()

    def reread(self) -> RouterArgs:
        """Read the file of `config` again; return the options as they would be at a start with it, checked. What flags
        and variables set stays.

        Raises: ConfigError.
        """
        path = Path(self.config or "")
        file = {name: value for name, value in read_file(path).items() if name in OPTIONS}
        if not file:  # it would remove all workers
            raise ConfigError(f"{path} holds no options, as in the middle of a change")
        named = [name for name in live.URLS if name in self.from_file and getattr(self, name)]
        if named and not file.keys() & set(live.URLS):  # as in a file that is half written
            raise ConfigError(f"{path} names no workers any more; write `worker-urls: []` to remove all that it named")
        fixed = self.given - self.from_file
        values = {name: getattr(self, name) for name in fixed}
        new = {name: value for name, value in file.items() if name not in fixed}
        origins: dict[str, Any] = {"from_file": frozenset(new), "from_environment": self.from_environment}
        return RouterArgs(**values | new, given=frozenset(fixed | new.keys()), **origins).checked()

    def without_effect(self) -> list[str]:
        """Return the flags of the options that are set but have no effect in this router."""
        return self._used("inert")

    def _used(self, status: str) -> list[str]:
        return [option.flag for name, option in OPTIONS.items() if option.status == status and self._differs(name)]

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != OPTIONS[name].default)

    def _read_file(self) -> None:
        """Fill in the file's values if `config` was set by hand; `parse` has read the file of a flag already."""
        if self.config and "config" not in self.given:
            for name, value in read_file(Path(self.config)).items():
                if name in OPTIONS and not self._differs(name):
                    setattr(self, name, value)
                    self.from_file |= {name}

    def _resolve_aliases(self) -> None:
        for name, entry in ALIASES.items():
            value = getattr(self, name)
            if value is None:
                continue
            value = accept(name, value, flag_of(name))
            wanted = value if entry.means is None else entry.means
            current, default = getattr(self, entry.target), OPTIONS[entry.target].default
            if current == default and value is not False:
                setattr(self, entry.target, wanted)
            elif current != wanted and entry.means is None:
                both = f"{OPTIONS[entry.target].flag} and {entry.flag}"
                raise ConfigError(f"{both} are two names of one option, with different values; give only one of them")

    def _assume(self) -> None:
        """With --compat, set what nobody has set to the defaults of that router."""
        if self.compat is not None:
            values = compat.defaults(self.given)
            for name, value in values.items():
                setattr(self, name, copy.copy(value))
            self.assumed = frozenset(values)

    def _mirror_aliases(self) -> None:
        """Set aliases to the resolved values, so that a copy can be checked again."""
        for name, entry in ALIASES.items():
            if getattr(self, name) is not None and entry.means is None:
                setattr(self, name, getattr(self, entry.target))

    def _reject_unavailable(self) -> None:
        if used := self._used("later"):
            them = "it" if len(used) == 1 else "them"
            raise ConfigError(f"not available in this version: {', '.join(used)}; start without {them}")

    def _derive(self) -> None:
        """Compute the values that depend on others."""
        if self.disable_retries:
            self.max_worker_retries, self.max_total_retries = 1, 0
        elif self.retry_max_retries is not None:
            if "max_total_retries" in self.given and self.max_total_retries != self.retry_max_retries - 1:
                raise ConfigError("--max-total-retries and --retry-max-retries conflict; give only one of them")
            self.max_total_retries = self.retry_max_retries - 1
        if self.retry_max_backoff_ms < self.retry_initial_backoff_ms:
            raise ConfigError("--retry-max-backoff-ms must not be less than --retry-initial-backoff-ms")
        if self.autoscale is not None and self.dp_aware:
            raise ConfigError(
                "--autoscale cannot be used with --dp-aware, which makes several workers of one engine; give only one"
                " of them"
            )
        if self.autoscale is None and (self.scale_webhook or self.scale_command):
            raise ConfigError("--scale-webhook and --scale-command need --autoscale MIN:MAX; give it as well")
        self._check_pairs()
        self.model_table()
        self._check_disaggregation()
        self._check_discovery()
        if self.cb_max_timeout_duration_secs < self.cb_timeout_duration_secs:
            self.cb_max_timeout_duration_secs = self.cb_timeout_duration_secs
        self.prometheus_host = self.prometheus_host or self.host

    def model_table(self) -> ModelTable:
        """Return what the options say of single models.

        Raises: ConfigError, when two of them contradict each other, or a setting is no good.
        """
        worker_models(self.worker_model, self.worker_urls)
        return model_table(self.models, self.model_alias, self.model_fallback, accept)

    def _check_pairs(self) -> None:
        """Check the options of access and TLS that need each other, or exclude each other."""
        for cert, key in (
            ("server_cert_path", "server_key_path"),
            ("client_cert_path", "client_key_path"),
            ("shared_state_client_cert", "shared_state_client_key"),
        ):
            flags = [OPTIONS[name].flag for name in (cert, key)]
            if bool(getattr(self, cert)) != bool(getattr(self, key)):
                raise ConfigError(f"{flags[0]} and {flags[1]} belong together; give both")
        if self.shared_state_workers and self.shared_state is not None and self.shared_state_key is None:
            raise ConfigError(
                "--shared-state-workers needs --shared-state-key: without it, who can read the store could add workers"
            )
        if self.control_plane_open and (self.control_plane_api_keys or self.control_plane_api_keys_file):
            raise ConfigError("--control-plane-open cannot be used with control-plane keys; give only one of them")
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Check the options of an identity provider."""
        if bool(self.jwt_issuer) != bool(self.jwt_audience):
            raise ConfigError("--jwt-issuer and --jwt-audience belong together; give both")
        if not self.jwt_issuer and (self.jwt_jwks_uri or self.jwt_role_mapping):
            raise ConfigError("--jwt-jwks-uri and --jwt-role-mapping need --jwt-issuer; give it as well")
        if self.jwt_issuer and self.control_plane_open:
            raise ConfigError("--control-plane-open cannot be used with --jwt-issuer; give only one of them")
        for name, role in self.jwt_role_mapping.items():
            if role not in keys.ROLES:
                raise ConfigError(f"--jwt-role-mapping: {name!r} is mapped to {role!r}; give admin or user")
        for name in ("jwt_issuer", "jwt_jwks_uri"):
            if url := getattr(self, name):
                try:
                    checks.issuer_url(url)
                except ValueError as error:
                    raise ConfigError(f"{OPTIONS[name].flag}: {error}") from None

    def _check_disaggregation(self) -> None:
        """Check that workers are named once, and of which kind."""
        prefill = [url for url, _ in self.prefill_urls]
        named = [*self.worker_urls, *prefill, *self.decode_urls]
        if twice := next((url for url in named if named.count(url) > 1), None):
            raise ConfigError(f"{twice} is named twice, as workers of different kinds; name it once")
        if not self.pd_disaggregation:
            if flags := [flag for flag, urls in (("--prefill", prefill), ("--decode", self.decode_urls)) if urls]:
                raise ConfigError(f"{' and '.join(flags)} cannot be used without --pd-disaggregation; give it as well")
        elif bool(prefill) != bool(self.decode_urls) and not (self.worker_urls or self.looks_for_workers):
            given, missing = ("--prefill", "--decode") if prefill else ("--decode", "--prefill")
            raise ConfigError(f"{given} needs {missing} as well: each request goes to one worker of both kinds")

    @property
    def looks_for_workers(self) -> bool:
        """Whether a source looks for workers."""
        found = (self.inference_pool, self.discovery_file)
        return self.service_discovery or any(each is not None for each in found) or bool(self.discovery_dns)

    def _check_discovery(self) -> None:
        """Check that what looks for pods has what it needs."""
        if self.service_discovery and self.inference_pool is not None:
            raise ConfigError("--service-discovery and --inference-pool both say which pods; give only one of them")
        if self.service_discovery and not (self.selector or self.prefill_selector or self.decode_selector):
            raise ConfigError(
                "--service-discovery needs the labels of the workers' pods: --selector app=NAME, or"
                " --prefill-selector and --decode-selector"
            )

    def __repr__(self) -> str:
        """The values that differ from the defaults, without secrets."""
        changed = (
            f"{name}={'***' if option.secret else repr(getattr(self, name))}"
            for name, option in OPTIONS.items()
            if self._differs(name)
        )
        return f"RouterArgs({', '.join(changed)})"


def parse(
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    prog: str = "sglang-router launch",
) -> RouterArgs:
    """Read the options from a command line, the environment, and the file that one of them names.

    Raises: ConfigError; SystemExit(0) after --help.
    """
    namespace = new_parser(prog).parse_all(argv)
    flags_given: frozenset[str] = getattr(namespace, GIVEN)
    merged = merge({name: getattr(namespace, name) for name in flags_given}, environ)
    return _of(RouterArgs, merged)


def _of(kind: type[RouterArgs], merged: MergedValues) -> RouterArgs:
    """Return the options that were read from all sources."""
    return kind(**merged.values, **{name: getattr(merged, name) for name in MergedValues._fields[1:]})


def _attributes(args: object, use_router_prefix: bool) -> dict[str, Any]:
    """Return the options and aliases that an object has as attributes; None counts as missing."""
    found: dict[str, Any] = {}
    for each in fields(RouterArgs):
        if each.name not in OPTIONS and each.name not in ALIASES:
            continue
        value = getattr(args, f"{PREFIX}_{each.name}", _ABSENT) if use_router_prefix else _ABSENT
        if value is _ABSENT:
            value = getattr(args, each.name, _ABSENT)
        if value is not _ABSENT and value is not None:
            found[each.name] = copy.copy(value)
    return found
