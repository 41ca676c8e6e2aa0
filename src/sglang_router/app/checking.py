"""Check what the options name, without starting anything: files of keys, certificates, workers.

    problems(args)         what a start or a reload would refuse: all of it, not only the first
    start_problems(args)   what only a start reads

`sglang-router check-config` asks both, `app.reload` the first: what is refused there has changed nothing yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from sglang_router.app import settings, shared
from sglang_router.app.caches import caches_of
from sglang_router.config import RouterArgs, keys, small_files
from sglang_router.discovery import kube_config, workers_file
from sglang_router.errors import ConfigError


def problems(args: RouterArgs, *, again: bool = False) -> list[str]:
    """Return why these options cannot be used, a sentence each.

    args   checked options
    again  the files were read before: a pipe is left out, which gives its content once
    """
    files = (
        args.api_key_file,
        args.control_plane_api_keys_file,
        args.server_cert_path,
        args.server_key_path,
        *args.ca_cert_paths,
        args.client_cert_path,
        args.client_key_path,
    )
    checks: list[Callable[[], object]] = [lambda: settings.configured_workers(args)]
    if not (again and any(path and small_files.is_pipe(path) for path in files)):
        checks += (
            lambda: keys.load(
                args.api_key, args.api_key_file, args.control_plane_api_keys, args.control_plane_api_keys_file
            ),
            lambda: settings.server_tls(args),
            lambda: settings.worker_tls(args),
        )
    return _refused(checks)


def start_problems(args: RouterArgs) -> list[str]:
    """Return why a router would not start with these options beside `problems`, or would start without workers."""
    checks: list[Callable[[], object]] = [lambda: caches_of(args), lambda: shared.files_of(args)]
    if args.discovery_file is not None:
        checks.append(lambda: workers_file.read(args.discovery_file or ""))
    if args.service_discovery or args.inference_pool is not None:
        checks.append(lambda: kube_config.find(args.kubeconfig, os.environ))
    return _refused(checks)


def _refused(checks: Iterable[Callable[[], object]]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found.append(str(error))
    return found
