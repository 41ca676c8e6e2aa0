"""compose.yml: what docker-compose makes of it, and whether all that it names is there."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import yaml
from scripts.deploy.chart import DEPLOY
from scripts.deploy.report import Failure, Missing, Report, run

COMPOSE = DEPLOY / "compose"


def check(report: Report) -> None:
    """Run all of it. Raises: Failure, Missing."""
    _prometheus(report)
    if shutil.which("docker-compose") is None:
        raise Missing("docker-compose (any version): on Debian or Ubuntu: apt-get install docker-compose")
    # Version 1 knows all but the project's name.
    text = re.sub(r"^name: .*\n", "", (COMPOSE / "compose.yml").read_text("utf-8"), flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "compose.yml").write_text(text)
        command = ["docker-compose", "--project-directory", COMPOSE, "--file", Path(folder) / "compose.yml", "config"]
        services = yaml.safe_load(run(command))["services"]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
            if source.startswith("/") and not Path(source).exists():
                raise Failure(f"{name} mounts {source}, which is not there")
    report.ok(f"docker-compose config: {', '.join(sorted(services))}; all files that they mount are there")


def _prometheus(report: Report) -> None:
    """Let promtool read the scrape configuration, with the alerts where the container has them."""
    if shutil.which("promtool") is None:
        report.left("promtool check config: on Debian or Ubuntu: apt-get install prometheus")
        return
    with tempfile.TemporaryDirectory() as folder:
        text = (COMPOSE / "prometheus" / "prometheus.yml").read_text("utf-8")
        (Path(folder) / "prometheus.yml").write_text(text.replace("/etc/prometheus/", f"{folder}/"))
        shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
        run(["promtool", "check", "config", Path(folder) / "prometheus.yml"])
    report.ok("promtool check config: the scrape configuration and the alerts")
