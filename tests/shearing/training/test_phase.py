"""Interrupted phases go on as if nothing had been: on the same workers, on others, on another ZeRO stage."""

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from phase_runs import (
    SEQUENCE_TOKENS,
    SEQUENCES,
    checkpoints_asked_for,
    largest_difference,
    new_trainer,
    run_phase,
    save_all,
)
from safetensors.torch import load_file

from shearing.data.manifest import load_manifest
from shearing.errors import UserError
from shearing.models.loading import new_model, read_config
from shearing.storage import open_store
from shearing.training import checkpoint
from shearing.training.checkpoint import CheckpointReader
from shearing.training.config import DistillationConfig
from shearing.training.consumed import SequenceRepeatedError
from shearing.training.engine import DTYPES
from shearing.training.loop import Wish, training_reports
from shearing.training.phase import restore

SAVED_AFTER = 3  # not an evaluation's step: the next batch is being read while the state is saved
CASES = {
    **{f"zero{stage}-train": {"stage": stage} for stage in (1, 2, 3)},
    **{f"zero{stage}-masks": {"stage": stage, "pruning": True} for stage in (1, 2, 3)},
    "zero2-bfloat16-tied": {"stage": 2, "dtype": "bfloat16"},
}


def case(tiny_run, name, **changed):
    options = CASES[name] | changed
    if options.get("dtype") == "bfloat16":
        options["model"] = tiny_run.tied
    return tiny_run.phase(engine={"activation_checkpointing": name != "zero2-masks"}, **options)


@pytest.fixture(scope="module")
def whole_run(tiny_run, two_processes, tmp_path_factory):
    """An uninterrupted run of two workers and the checkpoint it left on the way; each case is trained once."""
    runs = {}

    def run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp(name) / "checkpoint"
            phase = case(tiny_run, name)
            runs[name] = two_processes.run(run_phase, phase, save_after=SAVED_AFTER, folder=str(folder)), folder
        return runs[name]

    return run


def close(one, other, tolerance):
    """Two histories with the same rows whose losses differ by no more than `tolerance` nats."""
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in other]
    for row, expected in zip(one, other, strict=True):
        for key in ("losses", "proportions", "loss", "lagrangian"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], abs=tolerance), (row["step"], key)
        assert row.get("drawn") == expected.get("drawn")


class TestResumed:
    @pytest.mark.parametrize("name", CASES)
    def test_by_the_same_workers(self, tiny_run, two_processes, whole_run, name):
        # catches anything that a checkpoint leaves out: moments, Adam's step count, gates, multipliers, the mixture's
        # version, places in the data, random state
        whole, folder = whole_run(name)
        rest = two_processes.run(run_phase, case(tiny_run, name), resume=str(folder))
        assert whole[0].history(after=SAVED_AFTER) == rest[0].history()
        assert [run.draws[5] for run in whole] == [run.draws[5] for run in rest]
        assert largest_difference(whole[0].tensors, rest[0].tensors) == 0
        if CASES[name].get("pruning"):
            assert largest_difference(whole[0].gates, rest[0].gates) == 0

    @pytest.mark.parametrize(
        ("name", "stage"),
        [
            ("zero1-train", 3),
            ("zero2-train", 1),
            ("zero3-train", 2),
            ("zero1-masks", 2),
            ("zero2-masks", 3),
            ("zero3-masks", 1),
        ],
    )
    def test_by_one_worker_on_another_stage(self, tiny_run, one_process, whole_run, name, stage):
        # catches shards saved or loaded in place of whole tensors, padding read as weights, and a rank's share of data,
        # noise or bitmaps in the state
        whole, folder = whole_run(name)
        rest = one_process.run(run_phase, case(tiny_run, name, stage=stage), resume=str(folder))[0]
        close(rest.history(), whole[0].history(after=SAVED_AFTER), 1e-5)

    def test_in_bfloat16_by_one_worker(self, tiny_run, one_process, whole_run):
        # catches a checkpoint of the rounded weights: the masters must be saved; 8 bits of a loss of 5 nats are 0.02
        whole, folder = whole_run("zero2-bfloat16-tied")
        rest = one_process.run(run_phase, case(tiny_run, "zero2-bfloat16-tied", stage=3), resume=str(folder))[0]
        close(rest.history(), whole[0].history(after=SAVED_AFTER), 0.02)
        weights = CheckpointReader(open_store(str(folder))).weights("weights-r0000-p000.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())

    @pytest.mark.parametrize(("name", "stage"), [("zero2-train", 3), ("zero1-masks", 3), ("zero3-masks", 1)])
    def test_from_one_worker_by_two(self, tiny_run, one_process, two_processes, whole_run, tmp_path, name, stage):
        # catches checkpoints that only as many workers can read, and a run that depends on their number
        folder = str(tmp_path / "checkpoint")
        alone = one_process.run(run_phase, case(tiny_run, name), save_after=SAVED_AFTER, folder=folder)[0]
        close(alone.history(), whole_run(name)[0][0].history(), 1e-5)
        rest = two_processes.run(run_phase, case(tiny_run, name, stage=stage), resume=folder)
        close(rest[0].history(), alone.history(after=SAVED_AFTER), 1e-5)
        assert rest[0].history() == rest[1].history()

    def test_ranks_read_at_the_same_time(self, tiny_run, two_processes, whole_run):
        # catches ranks that read one after another: a large checkpoint then takes as long as by a single reader
        _, folder = whole_run("zero1-train")
        read = two_processes.run(read_slowly, case(tiny_run, "zero1-train"), str(folder))
        assert [len(of_rank) for of_rank in read] == [1, 1]
        (first, second) = (of_rank[0] for of_rank in read)
        assert max(first[0], second[0]) < min(first[1], second[1])

    def test_twice(self, tiny_run, one_process, two_processes, whole_run, tmp_path):
        # catches a restored trainer that cannot be saved: bitmaps of the past lost, or kept by two ranks
        whole, folder = whole_run("zero3-masks")
        phase, second = case(tiny_run, "zero3-masks"), str(tmp_path / "second")
        two_processes.run(run_phase, phase, resume=str(folder), save_after=5, folder=second, until=5)
        rest = two_processes.run(run_phase, phase, resume=second)[0]
        assert rest.history() == whole[0].history(after=5)


class TestBatchThatWorkersDoNotDivide:
    @pytest.mark.parametrize(("stage", "pruning"), [(1, True), (3, False)])
    def test_every_sequence_counts_alike(self, tiny_run, one_process, two_processes, stage, pruning):
        """Five sequences on two workers, one at a time: the second worker's third pass is empty. Catches sequences of
        the shorter rank that count more, an idle rank that leaves the others waiting, and its filler in the losses."""
        changed = {"stage": stage, "pruning": pruning, "training": {"global_batch_tokens": 5 * SEQUENCE_TOKENS}}
        alone = one_process.run(run_phase, tiny_run.phase(engine={"micro_batch_sequences": 5}, **changed))[0]
        shared = two_processes.run(run_phase, tiny_run.phase(engine={"micro_batch_sequences": 1}, **changed))
        assert [len(run.draws[0]) for run in shared] == [3, 2]
        close(shared[0].history(), alone.history(), 1e-5)


class TestAskedFor:
    def test_what_one_rank_asks_all_do(self, tiny_run, two_processes):
        """Catches ranks that disagree about a checkpoint, one that is written again at every step, and one that falls
        between a step and the evaluation that belongs to it."""
        phase, wishes = tiny_run.phase(), {1: {3: Wish(save=True), 4: Wish(leave=True)}}
        runs = two_processes.run(checkpoints_asked_for, phase, wishes)
        assert runs[0] == runs[1] == [(3, Wish(save=True)), (6, Wish())]


class TestSaved:
    def test_bitmaps_are_the_plan(self, tiny_run, whole_run):
        # catches bitmaps of one rank only, or of rows that were planned but not given
        whole, folder = whole_run("zero1-train")
        reader = CheckpointReader(open_store(str(folder)))
        manifest = load_manifest(open_store(tiny_run.corpus))
        planned = {(d.domain, d.index) for run in whole for step in range(SAVED_AFTER) for d in run.draws[step]}
        drawn = reader.state()["mix"]["drawn"]
        assert drawn == whole[0].of_kind("step")[SAVED_AFTER - 1]["drawn"]
        for domain, entry in manifest.domains.items():
            bitmap = reader.arrays("consumed")[f"{domain}/0"]
            assert bitmap.shape == (-(-entry["train"].sequences // 8),)
            count = sum(bin(byte).count("1") for byte in bitmap)
            assert count == drawn[domain] == sum(d == domain for d, _ in planned)

    def test_epochs_have_bitmaps_of_their_own(self, tiny_run, one_process, tmp_path):
        # catches a second epoch refused as repetition, or counted on top of the first
        phase = tiny_run.phase(
            training={"steps": 5}, mixture={"rule": "static"}, proportions={"a": 1.0}, references={"a": 2.0}
        )
        run = one_process.run(run_phase, phase, save_after=5, folder=str(tmp_path / "checkpoint"))[0]
        bitmaps = CheckpointReader(open_store(str(tmp_path / "checkpoint"))).arrays("consumed")
        counts = {name: sum(bin(byte).count("1") for byte in bitmap) for name, bitmap in bitmaps.items()}
        assert counts == {"a/0": SEQUENCES["a"], "a/1": SEQUENCES["a"]}
        assert [(event["step"], event["event"]) for event in run.of_kind("event")] == [(3, "next_epoch")]

    def test_nothing_is_a_pickle(self, whole_run):
        # catches a checkpoint that runs code when it is opened
        for name in CASES:
            folder = whole_run(name)[1]
            suffixes = {path.suffix for path in folder.iterdir()}
            assert suffixes == {".safetensors", ".json"}
            assert (folder / "gates.safetensors").exists() == ("masks" in name)

    def test_index_names_every_file(self, whole_run):
        # catches files of other ranks left out of the index, whose loss nobody would notice
        folder = whole_run("zero3-masks")[1]
        files = json.loads((folder / "index.json").read_text())["files"]
        assert files == {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "index.json"}

    def test_ranks_share_the_writing(self, whole_run):
        # catches one rank writing everything
        folder = whole_run("zero1-train")[1]
        sizes = [path.stat().st_size for path in folder.glob("weights-*")]
        assert len(sizes) == 2
        assert max(sizes) < 1.5 * min(sizes)

    def test_a_rank_copies_only_what_it_writes(self, tiny_run, two_processes, tmp_path):
        # catches every worker of a node that copies the whole model with its moments from its GPU at each checkpoint
        copied = two_processes.run(copied_to_the_host, tiny_run.phase(), tmp_path)
        assert copied == [len(load_file(path)) for path in sorted(tmp_path.glob("weights-r*"))]

    def test_in_parts(self, tiny_run, two_processes, whole_run, tmp_path):
        # catches parts that overwrite each other, and a reader that takes the first of each rank
        folder = str(tmp_path / "parts")
        two_processes.run(save_in_parts, case(tiny_run, "zero3-train"), folder, 10_000)
        assert len(list(Path(folder).glob("weights-*"))) > 4
        rest = two_processes.run(run_phase, case(tiny_run, "zero3-train"), resume=folder)
        assert rest[0].history() == whole_run("zero3-train")[0][0].history(after=2)

    def test_a_sequence_of_two_ranks_is_noticed(self, tiny_run, two_processes, tmp_path):
        # catches a rank that reads another's share: the loss would look well
        found = two_processes.run(save_with_repeated_draws, tiny_run.phase(), str(tmp_path / "checkpoint"))
        assert all("were planned and" in text for text in found)
        assert not list(tmp_path.glob("*/index.json"))


def read_slowly(rank, world, phase, folder):
    """When each weight file of a checkpoint began and ended to be read by this rank."""
    trainer, read, spans = new_trainer(rank, world, phase), CheckpointReader.weights, []

    def weights(self, file):
        began_s = time.monotonic()
        time.sleep(2)
        tensors = read(self, file)
        spans.append((began_s, time.monotonic()))
        return tensors

    CheckpointReader.weights = weights
    try:
        restore(trainer, CheckpointReader(open_store(folder)))
    finally:
        CheckpointReader.weights = read
    return spans


def save_in_parts(rank, world, phase, folder, part_bytes):
    kept, checkpoint.PART_BYTES = checkpoint.PART_BYTES, part_bytes
    run_phase(rank, world, phase, save_after=2, folder=folder, until=2)
    checkpoint.PART_BYTES = kept


def copied_to_the_host(rank, world, phase, folder):
    """How many weights and moments this rank asked for on the CPU while it saved; torch gathers bytes there."""
    engine, asked, copy = new_trainer(rank, world, phase).engine, [], torch.Tensor.cpu
    engine.begin_loading(0)
    torch.Tensor.cpu = lambda tensor, *args: asked.append(tensor.dtype) or copy(tensor, *args)
    try:
        checkpoint.save_checkpoint(engine, folder, {}, {})
    finally:
        torch.Tensor.cpu = copy
    return asked.count(torch.float32)


def save_with_repeated_draws(rank, world, phase, folder):
    trainer = new_trainer(rank, world, phase)
    trainer.stream.rank = 0
    for report in training_reports(trainer):
        if report["step"] == 1:
            break
    trainer.stream.rank = rank
    try:
        save_all(trainer, folder)
    except SequenceRepeatedError as error:
        return str(error)
    return ""


def problems_of_building(rank, world, phase, missing):
    """What keeps this rank from building the phase, where rank 1 alone is on a node that does not see `missing`."""
    if rank == 1:
        phase = phase.model_copy(update=missing)
    try:
        new_trainer(rank, world, phase)
    except UserError as error:
        return error.problems
    return []


class TestBuilding:
    @pytest.mark.parametrize("what", ["model", "teacher"])
    def test_a_model_that_one_node_lacks_is_told_by_all(self, tiny_run, two_processes, what):
        # catches a rank that leaves alone: the others wait in their first collective for half an hour
        def missing(folder):
            return {"model": folder} if what == "model" else {"distillation": DistillationConfig(teacher=folder)}

        phase = tiny_run.phase(**({} if what == "model" else missing(tiny_run.model)))
        found = two_processes.run(problems_of_building, phase, missing("/only/on/rank-0"), timeout_s=60)
        assert found[0] == found[1]
        (problem,) = found[0]
        assert "/only/on/rank-0 holds no config.json" in problem
        assert f"This is so on {socket.gethostname()};" in problem

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_fresh_models_are_one(self, tiny_run, one_process, two_processes, dtype):
        # catches ranks, or ZeRO 3's partitioned construction, that start from other weights
        training = {"steps": 1, "learning_rate": 1e-12}
        phases = [tiny_run.phase(fresh=True, stage=stage, dtype=dtype, training=training) for stage in (1, 3)]
        runs = [group.run(run_phase, phase)[0] for group in (one_process, two_processes) for phase in phases]
        expected = new_model(read_config(tiny_run.model), DTYPES[dtype], phases[0].seed)
        for run in runs:
            for name, parameter in expected.named_parameters():
                torch.testing.assert_close(run.tensors[name], parameter.detach().float(), atol=1e-9, rtol=0)
