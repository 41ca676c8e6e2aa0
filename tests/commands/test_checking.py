"""`sglang-router check-config`: all errors of a configuration, and nothing is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from certificates import Authority
from sglang_router.cli import main


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["check-config", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "router.yaml"


def test_a_good_file_is_ok(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("policy: cost\nworker-urls: [http://127.0.0.1:9]\n")
    assert check(capsys, str(config)) == (0, "OK\n", "")
    assert main(["launch", "--config", str(config), "--check-config"]) == 0
    assert main(["--config", str(config), "--check-config"]) == 0


def test_every_wrong_key_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("# mine\npolici: cost\n\n'port': 0\nqueue-size:\n  many\nlog-level: info\n")
    status, out, err = check(capsys, str(config))
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"error: {config}:2: 'polici' is not an option; did you mean policy?",
        f"error: {config}:4: port: 0 is not a whole number from 1 to 65535",
        f"error: {config}:5: queue-size: 'many' is not a whole number of at least 0",
    ]


def test_what_the_options_name_is_read(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, workers = tmp_path / "keys", tmp_path / "workers.yaml"
    keys.write_text("a b c\n")
    workers.write_text("- http://a:1\n- http://a:1\n")
    config.write_text(
        f"api-key-file: {keys}\ntls-cert-path: {tmp_path}/none.pem\ntls-key-path: {tmp_path}/none.key\n"
        f"discovery-file: {workers}\n"
    )
    status, out, err = check(capsys, str(config), "--json")
    found = json.loads(out)
    assert (status, err, found["ok"], len(found["errors"])) == (1, "", False, 3)
    assert [any(name in each for each in found["errors"]) for name in ("keys:1", "none.pem", "is there twice")] == [
        True
    ] * 3


def test_options_that_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = check(capsys, "--tls-cert-path", "x")
    assert (status, err) == (1, "error: --tls-cert-path and --tls-key-path belong together; give both\n")


def test_a_wrong_command_line_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, "--portt", "1")[0] == 2
    assert check(capsys, "/nonexistent.yaml")[0] == 1


def test_a_certificate_that_belongs_to_another_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = Authority(tmp_path / "ca")
    one, two = authority.issue("one"), authority.issue("two")
    assert check(capsys, "--tls-cert-path", one.cert, "--tls-key-path", one.key)[0] == 0
    assert check(capsys, "--tls-cert-path", one.cert, "--tls-key-path", two.key)[0] == 1
