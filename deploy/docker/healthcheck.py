"""Ask the router in this container whether it is well: status 0, or 1 with the reason.

    healthcheck.py               /liveness: the router answers. What an orchestrator may restart it for
    healthcheck.py /readiness    a request would find a worker. What others may wait for

The port is SGLANG_ROUTER_PORT, else 30000. Neither path needs a key. A port that does not speak plain HTTP is asked
with TLS, without a look at its certificate: that is of another name, and the connection does not leave the container.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

TIMEOUT = 2.0


def asked(connection: http.client.HTTPConnection, path: str) -> int:
    """Return the status of the answer. Raises: OSError, HTTPException."""
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def status(port: int, path: str) -> int:
    """Return the status of the answer of the router at this port. Raises: OSError, HTTPException."""
    try:
        return asked(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT), path)
    except ConnectionRefusedError:
        raise
    except (OSError, http.client.HTTPException):
        trusting = ssl._create_unverified_context()  # noqa: S323
        return asked(http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT, context=trusting), path)


def main(path: str = "/liveness") -> int:
    """Ask, and say what came; return the exit status."""
    try:
        got = status(int(os.environ.get("SGLANG_ROUTER_PORT", "30000")), path)
    except (OSError, http.client.HTTPException) as error:
        print(f"{path}: {error or type(error).__name__}")
        return 1
    print(f"{path}: {got}")
    return 0 if got == 200 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
