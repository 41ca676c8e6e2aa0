"""docs/autoscaling.md: its examples are well-formed, and what it names is there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaling_decisions import decision
from sglang_router.autoscale.actuator import told
from sglang_router.autoscale.scaler import Reading, ScalingRules
from sglang_router.config import RouterArgs
from sglang_router.config.args import parse
from sglang_router.config.table import OPTIONS
from sglang_router.observe.catalogue import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "autoscaling.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def manifests(kind: str) -> list[Any]:
    found = [yaml.safe_load(block) for block in blocks("yaml")]
    return [each["spec"] for each in found if each.get("kind") == kind]


def test_every_flag_it_names_is_an_option() -> None:
    known = {option.flag for option in OPTIONS.values()}
    others = {"--model-path", "--dp-size", "--drain-timeout-secs", "--region", "--replicas"}
    named = {flag.replace("--router-", "--") for flag in re.findall(r"--[a-z][a-z-]+[a-z]", PAGE)}
    assert named - others <= known
    scaling = {option.flag for option in OPTIONS.values() if option.group == "Autoscaling"}
    assert scaling <= named  # and each of the group is told of


def test_the_defaults_it_names() -> None:
    said = re.findall(r"`(--[a-z-]+)` \(?(\d+)\b", PAGE)
    assert len(said) >= 8
    for flag, value in said:
        (option,) = [option for option in OPTIONS.values() if option.flag == flag]
        assert float(option.default) == float(value), flag


@pytest.mark.parametrize("line", re.findall(r"^(--autoscale .*?)(?:  .*)?$", PAGE, re.MULTILINE))
def test_the_examples_of_options_are_taken(line: str) -> None:
    assert parse(shlex.split(line), {}).checked().scale_range


def test_json_examples_have_the_names_of_the_real_thing() -> None:
    scale, message = (json.loads(block) for block in blocks("json"))
    real = told(decision(3), 0.0)
    assert scale["figures"].keys() == real["figures"].keys() == {*Reading.__struct_fields__, "wants"}
    assert scale["decisions"][0].keys() == real.keys()
    assert message.keys() == {"id", "min", "max", *real}
    assert scale["rules"].keys() <= set(ScalingRules.__struct_fields__)


def test_the_hpa_follows_the_gauge() -> None:
    (adapter,) = [rules for block in blocks("yaml") if (rules := yaml.safe_load(block).get("rules"))]
    (hpa,) = manifests("HorizontalPodAutoscaler")
    (metric,) = hpa["metrics"]
    assert metric["external"]["metric"]["name"] == adapter["external"][0]["name"]["as"]
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "1"}
    assert "sgl_router_desired_workers" in {row.name for row in METRICS}


def test_keda_asks_for_what_there_is() -> None:
    prometheus, direct = manifests("ScaledObject")
    assert prometheus["triggers"][0]["metadata"]["query"] == "max(sgl_router_desired_workers)"
    (trigger,) = direct["triggers"]
    assert trigger["metadata"]["url"].endswith("/scale")
    assert trigger["metadata"]["valueLocation"] in told(decision(3), 0.0)
    assert all(isinstance(value, str) for value in trigger["metadata"].values())  # as Kubernetes insists
    assert RouterArgs(autoscale=f"{direct['minReplicaCount']}:{direct['maxReplicaCount']}").checked().scale_range
