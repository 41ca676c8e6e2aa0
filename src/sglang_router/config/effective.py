"""The options in effect, with where each value comes from: what `GET /config` and `sglang-router config` show.

    origin        the value was set                             where
    flag          on the command line, or by a program          --policy
    environment   by a variable                                 SGLANG_ROUTER_POLICY
    file          by the file of --config                       /etc/sglang-router.yaml
    compat        by --compat                                   0.3.2
    default       by nobody; some defaults follow other options

Secrets are never in it: a secret that is set reads `***`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_router.config.args import RouterArgs
from sglang_router.config.live import LIVE
from sglang_router.config.option import ENVIRONMENT_PREFIX, Option
from sglang_router.config.table import OPTIONS

HIDDEN = "***"


class EffectiveOption(msgspec.Struct, frozen=True):
    """One option in effect.

    name    its key in a file; flag: on the command line
    value   what it is now, in the form of a file
    origin  who set it: see the module; where: more exactly
    reload  a reload changes it while the router runs; else a restart does
    """

    name: str
    flag: str
    group: str
    value: Any
    origin: str
    where: str
    reload: bool


def effective(args: RouterArgs) -> list[EffectiveOption]:
    """Return all options that have an effect in this router, in the order of the documentation."""
    return [_effective(args, option) for option in OPTIONS.values() if option.status == "implemented"]


def _effective(args: RouterArgs, option: Option) -> EffectiveOption:
    value = getattr(args, option.name)
    if option.secret and value:
        value = HIDDEN
    origin, where = _origin(args, option)
    return EffectiveOption(option.name, option.flag, option.group, value, origin, where, option.name in LIVE)


def _origin(args: RouterArgs, option: Option) -> tuple[str, str]:
    name = option.name
    if name in args.from_file:
        return "file", args.config or ""
    if name in args.from_environment:
        return "environment", ENVIRONMENT_PREFIX + name.upper()
    if name in args.assumed:
        return "compat", args.compat or ""
    return ("flag", option.flag) if name in args.given else ("default", "")
