"""How targets are started, and what is said of those that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.benchmark.loads import BY_NAME, LOADS, selected
from scripts.benchmark.options import parse
from scripts.benchmark.processes import BenchError
from scripts.benchmark.targets import TARGETS, Found, Place, Target, find, haproxy, litellm, module, nginx, wanted
from scripts.reporting import ROOT

from sglang_router import __version__

needs_history = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout with its history")
BY_TARGET = {target.name: target for target in TARGETS}


def place(folder: Path, *flags: str) -> Place:
    return Place("/bin/program", folder, 1000, 2000, [3001, 3002], flags)


def words(command: list[object]) -> str:
    return " ".join(str(word) for word in command)


def test_a_router_gets_its_ports_its_workers_and_the_flags(tmp_path: Path) -> None:
    command = module("a.router", "--log-level", "error")(place(tmp_path, "--policy", "random"))
    assert words(command) == (
        "/bin/program -m a.router --host 127.0.0.1 --port 1000 --prometheus-port 2000 --log-level error "
        "--policy random --worker-urls http://127.0.0.1:3001 http://127.0.0.1:3002"
    )


def test_configurations_name_port_and_workers(tmp_path: Path) -> None:
    for command, file in ((haproxy, "haproxy.cfg"), (nginx, "nginx.conf")):
        assert str(tmp_path / file) in words(command(place(tmp_path)))
        text = (tmp_path / file).read_text()
        assert all(f"127.0.0.1:{port}" in text for port in (1000, 3001, 3002))
    assert not {"PORT", "FOLDER", "WORKERS", "FILES"} & set(text.replace(";", " ").replace("/", " ").split())
    litellm(place(tmp_path))
    assert (tmp_path / "litellm.yaml").read_text().count("api_base: http://127.0.0.1:300") == 2


def test_the_targets_of_the_core_are_in_the_table() -> None:
    assert {target.name for target in wanted(parse(["--core"]))} == {"ours", "reference", "haproxy"}
    assert {target.name for target in wanted(parse(["--against", "HEAD"]))} == {"ours", "before"}


RELAYS = ["ours-relays-1", "ours-relays-2", "compiled-relays-1", "compiled-relays-2"]


@pytest.mark.parametrize("words", [[], ["--core"], ["--quick"], ["--against", "HEAD"]])
def test_relay_processes_are_measured_only_when_they_are_named(words: list[str]) -> None:
    assert not {target.name for target in wanted(parse(words))} & set(RELAYS)


def test_relay_processes_are_named_by_their_names_or_by_patterns() -> None:
    def names(only: str, *more: str) -> list[str]:
        return [target.name for target in wanted(parse([*more, "--only", only]))]

    assert names("*-relays-*") == RELAYS
    assert names("ours,compiled-relays-2", "--core") == ["ours", "compiled-relays-2"]
    assert names("ours,compiled") == ["ours", "compiled"]


def test_a_router_with_relays_is_started_with_so_many_and_the_flags_come_after(tmp_path: Path) -> None:
    for name in RELAYS:
        command = words(BY_TARGET[name].command(place(tmp_path, "--policy", "random")))
        assert f" --relay-processes {name[-1]} --policy random --worker-urls " in command
        assert BY_TARGET[name].source is BY_TARGET[name.partition("-")[0]].source


def test_without_a_revision_there_is_nothing_before() -> None:
    assert "before" not in {target.name for target in wanted(parse([]))}


def test_a_program_that_is_missing_is_told_with_the_way_to_get_it(tmp_path: Path) -> None:
    missing = Target("none", "None", haproxy, program="no-such-program-anywhere")
    assert find(missing, parse([]), tmp_path) == (
        "not installed; on Debian or Ubuntu: apt-get install no-such-program-anywhere"
    )


@needs_history
def test_a_former_revision_is_named_by_it_and_the_checkout_by_its_version(tmp_path: Path) -> None:
    options = parse(["--against", "HEAD", "--flags", "--policy", "random"])
    checkout, before = (find(BY_TARGET[name], options, tmp_path) for name in ("ours", "before"))
    assert isinstance(checkout, Found)
    assert isinstance(before, Found)
    assert checkout.title == f"this router {__version__}"
    assert before.title == "before HEAD"
    assert checkout.flags == before.flags == ("--policy", "random")
    assert (Path(before.environment["PYTHONPATH"]) / "sglang_router" / "__init__.py").exists()


@needs_history
def test_a_revision_that_does_not_exist_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--against no-such-revision"):
        find(BY_TARGET["before"], parse(["--against", "no-such-revision"]), tmp_path)


def test_packages_are_pinned() -> None:
    assert all(target.package.count("==") == 1 for target in TARGETS if target.package)


def test_each_target_is_of_one_kind() -> None:
    kinds = [[bool(target.package), bool(target.program), bool(target.source)] for target in TARGETS]
    assert all(sum(kind) == 1 for kind in kinds)


def test_every_target_takes_the_load_by_which_it_warms_up() -> None:
    assert all(any(target.takes_load(load) for load in selected(["sizes"])) for target in TARGETS)
    assert all(BY_TARGET["ours"].takes_load(load) for load in LOADS)
    assert not BY_TARGET["litellm"].takes_load(BY_NAME["streams-500"])
