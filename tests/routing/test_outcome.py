"""The table in the head of routing/outcome.py, row by row, and what a status stands for."""

from __future__ import annotations

import pytest

from sglang_router.routing import outcome as outcome_module
from sglang_router.routing.outcome import Hears, Outcome


def test_the_table_in_the_head_of_the_module_is_true() -> None:
    heard = {
        "success": Hears.SUCCESS,
        "nothing": Hears.NOTHING,
        "failure (answer)": Hears.ANSWER_FAILURE,
        "failure (break)": Hears.BREAK_FAILURE,
        "failure (contact)": Hears.CONTACT_FAILURE,
    }
    table = {}
    for line in (outcome_module.__doc__ or "").splitlines():
        name, _, rest = line.strip().partition("  ")
        if name in Outcome.__members__:
            retried, hears = rest.strip().split("  ", 1)
            table[name] = (retried == "yes", heard[hears.strip().split("  ")[0]])
    assert table == {outcome.name: (outcome.retryable, outcome.hears) for outcome in Outcome}


def test_labels_are_unique_and_lower_case() -> None:
    assert [outcome.label for outcome in Outcome] == [outcome.name.lower() for outcome in Outcome]


@pytest.mark.parametrize(
    ("status", "retry_after", "outcome"),
    [
        (200, False, Outcome.SERVED),
        (204, False, Outcome.SERVED),
        (302, False, Outcome.SERVED),
        (400, False, Outcome.REJECTED),
        (401, False, Outcome.REJECTED),
        (404, False, Outcome.REJECTED),
        (408, False, Outcome.REJECTED),
        (413, True, Outcome.REJECTED),
        (422, False, Outcome.REJECTED),
        (429, False, Outcome.BUSY),
        (429, True, Outcome.BUSY),
        (499, False, Outcome.REJECTED),
        (500, False, Outcome.FAILED),
        (500, True, Outcome.FAILED),
        (501, False, Outcome.SERVED),
        (502, False, Outcome.FAILED),
        (503, False, Outcome.FAILED),
        (503, True, Outcome.BUSY),
        (504, True, Outcome.FAILED),
        (505, False, Outcome.SERVED),
        (529, False, Outcome.BUSY),
    ],
)
def test_what_a_status_stands_for(status: int, retry_after: bool, outcome: Outcome) -> None:
    assert Outcome.of_status(status, retry_after) is outcome
