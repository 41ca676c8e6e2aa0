"""Files of keys that say more of each key: every field, what is refused and how, and that no message shows a secret."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path

import pytest

from sglang_router.config import option_files
from sglang_router.config.key_files import KeyTerms, structured
from sglang_router.config.keys import digest_of, load
from sglang_router.errors import ConfigError

SECRET = "hush-hush"
HASHED = "sha256:" + sha256(b"secret").hexdigest()

WHOLE = f"""
keys:
  - name: alice
    key: {SECRET}
    expires: 2027-01-31T12:00:00Z
    requests_per_second: 5
    burst: 20
    max_concurrent_requests: 8
    tokens_per_minute: 100000
    priority: normal
    max_priority: high
    models: [llama-3, "qwen:3"]
  - key: {HASHED}
"""


def written(folder: Path, text: str, name: str = "keys.yaml") -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def complaint(folder: Path, text: str, name: str = "keys.yaml", control: bool = False) -> str:
    path = written(folder, text, name)
    with pytest.raises(ConfigError) as refused:
        load((), None, (), path) if control else load((), path)
    assert SECRET not in str(refused.value)
    assert str(refused.value).startswith(path)
    return str(refused.value).removeprefix(path)


def test_every_field_is_read(tmp_path: Path) -> None:
    ring = load((), written(tmp_path, WHOLE))
    assert ring.client == (("alice", SECRET), ("key-2", HASHED))
    assert ring.terms == {
        "alice": KeyTerms(5.0, 20.0, 8, 100_000.0, 0, 10, ("llama-3", "qwen:3")),
    }
    assert ring.expires == {sha256(SECRET.encode()).digest(): 1_801_396_800.0}
    assert digest_of(HASHED) == sha256(b"secret").digest() == digest_of(HASHED.upper().replace("SHA", "sha"))
    assert SECRET not in repr(ring)


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    entry = {"name": "a", "key": "k", "priority": -3, "models": ["m"], "expires": "2027-01-31"}
    one = load((), written(tmp_path, json.dumps({"keys": [entry]}), "keys.json"))
    toml = '[[keys]]\nname = "a"\nkey = "k"\npriority = -3\nmodels = ["m"]\nexpires = 2027-01-31\n'
    assert one == load((), written(tmp_path, toml, "keys.toml"))
    assert one.terms["a"] == KeyTerms(priority=-3, models=("m",))


@pytest.mark.parametrize(
    "moment",
    ["2027-01-31", "2027-01-31T00:00:00Z", "'2027-01-31'", "2027-01-31 01:00:00+01:00", "'2027-01-31T00:00:00'"],
)
def test_a_moment_may_be_written_in_many_ways(tmp_path: Path, moment: str) -> None:
    ring = load((), written(tmp_path, f"keys: [{{key: k, expires: {moment}}}]"))
    assert set(ring.expires.values()) == {1_801_353_600.0}


def test_the_name_of_the_file_tells_its_form() -> None:
    assert [structured(name) for name in ("a.yaml", "b.YML", "c.json", "d.toml", "keys", "keys.txt", None)] == [
        *(True, True, True, True),
        *(False, False, False),
    ]


def test_two_keys_of_one_name_are_one_client(tmp_path: Path) -> None:
    both = (
        "keys:\n- {name: a, key: one, burst: 2, requests_per_second: 1}"
        "\n- {name: a, key: two, burst: %s, requests_per_second: 1}"
    )
    ring = load((), written(tmp_path, both % "2"))
    assert [client.name for client in ring.client] == ["a", "a"]
    assert ring.terms == {"a": KeyTerms(1.0, 2.0)}
    assert "other limits" in complaint(tmp_path, both % "3")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (f"{{nam: alice, key: {SECRET}}}", "entry 1: it must be a mapping with some of the fields name, key, expires,"),
        (f"{{{SECRET}: alice}}", "and no others"),
        (SECRET, "it must be a mapping"),
        ("{name: alice}", "the key must consist of visible ASCII"),
        ("{key: 12345}", "`key` must be a text; quote a number"),
        (f"{{key: '{SECRET} x'}}", "visible ASCII"),
        (f"{{key: {SECRET}, expires: {SECRET}}}", "`expires` must be a date or a time"),
        ("{key: k, expires: 5}", "`expires` must be a date or a time"),
        ("{key: k, requests_per_second: 0}", "`requests_per_second` must be a number above 0"),
        ("{key: k, requests_per_second: .inf}", "a number above 0"),
        ("{key: k, requests_per_second: true}", "a number above 0"),
        ("{key: k, requests_per_second: 5.0e-324}", "a number above 0 (at least 0.000001)"),
        ("{key: k, requests_per_second: .nan}", "a number above 0"),
        ('{key: k, models: ["\\ud800"]}', "half a character"),
        (f"{{key: *{SECRET}}}", "found undefined alias '***' in line 2"),
        (f"{{key: !{SECRET} x}}", "could not determine a constructor for the tag '***' in line 2"),
        ('{key: k, name: "jwt:alice"}', "the name must not begin with jwt:"),
        ("{key: k, burst: 2}", "`burst` belongs to `requests_per_second`"),
        ("{key: k, requests_per_second: 1, burst: 0.5}", "`burst` must be a number of at least 1"),
        ("{key: k, max_concurrent_requests: 1.5}", "a whole number of at least 1"),
        ("{key: k, max_concurrent_requests: 0}", "a whole number of at least 1"),
        ("{key: k, tokens_per_minute: many}", "a number above 0"),
        ("{key: k, priority: urgent}", "a whole number from -20 to 20, or one of system, interactive"),
        ("{key: k, priority: 21}", "a whole number from -20 to 20"),
        ("{key: k, priority: high, max_priority: low}", "must not be above `max_priority`"),
        ("{key: k, models: m}", "`models` must be a list of names"),
        ("{key: k, models: []}", "`models` must be a list of names"),
    ],
)
def test_a_bad_entry_is_refused_without_its_values(tmp_path: Path, entry: str, words: str) -> None:
    assert words in complaint(tmp_path, f"keys:\n  - {entry}\n")


@pytest.mark.parametrize("text", ["", "keys: []", "keys: {a: b}", "key: [a]", "[a]", "keys: [{key: k}]\nmore: 1"])
def test_a_file_is_a_list_of_keys(tmp_path: Path, text: str) -> None:
    complaint(tmp_path, text)


def test_a_key_and_its_hash_are_one_key(tmp_path: Path) -> None:
    assert "the same key as in" in complaint(
        tmp_path, f"keys: [{{name: a, key: secret}}, {{name: b, key: '{HASHED}'}}]"
    )


def test_keys_of_the_control_plane_expire_too(tmp_path: Path) -> None:
    text = "keys: [{id: ops, name: On Call, role: admin, key: k, expires: 2027-01-31}]"
    ring = load((), None, (), written(tmp_path, text))
    assert ring.control == (("ops", "On Call", "k", "admin"),)
    assert math.inf not in ring.expires.values()
    assert "ID:NAME:ROLE:KEY" in complaint(tmp_path, "keys: [{id: ops, key: k}]", control=True)
    assert "and no others" in complaint(tmp_path, "keys: [{id: a, role: user, key: k, burst: 2}]", control=True)


def test_lines_may_hold_hashes(tmp_path: Path) -> None:
    ring = load(
        (), written(tmp_path, f"alice {HASHED}\n", "keys"), (), written(tmp_path, f"o:O:admin:{HASHED}0\n", "ops")
    )
    assert digest_of(ring.client[0].key) == sha256(b"secret").digest()
    assert digest_of(ring.control[0].key) == sha256(f"{HASHED}0".encode()).digest(), "65 digits are no hash"


def test_a_name_by_position_is_never_one_that_another_key_was_given(tmp_path: Path) -> None:
    """The two were one client, with one set of limits."""
    ring = load((), written(tmp_path, "keys: [{name: key-2, key: a}, {key: b}, {key: c}]"))
    assert [client.name for client in ring.client] == ["key-2", "key-2-unnamed", "key-3"]


def test_clients_with_tokens_have_terms_by_their_subjects(tmp_path: Path) -> None:
    text = "keys: [{key: k}]\ntokens: [{subject: bob, burst: 2, requests_per_second: 1}, {subject: '*', priority: low}]"
    ring = load((), written(tmp_path, text))
    assert ring.tokens == {"bob": KeyTerms(1.0, 2.0), "*": KeyTerms(priority=-10)}
    assert ring.terms == {}


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("{a: b}", "`tokens` must be a list"),
        ("[bob]", "token 1: it must be a mapping with `subject`"),
        ("[{priority: 1}]", "token 1: it must be a mapping with `subject`"),
        ("[{subject: bob, key: k}]", "token 1: it must be a mapping with `subject`"),
        ("[{subject: 7}]", "token 1: `subject` must be the subject of a token"),
        ("[{subject: bob}, {subject: bob}]", "token 2: this subject is there twice"),
        ("[{subject: bob, requests_per_second: no}]", "token 1: `requests_per_second` must be a number above 0"),
    ],
)
def test_a_bad_entry_for_tokens_is_refused(tmp_path: Path, tokens: str, words: str) -> None:
    assert words in complaint(tmp_path, f"keys: [{{key: {SECRET}}}]\ntokens: {tokens}\n")


def test_operators_have_no_limits_by_token(tmp_path: Path) -> None:
    text = "keys: [{id: ops, name: On Call, role: admin, key: k}]\ntokens: []"
    assert "must hold a list `keys`" in complaint(tmp_path, text, control=True)


def test_json_is_read_as_json(tmp_path: Path) -> None:
    entry = '{"key": "k", "name": "\\ud83d\\ude00", "tokens_per_minute": 1e3}'
    assert load((), written(tmp_path, f'{{"keys": [{entry}]}}', "k.json")).terms == {
        "\U0001f600": KeyTerms(tokens_per_minute=1000.0)
    }
    assert "a mapping has a field twice" in complaint(tmp_path, '{"keys": [{"key": "k", "key": "l"}]}', "k.json")
    assert "Expecting" in complaint(tmp_path, '{"keys": [', "k.json")


def test_yaml_means_the_same_whoever_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    quick = load((), path)
    monkeypatch.setattr(option_files, "_QuickLoader", option_files._Loader)
    assert load((), path) == quick
