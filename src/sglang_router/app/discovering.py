"""Make the sources that look for workers, from the options."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping

from sglang_router.app import settings
from sglang_router.config import RouterArgs
from sglang_router.config.dns_names import parse_dns_name
from sglang_router.discovery import dns, kube_config
from sglang_router.discovery.discovery import Discovery, Looking
from sglang_router.discovery.inference_pool import InferencePoolSource
from sglang_router.discovery.kube_config import KubeFiles
from sglang_router.discovery.kubernetes import KubernetesSource
from sglang_router.discovery.owner import Hands, WorkerOwner
from sglang_router.discovery.pods import PodRules
from sglang_router.discovery.workers_file import FileSource
from sglang_router.relay.addresses import Addresses, LookUp
from sglang_router.routing.source import Source


def discovery_of(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    hands: Hands,
    look_up: LookUp,
    rng: random.Random,
    environ: Mapping[str, str] = os.environ,
) -> Discovery:
    """Make what looks for workers; it has no source when no option asks for one.

    Raises: ConfigError, when a file cannot be used.
    """
    defaults, clock = settings.worker_defaults(args), hands.clock
    make: dict[Source, Callable[[WorkerOwner], Looking]] = {
        Source.KUBERNETES: lambda owner: _kubernetes(
            args,
            owner,
            KubeFiles(kube_config.find(args.kubeconfig, environ)),
            Addresses(loop, look_up, rng),
            rng,
            clock,
        ),
        Source.DISCOVERY_FILE: lambda owner: FileSource(owner, args.discovery_file or "", clock),
        Source.DNS: lambda owner: _dns_source(args, owner, look_up, clock, rng),
    }
    sources = [make[source](WorkerOwner(source, hands, defaults)) for source in settings.looking_sources(args)]
    return Discovery(loop, sources)


def _kubernetes(
    args: RouterArgs,
    owner: WorkerOwner,
    files: KubeFiles,
    addresses: Addresses,
    rng: random.Random,
    clock: Callable[[], float],
) -> Looking:
    """Make what looks for pods: those of an InferencePool, or those with some labels."""
    rules = pod_rules(args)
    if args.inference_pool is not None:
        return InferencePoolSource(owner, args.inference_pool, rules, files, addresses, rng, clock)
    return KubernetesSource(owner, rules, args.service_discovery_namespace, files, addresses, rng, clock)


def pod_rules(args: RouterArgs) -> PodRules:
    """Return how pods become workers."""
    roles = {"prefill": args.prefill_selector, "decode": args.decode_selector}
    chosen = {role: selector for role, selector in roles.items() if selector} or {"regular": args.selector}
    kind, _, key = (args.model_id_from or "").partition(":")
    return PodRules(
        roles=chosen,
        port=args.service_discovery_port,
        ports=args.worker_ports_annotation,
        bootstrap=args.bootstrap_port_annotation,
        model=(kind, key) if kind else None,
    )


def _dns_source(
    args: RouterArgs, owner: WorkerOwner, look_up: LookUp, clock: Callable[[], float], rng: random.Random
) -> dns.DNSSource:
    names = [parse_dns_name(text) for text in args.discovery_dns]
    return dns.DNSSource(owner, names, dns.resolver(names, look_up), clock, rng, args.discovery_dns_interval_secs)
