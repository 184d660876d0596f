"""Ray for one run: joined where a cluster is named, embedded otherwise, and quiet unless asked."""

import contextlib
import json
import logging
import math
import os
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from orchestrator.cluster_fit import Demand, cluster_problems, training_demands
from orchestrator.console import Console
from orchestrator.head_watch import HeadLostError, HeadWatch, host_and_port
from orchestrator.recipe import Recipe
from shearing.errors import UserError

CPU_FOR_ACTORS = 2.0  # streams, mixture, run log: they mostly wait
CPU_FOR_DATA = 2.0  # read tasks need one each, or a stream hangs for ever
ADDRESS_VARIABLE = "RAY_ADDRESS"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job
CONNECT_TIMEOUT_S = 10.0
# Read by the embedded Ray's node alone. It counts the machine's CPUs otherwise, and warns of the workers and actors
# that a run needs as of a mistake.
STARTUP_VARIABLE = "RAY_worker_maximum_startup_concurrency"

# Read by every process of the run. Ray Train polls reports at this interval, 2 s by default: each report would block
# that long. Printing is patched by Ray Train so that each line comes twice. A process to which Ray gives no GPU would
# see all of its node otherwise, and those who ask torch whether there is one would compute on another's.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# What only a cluster has a use for: each is one more process, and takes near 1 % of a core from training on a laptop.
_SERVICES = ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_ENABLE_STATE_TRACKING")
_QUIET_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TQDM": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def logical_cpus(recipe: Recipe, runs_at_once: int = 1) -> int:
    """CPUs that an embedded Ray declares: enough for the workers, the actors and reading, whatever the machine has.

    They are for scheduling alone.
    """
    compared = recipe.comparison.workers if recipe.comparison is not None else None
    workers = max(recipe.engine.most_workers, compared or 0)
    wanted = workers * recipe.engine.cpus_per_worker + CPU_FOR_ACTORS + CPU_FOR_DATA
    return max(os.cpu_count() or 1, math.ceil(runs_at_once * wanted))


class RaySession:
    """Ray, started when the first stage asks for it and ended with the run if it was embedded.

    Args:
        recipe: What the cluster has to hold.
        verbose: Let Ray's and the workers' own output through.
        dashboard: Serve Ray's dashboard where Ray is embedded (a cluster has its own).
        runs_at_once: Runs of such a recipe that go on beside each other, for which an embedded Ray declares CPUs; with
            none it declares the machine's own.
        demands: What of the recipe the job wants of the cluster at the same time; by default its training.
        on_lost: Told why in a thread of its own where Ray's head is gone; the main thread may wait for Ray for ever.
    """

    def __init__(
        self,
        recipe: Recipe,
        verbose: bool = False,
        dashboard: bool = False,
        *,
        runs_at_once: int = 1,
        demands: Callable[[Recipe], list[Demand]] = training_demands,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.logical_cpus = logical_cpus(recipe, runs_at_once)
        self.recipe, self.verbose, self.dashboard = recipe, verbose, dashboard
        self.is_embedded = os.environ.get(ADDRESS_VARIABLE, "local") in ("", "local")
        self._demands = demands
        self._started = False
        self._on_lost = on_lost
        self._watch: HeadWatch | None = None

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            import ray

            lost = False
            if self._watch is not None:
                self._watch.stop()
                lost = isinstance(error, Exception) and not self._watch.answers()
            ray.shutdown()
            self._started = False
            if lost:  # whatever Ray made of it
                raise HeadLostError(self._head_lost()) from error

    def start(self, console: Console) -> None:
        """Have Ray running; does nothing the second time. Raises UserError where the cluster cannot hold the recipe."""
        if self._started:
            return
        served = "0" if self.is_embedded and not self.dashboard else "1"
        environment = ENVIRONMENT | dict.fromkeys(_SERVICES, served) | ({} if self.verbose else _QUIET_ENVIRONMENT)
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        with _own_handlers():
            self._init(environment, console)
        self._started = True
        self._watch_head()
        self._check(console)

    def _init(self, environment: dict[str, str], console: Console) -> None:
        import ray

        if not self.verbose:
            warnings.filterwarnings("ignore", module=r"ray\..*")
            for name in ("ray", "ray.data", "ray.train", "ray.tune"):
                logging.getLogger(name).setLevel(logging.ERROR)
        options: dict[str, Any] = {
            "log_to_driver": self.verbose,
            "logging_level": logging.INFO if self.verbose else logging.ERROR,
            "configure_logging": True,
            "runtime_env": {"env_vars": _variables(environment)},
        }
        if self.is_embedded:
            # "local" and nothing else: a file left by another cluster on this machine must not be followed.
            console.detail("starting Ray in this process")
            os.environ.setdefault(STARTUP_VARIABLE, str(self.logical_cpus))
            options |= {"address": "local", "num_cpus": self.logical_cpus, "include_dashboard": self.dashboard}
            context = ray.init(**options)
            if self.dashboard and context.dashboard_url:
                console.note(f"Ray's dashboard: http://{context.dashboard_url}")
        else:
            address = os.environ[ADDRESS_VARIABLE]
            console.note(f"joining the Ray cluster at {address}")
            _check_address(address)
            try:
                ray.init(address=address, **options)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise UserError(_cannot_join(address, error)) from error
        _quiet_data(self.verbose)

    def _watch_head(self) -> None:
        import ray

        if (tell := self._on_lost) is not None:
            self._watch = HeadWatch(ray.get_runtime_context().gcs_address, lambda: tell(self._head_lost()))

    def _head_lost(self) -> str:
        if self.is_embedded:
            return "the head of this run's own Ray does not answer: it is lost, and its workers with it."
        address = os.environ[ADDRESS_VARIABLE]
        return (
            f"{ADDRESS_VARIABLE} = {address!r}: the cluster's head does not answer: it is lost, and its workers with "
            f"it. Start a head first, and set {ADDRESS_VARIABLE} to it."
        )

    def _check(self, console: Console) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        findings = cluster_problems(self._demands(self.recipe), nodes, _is_autoscaling())
        for warning in [*findings.warnings, *_folder_warnings(self.recipe, self.is_embedded, len(nodes))]:
            console.warn(warning)
        if findings.problems:
            raise UserError(findings.problems)


def _variables(names: Iterable[str]) -> dict[str, str]:
    """Those of these variables that every process is to be given with the value that they have here.

    A submitted job's own runtime environment gives what it names already; Ray refuses a variable that both give.
    """
    job = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("runtime_env") or {}
    return {name: os.environ[name] for name in names if name not in job.get("env_vars", {})}


class SurroundingSession(RaySession):
    """Ray as it runs around a task that drives a run of its own: neither started nor ended here."""

    def start(self, console: Console) -> None:
        """Quiet Ray Data in this process too."""
        console.detail("in a task of the cluster")
        _quiet_data(self.verbose)


def _check_address(address: str) -> None:
    """Raise UserError at once where nobody listens: Ray itself would try for minutes."""
    if "://" in address:
        what = "Ray Client's" if address.startswith("ray://") else "the dashboard's"
        raise UserError(
            f"{ADDRESS_VARIABLE} = {address!r} is {what} address, which no training can be driven through. Submit the "
            "run with `ray job submit --working-dir . -- python pipelines/shear.py ...`, or set it to the HOST:PORT "
            "that `ray start --head` printed (port 6379 unless changed)."
        )
    try:
        place = host_and_port(address)
    except ValueError:  # `auto`, which Ray looks up
        return
    try:
        socket.create_connection(place, timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:  # the latter of a port that there is not
        raise UserError(_cannot_join(address, error)) from None


def _cannot_join(address: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{ADDRESS_VARIABLE} = {address!r}: no Ray cluster could be joined there ({first_line}). Allowed: `auto`, or "
        "HOST:PORT with the port of `ray start --head` (6379 unless changed), not the dashboard's 8265. If the cluster "
        "runs, its token may differ: RAY_AUTH_MODE and the token have to be the same on all nodes and here. Unset "
        f"{ADDRESS_VARIABLE} to run on this machine alone."
    )


def _quiet_data(verbose: bool) -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.execution_no_progress_timeout_s = -1  # a rarely drawn domain's stream waits for long without being stuck


def _is_autoscaling() -> bool:
    """Whether the cluster joined grows by itself."""
    import ray

    with contextlib.suppress(Exception):  # an unsettled corner of Ray; not to know is to check strictly
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        nodes = [*status.active_nodes, *status.idle_nodes]
        # Without an autoscaler each node is a type of its own, named after its id.
        return any(not node.ray_node_type_name.startswith("node_") for node in nodes)
    return False


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep the handler of SIGTERM: `ray.init` puts one in its place that exits without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _folder_warnings(recipe: Recipe, is_embedded: bool, nodes: int) -> list[str]:
    if is_embedded:
        return []
    found = []
    for key, uri in (("workspace", recipe.workspace or f"runs/{recipe.name}"), ("corpus.path", recipe.corpus.path)):
        if "://" in uri:
            continue
        inside = os.path.abspath(uri)
        if inside.startswith(os.path.join(tempfile.gettempdir(), "ray", "")):
            found.append(
                f"{key} = {uri!r} lies in the job's own copy of the working directory, which Ray removes in time; "
                "give an absolute path or a URI to keep it and to go on later."
            )
        elif nodes > 1:
            found.append(
                f"{key} = {uri!r} is a local path on a cluster of {nodes} nodes: every node has to see it under one "
                "name (a shared filesystem), or use a URI such as s3://bucket/runs."
            )
    return found
