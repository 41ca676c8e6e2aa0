"""The files in deploy/ agree with the code: options, variables, paths, metrics and versions that they name exist.

`sh scripts/test-deploy` runs the programs that read these files.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts.deploy import chart

from sglang_router import errors
from sglang_router.admin.routes import PUBLIC, ROUTES
from sglang_router.config import OPTIONS, parse
from sglang_router.config.option import ENVIRONMENT_PREFIX
from sglang_router.observe.catalogue import METRICS
from sglang_router.version import __version__

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(
    path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".json" and "__pycache__" not in path.parts
)
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yml").read_text("utf-8"))
MANIFESTS = [each for each in yaml.safe_load_all(chart.MANIFESTS.read_text("utf-8")) if each]
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
DEPLOYMENT: dict[str, Any] = next(each for each in MANIFESTS if each["kind"] == "Deployment")
CONTAINER = DEPLOYMENT["spec"]["template"]["spec"]["containers"][0]
NAMES = {option.flag.lstrip("-") for option in OPTIONS.values()}


def options_in(text: str) -> dict[str, Any]:
    """Return the options of a configuration file, which the router accepts."""
    found: dict[str, Any] = yaml.safe_load(text)
    assert set(found) <= NAMES
    return found


def configurations() -> dict[str, str]:
    of_manifests = next(each for each in MANIFESTS if each["kind"] == "ConfigMap")
    return {
        "compose": (DEPLOY / "compose" / "router" / "router.yaml").read_text("utf-8"),
        "systemd": (DEPLOY / "systemd" / "router.yaml").read_text("utf-8"),
        "kubernetes": of_manifests["data"]["router.yaml"],
    }


@pytest.mark.parametrize("name", configurations())
def test_the_router_accepts_each_configuration(name: str, tmp_path: Path) -> None:
    text = configurations()[name]
    assert options_in(text)
    (tmp_path / "router.yaml").write_text(text)
    parse(["--config", str(tmp_path / "router.yaml")], environ={})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_variables_and_metrics_that_are_named_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    variables = set(re.findall(rf"\b{ENVIRONMENT_PREFIX}[A-Z_]+", text)) - {"SGLANG_ROUTER_COMPILE"}
    assert {name.removeprefix(ENVIRONMENT_PREFIX).lower() for name in variables} <= set(OPTIONS)
    metrics = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bsgl_router_\w+", text)}
    assert metrics <= {metric.name for metric in METRICS}


def test_images_have_the_version_of_the_router() -> None:
    about = yaml.safe_load((chart.CHART / "Chart.yaml").read_text("utf-8"))
    assert about["version"] == about["appVersion"] == __version__
    assert COMPOSE["services"]["router"]["image"] == f"sglang-router:{__version__}"
    assert CONTAINER["image"] == f"sglang-router:{__version__}"
    assert f"-t sglang-router:{__version__} ." in DOCKERFILE


def test_probes_ask_paths_that_need_no_key() -> None:
    paths = {CONTAINER[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"/liveness", "/readiness"}
    public = {row.route for rows in ROUTES.values() for row in rows if row.access is PUBLIC}
    assert {f"GET {path}" for path in paths} <= public


def test_a_pod_has_time_for_its_drain_and_its_last_requests() -> None:
    options = options_in(configurations()["kubernetes"])
    needed = options["shutdown-drain-secs"] + options["shutdown-grace-period-secs"]
    assert DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed


def test_a_container_of_compose_has_time_for_its_last_requests() -> None:
    options = options_in(configurations()["compose"])
    needed = options["shutdown-drain-secs"] + options["shutdown-grace-period-secs"]
    assert int(COMPOSE["services"]["router"]["stop_grace_period"].rstrip("s")) > needed


def test_compose_names_services_volumes_and_files_that_are_there() -> None:
    options = options_in(configurations()["compose"])
    targets = {url.partition("//")[2] for url in options["worker-urls"]}
    assert targets == {f"{name}:8080" for name in COMPOSE["services"] if name.startswith("engine")}
    prometheus = yaml.safe_load((DEPLOY / "compose" / "prometheus" / "prometheus.yml").read_text("utf-8"))
    scraped = [each for job in prometheus["scrape_configs"] for one in job["static_configs"] for each in one["targets"]]
    assert {each.partition(":")[0] for each in scraped} <= set(COMPOSE["services"])
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / "compose" / source).exists(), volume
    build = COMPOSE["services"]["router"]["build"]
    assert (DEPLOY / "compose" / build["context"] / build["dockerfile"]).exists()


def test_compose_is_for_this_machine_alone_and_its_dashboard_has_no_account() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    settings = COMPOSE["services"]["grafana"]["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert settings["GF_AUTH_BASIC_ENABLED"] == "false"  # it has a known password
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_what_the_image_copies_reaches_the_builder() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in allowed)
    copied = re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE, re.MULTILINE)
    assert {name for name in copied if name != "."} <= allowed
    compiled = ast.parse((ROOT / "scripts" / "compile.py").read_text("utf-8"))
    used = {node.module for node in ast.walk(compiled) if isinstance(node, ast.ImportFrom) and node.module}
    assert {f"{name.replace('.', '/')}.py" for name in used if name.startswith("scripts.")} <= allowed


def test_the_image_runs_the_router_as_process_1_and_as_nobody_special() -> None:
    assert re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", DOCKERFILE, re.MULTILINE) == ['["sglang-router"]', '["launch"]']
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]
    assert DEPLOYMENT["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == 10001


def test_the_image_listens_where_others_reach_it() -> None:
    """A container's loopback is nobody's: each option that is an address of the router's own is set."""
    set_there = set(re.findall(r"\bSGLANG_ROUTER_(\w+)=0\.0\.0\.0", DOCKERFILE))
    assert set_there == {name.upper() for name in OPTIONS if name == "host" or name.endswith("_host")}
    ports = re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)
    assert ports == [" ".join(str(OPTIONS[name].default) for name in ("port", "prometheus_port", "epp_port"))]


def test_the_chart_carries_the_alerts_and_documents_its_values() -> None:
    """Written by `python -m scripts.deploy.chart`, which is to be run after an option was added as well."""
    assert chart.SCHEMA.read_text("utf-8") == chart.schema()
    assert chart.ALERTS.read_text("utf-8") == (DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8")
    assert (chart.CHART / "README.md").read_text("utf-8") == chart.readme()


def test_the_alert_about_errors_knows_which_are_not_the_clients_mistakes() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    (rule,) = (rule for group in groups for rule in group["rules"] if rule["alert"] == "RouterErrors")
    counted = re.findall(r'error_type=~"(.*?)"', rule["expr"])[0]
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.RouterError)]
    found = {each.code: each.status for each in kinds}
    of_clients = {"upgrade_not_supported", "http_version_not_supported"}
    serious = {code for code, status in found.items() if status >= 500 or status == 429} - of_clients
    serious |= {"queue_timeout"}  # 408, because the client may ask again
    assert {code for code in found if re.fullmatch(counted, code)} == serious
    assert [status for status in range(400, 600) if re.fullmatch(counted, f"http_{status}")] == [429, *range(500, 600)]


def test_every_value_of_the_chart_has_a_place_in_its_schema_and_the_other_way_round() -> None:
    schema = json.loads((chart.CHART / "values.schema.json").read_text("utf-8"))
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text("utf-8"))

    def compare(part: dict[str, Any], value: dict[str, Any]) -> None:
        assert set(part["properties"]) - {"global"} == set(value) == set(part["required"])
        for name, each in part["properties"].items():
            if "properties" in each and name in value and name != "config":
                compare(each, value[name])

    compare(schema, values)
    assert set(schema["properties"]["config"]["properties"]) == NAMES >= set(values["config"])


def test_no_secret_and_no_address_comes_into_the_configuration_of_the_chart() -> None:
    """What the chart refuses there, and says where it belongs."""
    text = (chart.CHART / "templates" / "_checks.tpl").read_text("utf-8").partition('define "router.elsewhere"')[2]
    refused = set(re.findall(r"^([a-z-]+): ", text, re.MULTILINE)) | set(re.findall(r'"([a-z][a-z-]+)"', text))
    secrets = {option.flag.lstrip("-") for option in OPTIONS.values() if option.secret}
    assert refused == secrets | {"host", "prometheus-host", "epp-host"}


# -- systemd -----------------------------------------------------------------------------------------------------------


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Return the lines of a unit by section and key."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in (DEPLOY / "systemd" / name).read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", ["sglang-router.service", "sglang-router@.service"])
def test_the_unit_starts_the_command_with_options_that_exist(name: str) -> None:
    (start,) = unit(name)["Service"]["ExecStart"]
    command, word, *flags = shlex.split(start)
    assert (command, word) == ("/opt/sglang-router/bin/sglang-router", "launch")
    assert {flag.lstrip("-") for flag in flags if flag.startswith("--")} <= NAMES


def test_the_units_differ_in_nothing_but_the_hand_over() -> None:
    one, turn = unit("sglang-router.service"), unit("sglang-router@.service")
    (start,) = one["Service"]["ExecStart"]
    assert turn["Service"] == {**one["Service"], "ExecStart": [f"{start} --reuse-port"]}


def test_systemd_leaves_time_for_the_drain_and_the_last_requests() -> None:
    defaults = OPTIONS["shutdown_drain_secs"].default + OPTIONS["shutdown_grace_period_secs"].default
    (seconds,) = unit("sglang-router.service")["Service"]["TimeoutStopSec"]
    assert int(seconds) > defaults


def test_the_socket_listens_where_the_options_say() -> None:
    options = options_in(configurations()["systemd"])
    addresses = unit("sglang-router.socket")["Socket"]["ListenStream"]
    assert f"[{options['host']}]:{options['port']}" in addresses
    assert {address.rpartition(":")[2] for address in addresses} == {str(options["port"])}
