"""One phase of training on Ray Train: streams, domain weights and log as actors, DeepSpeed in the workers.

The driver calls `run_phase`; each worker runs `_train`. A worker group that dies is started again by Ray Train from the
last checkpoint; a driver that dies goes on the same way when it is started again.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS

from actors.checkpoints import (
    checkpoint_name,
    drop_torn_checkpoints,
    newest_checkpoint,
    remove_left_uploads,
    settle_checkpoints,
    upload_prefix,
)
from actors.domain_weights import DomainWeightsClient, start_domain_weights
from actors.feeder import FeedPlan, RayDataSource, start_feeder
from actors.metrics import RunMetrics
from actors.nodes import HELD_WITHIN_S, LEAVING, HeldNodes, count_nodes
from actors.process_group import NodeTorchConfig
from actors.run_log import RankLog, RunLog
from actors.trackers import TRACKERS, InThread
from actors.wishes import Wishes, free_resources, resources_per_worker, room_for
from shearing.data.manifest import load_manifest
from shearing.errors import UserError
from shearing.patience import StorageError
from shearing.storage import Store, open_store, resolve
from shearing.training.checkpoint import CheckpointReader
from shearing.training.config import EngineConfig
from shearing.training.engine import prepare_deepspeed
from shearing.training.loop import Report, Trainer, checkpoint_report, event_report, training_reports
from shearing.training.phase import PhaseConfig, Place, build_trainer, restore, save, start_report
from shearing.training.watchdog import TrainingDivergedError

KEPT_CHECKPOINTS = 2
POLL_S = 1.0
ELASTIC_RESTARTS = 1  # in which no worker started: a second time there is no room for as many
SETUP_ATTEMPTS = 3  # with no new checkpoint between them
LEAVE_WITHIN_S = 600.0  # a step and a checkpoint of a large model; who asks twice waits no more
CLOSE_WITHIN_S = 30.0
LOOK_FOR_ROOM_EVERY_S = 60.0
NEVER_S = 1e9


@dataclass(frozen=True)
class PhaseResult:
    """How a phase ended. `checkpoint` is the folder or URI of its last one; `outcome` what its gates came to."""

    checkpoint: str
    outcome: dict[str, Any]


def run_phase(phase: PhaseConfig, workspace_uri: str, on_report: Callable[[Report], None]) -> PhaseResult:
    """Bring one phase to its end, from its last checkpoint if there is one.

    Args:
        phase: What to train.
        workspace_uri: Folder or URI of the run; checkpoints, metrics and mixture decisions go below it.
        on_report: Called in a thread of the driver with each new report.

    Raises:
        UserError: What the user can mend: a domain that ran out, a loss that is no number.
        ray.train.TrainingFailedError: The workers failed more often than `engine.max_failures`.
    """
    workspace = open_store(workspace_uri)
    checkpoints = workspace.child("checkpoints")
    count_nodes()  # before any stream
    held = HeldNodes()
    stopping, training = threading.Event(), threading.Event()

    def follow(report: Report) -> None:
        if report["kind"] == "start":
            training.set()
        held.follow(report)
        on_report(report)

    with contextlib.closing(held), _phase_actors(phase, workspace) as actors, _Followed(actors["log"], follow):
        if problems := ray.get(actors["weights"].problems.remote()):
            raise UserError(problems)
        folder = checkpoints.child(phase.name)
        settings = {"checkpoints": folder.uri} | actors

        def leave() -> float:
            """Tell the workers. Returns for how many seconds they are waited for."""
            stopping.set()
            if not training.is_set():
                on_report(event_report(0, "stopping", "no workers train yet, so there is nothing to save"))
                return 0.0
            ray.get(actors["log"].ask_to_leave.remote())  # first: who is told may be gone
            on_report(event_report(0, "stopping", "saving a checkpoint first; ask again to stop at once"))
            return LEAVE_WITHIN_S

        def fit(look_every_s: float) -> dict[str, Any]:
            training.clear()
            return _fit_group(phase, settings | {"look_every_s": look_every_s}, checkpoints, on_report)

        returned = _in_thread(lambda: _fit(fit, stopping), leave)
        settle_checkpoints(folder)
    if returned["problems"]:
        raise UserError(returned["problems"])
    return PhaseResult(checkpoints.child(f"{phase.name}/{returned['checkpoint']}").uri, returned["outcome"])


@contextlib.contextmanager
def _phase_actors(phase: PhaseConfig, workspace: Store) -> Iterator[dict[str, Any]]:
    """The actors beside the workers, which end with the phase however it ends."""
    with contextlib.ExitStack() as ending:

        def kept(actor: Any) -> Any:
            ending.callback(ray.kill, actor)
            return actor

        # Named after their run too: another run of the same cluster may be in a phase of the same name.
        run = hashlib.sha256(workspace.uri.encode()).hexdigest()[:12]
        watchers = [RunMetrics, *(partial(InThread, TRACKERS[name]) for name in phase.trackers)]
        log = kept(_actor(RunLog, f"run-log-{phase.name}-{run}").remote(workspace.uri, phase.name, watchers))
        ending.callback(_close, log)
        weights = kept(
            start_domain_weights(
                f"domain-weights-{phase.name}-{run}",
                workspace.child(f"mixture/{phase.name}").uri,
                phase.mixture,
                phase.proportions,
                phase.references or dict.fromkeys(phase.proportions, 0.0),  # a source model has none yet
            )
        )
        feeder = kept(start_feeder(_feed_plan(phase), f"sequence-feeder-{phase.name}-{run}"))
        yield {"log": log, "weights": weights, "feeder": feeder}


def _close(log: Any) -> None:
    """Before it is killed, the log tells its trackers."""
    with contextlib.suppress(ray.exceptions.RayError):  # what shows a run may not end it
        ray.get(log.close.remote(), timeout=CLOSE_WITHIN_S)


def _in_thread(work: Callable[[], dict[str, Any]], leave: Callable[[], float]) -> dict[str, Any]:
    """What `work` returns or raises, done in a thread of its own.

    In the main thread Ray Train would put its own handler of Ctrl-C in place of the driver's, and leave it there.
    Where this thread is asked to stop, `leave` tells the workers, and how long they have for it.
    """
    done: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    try:
        thread.start()
        while not done.done():  # Thread.join takes a thread for ended once a signal has cut it short
            wait([done], timeout=POLL_S)  # a task that Ray cancels hears of it between two waits alone
    except KeyboardInterrupt:
        wait([done], timeout=leave())
        raise
    return done.result()


def _fit(fit: Callable[[float], dict[str, Any]], stopping: threading.Event) -> dict[str, Any]:
    """Worker groups, one after another while they leave for a larger one; what the last returned.

    `fit` runs one that looks for room every so many seconds.
    """
    before, look_every_s = 0, LOOK_FOR_ROOM_EVERY_S
    while True:
        returned = fit(look_every_s)
        if not returned.get("left") or stopping.is_set():
            return returned
        if returned["left"] == before:  # there was no room after all: somebody else was quicker, or it is in pieces
            look_every_s *= 4
        before = returned["left"]


def _fit_group(
    phase: PhaseConfig, settings: dict[str, Any], checkpoints: Store, on_report: Callable[[Report], None]
) -> dict[str, Any]:
    engine, folder = phase.engine, checkpoints.child(phase.name)
    # by reference: Ray Train's controller would load all of training for a value that it only hands on
    settings = settings | {"phase": ray.put(phase)}
    tries, not_started = 0, False
    newest: str | None = ""  # of no look yet
    while True:
        count_nodes()
        # also says in a minute that a storage is gone, on which Ray Train's controller would come up for many
        found = settle_checkpoints(folder)
        same, newest = found == newest, found
        tries = tries + 1 if same else 1
        most = _most_that_fit(engine, on_report) if not_started and same else engine.most_workers
        not_started = False
        try:
            result: Any = _trainer(phase, most, settings, checkpoints).fit()
            returned: dict[str, Any] = result.return_value
            return returned
        # Ray Train itself tries neither the set-up of the process group again nor a controller that did not come up
        except ray.train.ControllerError as error:
            if isinstance(error.controller_failure, RETRYABLE_CONTROLLER_ERRORS):
                not_started = True
                tries -= 1
                continue
            if tries < SETUP_ATTEMPTS:
                continue
            if isinstance(error.controller_failure, OSError) and not checkpoints.is_local:
                raise StorageError(f"looking after the checkpoints failed: {error.controller_failure}") from error
            raise
        except ray.exceptions.ActorDiedError as error:
            if tries == SETUP_ATTEMPTS or not error.actor_init_failed:
                raise


def _most_that_fit(engine: EngineConfig, on_report: Callable[[Report], None]) -> int:
    """Workers that there is room for, within what the recipe allows.

    Ray Train counts on what other jobs hold of the nodes. It is given the whole range first: what it may have at most
    is also what it asks an autoscaler for.
    """
    room = room_for(resources_per_worker(engine), free_resources())
    most = min(max(room, engine.least_workers), engine.most_workers)
    text = f"the workers could not start: others use what was counted on, or it was lost. Trying at most {most}"
    on_report(event_report(0, "not started", text))
    return most


def _trainer(phase: PhaseConfig, most: int, settings: dict[str, Any], checkpoints: Store) -> TorchTrainer:
    """Ray Train's, for as many workers as the recipe says, or up to `most` where it leaves that open."""
    engine = phase.engine
    elastic = not isinstance(engine.workers, int)
    worker: Any = train_worker
    scaling: Any = ScalingConfig  # typed as the older one, whose number of workers was fixed
    failing: Any = FailureConfig  # likewise
    return TorchTrainer(
        worker,
        train_loop_config=settings,
        torch_config=NodeTorchConfig(backend="nccl" if engine.gpus_per_worker else "gloo"),
        scaling_config=scaling(
            num_workers=(engine.least_workers, most) if elastic else engine.workers,
            use_gpu=bool(engine.gpus_per_worker),
            resources_per_worker=resources_per_worker(engine),
            # a group that runs is never resized from outside: it leaves by itself, after a checkpoint
            elastic_resize_monitor_interval_s=NEVER_S,
        ),
        run_config=RunConfig(
            name=phase.name,
            storage_path=checkpoints.path,
            # whose uploads are not a Store's, so that its requests have to be patient by themselves
            storage_filesystem=None if checkpoints.is_local else resolve(checkpoints.uri)[0],
            failure_config=failing(
                max_failures=engine.max_failures, controller_failure_limit=ELASTIC_RESTARTS if elastic else -1
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The phase on one worker.

    Returns the name of the last checkpoint and what the gates came to, or problems that no new start would mend.
    """
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), prepare_deepspeed())
    log = RankLog(settings["log"] if place.rank == 0 else None)
    try:
        return {"problems": []} | _train(settings, place, log)
    except (UserError, TrainingDivergedError) as error:  # the same on every rank, and on every new start
        return {"problems": error.problems if isinstance(error, UserError) else [str(error)]}
    finally:
        log.flush()


def _train(settings: dict[str, Any], place: Place, log: RankLog) -> dict[str, Any]:
    attempt = _agreed(secrets.token_hex(4))
    weights = DomainWeightsClient(settings["weights"], place.rank, place.world, attempt)
    phase: PhaseConfig = ray.get(settings["phase"])
    wishes = Wishes(phase.engine, place, log.asked_to_leave, settings["look_every_s"])
    trainer = build_trainer(phase, place, RayDataSource(settings["feeder"]), weights, wishes.now)
    name = ""
    prefix = upload_prefix(settings["checkpoints"])
    remove_left_uploads(prefix)
    found = None
    if place.rank == 0:  # which looks for all, as all have to see the same
        drop_torn_checkpoints(open_store(settings["checkpoints"]))
        found = newest_checkpoint(open_store(settings["checkpoints"]))
    if uri := _agreed(found.uri if found else ""):
        checkpoint = open_store(uri)
        restore(trainer, CheckpointReader(checkpoint))
        name, step = checkpoint_name(checkpoint), trainer.state.step
        workers = "1 worker" if place.world == 1 else f"{place.world} workers"
        log.push(event_report(step, "resumed", f"goes on from step {step:,} with {workers}"))
    log.push(start_report(phase, trainer))
    leaving = False
    try:
        for report in training_reports(trainer):
            log.push(report)
            if trainer.wish.leave and not leaving:
                leaving = True
                log.push(event_report(trainer.state.step, LEAVING, "the workers leave after their next checkpoint"))
            if trainer.settled(report) and trainer.checkpoint_due():
                log.flush()
                began_s = time.perf_counter()
                name = _checkpoint(trainer, attempt, prefix)
                log.push(checkpoint_report(trainer.state.step, name, time.perf_counter() - began_s))
                if leaving and not trainer.finished():
                    if place.rank == 0 and not log.asked:
                        time.sleep(HELD_WITHIN_S)  # the driver is to hear of it first
                    return {"checkpoint": name, "left": place.world}
    except TrainingDivergedError as error:
        kept = f"the last good checkpoint is {name}" if name else "no checkpoint had been written"
        raise TrainingDivergedError(f"{error}; {kept}. A run with other settings needs its own workspace=...") from None
    return {"checkpoint": name, "outcome": trainer.learner.outcome() if trainer.learner else {}}


def _checkpoint(trainer: Trainer, attempt: str, prefix: str) -> str:
    """Save and hand in a checkpoint (collective). Returns its name."""
    step, world = trainer.state.step, trainer.stream.world
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        save(trainer, Path(folder))
        # a name of this life of the group alone: files that a dead one left behind can never mix with these
        name = f"step-{step:08d}-of-{world}-{attempt}"
        try:
            ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder), checkpoint_dir_name=name)
        except OSError as error:  # of the upload
            raise StorageError(f"writing the checkpoint {name} failed: {error}") from error
    return name


class _Followed:
    """Hands new reports of the log to the driver while a phase runs."""

    def __init__(self, log: Any, on_report: Callable[[Report], None]) -> None:
        self.log, self.on_report = log, on_report
        self.seen = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="follow-run-log", daemon=True)

    def __enter__(self) -> "_Followed":
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop.set()
        self.thread.join(timeout=10)

    def _follow(self) -> None:
        while not self.stop.wait(POLL_S):
            self._pass_on()
        self._pass_on()

    def _pass_on(self) -> None:
        try:
            rows = ray.get(self.log.newer.remote(self.seen), timeout=30)
        except ray.exceptions.RayError:  # the log is being restarted, or the cluster goes down: the next poll tells
            return
        for number, row in rows:
            self.seen = number
            self.on_report(row)


def _agreed(token: str) -> str:
    """What rank 0 says (collective)."""
    tokens = [token]
    dist.broadcast_object_list(tokens, src=0)
    return tokens[0]


def _actor(cls: type, name: str) -> Any:
    return ray.remote(cls).options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=-1)


def _feed_plan(phase: PhaseConfig) -> FeedPlan:
    manifest = load_manifest(open_store(phase.corpus))
    sequences = phase.training.most_steps * phase.training.global_batch_tokens // manifest.sequence_tokens
    domains = list(phase.proportions)
    return FeedPlan(phase.corpus, phase.split, phase.seed, dict.fromkeys(domains, 0), dict.fromkeys(domains, sequences))
