"""Certificates for tests, made on the spot with the `openssl` command: an authority, and what it vouches for.

ca = Authority(tmp_path / "ca")
pair = ca.issue("worker", "DNS:localhost,IP:127.0.0.1")     # pair.cert, pair.key: paths of PEM files
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

LOCAL = "DNS:localhost,IP:127.0.0.1"

_CONFIG = "[req]\ndistinguished_name = name\n[name]\n"
_ELLIPTIC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


class Pair(NamedTuple):
    """Paths of a certificate and its key."""

    cert: str
    key: str

    def become(self, other: Pair) -> None:
        """Holds from now on what `other` holds, each file replaced at once as tools that renew certificates do."""
        replace(self.cert, Path(other.cert).read_text())
        replace(self.key, Path(other.key).read_text())


def replace(path: str, content: str) -> None:
    """Puts a new file in the place of one."""
    fresh = Path(path + ".new")
    fresh.touch(0o600)
    fresh.write_text(content)
    fresh.rename(path)


def openssl(*arguments: str) -> None:
    subprocess.run(("openssl", *arguments), check=True, capture_output=True)


class Authority:
    """Signs certificates; `cert` is the path of its own. All files go into `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._config = str(folder / "openssl.cnf")
        Path(self._config).write_text(_CONFIG)
        self.cert, self._key = self._make(
            "ca", ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"), _ELLIPTIC, ()
        )

    def issue(self, name: str, hosts: str = LOCAL, algorithm: tuple[str, ...] = _ELLIPTIC, days: int = 2) -> Pair:
        """A certificate for these hosts (subjectAltName) and its key."""
        return self._make(
            name,
            ("basicConstraints=CA:FALSE", f"subjectAltName={hosts}"),
            algorithm,
            ("-CA", self.cert, "-CAkey", self._key, "-days", str(days)),
        )

    def _make(
        self, name: str, extensions: tuple[str, ...], algorithm: tuple[str, ...], signer: tuple[str, ...]
    ) -> Pair:
        made = Pair(str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key"))
        added = [word for extension in extensions for word in ("-addext", extension)]
        openssl(
            *("req", "-x509", "-config", self._config, "-nodes", "-subj", f"/CN={name}"),
            *(*algorithm, *signer, *added, "-keyout", made.key, "-out", made.cert),
        )
        Path(made.key).chmod(0o600)
        return made
