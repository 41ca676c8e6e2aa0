"""Where the API server of Kubernetes is, and how the router shows who it is.

    --kubeconfig FILE, else $KUBECONFIG      current context: server, CA, token (or a file of it) or client certificate
    in a pod                                 KUBERNETES_SERVICE_HOST and _PORT, and the files of the service account
    else ~/.kube/config

    files = KubeFiles(find(...))             reads all; raises ConfigError
    files.access()                           reads them again if they changed: tokens are replaced every hour

A file that cannot be used any more, as in the middle of a change, leaves what was read before in use. Commands that
make tokens (`exec`, as cloud providers use them) are not run: use a service account.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
import ssl
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import yaml

from sglang_router.access.watched import WatchedFiles
from sglang_router.config import small_files
from sglang_router.errors import ConfigError

log = logging.getLogger("sglang_router.discovery")

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_NEITHER = (
    "--service-discovery: this is no pod with a service account, and there is no kubeconfig; name one with --kubeconfig"
)


class KubeAccess(NamedTuple):
    """How to reach the API server.

    host, port  where it listens; TLS unless `tls` is None
    name        the name that its certificate must have
    prefix      of each path
    token       sent as a bearer token; "": none
    token_from  where the token comes from, for messages; never the token
    namespace   the one of the context or the service account; "": unknown
    """

    host: str
    port: int
    name: str
    prefix: str
    tls: ssl.SSLContext | None
    token: str = ""
    token_from: str = ""
    namespace: str = ""

    def __repr__(self) -> str:
        return f"<KubeAccess {self.url}>"

    @property
    def authority(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'http' if self.tls is None else 'https'}://{self.authority}{self.prefix}"


class KubeFiles:
    """The files that say how to reach the API server. `load` reads them; see the module.

    Raises: ConfigError, when they cannot be used at the start.
    """

    _access: KubeAccess

    def __init__(self, load: Callable[[set[str]], KubeAccess]) -> None:
        self._read = load
        self._used: set[str] = set()
        self._load()
        self._watch()

    def _load(self) -> None:
        used: set[str] = set()
        self._access = self._read(used)
        self._used = used

    def _watch(self) -> None:
        used = self._used
        self._files = WatchedFiles(sorted(used), self._load, "Kubernetes", log)
        self._watched = used

    def access(self) -> KubeAccess:
        """Return how to reach the API server, by what the files say now."""
        self._files.refresh()
        if self._used != self._watched:  # a kubeconfig names other files now
            with contextlib.suppress(ConfigError):  # they change just now: they are tried again at the next request
                self._watch()
        return self._access


def find(
    kubeconfig: str | None, environ: Mapping[str, str], account: str = SERVICE_ACCOUNT
) -> Callable[[set[str]], KubeAccess]:
    """Return what reads the files of `KubeFiles`.

    kubeconfig  the file that an option names
    account     the folder with the files of a service account

    Raises: ConfigError, when there is nothing to read.
    """
    named = kubeconfig or environ.get("KUBECONFIG", "")
    if named:
        if os.pathsep in named and kubeconfig is None:
            raise ConfigError("KUBECONFIG names several files; name one of them with --kubeconfig")
        return lambda used: from_kubeconfig(named, used)
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if host:
        return lambda used: from_service_account(host, port, account, used)
    usual = os.path.join(environ.get("HOME", ""), ".kube", "config")
    if not os.path.exists(usual):
        raise ConfigError(_NEITHER)
    return lambda used: from_kubeconfig(usual, used)


# -- in a pod ----------------------------------------------------------------------------------------------------------


def from_service_account(host: str, port: str, folder: str, used: set[str]) -> KubeAccess:
    """Read the files that Kubernetes puts into each pod. Raises: ConfigError."""
    token, ca, namespace = (os.path.join(folder, name) for name in ("token", "ca.crt", "namespace"))
    used.update((token, ca))
    if not os.path.exists(token):
        raise ConfigError(
            f"--service-discovery: {token} is missing; the pod needs a service account"
            " (automountServiceAccountToken: true)"
        )
    context = _context(_text(ca), ca)
    space = _text(namespace).strip() if os.path.exists(namespace) else ""
    return KubeAccess(host, _port(port), host, "", context, _token(_text(token), token), token, space)


# -- kubeconfig --------------------------------------------------------------------------------------------------------


class KubeconfigCluster(msgspec.Struct, kw_only=True, rename="kebab"):
    """`cluster` of a kubeconfig."""

    server: str = ""
    certificate_authority: str | None = None
    certificate_authority_data: str | None = None
    insecure_skip_tls_verify: bool = False
    tls_server_name: str | None = None
    proxy_url: str | None = None


class KubeconfigUser(msgspec.Struct, kw_only=True, rename="kebab"):
    """`user` of a kubeconfig."""

    token: str | None = None
    token_file: str | None = msgspec.field(name="tokenFile", default=None)
    client_certificate: str | None = None
    client_certificate_data: str | None = None
    client_key: str | None = None
    client_key_data: str | None = None
    exec: Any = None
    auth_provider: Any = None
    username: str | None = None


class KubeconfigContext(msgspec.Struct, kw_only=True):
    """`context` of a kubeconfig."""

    cluster: str = ""
    user: str = ""
    namespace: str | None = None


class NamedCluster(msgspec.Struct):
    """An entry of `clusters`."""

    name: str
    cluster: KubeconfigCluster


class NamedUser(msgspec.Struct):
    """An entry of `users`."""

    name: str
    user: KubeconfigUser | None = None


class NamedContext(msgspec.Struct):
    """An entry of `contexts`."""

    name: str
    context: KubeconfigContext


class Kubeconfig(msgspec.Struct, kw_only=True):
    """What is read of a kubeconfig."""

    clusters: list[NamedCluster] | None = None
    users: list[NamedUser] | None = None
    contexts: list[NamedContext] | None = None
    current: str | None = msgspec.field(name="current-context", default=None)


def from_kubeconfig(path: str, used: set[str]) -> KubeAccess:
    """Read the current context of a kubeconfig. Names of files in it are relative to it. Raises: ConfigError."""
    used.add(path)
    try:
        config = msgspec.convert(yaml.safe_load(_text(path)), Kubeconfig)
    except (yaml.YAMLError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"{path} is no kubeconfig: {str(error).splitlines()[0]}") from None
    context = next((each.context for each in config.contexts or () if each.name == config.current), None)
    if context is None:
        raise ConfigError(f"{path} has no context {config.current!r}; set one: kubectl config use-context NAME")
    cluster = next((each.cluster for each in config.clusters or () if each.name == context.cluster), None)
    user = next((each.user for each in config.users or () if each.name == context.user), None) or KubeconfigUser()
    if cluster is None:
        raise ConfigError(f"{path} has no cluster {context.cluster!r}")
    folder = os.path.dirname(os.path.abspath(path))
    return _Reader(path, folder, used).access(cluster, user, context.namespace or "")


class _Reader:
    """Reads what a kubeconfig names. used: gets the names of the files."""

    def __init__(self, path: str, folder: str, used: set[str]) -> None:
        self._path = path
        self._folder = folder
        self._used = used

    def access(self, cluster: KubeconfigCluster, user: KubeconfigUser, namespace: str) -> KubeAccess:
        if user.exec or user.auth_provider or user.username:
            kind = "a command (exec)" if user.exec else "an auth-provider" if user.auth_provider else "a password"
            raise ConfigError(f"{self._path}: {kind} is not supported; use a token or a client certificate")
        if cluster.proxy_url:
            raise ConfigError(f"{self._path}: proxy-url is not supported")
        try:
            parts = urlsplit(cluster.server)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        host = parts.hostname
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{self._path}: the server must be a URL that begins with https://")
        context = None if parts.scheme == "http" else self._tls(cluster, user)
        token, source = "", self._path
        if user.token_file:
            source = self._file(user.token_file)
            token = _token(_text(source), source)
        elif user.token:
            token = _token(user.token, self._path)
        return KubeAccess(
            host,
            port,
            cluster.tls_server_name or host,
            parts.path.rstrip("/"),
            context,
            token,
            source,
            namespace,
        )

    def _tls(self, cluster: KubeconfigCluster, user: KubeconfigUser) -> ssl.SSLContext:
        authority = self._content(cluster.certificate_authority, cluster.certificate_authority_data)
        if cluster.insecure_skip_tls_verify:
            log.warning("Kubernetes: %s says insecure-skip-tls-verify: anybody may pose as the API server", self._path)
            authority = ""
        context = _context(authority, self._path)
        if cluster.insecure_skip_tls_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        certificate = self._content(user.client_certificate, user.client_certificate_data)
        key = self._content(user.client_key, user.client_key_data)
        if bool(certificate) != bool(key):
            raise ConfigError(f"{self._path}: client-certificate and client-key belong together")
        if certificate:
            _show(context, certificate, key, self._path)
        return context

    def _content(self, name: str | None, data: str | None) -> str:
        """Return the text of a file, or the one that stands in the kubeconfig; "" without either."""
        if data:
            try:
                return base64.b64decode(data, validate=True).decode("latin-1")
            except (binascii.Error, ValueError):
                raise ConfigError(f"{self._path} holds data that are not base64") from None
        return _text(self._file(name)) if name else ""

    def _file(self, name: str) -> str:
        path = os.path.join(self._folder, name)
        self._used.add(path)
        return path


# -- parts -------------------------------------------------------------------------------------------------------------


def _context(authority: str, where: str) -> ssl.SSLContext:
    """Return a context that trusts these certificates; with none, those of the system. Raises: ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if not authority:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError, TypeError):
        raise ConfigError(f"{where} holds no certificate that can be read") from None
    return context


def _show(context: ssl.SSLContext, certificate: str, key: str, where: str) -> None:
    """Let a context show a certificate. OpenSSL takes files only: they are private, and gone at once."""
    with tempfile.TemporaryDirectory(prefix="sglang-router-") as folder:
        file = Path(folder, "pair.pem")
        file.touch(0o600)
        file.write_text(f"{certificate}\n{key}", "latin-1")
        try:
            context.load_cert_chain(file, password="")
        except (ssl.SSLError, ValueError):
            raise ConfigError(f"{where}: its client certificate and key cannot be used together") from None


def _token(text: str, where: str) -> str:
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{where} holds no token")
    return token


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"KUBERNETES_SERVICE_PORT: {text!r} is not a port")
    return int(text)


def _text(path: str) -> str:
    return small_files.read(path, 4 << 20).decode("latin-1")
