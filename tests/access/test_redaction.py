"""Secrets in what engines say are found by name, place and value at every depth; what cannot be searched stays here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sglang_router.access.redaction import MOST_BYTES, STARS, label_without_secrets, redacted, without_secrets
from sglang_router.errors import WorkerInvalid


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "admin_api_key", "apiKey", "X-API-Key", "openai_api_key", "ssl_keyfile_password", "hf_token"),
        *("Authorization", "client_secret", "aws_credentials", "access_token", "private-key", "env_vars", "environ"),
    ],
)
def test_f4_secrets_are_found_by_name_at_every_depth(name: str) -> None:
    """Only the top level was starred: internal_states[0].api_key passed."""
    for value in ("hunter2", {"A": "hunter2"}, ["hunter2"]):
        for shape in ({name: value}, [{name: value}], {"internal_states": [{"deep": {name: value}}]}):
            assert "hunter2" not in json.dumps(redacted(shape)), shape


def test_f4_what_is_no_secret_passes() -> None:
    told: dict[str, Any] = {
        "max_total_tokens": 4096,
        "tokenizer_path": "/models/m",
        "skip_tokenizer_init": False,
        "token_usage": 0.5,
        "api_key": None,
        "ssl_keyfile_password": "",
        "eos_token": "</s>",
        "port": 30000,
        "url": "http://10.0.0.1:8000/keys",
        "template": "{% for token in tokens %}",
    }
    assert redacted(told) == told
    body = json.dumps(told, indent=3).encode()
    assert without_secrets(body) is body


@pytest.mark.parametrize(
    "text",
    [
        "python -m sglang.launch_server --api-key hunter2 --port 30000",
        "vllm serve m --api-key=hunter2",
        "HF_TOKEN=hunter2 OTHER=1",
        "Authorization: Bearer hunter2",
        "http://user:hunter2@10.0.0.1/v1",
        '{"nested": {"api_key": "hunter2"}}',
    ],
)
def test_f4_secrets_inside_of_texts(text: str) -> None:
    found = redacted({"launch_command": text})["launch_command"]
    assert "hunter2" not in found
    assert STARS in found


def test_f4_secrets_in_lists_of_arguments_and_of_variables() -> None:
    told = {
        "argv": ["serve", "--api-key", "hunter2", "--port", "1"],
        "env": [{"name": "X", "value": "1"}],
        "vars": [{"name": "API_KEY", "value": "hunter2"}],
    }
    found = redacted(told)
    assert "hunter2" not in json.dumps(found)
    assert found["argv"][-1] == "1"


def test_f4_the_keys_that_the_router_knows_are_found_in_any_text() -> None:
    told = {"motto": "my key is sk-worker-1!", "list": ["sk-worker-1", "k"], "k": "Kimi k2"}
    assert redacted(told, ["sk-worker-1", "k"]) == {
        "motto": f"my key is {STARS}!",
        "list": [STARS] * 2,
        STARS: "Kimi k2",
    }
    assert b"sk-worker" not in without_secrets(b'{"a":"\\u0073k-worker-1"}', ["sk-worker-1"])


@pytest.mark.parametrize(
    "body",
    [
        b'{"api_key":"hunter2","kv_usage":NaN}',
        b'{"api_key":"hunter2","x":Infinity}',
        b'[{"api_key":"hunter2"}]',
        b'{"api_key":"hunter2","cut":"\\ud83d"}',
        b'{"api_key":"hunter2","api_key":null}',
        b'{"a":{"api_key":"hunter2"},"a":1}',
        b'\xef\xbb\xbf{"api_key":"hunter2"}',
    ],
)
def test_f4_a_body_that_is_odd_does_not_pass_unsearched(body: bytes) -> None:
    """A body with NaN, and a list, passed as it was."""
    found = without_secrets(body)
    assert b"hunter2" not in found
    json.loads(found)


@pytest.mark.parametrize(
    "body", [b'{"api_key":"hunter2"', b"api_key: hunter2", b"[" * 100_000, b'{"a":"' + b"x" * MOST_BYTES + b'"}']
)
def test_f4_what_cannot_be_searched_is_refused(body: bytes) -> None:
    with pytest.raises(WorkerInvalid) as refused:
        without_secrets(body)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "told",
    [
        {"args": "{'api_key': 'hunter2', 'port': 1}"},
        {"args": "api_key: hunter2"},
        {"args": "Authorization: Basic hunter2"},
        {"args": ' {"api_key":"hunter2"}'},
        {"args": 'config={"api_key": "hunter2"}'},
        {"args": json.dumps(json.dumps({"api_key": "hunter2"}))},
        {"args": 'api_key="a\\"hunter2"'},
        {"args": "--api-key     hunter2"},
        {"args": [["api_key", "hunter2"]]},
        {"args": [{"key": "HF_TOKEN", "value": "hunter2"}]},
        {"args": [{"Name": "api_key", "Value": ["hunter2"]}]},
        {"args": [{"name": "api_key", "type": "str", "default": "hunter2"}]},
        {"hf_token": {"value": {"v": "hunter2"}}},
        {"auth_tokens": [["hunter2"]]},
        {"pwd": "hunter2", "auth": "hunter2", "jwt": "hunter2", "signingKey": "hunter2"},
        {"url": "https://hunter2@host/x"},
        {"url": "http://host/?key=hunter2"},
    ],
    ids=json.dumps,
)
def test_f4_secrets_in_other_shapes(told: Any) -> None:
    """A text was searched for `=` and flags only, and a name counted only as the name of a field."""
    assert "hunter2" not in json.dumps(redacted(told))


def test_f4_names_of_no_secret_in_other_shapes() -> None:
    told: Any = [
        ["token_embed", "token_classify"],
        {"name": "llama", "value": "x"},
        {"name": "eos_token", "value": "</s>"},
    ]
    assert redacted(told) == told


def test_f4_what_is_nested_too_deeply_is_replaced() -> None:
    """The search ended in a RecursionError, and the answer in a 500 with a traceback in the log."""
    deep: Any = "hunter2"
    for _ in range(700):
        deep = [deep]
    for told in (deep, {"x": deep}, json.dumps(deep), "[" * 100_000, {"token": deep}):
        assert "hunter2" not in json.dumps(redacted(told, ["hunter2"]))


def test_f4_labels_of_metrics() -> None:
    escaped = '{\\"api_key\\": \\"hunter2\\"}'
    assert label_without_secrets("args", escaped) == escaped.replace("hunter2", STARS)
    assert label_without_secrets("hf_token", "hunter2") == STARS
    assert label_without_secrets("token_type", "prompt") == "prompt"
    assert label_without_secrets("api_key", "") == ""
