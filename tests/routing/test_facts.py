"""What is read of a request: routing text, namespace, scaffold, streaming; and that nonsense fails in one way only."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleets import Bench
from sglang_router.errors import InvalidJSON
from sglang_router.routing.body_reader import NAMESPACE
from sglang_router.routing.endpoints import ENDPOINTS, UNKNOWN
from sglang_router.routing.facts import LARGE, Facts, Skimming, read
from sglang_router.routing.reserved import HOLDERS, LONGEST_HELD, RESERVED
from sglang_router.routing.tolerant import members

CHAT = b"/v1/chat/completions"


def facts(path: bytes, body: bytes, key: bytes = b"") -> Facts:
    if len(body) <= LARGE:
        return read(ENDPOINTS[path], body, key)
    skimming = Skimming(ENDPOINTS[path], body, key)
    while (found := skimming.step()) is None:
        pass
    return found


def chat(content: str, **fields: Any) -> bytes:
    """A chat request as the OpenAI client writes it."""
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": "m", "messages": messages, **fields}, separators=(",", ":")).encode()


# -- the routing text --------------------------------------------------------------------------------------------------


TEXTS = [
    ("/generate", b'{"text":"hello"}', b'"hello'),
    ("/generate", b'{"text":["a","b"],"sampling_params":{"n":2}}', b'["a","b"'),
    ("/generate", b'{"input_ids":[1, 2,3]}', b"[1, 2,3"),
    ("/generate", b'{"image_data":"u","text":"t"}', b'"t""u'),
    (
        "/v1/chat/completions",
        b'{"messages":[{"role":"user"}],"tools":[{"type":"function"}],"temperature":0}',
        b'[{"type":"function"}][{"role":"user"}',
    ),
    ("/v1/completions", b'{"prompt":"hello","suffix":"x"}', b'"hello'),
    ("/v1/completions", b'{"prompt":[[1,2],[3]]}', b"[[1,2],[3]"),
    ("/v1/responses", b'{"input":"q","instructions":"be brief","tools":[1]}', b'[1]"be brief""q'),
    (
        "/v1/messages",
        b'{"messages":[{"role":"user","content":"q"}],"system":"S"}',
        b'"S"[{"role":"user","content":"q"}',
    ),
    ("/v1/embeddings", b'{"input":["a"]}', b'["a"'),
    ("/v1/classify", b'{"input":"b","text":"a"}', b'"a""b'),
    ("/v1/score", b'{"items":["x"],"query":"q"}', b'"q"["x"'),
    ("/v1/score", b'{"text_2":["b"],"text_1":"a"}', b'"a"["b"'),
    ("/v1/rerank", b'{"documents":["d"],"query":"q"}', b'"q"["d"'),
    ("/rerank", b'{"documents":["d"],"query":"q"}', b'"q"["d"'),
    ("/v1/tokenize", b'{"prompt":"hello"}', b""),
    ("/v1/detokenize", b'{"tokens":[1]}', b""),
    ("/v1/audio/transcriptions", b"--x\r\nnot JSON\r\n--x--", b""),
    ("/v1/responses/{id}", b"", b""),
    ("/v1/responses/{id}/cancel", b"{}", b""),
    ("/v1/responses/{id}/input_items", b"", b""),
    ("/v1/messages/count_tokens", b'{"messages":[{"role":"user","content":"q"}]}', b""),
    ("/invocations", b'{"messages":[{"role":"user","content":"q"}]}', b'[{"role":"user","content":"q"}'),
    ("/invocations", b'{"prompt":"hello"}', b'"hello'),
    ("/completion", b'{"n_predict":1,"prompt":[1,"a",2]}', b'[1,"a",2'),
    (
        "/infill",
        b'{"prompt":"d","input_suffix":"s","input_prefix":"p","input_extra":[{"text":"x"}]}',
        b'[{"text":"x"}]"p""s""d',
    ),
    ("/api/generate", b'{"prompt":"q","system":"S","context":[1,2]}', b'"S"[1,2]"q'),
    ("/api/chat", b'{"messages":[{"role":"user"}],"tools":[1]}', b'[1][{"role":"user"}'),
    ("/api/embed", b'{"input":["a"]}', b'["a"'),
    ("/api/embeddings", b'{"prompt":"a"}', b'"a'),
    ("/pooling", b'{"input":"a"}', b'"a'),
    ("/classify", b'{"input":"b"}', b'"b'),
    ("/score", b'{"text_2":["b"],"text_1":"a"}', b'"a"["b"'),
    ("/v1/moderations", b'{"input":["a"]}', b'["a"'),
    ("/v1/audio/translations", b"--x\r\nnot JSON\r\n--x--", b""),
    ("/v1/audio/speech", b'{"input":"say it","voice":"v"}', b""),
    ("/v1/images/generations", b'{"prompt":"a cat"}', b""),
    ("/v1/images/edits", b"--x\r\nnot JSON\r\n--x--", b""),
    ("/v1/images/variations", b"--x\r\nnot JSON\r\n--x--", b""),
    ("/tokenize", b'{"prompt":"hello"}', b""),
    ("/detokenize", b'{"tokens":[1]}', b""),
    ("/parse/{name}", b'{"text":"a"}', b""),
    ("/parse_function_call", b'{"text":"a","tools":[1]}', b""),
    ("/separate_reasoning", b'{"text":"a"}', b""),
    ("/props", b"", b""),
    ("/slots", b"", b""),
    ("/slots/{slot}", b'{"filename":"f"}', b""),
    ("/api/show", b'{"model":"m"}', b""),
    ("/api/version", b"", b""),
    ("/v1/conversations", b"", b""),
    ("/v1/conversations/{id}", b"", b""),
    ("/v1/conversations/{id}/items", b"not JSON", b""),
    ("/v1/conversations/{id}/items/{item}", b"", b""),
    ("/v1/files", b"--x\r\nnot JSON\r\n--x--", b""),
    ("/v1/files/{id}", b"", b""),
    ("/v1/files/{id}/content", b"", b""),
    ("/v1/batches", b'{"input_file_id":"file-1","endpoint":"/v1/chat/completions"}', b""),
    ("/v1/batches/{id}", b"", b""),
    ("/v1/batches/{id}/cancel", b"", b""),
    ("/generate", b'{"text":7}', b"7"),
    ("/v1/messages", b'{"messages":{"a":[]}}', b'{"a":[]}'),
]


@pytest.mark.parametrize(("path", "body", "text"), TEXTS)
def test_the_text_is_the_raw_bytes_in_the_order_of_the_template_but_for_what_closes_it(
    path: str, body: bytes, text: bytes
) -> None:
    read_facts = facts(path.encode(), body)
    assert read_facts.text == text
    assert type(read_facts.text) is bytes
    assert read_facts.body is body


@pytest.mark.parametrize(
    ("path", "first", "then"),
    [
        (b"/generate", '{"text":"Once upon"}', '{"text":"Once upon a time"}'),
        (b"/generate", '{"input_ids":[1,2,3]}', '{"input_ids":[1,2,3,4]}'),
        (b"/v1/completions", '{"prompt":"Once upon"}', '{"prompt":"Once upon a time"}'),
        (CHAT, '{"messages":[{"content":"hi"}]}', '{"messages":[{"content":"hi"},{"content":"hello"}]}'),
    ],
)
def test_a_text_that_goes_on_begins_with_the_whole_text_before(path: bytes, first: str, then: str) -> None:
    before, after = facts(path, first.encode()).text, facts(path, then.encode()).text
    assert after.startswith(before)
    assert after != before


def test_every_path_of_the_contract_is_there() -> None:
    assert {path.encode() for path, *_ in TEXTS} == {path for path, row in ENDPOINTS.items() if not row.tunnel}


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
@pytest.mark.parametrize(
    ("body", "streaming"),
    [
        (b"{}", True),
        (b'{"stream":null}', True),
        (b'{"stream":true}', True),
        (b'{"stream": false}', False),
        (b'{"stream":false,"prompt":"%b"}' % (b"x" * LARGE), False),
        (b'{"prompt":"%b"}' % (b"x" * LARGE), True),
    ],
)
def test_ollama_streams_unless_it_is_told_not_to(path: str, body: bytes, streaming: bool) -> None:
    assert facts(path.encode(), body).streaming is streaming
    assert facts(b"/generate", body).streaming is (b"true" in body)


def test_a_batch_uses_the_file_that_it_names() -> None:
    assert facts(b"/v1/batches", b'{"input_file_id":"file-1"}').follows == b"file-1"
    assert facts(b"/v1/batches", b'{"input_file_id":null}').follows == b""


def test_the_model_is_read_from_forms_and_from_nothing_else_that_is_no_json() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
    forms = {path for path, endpoint in ENDPOINTS.items() if not endpoint.json and read(endpoint, form).model == b'"m"'}
    audio = {b"/v1/audio/transcriptions", b"/v1/audio/translations"}
    assert forms == {*audio, b"/v1/images/edits", b"/v1/images/variations"}
    assert read(UNKNOWN, form).model == b""


def test_nothing_is_decoded() -> None:
    content = rb'[ {"role" : "user",  "content": "caf\u00e9 \ud83c\udf0a caf' + "é".encode() + rb'", "x": 1.50e+2} ]'
    assert facts(CHAT, b'{"messages": ' + content + b' , "n": 1}').text == content[:-1]


def test_a_field_named_with_escapes_or_twice_is_read_as_engines_read_it() -> None:
    assert facts(CHAT, rb'{"\u006dodel":"m","messages":[1],"messages":[2]}').text == b"[2"
    assert facts(CHAT, rb'{"\u006dodel":"m"}').model == b'"m"'


@pytest.mark.parametrize("nothing", ["null", "[]", '""'])
@pytest.mark.parametrize("field", ["tools", "model", "lora_path", "cache_salt"])
def test_a_field_that_says_nothing_is_as_good_as_none(field: str, nothing: str) -> None:
    with_it = b'{"%s":%s,"messages":[{"role":"user","content":"q"}]}' % (field.encode(), nothing.encode())
    without = b'{"messages":[{"role":"user","content":"q"}]}'
    one, other = facts(CHAT, with_it), facts(CHAT, without)
    assert (one.text, one.scaffold, one.namespace, one.model) == (
        other.text,
        other.scaffold,
        other.namespace,
        other.model,
    )
    assert one.scaffold > 0


@pytest.mark.parametrize("nothing", [b"null", b"[]", b'""'])
def test_an_empty_prompt_is_no_text(nothing: bytes) -> None:
    assert facts(b"/v1/completions", b'{"prompt":%s}' % nothing).text == b""


# -- the namespace -----------------------------------------------------------------------------------------------------


def test_model_adapter_and_salt_each_make_a_namespace() -> None:
    bodies = [b'{"text":"t"}']
    for field in NAMESPACE:
        bodies += [b'{"%s":"a","text":"t"}' % field.encode(), b'{"%s":"b","text":"t"}' % field.encode()]
    bodies.append(b'{"model":"a","lora_path":"a","text":"t"}')
    bodies.append(b'{"model":"a","cache_salt":"a","text":"t"}')
    namespaces = [facts(b"/generate", body).namespace for body in bodies]
    assert len(set(namespaces)) == len(bodies)
    assert namespaces[0] == b""


@given(st.lists(st.one_of(st.none(), st.text(alphabet='a\0"\\,:é', max_size=3)), min_size=8, max_size=8))
def test_namespaces_are_equal_only_if_all_their_parts_are(values: list[str | None]) -> None:
    def namespace(parts: list[str | None]) -> bytes:
        fields = {name: part for name, part in zip(NAMESPACE, parts, strict=True) if part is not None}
        return facts(b"/generate", json.dumps(fields).encode()).namespace

    one, other = values[:4], values[4:]
    same = [part or "" for part in one] == [part or "" for part in other]
    assert (namespace(one) == namespace(other)) is same


def test_a_batch_of_adapters_is_a_namespace_too() -> None:
    one = facts(b"/generate", b'{"lora_path":["a","b"],"text":["t","u"]}')
    assert one.namespace != facts(b"/generate", b'{"lora_path":["b","a"],"text":["t","u"]}').namespace


def test_long_names_are_kept_short_and_apart() -> None:
    bodies = [b'{"lora_path":"%s%d","text":"t"}' % (b"long" * 1000, n) for n in range(1000)]
    namespaces = {facts(b"/generate", body).namespace for body in bodies}
    assert len(namespaces) == 1000
    assert max(map(len, namespaces)) <= 128


def test_the_same_text_is_never_matched_across_namespaces() -> None:
    bench = Bench(2, "cache_aware")
    body = '{"text":"the very same long prompt, sent again and again"%s}'
    for extra in ("", ',"lora_path":"a"', ',"lora_path":"b"', ',"cache_salt":"s"', ',"model":"m"'):
        first, again = (bench.ask(facts(b"/generate", (body % extra).encode())).attempt for _ in range(2))
        assert (first.branch, first.matched) == ("miss", 0)
        assert (again.branch, again.worker) == ("hit", first.worker)


# -- the scaffold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scaffold"),
    [
        (b'[{"role":"user","content":"hi"}]', b'[{"role":"user","content":'),
        (b'[{"content":"hi","role":"user"}]', b'[{"content":'),
        (b' [ { "role" : "system" , "content" : "hi"}]', b'[ { "role" : "system" , "content" : '),
        (
            b'[{"role":"user","content":[{"type":"text","text":"hi"}]}]',
            b'[{"role":"user","content":[{"type":"text","text":',
        ),
        (b'[{"type":"message","role":"user","content":"hi"}]', b'[{"type":"message","role":"user","content":'),
        (b'[{"role":"user","name":"bob","content":"hi"}]', b""),
        (b'[{"role":"user","content":[{"type":"image_url"}]}]', b'[{"role":"user","content":'),
        (b"[]", b""),
        (b'"a string"', b""),
        (b"[1,2,3]", b""),
    ],
)
def test_the_constant_beginning_of_a_chat_does_not_count(text: bytes, scaffold: bytes) -> None:
    assert facts(CHAT, b'{"messages":' + text + b"}").scaffold == len(scaffold)


def test_shared_tools_do_count() -> None:
    assert facts(CHAT, chat("hi", tools=[{"type": "function", "function": {"name": "f"}}])).scaffold == 0


def test_short_strangers_in_chat_do_not_stick_together() -> None:
    bench = Bench(3, "cache_aware")
    plans = [bench.send(facts(CHAT, chat(f"prompt {number}")), float(number)) for number in range(1, 31)]
    assert {plan.branch for plan in plans} == {"miss"}
    assert bench.spread(plans) == [10, 10, 10]


def test_a_short_chat_repeated_is_known() -> None:
    bench = Bench(3, "cache_aware")
    plans = [bench.send(facts(CHAT, chat("prompt 1"))) for _ in range(4)]
    assert [plan.branch for plan in plans] == ["miss", "hit", "hit", "hit"]
    assert plans[1].matched == plans[1].total


# -- streaming, and the rest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "streaming"),
    [
        (b"true", True),
        (b" true ", True),
        (b"false", False),
        (b"null", False),
        (b'"true"', False),
        (b"1", False),
        (b"{}", False),
    ],
)
def test_streaming_is_asked_for_by_true_alone(value: bytes, streaming: bool) -> None:
    assert facts(CHAT, b'{"stream":' + value + b"}").streaming is streaming
    assert facts(CHAT, b'{"options":{"stream":' + value + b"}}").streaming is False


def test_the_routing_key_is_handed_through() -> None:
    assert facts(CHAT, b"{}", b"tenant-7").routing_key == b"tenant-7"
    assert facts(b"/v1/audio/transcriptions", b"\xff", b"tenant-7").routing_key == b"tenant-7"


# -- nonsense ----------------------------------------------------------------------------------------------------------

DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n\t",
        b"null",
        b"true",
        b"7",
        b'"text"',
        b"[]",
        b'[{"text":"t"}]',
        b"{",
        b'{"text":"t"',
        b'{"text":"t"}}',
        b'{"text":"t"} x',
        b'{"text":"t"}\0',
        b'{"text":"t"}{"text":"t"}',
        b'{"text":"t",}',
        b"{'text':'t'}",
        b'{text:"t"}',
        b'{"text":01}',
        b'{"text":"a\nb"}',
        b'{"text":"\\q"}',
        b'{"text":"t"/* no */}',
        b'{"text":' * DEEP,
        b"[" * DEEP,
        b'{"text":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"other":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"other":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_a_json_object_is_invalid(body: bytes) -> None:
    for path in (path for path, endpoint in ENDPOINTS.items() if endpoint.json):
        with pytest.raises(InvalidJSON) as caught:
            facts(path, body)
        assert (caught.value.status, caught.value.code) == (400, "json_parse_error")
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"text":"cut \\ud83d"}', b'"cut \\ud83d'),
        (b'{"other":"\\udead","text":"t"}', b'"t'),
        (b'{"text":"t","other":NaN,"n":-Infinity}', b'"t'),
        (b'{"text":"first","text":"t","a":NaN}', b'"t'),
        (b'\xef\xbb\xbf{"text":"t"}', b'"t'),
        (' {"text":"t\u00e9"} '.encode("utf-16"), '"té'.encode()),
        ('{"text":"t"}'.encode("utf-16-le"), b'"t'),
        ('{"text":"t"}'.encode("utf-32"), b'"t'),
        (b'{"text":"\xed\xa0\xbd","a":NaN}', b'"\xed\xa0\xbd'),
        (b'{"a":NaN , "te\\u0078t" : "t"\n}\n', b'"t'),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_case_16_what_python_engines_read_is_read(body: bytes, text: bytes) -> None:
    """Half of a surrogate pair was refused as "truncated"."""
    json.loads(body)
    assert facts(b"/generate", body).text == text


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"text":"t","a":NaN,}', "double quotes"),
        (b'{"text":"\\ud83d"', "delimiter"),
        (b'{"text":"\\ud83d"}{}', "Extra data"),
        (b'{"text" NaN}', "':' delimiter"),
        (b"[NaN]", "Expected an object"),
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
    ],
)
def test_case_16_and_the_reason_is_the_right_one(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidJSON) as caught:
        facts(b"/generate", body)
    assert reason in str(caught.value)


@given(body=st.text(alphabet='{}[]":,\\ud8nNa1 \n', max_size=12))
def test_case_16_the_tolerant_reader_takes_what_json_takes_and_nothing_else(body: str) -> None:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    try:
        found = members(body.encode())
    except ValueError:
        found = None
    assert (found is not None) is isinstance(value, dict)
    if found is not None:
        assert repr({name: json.loads(raw) for name, raw in found.items()}) == repr(value)


@pytest.mark.parametrize("name", RESERVED)
@pytest.mark.parametrize("path", [b"/generate", b"/v1/chat/completions", b"/v1/embeddings", b"/v1/tokenize"])
def test_case_24_fields_that_only_routers_set_are_found(path: bytes, name: str) -> None:
    """`kv_transfer_params` of a client ended a vLLM engine."""
    for value in (b"1", b"{}", b'{"do_remote_prefill":true}', b"false", b'""', b"[0]"):
        for body in (b'{"%s":%s}', b'{"model":"m","text":"t","%s": %s}', b'{"%s":%s,"a":NaN}'):
            assert facts(path, body % (name.encode(), value)).reserved == name
    escaped = b'{"\\u%04x%s":1}' % (ord(name[0]), name[1:].encode())
    assert facts(path, escaped).reserved == name
    for harmless in (
        b'{"%s":null}',
        b'{"text":{"%s":1}}',
        b'{"text":"%s"}',
        b'{"my_%s":1}',
        b'{"extra_args":{"%s":null}}',
    ):
        assert facts(path, harmless % name.encode()).reserved == ""


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_case_16_a_body_in_another_encoding_is_read_or_refused_for_that_reason(encoding: str) -> None:
    """Above 512 kB the reason was `unexpected 'ÿ'`."""
    assert facts(b"/v1/completions", '{"prompt":"a"}'.encode(encoding)).text == b'"a'
    with pytest.raises(InvalidJSON, match="UTF-16 or UTF-32"):
        facts(b"/v1/completions", ('{"prompt":"%s"}' % ("a" * LARGE)).encode(encoding))


PADDING = b'{"x":"%s",' % (b"x" * LARGE)


@pytest.mark.parametrize("begin", [b"{", PADDING, b'{"x":NaN,'], ids=["small", "large", "tolerant"])
@pytest.mark.parametrize("name", RESERVED)
def test_case_24_fields_that_only_routers_set_are_found_in_every_spelling_and_size(name: str, begin: bytes) -> None:
    """`disagg_prefill_dp_rank` with each letter escaped passed in bodies above 512 kB."""
    for spelled in (name, "".join(f"\\u{ord(letter):04X}" for letter in name)):
        assert facts(b"/v1/chat/completions", begin + b'"%s":1}' % spelled.encode()).reserved == name


@pytest.mark.parametrize("begin", [b"{", PADDING, b'{"x":NaN,'], ids=["small", "large", "tolerant"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_case_24_fields_that_only_routers_set_are_found_where_engines_unpack_them(holder: str, begin: bytes) -> None:
    """vLLM reads `vllm_xargs.kv_transfer_params` like the field itself; it was passed on."""

    def reserved(value: bytes) -> str:
        return facts(b"/v1/completions", begin + b'"%s":%s}' % (holder.encode(), value)).reserved

    assert reserved(b'{"a":1,"kv_transfer_\\u0070arams":"x"}') == f"{holder}.kv_transfer_params"
    for harmless in (b"null", b"{}", b"[1]", b'"kv_transfer_params"', b'{"a":{"dp_rank":1}}', b'{"dp_rank":null}'):
        assert reserved(harmless) == ""
    if begin is PADDING:
        assert reserved(b'{"a":"%s"}' % (b"x" * LONGEST_HELD)) == holder


def test_case_24_the_rest_of_the_facts_is_read_all_the_same() -> None:
    found = facts(b"/generate", b'{"model":"m","text":"t","stream":true,"bootstrap_room":7}')
    assert (found.model, found.text, found.streaming) == (b'"m"', b'"t', True)


PATHS = st.sampled_from(sorted(ENDPOINTS))


@given(path=PATHS, body=st.binary(max_size=200))
def test_any_bytes_are_read_or_invalid(path: bytes, body: bytes) -> None:
    try:
        facts(path, body)
    except InvalidJSON:
        assert ENDPOINTS[path].json


FIELDS = sorted({*NAMESPACE, "stream", *(field for endpoint in ENDPOINTS.values() for field in endpoint.text)})
VALUES = st.recursive(
    # JSON allows half of a surrogate pair, a reader need not: UTF-8 has no such thing.
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=300)
@given(
    path=PATHS,
    body=st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), VALUES, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_any_object_is_read(path: bytes, body: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    def dump(value: object) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only)

    read_facts = facts(path, dump(body).encode())
    asked, lines = body.get("stream"), ENDPOINTS[path].lines and body.get("stream") in (None, "", [])
    assert read_facts.streaming is (ENDPOINTS[path].json and (asked is True or lines))
    assert 0 <= read_facts.scaffold <= len(read_facts.text)
    if ENDPOINTS[path].json:
        parts = [body[name] for name in ENDPOINTS[path].text if body.get(name) not in (None, "", [])]
        text = "".join(dump(part) for part in parts).encode()
        assert _squeezed(read_facts.text) == _squeezed(text[:-1] if text.endswith((b"]", b'"')) else text)
        assert bool(read_facts.model) is (body.get("model") not in (None, "", []))


def _squeezed(text: bytes) -> bytes:
    """Without white space: an inner value is indented deeper than the same value alone."""
    return b"".join(text.split())


def test_a_real_body_cut_or_changed_anywhere_never_raises_anything_else() -> None:
    body = chat("a café by the sea", stream=True, tools=[{"type": "function"}], lora_path=None)
    rng = random.Random(3)
    outcomes = set()
    for at in range(len(body)):
        for changed in (body[:at], body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]):
            try:
                facts(CHAT, changed)
                outcomes.add("read")
            except InvalidJSON:
                outcomes.add("invalid")
    assert outcomes == {"read", "invalid"}
