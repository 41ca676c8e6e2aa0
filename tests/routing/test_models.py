"""Several models behind one router: which worker may get which request, by the names that workers announce."""

from __future__ import annotations

import json
import sys
from types import FrameType

import pytest

from fleets import Bench, facts, spec
from sglang_router.errors import ModelNotFound, ModelRequired, NoWorkers, Unavailable
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.facts import read
from sglang_router.routing.model_names import LONGEST_NAME, LONGEST_TEXT, MOST_NAMES, NO_NAMES, Names, names_of
from sglang_router.routing.multipart import model_of
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import FleetRules, QueueRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker

CHAT = ENDPOINTS[b"/v1/chat/completions"]
PROMPT = b"a prompt that is long enough to count"


class Several:
    """A fleet whose pools follow from what its workers announce."""

    def __init__(self, policy: str = "round_robin", queue: QueueRules | None = None, most_load: int = 0) -> None:
        rules = FleetRules(most_load=most_load, slow_start=0.0)
        self.bench = Bench(0, policy, rules=rules, assign=None, queue=queue)
        self.fleet = self.bench.fleet
        self.pools = self.fleet.pools

    def add(self, name: str, *bases: str, adapters: tuple[str, ...] = (), given: str | None = None) -> Worker:
        said = spec(name)
        worker = self.fleet.add(WorkerSpec(url=said.url, health=said.health, model_id=given), 0.0)
        self.fleet.announced(worker, Names(bases, adapters))
        return worker

    def serve(self, model: str, count: int = 12) -> set[str]:
        """Send requests for a model; return the names of the workers that got them."""
        text = b'"%b"' % model.encode() if model else b""
        urls = {self.bench.send(facts(PROMPT, model=text)).worker.url for _ in range(count)}
        return {url.removeprefix("http://").removesuffix(":1") for url in urls}


def test_case_23_a_request_goes_only_to_workers_that_serve_its_model() -> None:
    """Engines with models A and B behind one router: it was a coin toss."""
    s = Several()
    for name, model in (("a1", "A"), ("b1", "B"), ("a2", "A")):
        s.add(name, model)
    assert (s.serve("A"), s.serve("B")) == ({"a1", "a2"}, {"b1"})
    assert len(s.pools) == 2


def test_case_23_an_unknown_model_is_404_and_no_model_400_and_both_tell_what_there_is() -> None:
    s = Several()
    s.add("a", "A")
    s.add("b", "B")
    with pytest.raises(ModelNotFound, match=r'model "C"\. .* serves A, B\.') as unknown:
        s.serve("C")
    assert (unknown.value.status, unknown.value.code, unknown.value.param) == (404, "model_not_found", "model")
    with pytest.raises(ModelRequired, match=r"names no model\. .* A, B") as missing:
        s.serve("")
    assert (missing.value.status, missing.value.code) == (400, "model_required")
    assert not s.bench.router.leases


def test_case_23_what_the_error_tells_is_bounded() -> None:
    s = Several()
    for number in range(40):
        s.add(f"w{number}", f"{number:03}" + "x" * 200)
    with pytest.raises(ModelNotFound) as unknown:
        s.serve("y" * 900)
    assert len(str(unknown.value)) < 1500
    assert "and 30 more" in str(unknown.value)


def test_with_one_model_the_engine_decides_about_names() -> None:
    """People call a single SGLang "default" or "gpt-4": it serves any name, vLLM refuses it itself."""
    s = Several()
    s.add("one", "A")
    s.add("two", "A", "an alias")
    assert s.pools.only is None
    for model in ("A", "gpt-4", ""):
        assert s.serve(model) == {"one", "two"}
    assert s.serve("an alias") == {"two"}


def test_the_only_model_costs_a_request_nothing() -> None:
    s = Several()
    s.add("one", "A")
    s.add("two", "A")
    s.add("three")
    assert s.pools.only is s.pools.default
    assert s.serve("A") == s.serve("B") == {"one", "two", "three"}


def test_an_adapter_goes_to_the_workers_that_have_it() -> None:
    s = Several()
    s.add("plain", "A")
    s.add("lora", "A", adapters=("sql",))
    s.add("other", "B", adapters=("sql",))
    assert (s.serve("A"), s.serve("sql"), s.serve("B")) == ({"plain", "lora"}, {"lora"}, {"other"})
    assert s.serve("A:sql") == {"lora"}, "SGLang's way to name an adapter of A"
    assert s.serve("A:new") == {"plain", "lora"}, "nobody has it loaded: an engine may load it on demand"


@pytest.mark.parametrize(("having", "ejected"), [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_case_1_requests_for_an_adapter_never_take_out_the_last_that_have_it(having: int, ejected: bool) -> None:
    """Two bad requests for an adapter of one worker opened its breaker, and all others for the adapter got 503."""
    s = Several()
    lora = [s.add(f"lora{n}", "A", adapters=("sql",)) for n in range(having)]
    for n in range(having + 2):
        s.add(f"plain{n}", "A")
    for worker in lora:
        if ejected:
            worker.ejected = "fails"
            s.fleet.pools.changed(worker)
        else:
            failing = [s.fleet.lease(worker) for _ in range(20)]
            for lease in failing:
                lease.close(Outcome.FAILED, 0.0)
            assert worker.breaker is Breaker.OPEN
    assert len(s.serve("sql")) == having - having // 2
    assert not s.serve("A") & {f"lora{n}" for n in range(having)}, "the others have enough without them"
    for worker in lora:
        s.fleet.down(worker, "it ended")
    with pytest.raises(Unavailable):
        s.serve("sql")


def test_case_1_a_full_worker_of_an_adapter_that_is_judged_out_is_waited_for() -> None:
    s = Several(most_load=1)
    lora = s.add("lora", "A", adapters=("sql",))
    s.add("plain0", "A")
    s.add("plain1", "A")
    lora.ejected = "fails"
    s.fleet.pools.changed(lora)
    first = s.bench.ask(facts(PROMPT, model=b'"sql"'), 0.0)
    second = s.bench.ask(facts(PROMPT, model=b'"sql"'), 0.0)
    assert first.attempt.worker is lora
    assert second.waits is not None
    assert second.waits[0] == "room"
    first.attempt.end(now=0.0)
    s.bench.settle(0.0)
    assert second.attempt.worker is lora


def test_an_adapter_stays_with_its_worker_when_others_take_its_seat() -> None:
    s = Several("cache_aware")
    lora, plain = s.add("lora", "A", adapters=("sql",)), s.add("plain", "A")
    first = lora.seat
    for worker in (lora, plain):
        assert s.serve("sql", 1) == {"lora"}
        s.fleet.emptied(worker)
        assert s.serve("sql", 1) == {"lora"}
        while s.pools.tidy(0.0, 100):
            pass
    assert (plain.seat == first, lora.seat != first) == (True, True)
    busy = [s.fleet.lease(lora) for _ in range(40)]  # whatever is chosen by load is chosen elsewhere
    assert s.serve("sql") == {"lora"}
    assert lora.load == len(busy)


def test_an_adapter_with_the_name_of_another_model_takes_no_requests_of_that() -> None:
    s = Several()
    s.add("a", "A", adapters=("B",))
    s.add("b", "B")
    assert s.serve("B") == {"b"}
    assert s.serve("A:B") == {"a"}, "this says which is meant"


def test_workers_whose_models_overlap_share_a_pool() -> None:
    s = Several()
    s.add("ab", "A", "B")
    s.add("bc", "B", "C")
    s.add("d", "D")
    assert [s.serve(model) for model in "ABCD"] == [{"ab"}, {"ab", "bc"}, {"bc"}, {"d"}]
    assert len(s.pools) == 2


def test_a_worker_that_announces_nothing_gets_what_no_other_serves() -> None:
    s = Several()
    s.add("a", "A")
    s.add("any")
    assert s.serve("A") == s.serve("C") == {"a", "any"}, "one model"
    s.add("b", "B")
    assert (s.serve("A"), s.serve("B"), s.serve("C")) == ({"a"}, {"b"}, {"any"})
    with pytest.raises(ModelRequired):
        s.serve("")


def test_what_an_operator_calls_a_worker_is_a_name_too() -> None:
    s = Several()
    s.add("fast", "A", given="quick")
    s.add("slow", "A", given="cheap")
    s.add("b", "B")
    assert (s.serve("quick"), s.serve("cheap"), s.serve("A")) == ({"fast"}, {"slow"}, {"fast", "slow"})


def test_a_model_whose_workers_are_down_is_unavailable_and_not_unknown() -> None:
    s = Several()
    s.add("a", "A")
    b = s.add("b", "B")
    s.fleet.down(b, "it crashed")
    with pytest.raises(Unavailable) as error:
        s.serve("B")
    assert not isinstance(error.value, NoWorkers)
    s.fleet.remove(b)
    assert s.serve("B") == {"a"}, "one model is left: the engine decides"


def test_f26_another_engine_at_the_same_url_changes_its_name_unless_an_operator_gave_it() -> None:
    """`model_id`, and the metrics by it, stayed `model-one` although the engine told `model-two`."""
    s = Several()
    found, given = s.add("a", "model-one"), s.add("b", "model-one", given="mine")
    s.fleet.announced(found, Names(("model-two",)))
    s.fleet.announced(given, Names(("model-two",)))
    assert (found.model, given.model) == ("model-two", "mine")
    assert set(s.pools.models.known.values()) == {"model-two", "mine"}
    s.fleet.announced(found, NO_NAMES)
    assert found.model is None


def test_the_first_model_keeps_its_prefixes_when_a_second_one_comes_and_goes() -> None:
    s = Several("cache_aware")
    a = s.add("a", "A")
    s.serve("A", 1)
    held = s.pools.remembered(a)
    b = s.add("b", "B")
    s.serve("B", 1)
    assert (s.pools.remembered(a), s.pools.remembered(b)) == (held, len(PROMPT))
    s.fleet.announced(s.add("b2"), Names(("B",)))
    assert s.pools.remembered(b) == len(PROMPT)
    s.fleet.remove(b)
    assert s.pools.remembered(a) == held
    assert s.pools.default is s.pools.of(a)


def test_a_worker_that_moves_to_another_pool_is_found_there_with_its_breaker_and_load() -> None:
    s = Several()
    a, other = s.add("a", "A"), s.add("b", "A")
    s.add("c", "B")
    lease = s.fleet.lease(other)
    s.fleet.announced(other, Names(("B",)))
    assert (s.serve("A"), s.serve("B")) == ({"a"}, {"b", "c"})
    lease.close(Outcome.SERVED, 1.0)
    assert (a.load, other.load) == (0, 0)


def test_a_queued_request_follows_its_model() -> None:
    s = Several(queue=QueueRules(max_concurrent=1, queue_size=5))
    a = s.add("a", "A")
    b = s.add("b", "B")
    first = s.bench.ask(facts(model=b'"A"')).attempt
    queued = [s.bench.ask(facts(model=model)) for model in (b'"B"', b'"A"')]
    s.fleet.announced(b, Names(("C",)))
    s.fleet.announced(a, Names(("A", "B")))
    for expected in (queued[0], queued[1]):
        first.end()
        s.bench.settle()
        first = expected.attempt
        assert first.worker is a
    first.end()
    late = s.bench.ask(facts(model=b'"C"'))
    waiting = s.bench.ask(facts(model=b'"B"'))
    s.fleet.announced(a, Names(("A",)))
    late.attempt.end()
    s.bench.settle()
    assert isinstance(waiting.answers[-1], ModelNotFound)


def test_the_longest_name_is_found_with_each_character_escaped() -> None:
    name = "\U0001f600" * LONGEST_NAME
    s = Several()
    s.add("a", name)
    s.add("b", "B")
    for spelled in (json.dumps(name), json.dumps(name, ensure_ascii=False)):
        attempt = s.bench.send(read(ENDPOINTS[b"/generate"], b'{"model":%b,"text":"x"}' % spelled.encode()))
        assert attempt.worker.url == "http://a:1"


@pytest.mark.parametrize("count", [1, 10_000])
def test_names_that_a_worker_announces_are_bounded_in_number_and_length(count: int) -> None:
    """A lying worker announces ten thousand names, or one of 4 MB."""
    names = names_of([f"name {n}" for n in range(count)] + ["x" * 4_000_000, "", 7, None, "a\nb"], ["l" * 257, "ok"])
    assert len(names.bases) + len(names.adapters) <= MOST_NAMES
    assert all(len(name) <= LONGEST_NAME for name in (*names.bases, *names.adapters))
    s = Several()
    s.add("liar", *names.bases)
    assert len(s.pools.models.known) == min(count, MOST_NAMES)
    s.fleet.remove(next(iter(s.fleet)))
    assert s.pools.models.known == {}


def test_a_name_is_found_however_its_json_is_spelled() -> None:
    """PHP writes "org\\/model", and Python's json module escapes what is not ASCII."""
    s = Several()
    s.add("a", "org/modèle")
    s.add("b", "B")
    for text in (b'"org/mod\xc3\xa8le"', b'"org\\/mod\\u00e8le"'):
        assert s.bench.send(read(CHAT, b'{"model":%b,"messages":[]}' % text)).worker.url == "http://a:1"


def test_case_23_many_models_are_divided_in_a_time_that_grows_with_their_names() -> None:
    """It grew with the cube of the models: 71 ms, in which no token moved, for each worker beyond the 400th."""

    def calls(models: int) -> int:
        s = Several()
        for number in range(models):
            s.add(f"w{number}", f"model {number}", f"alias {number}")
        seen = 0

        def count(frame: FrameType, event: str, arg: object) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            s.add("last", "another model")
        finally:
            sys.setprofile(None)
        assert len(s.pools) == models + 1
        return seen

    assert calls(80) < 2.5 * calls(40)


def test_f6_the_facts_of_a_request_hold_no_name_that_is_too_long_to_be_one() -> None:
    long = b'"' + b"x" * 4_000_000 + b'"'
    one = read(CHAT, b'{"model":%b,"messages":[]}' % long)
    assert len(one.model) == LONGEST_TEXT
    assert len(one.namespace) <= 64
    other = read(CHAT, b'{"model":%b,"messages":[]}' % (long[:-1] + b'y"'))
    assert one.namespace != other.namespace


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x\r\n', b'"whisper"'),
        (
            b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n'
            b'--x\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: text/plain\r\n\r\nw\r\n--x--'
            % bytes(100_000),
            b'"w"',
        ),
        (b'--x\r\nContent-Disposition: form-data; name="model_name"\r\n\r\nw\r\n--x\r\n', b""),
        (b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--x\r\n' % (b"w" * 2000), b""),
        (b"", b""),
    ],
)
def test_the_model_of_a_form(form: bytes, found: bytes) -> None:
    assert model_of(form) == found
    assert read(ENDPOINTS[b"/v1/audio/transcriptions"], form).model == found


def part(head: bytes, value: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + value + b"\r\n"


AUDIO = part(b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav', bytes(1 << 20))
MODEL = part(b'name="model"', b"w")
LONG_PROMPT = part(b'name="prompt"', b"p" * 300_000)


@pytest.mark.parametrize(
    "parts",
    [
        [AUDIO, MODEL, LONG_PROMPT],
        [LONG_PROMPT, MODEL, AUDIO],
        [part(b'name="model";', b"w"), AUDIO],
        [part(b"name=\"model\"; name*=utf-8''model", b"w")],
        [part(b'filename="name=file"; name=model', b"w")],
        [part(b'name="prompt"', part(b'name="model"', b"not this one").replace(b"--x", b"--y")), MODEL],
        [part(b'name="prompt"', b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nnor this\r\n--'), MODEL],
        [MODEL, part(b'name="file"', b'\r\ncontent-disposition: form-data; name="model"\r\n\r\nv\r\n--'), AUDIO],
        [part(b'name="model"', b"v"), AUDIO, MODEL],
        [part(b'name="prompt"', b""), MODEL],
    ],
)
def test_case_23_the_model_of_a_form_is_found_by_its_delimiters(parts: list[bytes]) -> None:
    """A prompt of 20 kB beside the audio hid the model (400 `model_required`), and a text inside a prompt made one."""
    form = b"".join(parts) + b"--x--\r\n"
    assert model_of(form) == b'"w"'
    assert model_of(bytearray(b"\r\n" + form)) == b'"w"'


def raw(head: bytes) -> bytes:
    return b"--x\r\n" + head + b"\r\n\r\nw\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [raw(b'X: content-disposition: form-data; name="file"\r\nContent-Disposition: form-data; name="model"')],
        [raw(b'Content-Disposition: attachment; name="model"')],
        [part(b"name*=utf-8''mod%65l", b"w")],
        [part(b'name="model"', b"v"), raw(b"Content-Disposition: form-data; name*=utf-8''model")],
    ],
)
def test_a_field_has_the_name_that_engines_read(parts: list[bytes]) -> None:
    """A key for some models got any other one."""
    assert model_of(b"".join(parts) + b"--x--\r\n") == b'"w"'


@pytest.mark.parametrize(
    "parts",
    [
        [MODEL, raw(b'Content-Disposition: form-data; name="a"\r\nContent-Disposition: form-data; name="model"')],
        [MODEL, part(b'name="a"; name="model"', b"v")],
        [MODEL, part(b"name=a; name*=utf-8''model", b"v")],
        [MODEL, part(b'name="model"\r\nX: ' + b"x" * 5000, b"v")],
        [MODEL, *[part(b'name="a"', b"")] * 300, part(b'name="model"', b"v")],
        [MODEL, part(b'name="a"; name="model"', b"v"), AUDIO, MODEL],
    ],
)
def test_where_readers_of_forms_differ_a_form_names_no_model(parts: list[bytes]) -> None:
    assert model_of(b"".join(parts) + b"--x--\r\n") == b""


@pytest.mark.parametrize(
    "form", [b"--", b"--x", b"--x\r\n", b"--x\r\n\r\n--x--", b"\r\n", MODEL[:-2], AUDIO, b"--x--\r\n"]
)
def test_a_form_that_is_none_has_no_model(form: bytes) -> None:
    assert model_of(form) == b""


def test_a_worker_that_starts_does_not_hide_an_unknown_model() -> None:
    s = Several()
    s.add("a", "A")
    s.add("b", "B")
    new = s.fleet.add(spec("new", checked=True), 0.0)
    assert new.health is Health.STARTING
    assert s.bench.ask(facts(model=b'"C"')).waits is not None, "it may be the model that starts"
    s.fleet.announced(new, Names(("A",)))
    s.bench.settle()
    with pytest.raises(ModelNotFound):
        s.serve("C")
