"""The study of the method's claims: its tasks are real recipes, its figures are what its results say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.recipe_loading import load_recipe

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks" / "study"
TINY = (
    "source.train.steps=6", "source.train.warmup_steps=1", "source.train.evaluate_every_steps=6",
    "source.train.tokenizer.vocab_size=400", "corpus.sequence_tokens=64", "corpus.split={eval: 0.2, prune: 0.3}",
    "pruning.steps=6", "pruning.warmup_steps=1", "pruning.gates.sparsity_warmup_steps=2",
    "pruning.global_batch_tokens=512", "source.train.global_batch_tokens=512", "recovery.global_batch_tokens=512",
    "recovery.steps=4", "recovery.warmup_steps=1", "recovery.evaluate_every_steps=2",
    "evaluation.sequences_per_domain=2", "scores={prompt_tokens: 16, decode_tokens: 4}",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def study_on_path():
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))


def tasks_of(seeds):
    from study_tasks import CLAIMS, Budget, study_tasks

    return study_tasks(CLAIMS, seeds, Budget.of(load_recipe(str(STUDY / "study.yaml"), [])))


def test_every_task_is_a_recipe_and_starts_from_tasks_before_it():
    """Catches a key that was renamed: the study would stop after its first hour."""
    seen = set()
    for task in tasks_of([1]):
        load_recipe(str(STUDY / "study.yaml"), list(task.overrides))
        assert set(task.models) <= seen, task.name
        seen.add(task.name)
    assert len(seen) > 30


def test_seeds_differ_in_their_seed_alone_and_share_the_source():
    one, two = ({task.name: task for task in tasks_of([seed])} for seed in (1, 2))
    assert set(one) & set(two) == {"source"}
    for name, task in one.items():
        if name == "source":
            continue
        other = two[name.removesuffix("-1") + "-2"]
        assert other.overrides == ("seed=2", *task.overrides[1:])


def test_a_finished_task_rests_on_what_it_reads():
    """Catches an hour of training thrown away for a setting of something else, and one kept that is out of date."""
    from study import fingerprints

    tasks = tasks_of([1])
    before = fingerprints(tasks, [], "corpus")
    changed = {
        setting: {name for name, found in fingerprints(tasks, [setting], "corpus").items() if found != before[name]}
        for setting in ("pruning.gates.learning_rate=0.5", "recovery.weight_decay=0.1", "source.train.steps=9")
    }
    kinds = {setting: {name.partition("/")[0] for name in names} for setting, names in changed.items()}
    assert kinds["pruning.gates.learning_rate=0.5"] == {"prune", "train", "speed"}
    assert kinds["recovery.weight_decay=0.1"] == {"train"}
    assert changed["source.train.steps=9"] == set(before)


def test_tokens_from_scratch_are_read_off_between_budgets():
    """A loss halfway between those of 2x and 4x takes 2 * sqrt(2) times the tokens, in logarithms."""
    from study_write_up import scratch_multiple

    losses = [5.0, 4.0, 3.0, 2.0]
    assert scratch_multiple(3.5, losses, (1, 2, 4, 8)) == pytest.approx(2 * 2**0.5)
    assert scratch_multiple(2.0, losses, (1, 2, 4, 8)) == pytest.approx(8)
    assert scratch_multiple(5.5, losses, (1, 2, 4, 8)) == 1
    assert scratch_multiple(1.9, losses, (1, 2, 4, 8)) is None


def test_only_marked_blocks_are_written(tmp_path):
    """Catches a write-up that eats the sentences around its tables."""
    from study_write_up import write_up

    folder = tmp_path / "study" / "train" / "static-1"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"mean_loss": 4.25, "seconds": 12.0}))
    (tmp_path / "RESULTS.md").write_text("before\n<!-- study:distillation -->\nold\n<!-- end -->\nafter\n")
    write_up(tmp_path / "study", tmp_path)
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert "| cross-entropy | 4.250 |  | 12 |" in lines
    assert any("not run" in line for line in lines)


@pytest.mark.slow
def test_the_whole_study_at_its_smallest(tmp_path):
    overrides = [f"corpus.path={tmp_path}/corpora", *TINY]
    domains = load_recipe(str(STUDY / "study.yaml"), []).corpus.domains
    overrides += [f"corpus.domains.{name}.text=installed:{name}?megabytes=0.3" for name in domains]
    script = [sys.executable, str(STUDY / "study.py"), "--folder", str(tmp_path / "study")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = [*script, "--seeds", "1", *overrides]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    again = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0
    count = len(tasks_of([1]))
    assert f"{count} tasks, {count} done already" in again.stdout
    shutil.copy(ROOT / "docs" / "RESULTS.md", tmp_path)
    from study_write_up import write_up

    write_up(tmp_path / "study", tmp_path)
    assert "not run" not in (tmp_path / "RESULTS.md").read_text()
