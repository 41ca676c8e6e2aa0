"""Workers from a file: what may stand in it, what is refused, and what happens when it changes."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from discovery_scenes import DEFAULTS, Scene, scene, write_anew
from sglang_router.discovery.workers_file import FileSource, read
from sglang_router.errors import ConfigError
from sglang_router.routing.source import Source

A, B, C = "http://a:1", "http://b:2", "http://c:3"


def started(made: Scene, path: Path, again: float = 3600.0) -> None:
    owner, clock = made.owner(Source.DISCOVERY_FILE), made.router.loop.time
    made.begin(lambda: FileSource(owner, str(path), clock, every=0.005, again=again))


def test_what_may_stand_in_it(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(
        f"""
        workers:
          - {A}/
          - url: {B}
            model_id: llama
            priority: 9
            cost: 0.5
            worker_type: prefill
            bootstrap_port: 8998
            labels: {{zone: a}}
            api_key: k
            dp_aware: true
            drain: true
        """
    )
    found = read(str(path))
    assert list(found) == [A, B]
    assert found[A].said == {}
    assert found[B].withheld == "its file says drain"
    assert found[B].said == {
        "model_id": "llama",
        "priority": 9,
        "cost": 0.5,
        "worker_type": "prefill",
        "bootstrap_port": 8998,
        "labels": {"zone": "a"},
        "api_key": "k",
        "dp_aware": True,
    }
    assert {each.origin for each in found.values()} == {str(path)}


@pytest.mark.parametrize("content", [{"workers": [A, {"url": B}]}, [A, B]])
def test_json_is_read_too_and_a_list_alone_is_enough(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps(content))
    assert list(read(str(path))) == [A, B]
    path.write_text('{"workers": []}')
    assert read(str(path)) == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "lists no workers; it needs `workers:`"),
        ("workers:", "lists no workers"),
        ("worker: [http://a:1]", "lists no workers"),
        ("workers: [http://a:1", "expected ',' or ']'"),
        ("workers: [http://a:1, http://a:1/]", "worker 2: http://a:1 is there twice"),
        ("workers: [a:1]", "worker 1: worker URL 'a:1' must begin with http"),
        ("workers: [7]", "worker 1: Expected `object`, got `int`"),
        ("workers: [{url: http://a:1, modle_id: x}]", "worker 1: Object contains unknown field `modle_id`"),
        ("workers: [{model_id: x}]", "worker 1: Object missing required field `url`"),
        ("workers: [{url: http://a:1, worker_type: both}]", "worker 1: Invalid enum value 'both'"),
        ("workers: [{url: http://a:1, bootstrap_port: 1}]", "worker 1: only a prefill worker has a bootstrap_port"),
        ("workers: [{url: http://a:1, priority: high}]", "worker 1: Expected `int"),
        ("workers: [{url: http://a:1, api_key: 's3cret key'}]", "worker 1: Expected `str` matching regex"),
        ('workers: [{url: http://a:1, model_id: "a\\nb"}]', "worker 1: `model_id` cannot be the name of a model"),
        ('workers: [{url: http://a:1, labels: {a: "x\\ud800"}}]', r"half a character, as in \ud800"),
        ('workers: [{url: http://a:1, labels: {"\\ud800": x}}]', r"half a character, as in \ud800"),
        ("workers: [{url: http://a:1, api_key: *s3cret}]", "found undefined alias '***' in line 1"),
        ("workers: [{url: http://a:1, cost: .nan}]", "worker 1: Expected `float` > 0.0"),
    ],
)
def test_what_is_refused_names_the_place_and_no_key(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(str(path))
    assert why in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text('{"workers": [}')
    with pytest.raises(ConfigError, match=r"w.json: Expecting value: line 1 column 14"):
        read(str(path))
    path.write_text('{"workers": ["http://a:1"], "workers": []}')
    with pytest.raises(ConfigError, match=r"w.json: a mapping has a field twice"):
        read(str(path))
    path.write_text('{"workers": [{"url": "http://a:1", "model_id": "\\ud83d\\ude00"}]}')
    assert read(str(path))["http://a:1"].said == {"model_id": "\U0001f600"}
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(str(tmp_path / "nothing.json"))


def test_a_change_is_followed_and_a_bad_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(f"workers: [{A}, {B}]")
    with scene() as made:
        started(made, path)
        made.until_urls(A, B)
        kept = made.worker(B)
        write_anew(path, f"workers: [{B}, {C}]")
        made.until_urls(B, C)
        assert made.worker(B) is kept
        write_anew(path, "workers: [")
        made.until(lambda: "expected the node content" in made.report_error())
        assert made.urls() == [B, C]
        (report,) = made.router.get("/workers").json()["discovery"]
        assert report["error"] == made.do(made.report_error)
        assert report["failures"] == {"invalid": 1}
        path.unlink()
        made.until(lambda: "cannot be read" in made.report_error())
        assert made.urls() == [B, C]
        write_anew(path, f"workers: [{C}]")
        made.until_urls(C)
        made.until(lambda: made.report_error() == "")
        assert made.report.removed == {"gone": 2}
        assert len([text for text in caplog.messages if "expected the node content" in text]) == 1


def test_a_worker_that_its_owner_gave_up_is_taken_over(tmp_path: Path) -> None:
    """The file did not change, so it was never looked at again."""
    path = tmp_path / "w.yaml"
    path.write_text(f"workers: [{A}, {B}]")
    with scene() as made:
        made.router.call(lambda: made.fleet.add(DEFAULTS.spec(A, Source.FLAGS), 0.0))
        started(made, path, again=0.02)
        made.until_urls(A, B)
        assert made.worker(A).spec.source is Source.FLAGS
        made.do(
            lambda: made.fleet.remove(made.fleet.entries(A)[0]), lambda: made.fleet.remove(made.fleet.entries(B)[0])
        )
        made.until_urls(A)
        assert made.worker(A).spec.source is Source.DISCOVERY_FILE
        passes = made.report.passes
        made.until(lambda: made.discovery.reports()[0].passes > passes + 2)
        assert made.urls() == [A], "the operator removed its worker: it stays out"


def test_drain_and_other_changes_keep_the_worker(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(f"workers: [{{url: '{A}', priority: 9, labels: {{x: y}}}}]")
    with scene() as made:
        started(made, path)
        made.until_urls(A)
        worker = made.worker(A)
        write_anew(path, f"workers: [{{url: '{A}', labels: {{x: z}}, drain: true}}]")
        made.until(lambda: worker.withheld == "its file says drain")
        assert (worker.spec.labels, worker.spec.priority) == ({"x": "z"}, 50)  # the default is back
        write_anew(path, f"workers: [{A}]")
        made.until(lambda: worker.in_rotation)
        assert (worker.spec.labels, worker.removed) == ({}, False)


def test_a_drained_worker_may_be_new(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(f"workers: [{{url: '{A}', drain: true}}]")
    with scene() as made:
        started(made, path)
        made.until(lambda: any(worker.withheld for worker in made.fleet))
        assert made.do(lambda: made.fleet.candidates(0.0)) == ()


def test_a_bad_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with scene() as made:
        owner = made.owner(Source.DISCOVERY_FILE)
        with pytest.raises(ConfigError, match="cannot be read"):
            FileSource(owner, str(tmp_path / "w.yaml"), made.router.loop.time)
        made.begin(lambda: FileSource(owner, _good(tmp_path), made.router.loop.time))


def _good(folder: Path) -> str:
    path = folder / "good.yaml"
    path.write_text("workers: []")
    return str(path)


def test_ranks_of_an_engine_are_one_worker_of_the_file(tmp_path: Path) -> None:
    """The source names the engine; `workers.ranks` makes workers of its ranks, which belong to the source as well."""
    path = tmp_path / "w.yaml"
    path.write_text(f"workers: [{{url: '{A}', dp_aware: true, drain: true}}]")
    with scene() as made:
        started(made, path)
        made.until_urls(A)
        whole = made.worker(A)

        def split() -> None:
            for rank in range(2):
                spec = msgspec.structs.replace(whole.spec, dp_rank=rank)
                made.fleet.withhold(made.fleet.add(spec, 0.0), whole.withheld)
            made.fleet.remove(whole)

        made.do(split)
        assert made.report.workers == 1
        write_anew(path, f"workers: [{{url: '{A}', dp_aware: true, model_id: m}}]")
        made.until(lambda: all(each.in_rotation and each.spec.model_id == "m" for each in made.fleet))
        assert made.urls() == [f"{A}@0", f"{A}@1"]
        write_anew(path, "workers: []")
        made.until_urls()
    assert DEFAULTS.dp_aware is False
