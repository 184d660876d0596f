"""What README.md says: every command is run, every path is there, every name is the code's own."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from journeys import end_with_children

from orchestrator.command import DONE, FAILED, TO_MEND
from orchestrator.methods import comparison_uri
from orchestrator.recipe import COMPARED_METHODS
from orchestrator.recipe_loading import load_recipe
from orchestrator.run import STAGES
from shearing.data.config import RULE_WORDS, ReferencesConfig
from shearing.data.mixture_rules import RULES
from shearing.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Indented blocks that are pictures: their first words, and what holds them true.
PICTURES = {
    "pipelines/": "test_the_tree_is_there",
    "text": "test_the_datas_way_is_the_order_of_the_stages",
    "runs/<name>/": "test_a_fresh_clone_reaches_its_report",
}

# Every command of README.md and the test that runs it, as `file::function`. A command that is not here fails a test.
HERE = "tests/test_readme.py"
COVERED = {
    "make quickstart": f"{HERE}::test_a_fresh_clone_reaches_its_report",
    "make test": ".ci/run",  # this very gate
    "make slow-tests": f"{HERE}::test_the_environment_and_the_slow_tests_are_the_makefiles",
    "source .venv/bin/activate": f"{HERE}::test_a_fresh_clone_reaches_its_report",
    "python pipelines/shear.py pipelines/recipes/quickstart.yaml --plan": f"{HERE}::test_plan",
    "python pipelines/shear.py": f"{HERE}::test_a_fresh_clone_reaches_its_report",
    "python pipelines/shear.py pipelines/recipes/redpajama-sample.yaml "
    "corpus.root=/data/redpajama_sample engine.workers=2": f"{HERE}::test_overrides_reach_the_plan",
    "ray job submit --working-dir . -- python pipelines/shear.py my-recipe.yaml": "tests/test_journey.py",
    "python pipelines/prepare_corpus.py pipelines/recipes/quickstart.yaml": f"{HERE}::test_corpus_and_scores",
    "python pipelines/score_model.py runs/quickstart/model "
    "pipelines/recipes/quickstart.yaml": f"{HERE}::test_corpus_and_scores",
    "pip install 'lm-eval==0.4.13'": "tests/shearing/evaluation/test_harness.py::"
    "test_the_command_installs_what_is_tested",
    "python pipelines/score_model.py runs/quickstart/model pipelines/recipes/quickstart.yaml "
    "--tasks piqa,arc_easy --limit 200": f"{HERE}::test_corpus_and_scores",
    "python pipelines/score_model.py runs/quickstart/model pipelines/recipes/quickstart.yaml "
    "--text wiki.test.txt --bos yes": f"{HERE}::test_corpus_and_scores",
    "python pipelines/fit_reference_losses.py losses.yaml --parameters 1345423360": f"{HERE}::test_reference_losses",
    "python pipelines/compare_methods.py pipelines/recipes/comparison-quickstart.yaml "
    "--plan": f"{HERE}::test_comparison_is_planned",
    "python pipelines/compare_methods.py pipelines/recipes/comparison-quickstart.yaml --methods learned slicegpt "
    "scratch": f"{HERE}::test_comparison_is_planned",  # run, with other methods, by tests/test_comparison.py
    "python pipelines/slice_model.py pipelines/recipes/quickstart.yaml --plan": f"{HERE}::test_plan_of_slicing",
    "python pipelines/slice_model.py pipelines/recipes/quickstart.yaml "
    "source.train=null source.model=runs/quickstart/source recovery.lora.rank=16": f"{HERE}::test_plan_of_slicing",
    "python pipelines/show_run.py runs/quickstart": "tests/pipelines/test_show_run.py::test_shows_once",
    "python benchmarks/NAME.py": "tests/test_benchmarks.py",
    "python benchmarks/study/study.py": "tests/test_study.py::test_the_whole_study_at_its_smallest",
}


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks() -> list[list[str]]:
    """Indented blocks, a list of lines each."""
    found = re.findall(r"(?:^    .+\n)+", without_fences(README), flags=re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in found]


def commands() -> list[str]:
    """Every line of the blocks that are not pictures, of shell fences, and `make ...` or `python ...` in a sentence."""
    indented = [line for block in blocks() if block[0].split()[0] not in PICTURES for line in block]
    fenced = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    spoken = re.findall(r"`((?:make|python|ray|pip) [^`]*\.py[^`]*|make [^`]+)`", without_fences(README))
    return [*indented, *(line for fence in fenced for line in fence.splitlines() if line.strip()), *spoken]


@functools.cache
def documented(start: str) -> str:
    """The one command of README.md that begins so, word for word."""
    (command,) = {command for command in commands() if command.startswith(start)}
    return command


def run(command: str, folder: Path, seconds: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a reader types it, in a folder that has the checkout's pipelines."""
    if not (folder / "pipelines").exists():
        (folder / "pipelines").symlink_to(ROOT / "pipelines")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=kept | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_every_command_is_covered():
    """A command in the README that nobody ever runs is wrong after a while."""
    assert sorted(set(commands())) == sorted(COVERED)
    for place in COVERED.values():
        name, _, function = place.partition("::")
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not function or f"\ndef {function}(" in text, place
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert '"submit"' in (ROOT / "tests" / "test_journey.py").read_text()


def test_the_environment_and_the_slow_tests_are_the_makefiles():
    """An environment that lies elsewhere, and tests that `make test` leaves out and nobody hears of."""
    assert documented("source ") == "source .venv/bin/activate"
    assert re.search(r"^VENV \?= \.venv$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run(
        ["make", "--dry-run", "slow-tests"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\S+/pytest -m slow$", done.stdout, re.MULTILINE)


def test_exit_statuses_are_the_commands():
    """A status that a script waits for in vain."""
    (sentence,) = re.findall(r"^Exit status: ((?:.+\n)+)", README, flags=re.MULTILINE)
    stopped = {128 + signal.SIGINT, 128 + signal.SIGTERM}
    assert {int(number) for number in re.findall(r"\b\d+\b", sentence)} == {DONE, FAILED, TO_MEND} | stopped


def test_plan(tmp_path):
    done = run(documented("python pipelines/shear.py pipelines/recipes/quickstart.yaml"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recovery" in done.stdout
    assert not (tmp_path / "runs").exists(), "--plan starts nothing"


def test_comparison_is_planned(tmp_path):
    start = "python pipelines/compare_methods.py pipelines/recipes/comparison-quickstart.yaml"
    done = run(documented(f"{start} --plan"), tmp_path)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and "to run" in line]
    assert listed == list(COMPARED_METHODS)
    some = run(documented(f"{start} --methods") + " --plan", tmp_path)
    assert some.returncode == 0, some.stderr
    assert re.findall(r"^  (\w+) .*to run$", some.stdout, re.MULTILINE) == ["learned", "slicegpt", "scratch"]
    recipe = load_recipe(str(ROOT / "pipelines" / "recipes" / "comparison-quickstart.yaml"), [])
    assert f"The page `{comparison_uri(recipe)}/comparison/index.html`" in README
    unnamed = comparison_uri(recipe.model_copy(update={"workspace": None, "name": "<name>"}))
    assert f"`{unnamed}/comparison/index.html`" in README
    assert not (tmp_path / "runs").exists(), "--plan starts nothing"


def test_plan_of_slicing(tmp_path):
    """Both commands as they stand; the second on a model such as the quickstart leaves, and planned. What it then does
    is run by tests/test_slice_journey.py."""
    from shearing.models.family import llama_config
    from shearing.models.loading import model_tensors, new_model, write_model_directory

    first, second = sorted(command for command in commands() if command.startswith("python pipelines/slice_model.py"))
    done = run(first, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 of 128 -> 96" in done.stdout
    train = load_recipe(str(ROOT / "pipelines" / "recipes" / "quickstart.yaml"), []).source.train
    assert train is not None
    config = llama_config(train.shape, train.tokenizer.vocab_size, 512)
    source = tmp_path / "runs" / "quickstart" / "source"
    source.parent.mkdir(parents=True)
    write_model_directory(source, config, model_tensors(new_model(config)))
    tokens = {"content": "<end>", "id": train.tokenizer.vocab_size - 1}
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": [tokens]}))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    planned = run(f"{second} --plan", tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "rank 16, alpha 10" in planned.stdout


def test_overrides_reach_the_plan(tmp_path):
    """A recipe of the README that its own overrides do not fit: only the text is put elsewhere, and nothing is run."""
    for name in ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4-rp"):
        (tmp_path / "text" / name).mkdir(parents=True)
        line = json.dumps({"text": f"{name} " * 200})
        (tmp_path / "text" / name / "a.jsonl").write_text(f"{line}\n" * 600)
    command = documented("python pipelines/shear.py pipelines/recipes/redpajama-sample.yaml")
    assert "corpus.root=/data/redpajama_sample" in command
    done = run(command.replace("/data/redpajama_sample", str(tmp_path / "text")) + " --plan", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = run(f"{done.args} engine.workers=1", tmp_path)
    assert alone.returncode == 0
    assert alone.stdout != done.stdout, "what each worker holds follows the number of workers"


def test_reference_losses(tmp_path):
    """The file as the README describes it; Llama 2's losses, whose prediction is published."""
    assert "`losses.yaml` holds `parameters: [N1, N2, ...]` and `losses: {domain: [loss1, loss2, ...]}`" in README
    (tmp_path / "losses.yaml").write_text(
        "parameters: [6738415616, 13015864320, 68976648192]\nlosses: {wiki: [1.4844, 1.3945, 1.2118]}\n"
    )
    command = documented("python pipelines/fit_reference_losses.py")
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^wiki +1\.7\d", done.stdout, re.MULTILINE), done.stdout
    assert "1.7590" in run(f"{command} --unbounded", tmp_path).stdout  # arXiv 2310.06694, Table 6


def test_corpus_and_scores(tmp_path):
    """The commands one after the other: less text for the first; scores word for word on what it left."""
    import torch

    from shearing.models.family import llama_config
    from shearing.models.loading import model_tensors, new_model, write_model_directory

    recipe = load_recipe(str(ROOT / "pipelines" / "recipes" / "quickstart.yaml"), [])
    assert recipe.source.train is not None
    less = [f"'corpus.domains.{name}.text=installed:{name}?megabytes=0.2'" for name in recipe.corpus.domains]
    command = documented("python pipelines/prepare_corpus.py")
    done = run(" ".join([command, "corpus.split.eval=0.15", *less]), tmp_path)
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "corpora").glob("*/manifest.json")
    assert {line.split()[0] for line in done.stdout.splitlines()} >= set(recipe.corpus.domains)

    torch.manual_seed(0)
    train, folder = recipe.source.train, tmp_path / "runs" / "quickstart" / "model"
    config = llama_config(train.shape, train.tokenizer.vocab_size, 512)
    folder.parent.mkdir(parents=True)
    write_model_directory(
        folder, config, model_tensors(new_model(config)), tokenizer_folder=manifest.parent / "tokenizer"
    )
    held_out, tasks, text = sorted(c for c in commands() if c.startswith("python pipelines/score_model.py"))
    scored = run(held_out, tmp_path)
    assert scored.returncode == 0, scored.stderr
    losses = {line.split()[0]: line.split()[1] for line in scored.stdout.splitlines() if len(line.split()) == 4}
    assert set(losses) >= set(recipe.corpus.domains)
    # fresh weights know nothing: every token of 2,048 is as likely
    assert all(7.3 < float(losses[name]) < 8.0 for name in recipe.corpus.domains), losses
    check_tasks_and_text(tmp_path, text, tasks)


def check_tasks_and_text(folder: Path, text: str, tasks: str) -> None:
    """Both commands word for word, the tasks with files of the same names in place of the hub's."""
    (folder / "wiki.test.txt").write_text(" = Title = \n\n Some words of a text .\n" * 40)
    read = run(text, folder)
    assert read.returncode == 0, read.stderr
    assert re.search(r"wiki\.test\.txt: loss [78]\.\d+, perplexity \d+", read.stdout), read.stdout
    assert "opens each window" in read.stdout
    (folder / "tasks").mkdir()
    for name in ("piqa", "arc_easy"):
        rows = [{"question": f"{name} {n}", "choices": ["so", "not so"], "answer": n % 2} for n in range(9)]
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        task |= {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}"}
        task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metadata": {"version": 7.0}}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    done = run(f"{tasks} --task-files tasks", folder)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("piqa", "arc"))}
    assert rows["piqa"][:3] == rows["arc_easy"][:3] == ["7.0", "0", "9"]
    assert "the first 200 questions of each task" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_fresh_clone_reaches_its_report(tmp_path):
    """Files that only lie in the author's folder, undeclared dependencies, a quickstart that takes all morning.

    `git clone` and `make quickstart`, install included, in twenty minutes at the most, whatever else the machine does;
    then what the README says it leaves.
    """
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=120)
    assert re.search(r"^quickstart:.*\n\t\$\(BIN\)/python pipelines/shear\.py$", (clone / "Makefile").read_text(), re.M)
    outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "RAY_ADDRESS")}
    with (tmp_path / "said").open("w") as said:
        made = subprocess.Popen(["make", "quickstart"], cwd=clone, env=outside, stdout=said, stderr=subprocess.STDOUT)
        try:
            status = made.wait(timeout=1200)
        finally:
            end_with_children(made)  # of a `make` that is killed alone the run goes on
    output = (tmp_path / "said").read_text(encoding="utf-8")
    assert status == 0, output[-3000:]
    activated = f"{documented('source ')} && python -c 'import sys, shearing; print(sys.prefix)'"
    python = subprocess.run(
        ["bash", "-c", activated], cwd=clone, env=outside, capture_output=True, text=True, check=True
    )
    assert python.stdout.strip() == str(clone / ".venv")
    folder = clone / "runs" / "quickstart"
    assert f"report  {folder}/report/index.html" in output
    for name in tree_of("runs/<name>/"):
        assert list(folder.glob(name.rstrip("/").replace("<phase>", "recovery"))), name
    marks = {path.stem: json.loads(path.read_text())["outputs"] for path in (folder / "stages").glob("*.json")}
    assert marks["extraction"]["agrees"]
    assert marks["extraction"]["converged"]
    scores = {name: entry["mean_loss"] for name, entry in marks["scores"]["models"].items()}
    assert scores["recovered"] < scores["scratch"]  # not against the source: it saw too few tokens to be a floor
    assert scores["recovered"] < scores["pruned"]


def tree_of(first: str) -> list[str]:
    """The paths of a picture, below its first line."""
    (block,) = (block for block in blocks() if block[0].split()[0] == first)
    return [name for line in block[1:] for name in re.findall(r"[\w*.<>/-]+", line.split("  ")[0])]


def test_the_tree_is_there():
    """Folders that were renamed since the README was written."""
    (picture,) = re.findall(r"(?:^    .+\n)*^    pipelines/ .+\n(?:^    .+\n)+", README, flags=re.MULTILINE)
    above = ""
    for line in picture.splitlines():
        name = line.split()[0]
        if not name.endswith("/"):
            continue  # the line before goes on
        above = above if line.startswith("      ") else name
        assert (ROOT / (above + name if line.startswith("      ") else name)).is_dir(), name
    for script in re.search(r"what you run: (.*) and recipes/", picture, re.DOTALL)[1].strip(", ").split(","):
        assert (ROOT / "pipelines" / script.strip()).is_file(), script
    shown = {name.rstrip("/") for name in re.findall(r"^    (\S+)/ ", picture, flags=re.MULTILINE)}
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    assert shown >= {name for name in there if not name.startswith(".") and name != "build"}


def test_the_datas_way_is_the_order_of_the_stages():
    """Two stages that changed places, and a picture that did not."""
    made = {"tokens per domain": "corpus", "source model": "source", "reference losses": "references"}
    made |= {"masks": "pruning", "pruned model": "extraction", "recovered model": "recovery"}
    (way,) = (block[0] for block in blocks() if block[0].startswith("text ->"))
    order = [made.get(thing, thing) for thing in way.split(" -> ")[1:]]
    assert order == [stage.name for stage in STAGES if stage.name not in ("scratch", "slicing", "sparsifying")]


def test_paths_and_links_resolve():
    """A link that leads nowhere."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
    named = set(
        re.findall(r"`?\b((?:pipelines|cluster|benchmarks|orchestrator|shearing|actors|tests)/[\w./*-]*)", README)
    )
    named |= set(re.findall(r"`([\w-]+\.(?:md|toml))`", README))
    for name in named - {"benchmarks/NAME.py"}:
        assert list(ROOT.glob(name.rstrip("/."))), name


def table_row(title: str) -> str:
    (row,) = re.findall(rf"^\| {title} \| (.+) \|$", README, flags=re.MULTILINE)
    return row


def test_the_table_names_what_the_code_has():
    """A family or a rule that is announced and missing, or there and unknown."""
    families = re.sub(r"\([^)]*\)", "", table_row("Families").split(".  ")[0].split(". An unknown")[0])
    assert {name.strip() for name in families.split(",")} == set(FAMILIES)
    (even,) = re.findall(r"uneven layers \(CoFi\) are not\s+for (.+?), whose head size", README)
    kinds_of_head = {name: family.head_size_from_hidden for name, family in FAMILIES.items()}
    words = {"always": "{}", "long_rope": "long-rope {}"}
    tied = {words[kind].format(name) for name, kind in kinds_of_head.items() if kind is not None}
    assert set(re.split(", | and ", even)) == tied
    assert set(re.findall(r"`(\w+)`", table_row("Mixture rules"))) == set(RULE_WORDS) == set(RULES)
    kinds = get_args(ReferencesConfig.model_fields["kind"].annotation)
    assert set(re.findall(r"`(\w+)`", table_row("References"))) == set(kinds)


def test_the_readmes_recipe_is_a_recipe(tmp_path):
    """A key that was renamed, in the one recipe that everybody copies first."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    shutil.copy(ROOT / "pipelines" / "recipes" / "sheared-llama-1.3b.yaml", tmp_path / "paper.yaml")
    (tmp_path / "mine.yaml").write_text(text)
    mine, paper = (load_recipe(str(tmp_path / name), []) for name in ("mine.yaml", "paper.yaml"))
    assert set(yaml.safe_load(text)) <= set(paper.model_dump())
    assert mine.pruning.target == paper.pruning.target, "the README says that this is the paper's own run"
    assert mine.recovery.steps == paper.recovery.steps
    assert mine.recovery.global_batch_tokens == paper.recovery.global_batch_tokens
