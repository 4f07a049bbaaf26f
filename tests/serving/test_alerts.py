"""The alert rules, tried by Prometheus' own tool: each fires for the fault that it names, and for nothing else."""

import re
import shutil
import subprocess

import pytest
import yaml
from serving_tools import distributed

from common.course.settings import ROOT

MONITORING = ROOT / "03-Model_Compression" / "Lab-3.1-Quantization" / "monitoring"
ALERTS = [
    rule["alert"] for rule in yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"][0]["rules"]
]


@pytest.fixture(scope="module")
def promtool():
    return distributed("prometheus", "promtool")


@pytest.fixture
def folder(tmp_path):
    """The lab's folder as it is beside a service with a key."""
    shutil.copytree(MONITORING, tmp_path, dirs_exist_ok=True)
    (tmp_path / "llm-api-key").write_text("secret", encoding="utf-8")
    return tmp_path


def run(promtool, folder, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([promtool, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_prometheus_takes_the_configuration_and_the_rules(promtool, folder):
    done = run(promtool, folder, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_every_alert_fires_for_its_fault_and_for_nothing_else(promtool, folder):
    done = run(promtool, folder, "test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stderr


def test_every_alert_has_its_rule_test():
    tests = (MONITORING / "alerts_test.yml").read_text("utf-8")
    assert set(re.findall('alertname="(.*?)"', tests)) == set(ALERTS)


def test_a_rule_that_never_fires_is_found(promtool, folder):
    """Planted in all rules at once: each is missed by name."""
    rules = yaml.safe_load((folder / "alerts.yml").read_text("utf-8"))
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = "vector(1) > 2"
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    done = run(promtool, folder, "test", "rules", "alerts_test.yml")
    assert done.returncode != 0
    missed = set(re.findall('alertname="(.*?)"', done.stderr + done.stdout))
    assert missed == set(ALERTS)
