"""What a source wants against what is there: the difference is the work to do, and nothing else is.

    wanted   what the source names now, whole: URL -> WantedWorker
    present  who has each of these URLs now, and what else this source owns: URL -> Present
    told     what the source said when the router did it last: URL -> WantedWorker

                                      nobody has the URL     this source has it          another source has it
    wanted, may be added              ADD                    KEEP; AMEND if it says      FOREIGN: it stays theirs
                                                             something else; WITHHOLD
                                                             if it may or may not get
                                                             requests now
    wanted, another instance          ADD                    REPLACE: its cache is cold  FOREIGN
    wanted, not yet (or not any more) --                     KEEP, AMEND, WITHHOLD       --
    not wanted                        --                     REMOVE                      --
    removed by an operator            DISMISSED              --                          --

A worker that an operator removed is *dismissed*: it stays out until the source stops naming it, or names another
instance. What an operator changed of a worker stays until the source says something else about it than before.

Each pass begins with everything that is known, so a pass that was lost, or came late, does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from sglang_router.routing.source import Source

ADD: Final = "add"
REPLACE: Final = "replace"
AMEND: Final = "amend"
WITHHOLD: Final = "withhold"
REMOVE: Final = "remove"
FOREIGN: Final = "foreign"
DISMISSED: Final = "dismissed"


class WantedWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that a source names.

    url       its base URL, in the normal form
    said      the fields of its `WorkerSpec` that the source sets; the others have the router's defaults
    origin    its name in the source
    instance  differs for another process at the same URL; "": the source cannot tell
    addable   it may be added; a worker that is there stays, whether or not
    withheld  why it shall get no new requests; "": it may
    """

    url: str
    said: Mapping[str, Any] = msgspec.field(default_factory=dict)
    origin: str = ""
    instance: str = ""
    addable: bool = True
    withheld: str = ""


class Present(NamedTuple):
    """The worker (or the ranks) at a URL."""

    source: Source
    instance: str
    withheld: str


class Step(NamedTuple):
    """One thing to do. wanted: None for REMOVE."""

    act: str
    url: str
    wanted: WantedWorker | None


def difference(
    source: Source, wanted: Mapping[str, WantedWorker], present: Mapping[str, Present], told: Mapping[str, WantedWorker]
) -> list[Step]:
    """Return the steps that make the workers of this source what it wants; those that remove come last."""
    steps = [step for each in wanted.values() for step in _towards(source, each, present, told)]
    gone = [url for url, there in present.items() if there.source is source and url not in wanted]
    return steps + [Step(REMOVE, url, None) for url in gone]


def _towards(
    source: Source, wanted: WantedWorker, present: Mapping[str, Present], told: Mapping[str, WantedWorker]
) -> Iterator[Step]:
    url = wanted.url
    there, before = present.get(url), told.get(url)
    if there is None:
        if before is not None and before.instance == wanted.instance:
            yield Step(DISMISSED, url, wanted)
        elif wanted.addable:
            yield Step(ADD, url, wanted)
    elif there.source is not source:
        if wanted.addable:
            yield Step(FOREIGN, url, wanted)
    elif there.instance != wanted.instance:
        # One that cannot be added yet still ends the old one: nothing that it had is there any more.
        yield Step(REPLACE, url, wanted) if wanted.addable else Step(REMOVE, url, None)
    else:
        if before is None or (before.said, before.origin) != (wanted.said, wanted.origin):
            yield Step(AMEND, url, wanted)
        if there.withheld != wanted.withheld:
            yield Step(WITHHOLD, url, wanted)
