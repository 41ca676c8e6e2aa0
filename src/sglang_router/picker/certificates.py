"""Certificate and key of the gRPC port, read again when the files change: each handshake looks at their times."""

from __future__ import annotations

import logging
import os
from typing import Any

import grpc

from sglang_router.errors import ConfigError

log = logging.getLogger("sglang_router.picker")


class CertificateFiles:
    """A certificate with its chain and its key, both PEM. gRPC calls `renewed` in threads of its own."""

    def __init__(self, cert: str, key: str) -> None:
        self._paths = (key, cert)
        self._seen = self._times()

    def __repr__(self) -> str:
        return f"<CertificateFiles {self._paths[1]}>"

    def _times(self) -> tuple[int, ...]:
        return tuple(os.stat(path).st_mtime_ns for path in self._paths)

    def read(self) -> Any:
        """Return key and certificate as gRPC wants them. Raises: OSError."""
        contents = []
        for path in self._paths:
            with open(path, "rb") as file:
                contents.append(file.read())
        return grpc.ssl_server_certificate_configuration([tuple(contents)])

    def renewed(self) -> Any:
        """Return the pair if the files have changed, else None. What cannot be read leaves the old pair in use."""
        try:
            times = self._times()
            if times == self._seen:
                return None
            found = self.read()
        except OSError as error:
            log.warning("the certificate of the endpoint picker cannot be read again: %s", error)
            return None
        self._seen = times
        log.info("the certificate of the endpoint picker was read again")
        return found


def credentials(cert: str, key: str) -> Any:
    """Return gRPC's credentials for these files. Raises: ConfigError, when they cannot be read."""
    try:
        files = CertificateFiles(cert, key)
        return grpc.dynamic_ssl_server_credentials(files.read(), files.renewed)
    except OSError as error:
        raise ConfigError(f"--epp-tls-cert-path, --epp-tls-key-path: {error}") from None
