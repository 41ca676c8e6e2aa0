"""TLS for clients and towards workers: contexts made from PEM files, and made again when the files change.

    server_files(cert, key)    --+                                  .--> listening_context: each new handshake
                                 +--> TLSFiles.context --refresh()--+
    worker_files(cas, cert, key)-+                                  '--> the connection pool, for each new connection

A change never touches the context in use: OpenSSL loads a new certificate before it finds that the key does not match
it, and could then serve neither. So the files are loaded into a new context, which replaces the old one when that
worked. Until then, as in the middle of a renewal, the old pair stays in use. Open connections are not affected.
"""

from __future__ import annotations

import logging
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone

from sglang_router.access.watched import WatchedFiles
from sglang_router.config import small_files
from sglang_router.config.keys import exposure
from sglang_router.errors import ConfigError

log = logging.getLogger("sglang_router.tls")

# TLS 1.2 with forward secrecy and authenticated encryption; the suites of TLS 1.3 are all of that kind.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_PROTOCOLS = ["http/1.1"]
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_TIME_FORMS = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}  # UTCTime, GeneralizedTime
_EXPLICIT_VERSION = 0xA0
_LARGEST = 16 << 20
"""Bytes of a file of certificates: those of all public authorities together are a quarter of a MiB."""


class TLSFiles:
    """A context and the files it was made from. `build` makes it, or raises ConfigError.

    expires_at  when the certificate in use expires, in seconds since 1970; None without one
    """

    context: ssl.SSLContext
    expires_at: float | None

    def __init__(self, paths: Sequence[str], build: Callable[[], tuple[ssl.SSLContext, float | None]]) -> None:
        self._build = build
        self._files = WatchedFiles(paths, self._load, "TLS", log)

    def _load(self) -> None:
        self.context, self.expires_at = self._build()

    def refresh(self, *, anyway: bool = False) -> bool:
        """Load the files again if they changed, or `anyway`; returns whether new ones are in use now."""
        return self._files.refresh(anyway=anyway)


def server_files(cert: str, key: str, clock: Callable[[], float] = time.time) -> TLSFiles:
    """Load the certificate (with its chain) and the key that are shown to clients. `clock`: seconds since 1970.

    Raises: ConfigError
    """

    def build() -> tuple[ssl.SSLContext, float]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _harden(context)
        context.options |= ssl.OP_NO_RENEGOTIATION
        return context, _load_pair(context, cert, key, clock())

    return TLSFiles((cert, key), build)


def worker_files(
    cas: Sequence[str] = (),
    cert: str | None = None,
    key: str | None = None,
    clock: Callable[[], float] = time.time,
) -> TLSFiles:
    """Load what workers are verified with.

    cas        files of trusted certificates; none: those of the system
    cert, key  shown to workers that ask for a certificate; both or neither

    Raises: ConfigError
    """

    def build() -> tuple[ssl.SSLContext, float | None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _harden(context)
        for path in cas:
            context.load_verify_locations(cadata=_certificates(path, pipe=True))
        if not cas:
            context.load_default_certs()
        return context, _load_pair(context, cert, key, clock()) if cert and key else None

    return TLSFiles([path for path in (*cas, cert, key) if path], build)


def listening_context(files: TLSFiles) -> ssl.SSLContext:
    """Make the context for a listening socket: each handshake uses the current context of the files."""

    def newest(tls: ssl.SSLObject, name: str, context: ssl.SSLContext) -> None:
        tls.context = files.context

    context = files.context
    context.sni_callback = newest  # also called for clients that name no server
    return context


def explain(error: OSError) -> str:
    """Say in words, for operators, what went wrong with an https worker; "" if it is not about TLS.

    Servers on asyncio close without an alert, so a reset may be the only sign of a refusal.
    """
    if isinstance(error, ConnectionResetError):
        return f"the worker broke off the handshake; it {MAY_WANT_CERTIFICATE}"
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "; name its CA in --ca-cert-paths" if error.verify_code in _UNKNOWN_CA else ""
        return f"the worker's certificate is not accepted: {error.verify_message.rstrip('.')}{hint}"
    if not isinstance(error, ssl.SSLError):
        return ""
    reason = error.reason or ""
    return _FAILURES.get(reason, f"TLS with the worker failed: {_words(reason) or error.strerror}")


_UNKNOWN_CA = (18, 19, 20, 21)  # X509_V_ERR_*: self-signed, in the chain; no issuer, here or at all
MAY_WANT_CERTIFICATE = "may want a client certificate (--client-cert-path)"
_NO_CLIENT_CERTIFICATE = "the worker wants a certificate it trusts: see --client-cert-path"
_FAILURES = {
    "WRONG_VERSION_NUMBER": "the worker does not speak TLS: its URL may have to begin with http://",
    "HTTP_REQUEST": "the worker does not speak TLS: its URL may have to begin with http://",
    "UNSUPPORTED_PROTOCOL": "the worker knows only old versions of TLS; 1.2 is needed",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the worker has no version of TLS in common with the router",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": _NO_CLIENT_CERTIFICATE,
    "TLSV1_ALERT_UNKNOWN_CA": _NO_CLIENT_CERTIFICATE,
    "SSLV3_ALERT_BAD_CERTIFICATE": _NO_CLIENT_CERTIFICATE,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": f"the worker refuses the handshake; it {MAY_WANT_CERTIFICATE}",
}


# -- files -------------------------------------------------------------------------------------------------------------


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(_PROTOCOLS)


def _load_pair(context: ssl.SSLContext, cert: str, key: str, now: float) -> float:
    """Load certificate and key; returns when the certificate expires.

    Raises: ConfigError that names the bad file. A certificate out of date is only a warning.
    """
    certificates = _certificates(cert)
    _check_key(key)
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(_pair_fault(error.reason or "", cert, key)) from None
    except OSError as error:  # removed since it was read
        raise ConfigError(f"{cert} or {key} cannot be read: {error.strerror}") from None
    if warning := exposure(key):
        log.warning(warning)
    begins, ends = _validity(certificates)
    if not begins <= now < ends:
        word, moment = ("expired on", ends) if now >= ends else ("is not valid before", begins)
        day = datetime.fromtimestamp(moment, timezone.utc)
        log.warning("TLS: the certificate %s %s %s: it will be refused", cert, word, f"{day:%Y-%m-%d %H:%M} UTC")
    return ends


def _pair_fault(reason: str, cert: str, key: str) -> str:
    if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        return f"the key {key} does not belong to the certificate {cert}"
    if reason.startswith(("EE_", "CA_")):
        return f"{cert} is too weak: {_words(reason)}"
    return f"{key} holds no private key that can be read" + (f": {_words(reason)}" if reason else "")


def _certificates(path: str, *, pipe: bool = False) -> str:
    """Return the certificates in a PEM file, without the text between them. `pipe`: see `small_files.read`.

    Raises: ConfigError
    """
    text = _text(path, pipe=pipe)
    found = _CERTIFICATE.findall(text)
    if not found:
        raise ConfigError(f"{path} holds no certificate in PEM form")
    certificates = "\n".join(found)
    try:
        if len(found) != text.count("-----BEGIN CERTIFICATE-----"):
            raise ValueError
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificates)
    except (ssl.SSLError, ValueError, TypeError):
        raise ConfigError(f"{path} holds a certificate that is damaged or cut off") from None
    return certificates


def _check_key(path: str) -> None:
    text = _text(path)
    if "PRIVATE KEY-----" not in text:
        raise ConfigError(f"{path} holds no private key in PEM form")
    if "ENCRYPTED" in text:
        raise ConfigError(f"the key {path} needs a password; make a plain one: openssl pkey -in {path} -out NEW.key")


def _text(path: str, *, pipe: bool = False) -> str:
    return small_files.read(path, _LARGEST, pipe=pipe).decode("latin-1")


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")


# -- dates: the ssl module reads those of a peer's certificate, but not of our own -----------------------------------


def _validity(certificates: str) -> tuple[float, float]:
    """Return from when to when the first certificate is valid, in seconds since 1970 (RFC 5280 4.1)."""
    first = _CERTIFICATE.findall(certificates)[0]
    (_, certificate), *_ = _elements(ssl.PEM_cert_to_DER_cert(first))
    (_, signed), *_ = _elements(certificate)
    parts = [content for tag, content in _elements(signed) if tag != _EXPLICIT_VERSION]
    _serial, _algorithm, _issuer, validity, *_ = parts
    begins, ends = (_moment(tag, content) for tag, content in _elements(validity))
    return begins, ends


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element of a DER sequence. OpenSSL has read it before, so it is well-formed."""
    at = 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            digits = size & 0x7F
            size = int.from_bytes(der[at : at + digits], "big")
            at += digits
        yield tag, der[at : at + size]
        at += size


def _moment(tag: int, content: bytes) -> float:
    return datetime.strptime(content.decode("ascii"), _TIME_FORMS[tag]).replace(tzinfo=timezone.utc).timestamp()
