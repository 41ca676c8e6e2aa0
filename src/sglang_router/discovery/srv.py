"""SRV records (RFC 2782) by dnspython: each target and port is a worker.

Targets stay names, which the router looks up when it connects. Priorities and weights are not used: all targets get
requests, as the policy decides.
"""

from __future__ import annotations

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver

from sglang_router.config import parse_worker_url
from sglang_router.config.dns_names import DNSName
from sglang_router.discovery.looked_up import LookedUp, LookUpFailed
from sglang_router.errors import ConfigError

_WITHIN = 10.0
"""Seconds for a look-up, all name servers together."""


class SRVLookUp:
    """See the module. resolver: None: the one that /etc/resolv.conf describes."""

    def __init__(self, resolver: dns.asyncresolver.Resolver | None = None) -> None:
        self._resolver = resolver

    async def __call__(self, name: DNSName) -> LookedUp:
        """Return the workers that the SRV records of a name tell. Raises: LookUpFailed."""
        try:
            if self._resolver is None:
                self._resolver = dns.asyncresolver.Resolver()
            found = await self._resolver.resolve(name.name, dns.rdatatype.SRV, search=True, lifetime=_WITHIN)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            raise LookUpFailed("not_found", f"{name.name} has no SRV records") from None
        except dns.exception.Timeout:
            raise LookUpFailed("silent", f"the look-up of {name.name} takes longer than {_WITHIN:g} s") from None
        except (dns.exception.DNSException, OSError) as error:
            raise LookUpFailed("failed", f"the look-up of {name.name} failed: {error}") from None
        return LookedUp(tuple(_urls(name, found)), float(found.rrset.ttl) if found.rrset is not None else None)


def _urls(name: DNSName, found: dns.resolver.Answer) -> list[str]:
    """Return the URLs of the targets. Raises: LookUpFailed, when one cannot be a worker."""
    urls = []
    for record in found:
        target = record.target.to_text(omit_final_dot=True)
        if not target or not record.port:  # "." says that there is no such service
            continue
        try:
            urls.append(parse_worker_url(f"{name.scheme}://{target}:{record.port}"))
        except ConfigError as error:
            raise LookUpFailed("invalid", f"{name.name}: {error}") from None
    if not urls:
        raise LookUpFailed("not_found", f"{name.name} names no target")
    return sorted(set(urls))
