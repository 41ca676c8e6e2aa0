"""Readers of what engines answer about themselves: what they serve, how much they hold, how busy they are.

    SGLang      /server_info  /v1/models  /model_info   /v1/loads, older: /get_load
    vLLM        /version      /v1/models                /metrics, without them: /load
    llama.cpp   /props        /v1/models                /metrics
    built-in    as SGLang

`workers.engine_survey` asks. Each reader takes the decoded answer and the data-parallel rank that is meant (None: the
engine as a whole, the sum of its ranks), and returns the fields of an `EngineReport` that it found. A value that is
missing, of another shape, negative or not a number is left out: it is neither an error nor a zero. Nothing here does
I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sglang_router.routing.model_names import names_of

_VLLM = "vllm"
_MAX_COUNT = 1 << 53
"""Counts above this are nonsense."""

ReportFields = dict[str, Any]
"""Some fields of an EngineReport, by name; and `names`, the names of models that the engine announces."""
Reader = Callable[[Any, "int | None"], ReportFields]
"""Takes the decoded answer and the rank."""


# -- what an engine is -------------------------------------------------------------------------------------------------


def models(answer: Any, rank: int | None) -> ReportFields:
    """Read /v1/models: the first model, and all names. `max_model_len` is vLLM's and SGLang's, `meta` llama.cpp's.

    An entry with a parent is an adapter: vLLM and SGLang list the loaded ones beside the model. `owned_by` says that an
    engine is vLLM. This is the first answer, so that is known before the engine gets a request.
    """
    listed = _objects(_field(answer, "data"))
    first = next(iter(listed), None)
    length = _count(_field(first, "max_model_len"))
    if length is None:
        length = _count(_field(_field(first, "meta"), "n_ctx"))
    names = names_of(
        [name for entry in listed if not entry.get("parent") for name in _names(entry)],
        [entry.get("id") for entry in listed if entry.get("parent")],
    )
    return _found(
        model=_text(_field(first, "id")),
        context_length=length,
        names=names if names.bases else None,
        runtime=_VLLM if _field(first, "owned_by") == _VLLM else None,
    )


def _names(entry: dict[str, Any]) -> list[Any]:
    """Return the names of a model: its id, and llama.cpp's `aliases`.

    What was loaded (`root`) is no name: vLLM does not serve it, and in containers it is often the same folder for all.
    """
    aliases = entry.get("aliases")
    return [entry.get("id"), *(aliases if isinstance(aliases, list) else [])]


def server_info(answer: Any, rank: int | None) -> ReportFields:
    """Read SGLang's /server_info: its options, what its schedulers found, and the state of each rank."""
    ranks = _count(_field(answer, "dp_size")) or None
    each = [_capacity_of(state) for state in _of_rank(_objects(_field(answer, "internal_states")), rank)]
    capacity = _sum(each)
    if capacity is None:  # the figure of one scheduler
        capacity = _count(_field(answer, "max_total_num_tokens"))
        if capacity is not None and rank is None:
            capacity *= ranks or 1
    role = _field(answer, "disaggregation_mode")
    return _found(
        model=_text(_field(answer, "served_model_name")),
        role=role if role in ("prefill", "decode") else "regular" if role in ("null", "") else None,
        bootstrap_port=_port(_field(answer, "disaggregation_bootstrap_port")),
        window=_window_of(answer, rank, ranks),
        version=_text(_field(answer, "version")),
        context_length=_count(_field(answer, "context_length")),
        capacity_tokens=capacity,
        ranks=ranks,
    )


def _window_of(answer: Any, rank: int | None, ranks: int | None) -> int | None:
    """Return how many requests an engine runs at once; its figure is that of one scheduler."""
    states = _of_rank(_objects(_field(answer, "internal_states")), rank)
    each = [_count(_field(state, "effective_max_running_requests_per_dp")) for state in states]
    window = _sum(each)
    if window is None:
        window = _count(_field(answer, "max_running_requests"))
        if window is not None and rank is not None and ranks:
            window = max(window // ranks, 1)
    return window or None


def _capacity_of(state: Any) -> int | None:
    own = _count(_field(state, "max_total_num_tokens"))
    return _count(_field(_field(state, "memory_usage"), "token_capacity")) if own is None else own


def model_info(answer: Any, rank: int | None) -> ReportFields:
    """Read SGLang's /model_info."""
    return _found(model=_text(_field(answer, "model_path")))


def version(answer: Any, rank: int | None) -> ReportFields:
    """Read vLLM's /version."""
    found = _text(_field(answer, "version"))
    return _found(version=found, runtime=_VLLM if found else None)


def props(answer: Any, rank: int | None) -> ReportFields:
    """Read llama.cpp's /props. `n_ctx` is that of one slot; slots may share cells, so it tells no capacity."""
    length = _count(_field(_field(answer, "default_generation_settings"), "n_ctx"))
    return _found(version=_text(_field(answer, "build_info")), context_length=length)


# -- how busy it is ----------------------------------------------------------------------------------------------------


def loads(answer: Any, rank: int | None) -> ReportFields:
    """Read SGLang's /v1/loads: one row for each rank."""
    rows = _of_rank(_objects(_field(answer, "loads")), rank)
    used, held = _total(rows, "num_used_tokens"), _total(rows, "num_total_tokens")
    return _found(
        running=_total(rows, "num_running_reqs"),
        queued=_total(rows, "num_waiting_reqs"),
        window=_total(rows, "max_running_requests") or None,
        used_tokens=used,
        load_tokens=used if held is None else held,
        capacity_tokens=_total(rows, "max_total_num_tokens") or None,  # 0 before the first forward pass
        prefilled_tokens=_total(rows, "total_prefill_uncached_tokens"),
        prefill_busy_us=_total(rows, "total_prefill_busy_us"),
    )


def get_load(answer: Any, rank: int | None) -> ReportFields:
    """Read SGLang's older /get_load: a row, or one for each rank; its count of requests includes the queued ones."""
    rows = _of_rank(_objects(answer if isinstance(answer, list) else [answer]), rank)
    requests, queued = _total(rows, "num_reqs"), _total(rows, "num_waiting_reqs")
    running = None if requests is None or queued is None or requests < queued else requests - queued
    return _found(running=running, queued=queued, load_tokens=_total(rows, "num_tokens"))


def server_load(answer: Any, rank: int | None) -> ReportFields:
    """Read vLLM's /load. It is 0 unless the engine was started to count requests, so a 0 says nothing."""
    return _found(running=_count(_field(answer, "server_load")) or None) if rank is None else {}


class Sample(NamedTuple):
    """One line in Prometheus' format."""

    name: str
    labels: Mapping[str, str]
    value: float


_RUNNING = ("vllm:num_requests_running", "llamacpp:requests_processing")
_QUEUED = ("vllm:num_requests_waiting", "llamacpp:requests_deferred")
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_CACHE = "vllm:cache_config_info"
METRICS = (*_RUNNING, *_QUEUED, *_USAGE, _CACHE)
"""The metrics that are read; other lines need no parsing."""


def metrics(samples: Iterable[Sample], rank: int | None) -> ReportFields:
    """Read vLLM's and llama.cpp's /metrics. vLLM's ranks differ by the label `engine`."""
    found = list(samples)
    engines = {sample.labels["engine"] for sample in found if sample.name in _RUNNING and "engine" in sample.labels}
    mine = [sample for sample in found if rank is None or sample.labels.get("engine") == str(rank)]
    each = _tokens_per_engine([sample for sample in found if sample.name == _CACHE], len(engines))
    shares = [sample.value for sample in mine if sample.name in _USAGE]
    used = capacity = None
    if each is not None and engines:
        capacity = each * (len(engines) if rank is None else 1)
        if shares and all(0.0 <= share <= 1.0 for share in shares):
            used = round(sum(shares) * each)
    return _found(
        ranks=len(engines) or None,
        running=_sum([_count(sample.value) for sample in mine if sample.name in _RUNNING]),
        queued=_sum([_count(sample.value) for sample in mine if sample.name in _QUEUED]),
        used_tokens=used,
        capacity_tokens=capacity,
    )


def _tokens_per_engine(infos: list[Sample], engines: int) -> int | None:
    """Return the tokens that the cache of one vLLM rank can hold.

    Every rank reports the blocks of all ranks together.
    """
    for info in infos:
        size = _whole(info.labels.get("kv_cache_size_tokens"))
        if size is not None:
            return size
        blocks, tokens = _whole(info.labels.get("num_gpu_blocks")), _whole(info.labels.get("block_size"))
        if blocks and tokens and engines:
            return blocks * tokens // engines
    return None


# -- reading without trust ---------------------------------------------------------------------------------------------


def _found(**fields: Any) -> ReportFields:
    return {name: value for name, value in fields.items() if value is not None}


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list; a value of another shape has none."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _of_rank(rows: list[dict[str, Any]], rank: int | None) -> list[dict[str, Any]]:
    """Return the rows of one rank, or all. Rows without a rank are in the order of ranks."""
    return [row for place, row in enumerate(rows) if rank is None or row.get("dp_rank", place) == rank]


def _count(value: Any) -> int | None:
    """Return a whole number that is not negative; Prometheus writes it as a float."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= _MAX_COUNT else None


def _port(value: Any) -> int | None:
    found = _count(value)
    return found if found and found <= 65535 else None


def _whole(label: str | None) -> int | None:
    return int(label) if label is not None and label.isascii() and label.isdecimal() and len(label) < 16 else None


def _sum(counts: list[int | None]) -> int | None:
    """Return their sum if there are any and all are known."""
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _total(rows: list[dict[str, Any]], name: str) -> int | None:
    return _sum([_count(row.get(name)) for row in rows])


def _text(value: Any) -> str | None:
    """Return a name; not an empty one, nor one that is too long to be a name or does not print."""
    return value if isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable() else None
