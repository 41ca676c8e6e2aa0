"""TLS for clients and towards workers: contexts made of PEM files, and made anew when the files change.

    server_files(cert, key)    --+                                  .--> listening_context: new handshakes
                                 +--> TLSFiles.context --refresh()--+
    worker_files(cas, cert, key)-+                                  '--> whoever connects asks for `.context` each time

A change never touches the context in use: OpenSSL takes a new certificate before it finds that the key does not belong
to it, and would then serve neither. So the files are loaded into a fresh context, which takes the old one's place when
all is well; until then, as in the middle of a renewal, the old pair serves on. Open connections go on as they are.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from sglang_router.config.keys import exposure
from sglang_router.errors import ConfigError

log = logging.getLogger("sglang_router.tls")

# TLS 1.2 with forward secrecy and authenticated encryption; the suites of TLS 1.3 are all of that kind.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_PROTOCOLS = ["http/1.1"]
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_TIME_FORMS = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}  # UTCTime, GeneralizedTime
_EXPLICIT_VERSION = 0xA0

Mark = tuple[int, ...]


class TLSFiles:
    """A context and the files it was made of. `build` makes it, or raises ConfigError.

    `expires_at` is when the certificate in use ends, in seconds since 1970; None without one.
    """

    def __init__(self, paths: Sequence[str], build: Callable[[], tuple[ssl.SSLContext, float | None]]) -> None:
        self._paths = paths
        self._build = build
        self._complaint = ""
        self._marks = self._look()
        self.context, self.expires_at = build()

    def refresh(self) -> bool:
        """Looks whether the files changed; True if new ones are in use now. To be called every few seconds.

        Files that cannot be used are told once, and tried again at each call: only what is in use counts as seen.
        """
        marks = self._look()
        if marks == self._marks:
            self._complaint = ""
            return False
        try:
            self.context, self.expires_at = self._build()
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("TLS: %s; the files loaded before stay in use", error)
            return False
        self._marks, self._complaint = marks, ""
        log.info("TLS: loaded %s anew", ", ".join(self._paths))
        return True

    def _look(self) -> tuple[Mark, ...]:
        return tuple(map(_mark, self._paths))


def server_files(cert: str, key: str, clock: Callable[[], float] = time.time) -> TLSFiles:
    """The certificate (with its chain) and the key shown to clients. `clock` gives seconds since 1970.

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
    """What workers are verified by: `cas`, files of trusted certificates, or the system's if there are none.

    cert, key  shown to workers that ask for a certificate; both or neither

    Raises: ConfigError
    """

    def build() -> tuple[ssl.SSLContext, float | None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _harden(context)
        for path in cas:
            context.load_verify_locations(cadata=_certificates(path))
        if not cas:
            context.load_default_certs()
        return context, _load_pair(context, cert, key, clock()) if cert and key else None

    return TLSFiles([path for path in (*cas, cert, key) if path], build)


def listening_context(files: TLSFiles) -> ssl.SSLContext:
    """The context for a listening socket: each handshake takes the files' current one."""

    def newest(tls: ssl.SSLObject, name: str, context: ssl.SSLContext) -> None:
        tls.context = files.context

    context = files.context
    context.sni_callback = newest  # also called for clients that name no server
    return context


def explain(error: OSError) -> str:
    """What went wrong with an https worker, in words for whoever runs it; "" if TLS has no part in it.

    Servers on asyncio hang up without an alert, so that a reset may be all there is to see of a refusal.
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


def _mark(path: str) -> Mark:
    """What changes when a file does, behind symbolic links too (Kubernetes swaps those); empty if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def _load_pair(context: ssl.SSLContext, cert: str, key: str, now: float) -> float:
    """Loads certificate and key; returns when the certificate ends.

    Raises: ConfigError that names the file at fault. Certificates out of date are only warned of.
    """
    certificates = _certificates(cert)
    _check_key(key)
    try:
        # OpenSSL would ask for a password at the terminal if none were given.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(_pair_fault(error.reason or "", cert, key)) from None
    except OSError as error:  # gone since it was looked at
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


def _certificates(path: str) -> str:
    """The certificates in a PEM file, without what stands between them.

    Raises: ConfigError
    """
    text = _text(path)
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


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("latin-1")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")


# -- dates: the ssl module tells those of a peer's certificate, not of one's own --------------------------------------


def _validity(certificates: str) -> tuple[float, float]:
    """From when to when the first certificate is valid, in seconds since 1970 (RFC 5280 4.1)."""
    first = _CERTIFICATE.findall(certificates)[0]
    (_, certificate), *_ = _elements(ssl.PEM_cert_to_DER_cert(first))
    (_, signed), *_ = _elements(certificate)
    parts = [content for tag, content in _elements(signed) if tag != _EXPLICIT_VERSION]
    _serial, _algorithm, _issuer, validity, *_ = parts
    begins, ends = (_moment(tag, content) for tag, content in _elements(validity))
    return begins, ends


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element of a DER sequence; OpenSSL has read it before, so it is well-formed."""
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
