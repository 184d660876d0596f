"""Dashboard, Prometheus' configuration and alerts: against the table of metrics, and beside a running job."""

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from journeys import end_with_children, free_ports, small_journey, wait_until

from actors.metrics import METRICS

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "cluster" / "grafana"
DASHBOARD = json.loads((GRAFANA / "shear.json").read_text())
RULES = [rule for group in yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
# What a run on CPUs without a teacher has no figure for.
ABSENT = ("ray_shear_model_flops_utilization", "ray_shear_divergence_nats_per_token")


def queries() -> list[str]:
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [target["expr"] for target in targets]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"ray_(shear_\w+)", expression))


def test_every_metric_is_on_the_dashboard_and_no_other():
    """A panel that stays empty since a metric was renamed; a metric that nobody ever sees."""
    known = {metric.name for metric in METRICS}
    shown = set().union(*map(names_in, queries()))
    assert shown == known
    assert all(names_in(rule["expr"]) and names_in(rule["expr"]) <= known for rule in RULES)


def test_labels_are_those_of_the_metrics():
    """A legend or a filter by a label that the metric does not carry."""
    labels = {metric.name: {"run", "phase", *metric.labels} for metric in METRICS}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            carried = set.intersection(*(labels[name] for name in names_in(target["expr"])))
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert used <= carried, target
            assert 'run=~"$run"' in target["expr"], "every panel follows the choice of runs"


def test_panels_have_places_and_numbers_of_their_own():
    """Two panels over one another."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@needs_promtool
def test_prometheus_accepts_rules_and_configuration():
    for what, name in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(
            ["promtool", "check", what, str(GRAFANA / name)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path):
    """An alert that never fires, or always does."""
    shutil.copy(GRAFANA / "alerts.yml", tmp_path)
    shutil.copy(ROOT / "tests" / "cluster" / "alerts_fire.yml", tmp_path)
    told = {test["alertname"] for case in yaml.safe_load((tmp_path / "alerts_fire.yml").read_text())["tests"]
            for test in case["alert_rule_test"] if test["exp_alerts"]}  # fmt: skip
    assert told == {rule["alert"] for rule in RULES}
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_fire.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A server with the project's configuration, beside the cluster of a test."""

    def __init__(self, folder: Path, discovery: str) -> None:
        text = (GRAFANA / "prometheus.yml").read_text()
        assert "/tmp/ray/prom_metrics_service_discovery.json" in text
        folder.mkdir()
        (folder / "prometheus.yml").write_text(
            text.replace("/tmp/ray/prom_metrics_service_discovery.json", discovery).replace("10s", "2s")
        )
        shutil.copy(GRAFANA / "alerts.yml", folder)
        (port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{port}/api/v1"
        self.log = (folder / "log").open("w")
        words = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
        self.process = subprocess.Popen(["prometheus", *words], stdout=self.log, stderr=self.log)

    def ask(self, what: str, **words: str) -> dict:
        with urllib.request.urlopen(f"{self.address}/{what}?{urllib.parse.urlencode(words)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def finds(self, expression: str) -> bool:
        """Whether a query that Prometheus accepts gives any series; raises HTTPError where it does not accept it."""
        expression = expression.replace("$run", ".+").replace("$phase", ".+")
        return bool(self.ask("query", query=expression)["result"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_a_running_job_is_watched_stopped_and_goes_on(cluster, tmp_path):
    """Panels without data beside a real job; a stop that leaves nothing to go on from."""
    journey = small_journey(tmp_path / "journey", tmp_path).with_overrides(
        "pruning.steps=100000", "pruning.evaluate_every_steps=10", "pruning.checkpoint_every_steps=20",
        "pruning.gates.sparsity_warmup_steps=50", "trackers=[tensorboard]",
    )  # fmt: skip
    environment = ["--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})]

    def ray(*words: str) -> str:
        done = subprocess.run(
            ["ray", "job", *words], env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        return done.stdout + done.stderr

    def submit(name: str) -> None:
        command = ["python", "pipelines/shear.py", *journey.arguments]
        ray("submit", "--no-wait", "--submission-id", name, *environment, "--working-dir", ".", "--", *command)

    def stop(name: str) -> str:
        ray("stop", name)
        assert "was stopped" in ray("status", name)
        return ray("logs", name)

    prometheus = Prometheus(tmp_path / "prometheus", f"{cluster['RAY_TMPDIR']}/prom_metrics_service_discovery.json")
    try:
        submit("first")
        wanted = [query for query in queries() if not any(name in query for name in ABSENT)]
        assert len(wanted) == len(queries()) - len(ABSENT)
        wanted += [f"count(ray_{name})" for rule in RULES for name in sorted(names_in(rule["expr"]))]
        empty = list(wanted)

        def all_found() -> bool:
            empty[:] = [query for query in empty if not prometheus.finds(query)]
            return not empty

        try:
            wait_until(all_found, "data for every panel", timeout_s=1500, every_s=3)
        except AssertionError:
            raise AssertionError(f"no data for {empty}\n{ray('logs', 'first')[-3000:]}") from None
        for query in (*queries(), *(rule["expr"] for rule in RULES)):
            prometheus.finds(query)  # those without data are accepted all the same
        (group,) = prometheus.ask("rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} == {"ok"}, group
        assert prometheus.ask("query", query="ray_shear_workers")["result"][0]["value"][1] == "2"
        shown = {path.name for path in Path(cluster["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"]).iterdir()}
        assert any("default" in name for name in shown), "Ray's own dashboards lie where ours are put"

        wait_until(lambda: journey.checkpoints("pruning"), "a checkpoint to go on from", timeout_s=600)
        assert "stopped by SIGTERM" in stop("first")
        assert journey.checkpoints("pruning")
        assert list((journey.workspace / "tracking" / "tensorboard" / "pruning").iterdir())
        state = subprocess.run(
            [sys.executable, "pipelines/show_run.py", str(journey.workspace)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert state.returncode == 0, state.stderr
        assert "pruning" in state.stdout

        submit("second")
        restarted = 'ray_shear_restarts{phase="pruning"} == 1'
        wait_until(lambda: prometheus.finds(restarted), "the stopped phase to go on", timeout_s=900, every_s=3)
        stop("second")
    finally:
        end_with_children(prometheus.process)
