"""Where an engine publishes its KV events: what it says of that itself, else what an option says.

    SGLang   /server_info         kv_events: host, port of rank 0, and the port of rank 0 for replays
    vLLM     /kv_event_sources    a list, one entry for each data-parallel rank; in 0.32 a map by rank
    option   tcp://{host}:5557    {host}: that of the worker's URL; a rank's port is so many higher

An engine that binds to all addresses names none, so the worker's host is taken. Readers take the decoded answer, and
skip what is missing or of another shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.worker import Worker
from sglang_router.workers.engine_answers import ReportFields
from sglang_router.workers.engine_survey import Question, ask

_ANY_HOST = frozenset(("*", "", "0.0.0.0", "::"))  # noqa: S104
_SCHEMES = ("tcp://", "ipc://")


class Published(NamedTuple):
    """Where one rank publishes. replay: the address for what was missed; "": none."""

    endpoint: str
    replay: str = ""
    topic: str = ""


class Templates(NamedTuple):
    """The addresses of engines that do not tell theirs; None: not known."""

    endpoint: str | None = None
    replay: str | None = None


async def sources_of(pool: ConnectionPool, worker: Worker, templates: Templates) -> dict[int, Published]:
    """Ask a worker's engine where it publishes, by rank; empty when nobody knows."""
    questions = (
        Question(b"/server_info", server_info),
        Question(b"/get_server_info", server_info),
        Question(b"/kv_event_sources", kv_event_sources),
    )
    answer = await ask(pool, worker, questions, worker.spec.health.timeout)
    host = urlsplit(worker.spec.url).hostname or ""
    rank = worker.dp_rank or 0
    found: dict[int, Published] = answer.get("kv_sources", {})
    if not found and templates.endpoint is not None:
        endpoint, replay = ("" if each is None else _of_rank(each, rank) for each in templates)
        found = {rank: Published(endpoint, replay)}
    return {
        number: Published(_at(each.endpoint, host), _at(each.replay, host), each.topic)
        for number, each in found.items()
        if each.endpoint.startswith(_SCHEMES)
    }


def server_info(answer: Any, rank: int | None) -> ReportFields:
    """Read SGLang's /server_info."""
    said = answer.get("kv_events") if isinstance(answer, dict) else None
    if not isinstance(said, dict) or said.get("publisher") != "zmq":
        return {}
    port, replay, ranks = said.get("endpoint_port_base"), said.get("replay_endpoint_port_base"), said.get("dp_size")
    host, topic = said.get("endpoint_host"), said.get("topic")
    if not isinstance(port, int):
        return {}
    replay_host = said.get("replay_endpoint_host", host)
    found = {
        number: Published(
            f"tcp://{_bracketed(host)}:{port + number}",
            f"tcp://{_bracketed(replay_host)}:{replay + number}" if isinstance(replay, int) else "",
            topic if isinstance(topic, str) else "",
        )
        for number in range(ranks if isinstance(ranks, int) and 0 < ranks <= 1024 else 1)
    }
    return {"kv_sources": found}


def kv_event_sources(answer: Any, rank: int | None) -> ReportFields:
    """Read vLLM's /kv_event_sources."""
    if isinstance(answer, dict):
        ranks = {int(key): each for key, each in answer.items() if key.isdecimal() and isinstance(each, dict)}
        answer = [{**each, "data_parallel_rank": rank} for rank, each in ranks.items()]
    found = {}
    for each in answer if isinstance(answer, list) else ():
        if isinstance(each, dict) and isinstance(each.get("endpoint"), str):
            number, replay, topic = (each.get(name) for name in ("data_parallel_rank", "replay_endpoint", "topic"))
            found[number if isinstance(number, int) else 0] = Published(
                each["endpoint"], replay if isinstance(replay, str) else "", topic if isinstance(topic, str) else ""
            )
    return {"kv_sources": found} if found else {}


def _bracketed(host: Any) -> str:
    """Return a host as it stands in an address; "*" for any."""
    if not isinstance(host, str) or host.strip("[]") in _ANY_HOST:
        return "*"
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _at(endpoint: str, host: str) -> str:
    """Return an address with the worker's host where it names none."""
    scheme, _, rest = endpoint.partition("://")
    name, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not colon:
        return endpoint
    own = name.replace("{host}", host)
    return f"tcp://{_bracketed(host if own.strip('[]') in _ANY_HOST else own)}:{port}"


def _of_rank(template: str, rank: int) -> str:
    """Return an address with the port of a rank."""
    head, colon, port = template.rpartition(":")
    return f"{head}{colon}{int(port) + rank}" if port.isdecimal() else template
