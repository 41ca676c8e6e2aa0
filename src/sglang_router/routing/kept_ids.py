"""Which worker keeps what an id names: responses, conversations, files and batches stay in the engine that made them.

    keep(id, worker)    an answer had this id, or the worker answered a request about it
    holder(id)          the worker; None when nobody knows, or its process has ended since

A request *follows* an id when it continues or uses it (POST /v1/responses with `previous_response_id`, POST /v1/batches
with `input_file_id`), or asks about it (GET /v1/files/{id} and the like). It goes to the worker that keeps it. When
nobody knows which one that is, the workers are asked in turn, until one answers something else than 404
(`routing.router`). So nothing is lost with this table, and what an id names is seen by whom its engine shows it.

One table has the ids of all kinds: engines give each kind a beginning of its own (resp_, conv_, file-, batch_). The ids
that are remembered are bounded, each takes about 300 bytes; the least recently used are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from sglang_router.routing.worker import Worker

_MOST_IDS: Final = 1 << 16


class KeptIds:
    """See the module. most: ids that are remembered."""

    __slots__ = ("_holders", "_most")

    def __init__(self, most: int = _MOST_IDS) -> None:
        self._most = most
        self._holders: OrderedDict[bytes, tuple[Worker, int]] = OrderedDict()  # worker and its life, by id

    def __repr__(self) -> str:
        return f"<KeptIds {len(self._holders)} ids>"

    def keep(self, id: bytes, worker: Worker) -> None:
        """Remember that a worker keeps what has this id."""
        self._holders[id] = (worker, worker.life)
        self._holders.move_to_end(id)
        if len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def holder(self, id: bytes) -> Worker | None:
        """Return the worker that keeps what has this id; None when nobody knows."""
        found = self._holders.get(id)
        if found is None:
            return None
        worker, life = found
        if worker.removed or worker.life != life:
            del self._holders[id]
            return None
        return worker
