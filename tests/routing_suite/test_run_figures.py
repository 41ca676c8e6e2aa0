"""The figures of a live run, by arithmetic."""

from __future__ import annotations

from scripts.routing_suite.answers import Answer
from scripts.routing_suite.figures import Costs, Sent, figures, reasons

COSTS = Costs(wall=10.0, router=1.0, engines=4.0, client=0.5, machine=15.0, cores=2)


def sent(moment: float, first: float, last: float, cached: int, error: str = "") -> Sent:
    return Sent(moment, moment + 0.01, moment + first, moment + last, Answer(error, "", 100, cached, 8))


def test_times_count_from_the_moment_at_which_a_request_was_to_be_sent() -> None:
    found = figures([sent(float(n), 0.1 * (n + 1), 1.0 + n, 50) for n in range(10)], [1.0], COSTS)
    assert [round(found[name], 6) for name in ("ttft_p50", "ttft_p90", "ttft_p99")] == [0.6, 1.0, 1.0]
    assert round(found["ttft_mean"], 6) == 0.55
    assert round(found["e2e_p90"], 6) == 10.0
    assert round(found["late_p99"], 6) == 0.01


def test_what_failed_is_counted_and_nothing_else_of_it() -> None:
    all_of_them = [sent(0.0, 0.1, 1.0, 80), sent(1.0, 0.1, 1.0, 40), sent(2.0, 9.0, 9.0, 0, "status 503")]
    found = figures(all_of_them, [1.0], COSTS)
    assert (found["requests"], found["failed"], found["hit"]) == (3, 1, 0.6)
    assert round(found["ttft_p99"], 6) == 0.1
    assert reasons([*all_of_them, sent(3.0, 1.0, 1.0, 0, "cut"), sent(4.0, 1.0, 1.0, 0, "cut")]) == {
        "status 503": 1,
        "cut": 2,
    }


def test_balance_is_the_work_of_the_busiest_by_the_mean() -> None:
    assert figures([], [10.0, 20.0, 30.0], COSTS)["balance"] == 1.5
    assert figures([], [0.0, 0.0], COSTS)["balance"] == 0.0


def test_cpu_time_is_told_as_shares() -> None:
    found = figures([], [1.0], COSTS)
    shares = [found[name] for name in ("cpu_router", "cpu_engines", "cpu_client", "cpu_machine")]
    assert shares == [0.1, 0.4, 0.05, 0.75]
