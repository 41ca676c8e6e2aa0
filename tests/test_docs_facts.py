"""What the pages say of flags, defaults, paths, headers, error codes, metrics and alerts is what the code says.

Figures that were measured cannot be checked here; those of docs/comparison.md must stand where they were measured.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from documented import DOCUMENTS, ROOT
from sglang_router import cli
from sglang_router.admin.reference import error_classes
from sglang_router.config import OPTIONS, POLICY_NAMES
from sglang_router.observe.access_line import AccessLine
from sglang_router.observe.catalogue import METRICS

DOCS = ROOT / "docs"
PAGES = [page for page in DOCUMENTS if page.parent.name != "decisions"]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
OTHERS = {
    *("--kv-events-config", "--mem-fraction-static", "--no-prefill-assistant", "--quantization", "--stream-output"),
    *("--build", "--cap-drop", "--detach", "--publish", "--read-only", "--security-opt", "--stop-timeout", "--tmpfs"),
    *("--follow", "--from-file", "--from-literal", "--now", "--replicas", "--reset-then-reuse-values"),
    *("--enable-mesh", "--errors", "--headers", "--pdb", "--region"),
}
"""Flags of engines; of Docker; of Kubernetes and systemd; of smg, modules that print pages, pytest, an example."""
OTHER_PATHS = {"/kv_event_sources", "/pd_role_switch", "/v1/loads"}
"""Paths of engines that clients do not reach through the router."""
METRIC = re.compile(r"\b(?:sgl_router|smg)_[a-z0-9_]+[a-z0-9]\b")
METRIC_SUFFIX = re.compile(r"_(?:bucket|sum|count)$")
PROMETHEUS_LABELS = {"instance", "job", "le", "namespace"}
CODES = re.compile(r"\b([45]\d\d),? (`[A-Za-z_]+`(?:(?:, | and | or )`[A-Za-z_]+`)*)")
OTHER_CODES = {"overloaded_error"}
"""A type of Anthropic's errors."""


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def test_no_option_sends_its_reader_to_another_package() -> None:
    """On PyPI the package of our name is the Rust router; `wrong_with` of the commands looks at the pages."""
    assert [option.flag for option in OPTIONS.values() if "pip install" in option.help] == []


def test_a_help_text_ends_like_a_sentence() -> None:
    """Pages and `--help` go on behind it with what the value may be."""
    assert [option.flag for option in OPTIONS.values() if not option.help.endswith((".", ".)"))] == []


@functools.cache
def known_flags() -> set[str]:
    """Return the flags of our commands, and those that scripts have or give to other programs."""
    found = {flag for parser in cli.parsers().values() for action in parser._actions for flag in action.option_strings}
    for folder in (ROOT / "scripts", ROOT / "src" / "sglang_router" / "launch"):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                found |= set(FLAG.findall(path.read_text("utf-8", "replace")))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "migrating-vllm"], ids=lambda page: page.name)
def test_a_flag_that_is_named_exists(page: Path) -> None:
    """docs/migrating-vllm.md names those of the routers that it leads away from."""
    assert sorted(set(FLAG.findall(text_of(page))) - known_flags() - OTHERS) == []


def said_defaults(text: str) -> Iterator[tuple[str, float]]:
    """Yield options and the numbers that follow them in brackets, as in `--queue-size` (100); 1 s is one as well."""
    for flag, said in re.findall(r"`--(?:router-)?([a-z0-9-]+)`,? \((\d[\d,.]*)(?: s)?\)", text):
        option = OPTIONS.get(flag.replace("-", "_"))
        if option is not None and isinstance(option.fresh_default(), int | float):
            yield flag, float(said.replace(",", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_default_in_brackets_is_the_default(page: Path) -> None:
    said = list(said_defaults(text_of(page)))
    assert [(flag, value) for flag, value in said if OPTIONS[flag.replace("-", "_")].fresh_default() != value] == []


def test_defaults_in_brackets_are_found() -> None:
    text = "`--queue-size` (7), `--router-hang-timeout-secs` (3), `--port`, (as written) `--shutdown-drain-secs` (5 s)"
    assert list(said_defaults(text)) == [("queue-size", 7.0), ("shutdown-drain-secs", 5.0)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_path_that_is_named_exists(page: Path) -> None:
    """docs/endpoints.md is made from the tables of endpoints. A page may call a part of a path as it likes."""

    def plain(text: str) -> str:
        return re.sub(r"\{\w+\}", "{}", text)

    endpoints = plain(text_of(DOCS / "endpoints.md"))
    named = set(re.findall(r"`(?:(?:GET|POST|PUT|PATCH|DELETE) )?(/[a-z0-9_/{}]+)(?=[`?])", plain(text_of(page))))
    folders = ("/etc", "/opt", "/proc", "/tmp", "/var")
    assert [
        path for path in sorted(named - OTHER_PATHS) if path not in endpoints and not path.startswith(folders)
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_header_that_is_named_exists(page: Path) -> None:
    """docs/headers.md is made from the tables of headers; `x-a-*` there stands for all that begin so."""
    known = re.findall(r"`(x-[a-z0-9-]+\*?)", text_of(DOCS / "headers.md"))
    named = set(re.findall(r"`(x-[a-z0-9-]+)`", text_of(page)))
    assert [
        name
        for name in sorted(named)
        if not any(name == each or (each[-1] == "*" and name.startswith(each[:-1])) for each in known)
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_error_has_the_status_that_is_said(page: Path) -> None:
    statuses = {each.code: str(each.status) for each in error_classes()}
    said = [(code, status) for status, codes in CODES.findall(text_of(page)) for code in re.findall(r"\w+", codes)]
    assert [each for each in said if each[0] not in OTHER_CODES and statuses.get(each[0]) != each[1]] == []


def test_every_error_is_explained() -> None:
    """docs/errors.md has what the router says; what to do stands with the symptoms, or where the feature is."""
    explained = "".join(text_of(page) for page in PAGES if page.stem != "errors")
    never_seen = {"workers_full"}  # such a request waits
    codes = {each.code for each in error_classes()} - never_seen
    assert [code for code in sorted(codes) if f"`{code}`" not in explained] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_a_metric_that_is_named_exists(page: Path) -> None:
    """A name may be the beginning of several, as in `grep sgl_router_cache`."""
    named = {METRIC_SUFFIX.sub("", name) for name in METRIC.findall(text_of(page))}
    assert [name for name in sorted(named) if not any(metric.name.startswith(name) for metric in METRICS)] == []


def labels_said(text: str) -> Iterator[tuple[str, str]]:
    """Yield metrics and the labels that expressions ask them for."""
    for name, inside in re.findall(rf"({METRIC.pattern})\{{([^}}]*)\}}", text):
        yield from ((name, label) for label in re.findall(r"(\w+) *(?:=|!)", inside))
    for labels, name in re.findall(rf"by \(([^)]*)\) \((?:\w+\()?({METRIC.pattern})", text):
        yield from ((name, label) for label in re.findall(r"\w+", labels))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_metric_has_the_labels_that_are_asked_for(page: Path) -> None:
    """An expression with a label that a metric does not have is empty, and Prometheus does not say so."""
    labels = {metric.name: set(metric.labels) for metric in METRICS}
    for name, label in labels_said(text_of(page)):
        plain = name if name in labels else METRIC_SUFFIX.sub("", name)
        assert label in labels[plain] | PROMETHEUS_LABELS, f"{name} has no label {label}"


def test_labels_are_found() -> None:
    text = 'sum by (le, worker) (rate(sgl_router_queue_seconds_bucket{client="a", code!~"b"}[5m]))'
    assert [label for _, label in labels_said(text)] == ["client", "code", "le", "worker"]


def test_every_policy_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", text_of(DOCS / "tuning.md"), re.MULTILINE)
    assert sorted(set(rows)) == sorted(POLICY_NAMES)


def test_every_alert_is_explained() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text("utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert set(re.findall(r"`(Router[A-Z]\w+)`", text_of(DOCS / "monitoring.md"))) == alerts


def test_every_field_of_the_access_log_is_explained() -> None:
    page = text_of(DOCS / "monitoring.md")
    table = page[page.index("## The access log") :]
    line = {"time", "level", "logger", "message", "method", "path", "status"}  # what every log has
    fields = {each.encode_name for each in msgspec.structs.fields(AccessLine)} - line
    assert [name for name in sorted(fields) if f"`{name}`" not in table] == []


def test_the_figures_of_the_comparison_stand_where_they_were_measured() -> None:
    """It repeats them, so that a new measurement must not leave it behind."""
    measured = "".join(text_of(DOCS / f"{page}.md") for page in ("performance", "routing", "reliability", "kubernetes"))
    rows = re.findall(r"^\|.*$", text_of(DOCS / "comparison.md"), re.MULTILINE)
    plain = (re.sub(r"`[^`]*`|\b(?:0\.3\.2|1\.13|0\.1\.17)\b", "", row) for row in rows)
    figures = {figure for row in plain for figure in re.findall(r"\d[\d,]*\.\d+|\d+,\d{3}", row)}
    assert len(figures) > 40
    assert [figure for figure in sorted(figures) if figure not in measured] == []
