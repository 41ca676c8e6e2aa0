"""Secrets in what engines say are found by name, place and value at every depth; what cannot be searched stays here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sglang_router.access.redaction import MOST_BYTES, STARS, redacted, without_secrets
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
