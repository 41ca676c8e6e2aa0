"""Check deploy/: image, compose, Helm chart and manifests, systemd units, and a rolling update under load.

scripts/test-deploy [--image] [--only PART]     (a shell script; prepares the environment and runs this)

Each check is one line as it holds. What cannot be checked on this machine is listed at the end, and is no failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from scripts.deploy import cluster_checks, composed, image, manifests, rollout, units
from scripts.deploy.report import Report

PARTS: dict[str, tuple[str, Callable[[Report], None]]] = {
    "dockerfile": ("Dockerfile", image.lint),
    "compose": ("compose", composed.check),
    "chart": ("Helm chart", manifests.check),
    "cluster": ("the chart in a real API server", cluster_checks.check),
    "rollout": ("rolling update", rollout.check),
    "systemd": ("systemd units in a real systemd", units.check),
    "image": ("image", image.check),
}
NOT_HERE = (
    "docker compose up: the images of llama.cpp, Prometheus and Grafana are not fetched"
    " (scripts/test-monitoring runs a real Prometheus)",
    "pods in the API server: there is no kubelet; the rolling update plays it",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", action="store_true", help="build and run the image too: 5 to 15 minutes more")
    parser.add_argument("--only", choices=PARTS, help="one part")
    options = parser.parse_args()
    report = Report()
    for name, (title, check) in PARTS.items():
        if options.only not in (None, name):
            continue
        if name == "image" and not (options.image or options.only):
            report.left("the image: add --image")
            continue
        with report.part(title):
            check(report)
    if options.only is None:
        for what in NOT_HERE:
            report.left(what)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
