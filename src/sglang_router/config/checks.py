"""Checks of option values beyond their type: ranges, addresses, names.

A check takes the typed value and returns it, in its normal form where it has one, or raises ValueError. A `NumberRange`
raises without a message, because the option puts the bounds into its own sentence; the other checks say what is wrong.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import keyword
import re
import shlex
from dataclasses import dataclass
from urllib.parse import urlsplit

from sglang_router.config.dns_names import parse_dns_name
from sglang_router.config.urls import parse_worker_url

_KV_ENDPOINT = re.compile(r"tcp://(?:\{host\}|\[[0-9a-fA-F:.]+\]|[^{}\s/:\[\]]+):\d{1,5}|ipc://[^{}\s]+")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HOST_NAME = re.compile(r"[0-9A-Za-z_.-]+")
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?/?")
_STORE_PREFIX = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_KEY_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_KEY_PREFIX = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_PER_REQUEST = ("x-request-id", "x-client-request-id", "request-id", "traceparent")
_PORTS = {"http": "80", "https": "443"}


@dataclass(frozen=True)
class NumberRange:
    """low <= value <= high; with `open`, low < value. Its `str` completes "a number ..."."""

    low: float
    high: float | None = None
    open: bool = False

    def __call__(self, value: float) -> float:
        too_low = value <= self.low if self.open else value < self.low
        if too_low or (self.high is not None and value > self.high):
            raise ValueError
        return value

    def __str__(self) -> str:
        if self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        return f"above {self.low:g}" if self.open else f"of at least {self.low:g}"


def at_least(low: float) -> NumberRange:
    return NumberRange(low)


def above(low: float) -> NumberRange:
    return NumberRange(low, open=True)


def between(low: float, high: float) -> NumberRange:
    return NumberRange(low, high)


def worker_urls(urls: list[str]) -> list[str]:
    """Return the URLs in their normal form; each must be given once only."""
    normal: list[str] = []
    for url in map(parse_worker_url, _separated(urls)):
        if url in normal:
            raise ValueError(f"worker URL {url} is given twice")
        normal.append(url)
    return normal


def prefill_urls(pairs: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    """Return URLs in their normal form, each with its bootstrap port; each must be given once only."""
    normal = worker_urls([url for url, _ in pairs])
    for url, port in pairs:
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(f"bootstrap port {port} of {url} must be from 1 to 65535")
    return list(zip(normal, [port for _, port in pairs], strict=True))


def prefill_policy(name: str | None) -> str | None:
    """Refuse the policy of the reference router that this one does not have."""
    if name == "bucket":
        raise ValueError(
            "the policy bucket is not available: it spreads prompts by their length, so that long ones do not hold up"
            " short ones. `cost` does that by the time that each takes, `cache_aware` balances loads; give one of them"
        )
    return name


def kv_connector(name: str) -> str:
    """Refuse the connector that was never tried."""
    if name == "mooncake":
        raise ValueError(
            "mooncake (of vLLM) is not available: it was never run against an engine here; use nixl or nixl_push, or"
            " SGLang's engines, whose transfer by Mooncake needs nothing of a router"
        )
    return name


def _separated(texts: list[str]) -> list[str]:
    """Return the members of a list in which one word may hold several, with commas or spaces between them."""
    return [part for text in texts for part in text.replace(",", " ").split()] or texts


def collector(endpoint: str) -> str:
    """Return where a collector of traces listens: host and port, or an http URL."""
    try:
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if "@" in endpoint:
        raise ValueError("the endpoint must not hold credentials; give them in the variable OTEL_EXPORTER_OTLP_HEADERS")
    if not valid or (parts.port is None and "://" not in endpoint) or parts.query:
        raise ValueError(f"{endpoint!r} is not a host and port, as in localhost:4317, or an http URL without a query")
    return endpoint


def scale_range(text: str) -> str:
    """Return MIN:MAX without spaces and leading zeros: whole numbers with 0 <= MIN <= MAX and 1 <= MAX."""
    low, separator, high = (part.strip() for part in text.partition(":"))
    if not (separator and low.isdecimal() and high.isdecimal() and len(low + high) < 12):
        raise ValueError(f"{text!r} is not MIN:MAX, as in 1:8")
    if not int(low) <= int(high) or int(high) < 1:
        raise ValueError(f"{text!r}: MIN must not be above MAX, and MAX must be at least 1")
    return f"{int(low)}:{int(high)}"


def webhook(url: str) -> str:
    """Check an http or https URL with a host. Credentials in it are refused: they would appear in logs."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port, or brackets without an address
        sound = False
    if not sound or not _VISIBLE.fullmatch(url):
        raise ValueError("the webhook must be a URL that begins with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("the webhook's URL must not hold credentials; sign messages with --scale-webhook-secret")
    return url


def issuer_url(url: str) -> str:
    """Check a URL from which keys are fetched: https; or http on this machine, where nobody can change them."""
    try:
        parts = urlsplit(url)
        local = parts.hostname == "localhost" or (bool(parts.hostname) and _is_loopback(str(parts.hostname)))
        sound = parts.port != 0 and (parts.scheme == "https" or (parts.scheme == "http" and local))
    except ValueError:  # an invalid port, or brackets without an address
        sound = False
    if not sound or not parts.hostname or "@" in parts.netloc or not _VISIBLE.fullmatch(url):
        raise ValueError("this is not a URL that begins with https:// (or http://, on this machine only)")
    if parts.fragment:
        raise ValueError("the URL must not have a fragment")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def command(text: str) -> str:
    """Check that a command can be split into words as a shell would do it."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the command cannot be read: {error}") from None
    if not words:
        raise ValueError("the command is empty")
    return text


def address(host: str) -> str:
    """Return the normal form of a host name or IP address to listen on; an IPv6 address may have brackets."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(bare))  # `::` has other spellings
    if not _HOST_NAME.fullmatch(bare):
        hint = "; to listen on all addresses give 0.0.0.0 or ::" if host == "*" else ""
        raise ValueError(f"{host!r} is not a host name or an IP address{hint}")
    return bare.lower()


def host_names(texts: list[str]) -> list[str]:
    """Return names of hosts in lower case, without a dot at their end. One in front: all names below; `*`: any."""
    return [text if text == "*" else _host_name(text) for text in _separated(texts)]


def _host_name(text: str) -> str:
    name = text.lower().rstrip(".")
    if not _HOST_NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{text!r} is not the name of a host, as in router.example.com: give no scheme, port or path")
    return name


def origins(texts: list[str]) -> list[str]:
    """Return origins as browsers send them (RFC 6454): scheme, host, and the port if it is not the default; or `*`."""
    return [text if text == "*" else _origin(text) for text in _separated(texts)]


def _origin(text: str) -> str:
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not an origin, as in https://chat.example.com")
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and port != _PORTS.get(scheme) else "")


def path(value: str) -> str:
    """Check a path that can be part of a request line."""
    if not value.startswith("/") or not _VISIBLE.fullmatch(value):
        raise ValueError(f"{value!r} is not a path: it must begin with / and contain no spaces")
    return value


def kv_endpoint(value: str) -> str:
    """Check the address of a ZeroMQ socket, in which {host} may stand for a worker's host."""
    if not _KV_ENDPOINT.fullmatch(value):
        raise ValueError(f"{value!r} is not an address, as in tcp://{{host}}:5557")
    return value


def store_prefix(text: str) -> str:
    """Check what the names of keys in a store begin with. Braces would decide where a cluster keeps them."""
    if not _STORE_PREFIX.fullmatch(text):
        raise ValueError(f"{text!r} is not a prefix: 1 to 64 letters, digits and ._:/-")
    return text


def header_names(names: list[str]) -> list[str]:
    """Return the names of headers in lower case."""
    names = _separated(names)
    for name in names:
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a header")
    return [name.lower() for name in names]


def session_headers(names: list[str]) -> list[str]:
    """Return the names of headers in lower case; an id that each request has anew is refused."""
    names = header_names(names)
    for name in names:
        if name in _PER_REQUEST:
            raise ValueError(f"{name!r} is new for each request, so it names no session")
    return names


def field_names(names: list[str]) -> list[str]:
    """Check names of fields of a JSON body: `name`, or `name.inner` for a member of an object."""
    names = _separated(names)
    for name in names:
        parts = name.split(".")
        if len(parts) > 2 or not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
            raise ValueError(f"{name!r} is not the name of a field, as in session_id or metadata.user_id")
    return names


def bearer_key(key: str) -> str:
    """Check a key that can be sent in an Authorization header."""
    if not _VISIBLE.fullmatch(key):
        raise ValueError("the key must consist of visible ASCII characters without spaces")
    return key


def namespace(name: str) -> str:
    """Check the name of a Kubernetes namespace (RFC 1123 label)."""
    if len(name) > 63 or not _LABEL.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a namespace: small letters, digits and -")
    return name


def inference_pool(text: str) -> str:
    """Check the name of an InferencePool: NAMESPACE/NAME."""
    space, slash, name = text.partition("/")
    if not slash or len(name) > 253 or not _KEY_PREFIX.fullmatch(name):
        raise ValueError(f"{text!r} is not NAMESPACE/NAME, as in default/llama")
    return f"{namespace(space)}/{name}"


def pod_key(key: str) -> str:
    """Check the key of a label or an annotation of Kubernetes: PREFIX/NAME or NAME."""
    prefix, slash, name = key.rpartition("/")
    sound = _KEY_NAME.fullmatch(name) and (_KEY_PREFIX.fullmatch(prefix) or not slash)
    if not sound or len(name) > 63 or len(prefix) > 253:
        raise ValueError(f"{key!r} is not the key of a label or an annotation, as in example.com/name")
    return key


def pod_labels(labels: dict[str, str]) -> dict[str, str]:
    """Check labels that pods must have: keys, and values of at most 63 letters, digits, `-`, `_` and `.`."""
    for key, value in labels.items():
        pod_key(key)
        if len(value) > 63 or (value and not _KEY_NAME.fullmatch(value)):
            raise ValueError(f"{value!r} is not the value of a label; a selector is a list of KEY=VALUE")
    return labels


def model_source(text: str) -> str:
    """Check what names the model of a pod: namespace, label:KEY or annotation:KEY."""
    kind, colon, key = text.partition(":")
    if (kind, colon) == ("namespace", "") or (kind in ("label", "annotation") and key):
        return f"{kind}{colon}{pod_key(key) if colon else ''}"
    raise ValueError(f"{text!r} is not namespace, label:KEY or annotation:KEY")


def workers_file(path: str) -> str:
    """Check the name of a file that lists workers: its end tells the format."""
    if not path.lower().endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"{path}: the name of the file must end in .yaml, .yml or .json, which tells its format")
    return path


def dns_names(texts: list[str]) -> list[str]:
    """Check names of --discovery-dns; each must be given once only."""
    texts = _separated(texts) if texts else []
    for number, text in enumerate(texts):
        parse_dns_name(text)
        if text in texts[:number]:
            raise ValueError(f"{text} is given twice")
    return texts


def buckets(bounds: list[float]) -> list[float]:
    """Check the upper bounds of a histogram."""
    if not bounds or bounds[0] <= 0 or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise ValueError("the buckets must be positive and ascending")
    return bounds
