import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from clusters import started_head
from journeys import Journey, small_journey, wait_until

from orchestrator.phases import phase_config
from orchestrator.recipe_loading import load_recipe
from shearing.training.phase import PhaseConfig, PhaseName

# a shell that runs the tests in the background has Ctrl-C ignored, also by what they start
signal.signal(signal.SIGINT, signal.default_int_handler)
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
    """A cluster of one node with six CPUs; the environment that reaches it."""
    with started_head(tmp_path / "ray-start.log", 6) as head:
        ready = ["ray", "job", "list"]

        def answers() -> bool:
            return subprocess.run(ready, env=head.words, capture_output=True, check=False).returncode == 0

        wait_until(answers, "the cluster's dashboard", every_s=1)
        yield head.words


@pytest.fixture
def pruning_phase(finished_journey: tuple[Journey, subprocess.CompletedProcess]) -> PhaseConfig:
    """Mask learning of the finished journey as its driver described it, on the same corpus and source model."""
    return described(finished_journey, "pruning", "source")


@pytest.fixture
def recovery_phase(finished_journey: tuple[Journey, subprocess.CompletedProcess]) -> PhaseConfig:
    """The finished journey's continued pretraining, of the same pruned model."""
    return described(finished_journey, "recovery", "pruned")


def described(finished: tuple[Journey, subprocess.CompletedProcess], name: PhaseName, model: str) -> PhaseConfig:
    journey, done = finished
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(str(journey.workspace / "recipe.yaml"), [])
    return phase_config(
        recipe,
        name,
        model=str(journey.workspace / model),
        source=journey.json("stages/source.json")["outputs"]["model"],
        corpus=journey.json("stages/corpus.json")["outputs"]["path"],
        references=journey.json("stages/references.json")["outputs"]["losses"],
    )
