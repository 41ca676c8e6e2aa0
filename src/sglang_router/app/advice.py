"""What a router says at its start about options that probably do not do what was meant.

advice(args, environ, exists) -> sentences, each a warning in the log
remark(args)                      logs them, and what --compat has set
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
from collections.abc import Callable, Mapping

from sglang_router.config import OPTIONS, RouterArgs, as_flag
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.rules import PolicySettings

log = logging.getLogger("sglang_router")

_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")
_KUBERNETES = "KUBERNETES_SERVICE_HOST"


def advice(args: RouterArgs, environ: Mapping[str, str], exists: Callable[[str], bool]) -> list[str]:
    """Return the warnings. `exists`: whether there is a file of that name."""
    loopback = is_loopback_host(args.host)
    found = []
    if loopback and (_KUBERNETES in environ or any(map(exists, _CONTAINER_FILES))):
        found.append(
            f"this is a container, and the router listens on {args.host}: nothing outside this container can reach it;"
            " add --host 0.0.0.0"
        )
    if not loopback and not args.api_key and args.api_key_file is None:
        found.append(
            f"inference is open to everybody who can reach port {args.port} of {args.host}: set a key with"
            " --api-key-file or --api-key"
        )
    if args.kv_events and POLICIES[args.policy](PolicySettings(), random.Random()).memory is None:
        found.append(f"--kv-events has no effect: --policy {args.policy} does not ask what workers have cached")
    elif not args.kv_events and any(name.startswith("kv_events_") for name in args.given):
        found.append("options for KV events have no effect without --kv-events")
    if args.shared_state is None and any(name.startswith("shared_state_") for name in args.given):
        found.append("options for a shared state have no effect without --shared-state")
    selectors = [args.selector, args.prefill_selector, args.decode_selector]
    if any(selectors) and not args.service_discovery:
        found.append("selectors of pods have no effect without --service-discovery")
    elif args.selector and any(selectors[1:]):
        found.append("--selector is not used beside --prefill-selector and --decode-selector")
    return found


def is_loopback_host(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only. A name other than localhost counts as
    one that others can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def remark(args: RouterArgs) -> None:
    """Log what --compat has set, and what probably is not as it was meant."""
    if args.assumed:
        values = (as_flag(option, getattr(args, name)) for name, option in OPTIONS.items() if name in args.assumed)
        log.info("defaults of %s are in effect: %s", args.compat, " ".join(values))
    for warning in advice(args, os.environ, os.path.exists):
        log.warning(warning)
