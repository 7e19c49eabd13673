"""Alerts and dashboard: every metric exists, every alert has its advice, and they fire when they should.

With promql-parser installed every query is parsed; with Prometheus' promtool on the PATH the alerts are also run on the
series of alerts.yaml (Debian: apt-get install prometheus).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml
from manifests import metrics
from manifests.render import Object, render
from manifests.schemas import findings
from manifests.workloads import pods, quantity, selects

FOLDER = metrics.ROOT / "cluster" / "kubernetes" / "observability"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(FOLDER)


@pytest.fixture(scope="module")
def rules(objects) -> Object:
    return next(one["spec"] for one in objects if one["kind"] == "PrometheusRule")


@pytest.fixture(scope="module")
def alerts(rules) -> list[Object]:
    return [rule for group in rules["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard(objects) -> Object:
    (found,) = (one for one in objects if one["kind"] == "ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = found["data"].values()
    return json.loads(text)


@pytest.fixture(scope="module")
def queries(alerts, dashboard) -> list[str]:
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [rule["expr"] for rule in alerts] + [plain(query) for query in shown]


def plain(query: str) -> str:
    """Return a panel's query with Grafana's variables filled in."""
    filled = query.replace("$__rate_interval", "1m").replace("$cluster", ".*")
    assert "$" not in filled
    return filled


def test_schemas(objects):
    assert {one["kind"] for one in objects} == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    assert [line for one in objects for line in findings(one)] == []
    (monitor,) = (one for one in objects if one["kind"] == "PodMonitor")
    assert findings({**monitor, "spec": {**monitor["spec"], "podTargetLabel": []}}) != []


@pytest.mark.parametrize("overlay", ["dev", "prod", "kueue"])
def test_prometheus_finds_every_ray_pod_at_a_port_that_is_open_to_it(overlay, objects, rendered):
    (monitor,) = (one["spec"] for one in objects if one["kind"] == "PodMonitor")
    there = [pod for pod in pods([*rendered(overlay), *rendered(f"{overlay}/jobs")]) if pod.main.get("ports")]
    chosen = [pod for pod in there if selects(monitor["selector"], pod.labels)]
    assert {pod.name for pod in chosen} == {pod.name for pod in there if "ray.io/cluster" in pod.labels}
    (policy,) = (one for one in rendered(overlay) if one["metadata"]["name"] == "metrics")
    (opened,) = (port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"])
    for pod in chosen:
        ports = {port["name"]: port["containerPort"] for port in pod.main["ports"]}
        assert [ports[one["port"]] for one in monitor["podMetricsEndpoints"]] == [opened]
        assert set(monitor["podTargetLabels"]) - {"ray.io/group"} <= set(pod.labels)


def test_every_metric_exists(queries):
    declared = metrics.ours()
    used = {name for query in queries for name in metrics.names(query)}
    assert {name for name in used if name.startswith("ray_cir_")} <= declared
    others = {name for name in used if not name.startswith("ray_cir_")} - {"up"}
    assert {name for name in others if not name.startswith("ray_") or not metrics.is_rays(name)} == set()
    assert len(others) >= 5
    assert not metrics.is_rays("ray_memory_manager_worker_evictions_total")
    assert {f"ray_cir_{name}" for name in ("embed_rows_total", "tat_train_steps", "storage_retries_total")} <= used


def test_every_metric_of_ours_is_in_the_readme(queries):
    rows = re.findall(r"^\| (`ray_cir_[^|]+)\|", README, re.MULTILINE)
    documented = set()
    for row in rows:
        first, *others = re.findall(r"`(\w+)`", row)
        job = re.match(r"ray_cir_(embed|tat_train|batch_retrieve|storage)", first)[0]
        documented |= {first, *(job + name for name in others)}
    assert documented == metrics.ours()


def test_every_stage_is_one_that_is_measured(queries):
    named = {
        stage for query in queries for found in re.findall(r'stage=~?"([^"]+)"', query) for stage in found.split("|")
    }
    assert named >= {"data_wait", "read", "decode", "search"}
    assert named <= metrics.stages()


def test_every_alert_has_its_advice_a_severity_and_a_test(alerts):
    assert re.findall(r"^\| `(SlerpTat\w+)` \|", README, re.MULTILINE) == [rule["alert"] for rule in alerts]
    tested = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text())["tests"]
    fired = {one["alertname"] for test in tested for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alerts}
    assert {rule["labels"]["severity"] for rule in alerts} == {"warning", "critical"}


def test_a_pod_s_disk_is_told_of_before_its_volume_is_full(alerts, rendered):
    """Spilled objects fill volume `tmp`; at its limit the pod is evicted, long before the machine's disk is full."""
    (rule,) = (one for one in alerts if one["alert"] == "SlerpTatPodDiskFilling")
    told = {kind: float(most) for kind, most in re.findall(r'ray_io_node_type="(\w+)"}\) > (\S+)', rule["expr"])}
    assert set(told) == {"head", "worker"}
    for pod in pods([*rendered("prod"), *rendered("prod/jobs")]):
        if kind := pod.labels.get("ray.io/node-type"):
            (volume,) = (one["emptyDir"] for one in pod.spec["volumes"] if one["name"] == "tmp")
            assert 0.6 < told[kind] / float(quantity(volume["sizeLimit"])) < 0.8


def test_the_dashboard_is_whole(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [(x, y) for panel in panels for x, y in squares(panel["gridPos"])]
    assert len(set(places)) == len(places)
    assert all(x < 24 for x, _ in places)
    variables = {one["name"] for one in dashboard["templating"]["list"]}
    named = {name for name in re.findall(r"\$\{?(\w+)", json.dumps(panels)) if name != "__rate_interval"}
    assert named == variables
    assert any("MLflow" in link["title"] for link in dashboard["links"])


def squares(place: dict[str, int]) -> list[tuple[int, int]]:
    return [(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])]


def test_queries_parse(queries):
    for query in queries:
        found: set[str] = set()
        collect(promql_parser.parse(query), found)
        assert found == set(metrics.names(query)), query
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql_parser.parse("sum by (a (b)")


def collect(node, found: set[str]) -> None:
    """Gather the names of the metrics of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        found.add(node.name)
    for part in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
        child = getattr(node, part, None)
        for one in child if isinstance(child, list) else [child]:
            if one is not None:
                collect(one, found)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_alerts_fire_when_they_should(rules, tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(Path(__file__).with_name("alerts.yaml"), tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "alerts.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_the_dashboard_s_queries_are_promql(dashboard, tmp_path):
    shown = [plain(target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(shown)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
