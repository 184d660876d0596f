import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from journeys import Journey, end_of, end_with_children, environment, free_ports, small_journey, wait_until

from orchestrator.phases import phase_config
from orchestrator.recipe_loading import load_recipe
from shearing.training.phase import PhaseConfig

# a busy machine is no fault of the code: nothing here is asked to be fast
hypothesis.settings.register_profile("shear", deadline=None)
hypothesis.settings.load_profile("shear")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One embedded Ray for all tests that need it: eight logical CPUs, and as quiet and quick as a run's own."""
    import ray

    from orchestrator.ray_session import ENVIRONMENT

    # Ray keeps its sockets below this folder, and a socket's path may be 107 characters long
    with tempfile.TemporaryDirectory(prefix="shear-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
            runtime_env={"env_vars": ENVIRONMENT},
        )
        yield
        with contextlib.suppress(Exception):
            ray.shutdown()


@pytest.fixture(scope="session")
def finished_journey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Journey, subprocess.CompletedProcess]:
    """One uninterrupted run of the main job on small text, and how its command ended."""
    folder = tmp_path_factory.mktemp("journey")
    journey = small_journey(folder / "whole", shared=folder)
    return journey, journey.run()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster by `ray start --head` with ports and a folder of its own; the environment that reaches it."""
    ports = free_ports(6)
    with tempfile.TemporaryDirectory(prefix="shear-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        words = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        words["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"] = f"{folder}/dashboards"
        words["PATH"] = f"{Path(sys.executable).parent}:{words['PATH']}"
        names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
                 "dashboard-agent-grpc-port", "metrics-export-port")  # fmt: skip
        given = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        log = tmp_path / "ray-start.log"
        with log.open("w") as file:
            head = subprocess.Popen(
                ["ray", "start", "--head", "--block", "--num-cpus=6", f"--temp-dir={folder}", *given],
                env=words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{ports[1]}"
            ready = ["ray", "job", "list", f"--address={address}"]

            def answers() -> bool:
                done = subprocess.run(ready, env=words, capture_output=True, check=False)
                return head.poll() is not None or done.returncode == 0

            wait_until(answers, "the cluster", every_s=1)
            assert head.poll() is None, log.read_text()
            yield words | {"RAY_API_SERVER_ADDRESS": address}
        finally:
            end_with_children(head)
            end_of(folder)


@pytest.fixture
def pruning_phase(finished_journey: tuple[Journey, subprocess.CompletedProcess]) -> PhaseConfig:
    """Mask learning of the finished journey as its driver described it, on the same corpus and source model."""
    journey, done = finished_journey
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(str(journey.workspace / "recipe.yaml"), [])
    source = journey.json("stages/source.json")["outputs"]["model"]
    return phase_config(
        recipe,
        "pruning",
        model=source,
        source=source,
        corpus=journey.json("stages/corpus.json")["outputs"]["path"],
        references=journey.json("stages/references.json")["outputs"]["losses"],
    )
