import json
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from recipes_for_tests import tiny_recipe, write_model, write_recipe, write_weights

from orchestrator.preflight import preflight
from orchestrator.stage import Context
from orchestrator.stages import PRUNING
from orchestrator.workspace import open_workspace


@pytest.fixture
def problems(tmp_path):
    return lambda *overrides: preflight(tiny_recipe(tmp_path, *overrides))


def test_a_good_recipe_has_no_problem(problems):
    assert problems() == []


def test_a_tracker_that_is_not_installed(problems, monkeypatch):
    """A run that goes on for days and shows nothing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems("trackers=[wandb]")
    assert "pip install wandb" in problem


BAD = [
    (["corpus.domains.wiki.text=nowhere"], "corpus.domains.wiki.text"),
    (["corpus.domains={}"], "corpus.domains is empty"),
    (["corpus.domains.wiki.text=installed:nothing"], "names no installed text"),
    (["corpus.domains.wiki.proportion=0.8"], "sum to 1.05, not 1 (allowed error 1e-06). Scaled to 1 they are: wiki"),
    (["corpus.split.eval=0.5", "corpus.split.prune=0.5"], "leave nothing to the train split"),
    (["source.model=null"], "neither given"),
    (["trackers=[tensorboard]", "workspace=memory://bucket/run"], "which writes into the workspace"),
    (["source.model=models/none"], "is no directory"),
    (["pruning.target.num_heads=8"], "pruning.target.num_heads = 8 is larger than the source's 4"),
    (["pruning.target.hidden_size=47"], "is not a multiple of num_heads = 3"),
    (["pruning.gates.groups=[head, hidden, layer]"], "lacks 'intermediate'"),
    (["pruning.warmup_steps=21"], "pruning.warmup_steps = 21 is longer than the phase (pruning.steps = 20)"),
    (["recovery.warmup_steps=21"], "recovery.warmup_steps = 21 is longer"),
    (["scratch={warmup_steps: 21}"], "scratch.warmup_steps = 21 is longer than the phase (recovery.steps = 20)"),
    (["pruning.gates.sparsity_warmup_steps=21"], "pruning.gates.sparsity_warmup_steps = 21 is longer"),
    (["recovery.global_batch_tokens=500"], "Set recovery.global_batch_tokens=512."),
    (["engine.workers=3"], "8 sequences, which 3 workers x 2 sequences"),
    (["corpus.sequence_tokens=1024"], "longer than the source model reads"),
    (["scores.prompt_tokens=600"], "need 608 positions; the source model has 512. Set scores.prompt_tokens=504"),
    (["references.kind=values", "references.values.wiki=2"], "no reference loss for domain code"),
    (["references.kind=file", "references.file=none.yaml"], "none.yaml"),
    (["references.kind=scaling_law"], "needs references.file"),
    (["mixture.floor=0.6"], "asks for more than the whole; allowed: at most 0.5"),
    (["mixture.cap=0.4"], "cannot make up the whole"),
    (["mixture.cap=0.7"], "proportion = 0.75 lies outside"),
    (["recovery.update_mixture_every_steps=5"], "Set mixture.loss_from=train, or recovery.update_mixture_every_steps"),
    (["mixture.rule=nowhere.rules:best"], "there is no module nowhere.rules"),
    (["mixture.rule=orchestrator.run:stages"], "run.py has no stages; it defines: ASKED_BY, CORPUS"),
    (["mixture.on_exhausted=stop", "recovery.steps=1000000"], "would run out in recovery"),
    (["workspace=nope://x/y"], "workspace = 'nope://x/y' cannot be opened"),
    (["corpus.split.eval=0.00001"], "in its eval split (an estimate from file sizes)"),
    (["corpus.boundary_token=bos"], "names no bos_token"),
    (["pruning.keep.layers=[0, 4]"], "pruning.keep.layers names 4, which a source with 4 layers does not have"),
    (["pruning.keep.layers=[0]", "pruning.drop.layers=[-4]"], "both name layers 0"),
    (["pruning.drop.layers=[1, 2]"], "forces 2 layers to go, but the target keeps 3 of 4"),
    (["pruning.target.sparsity=0.5"], "pruning.target has sparsity and num_layers, hidden_size"),
    (["pruning.target={parameters: 9000000}"], "pruning.target.parameters = 9,000,000 asks for 9,000,000 of the"),
    (["pruning.target={sparsity: 0.5}", "pruning.method=random"], "which only gates can spread over groups"),
    (["pruning.target={sparsity: 0.5}", "pruning.gates.groups=[head, layer]"], "'layer', which has no part in an"),
    (["pruning.gates.groups=[layer, hidden, head, intermediate, mlp_layer]"], "has 'mlp_layer', which a source"),
    (["pruning.target={sparsity: 0.5}", "pruning.keep.layers=[7]"], "pruning.keep.layers names 7"),
    (["recovery.lora.rank=49"], "allowed: 1 to 48. Set recovery.lora.rank=48"),
    (["pruning.method=activation", "corpus.split.prune=0.00001"], "takes its calibration text from"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), BAD, ids=[expected[:40] for _, expected in BAD])
def test_what_would_fail_later_is_refused_now(problems, overrides, expected):
    """Each of these, let through, costs a run that dies after minutes or silently does something else."""
    found = problems(*overrides)
    assert any(expected in problem for problem in found), found


def test_a_mixture_that_ignores_the_prior_is_not_held_against_it(problems):
    """0.75 lies above the cap, but equal shares never come near it."""
    assert problems("mixture.rule=uniform", "mixture.cap=0.6") == []


@pytest.mark.parametrize("method", ["magnitude", "activation", "block_influence", "random"])
def test_the_same_recipe_with_another_method_just_works(problems, method):
    """Catches keys of mask learning that are refused where nobody reads them."""
    assert (
        problems(f"pruning.method={method}", "pruning.warmup_steps=99", "pruning.gates.sparsity_warmup_steps=99") == []
    )


def test_all_problems_come_at_once(problems):
    found = problems(
        "corpus.domains.wiki.proportion=0.8",
        "pruning.warmup_steps=99",
        "engine.workers=3",
        "pruning.target.num_layers=9",
    )
    assert len(found) == 5  # the batch of both phases


def test_more_than_one_estimate_error_is_needed_to_refuse(problems):
    """File sizes forecast sequences to a factor of two; a run that may well fit is not refused for that."""
    assert problems("mixture.on_exhausted=stop") == []


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "config.json").unlink(), "is no Hugging Face directory"),
        (lambda folder: write_model(folder, vocab_size=352), "has a vocabulary of 352, the source of 320"),
        (lambda folder: write_model(folder, tokens=310), "1 of the source's 320 tokens have another id or none"),
        (lambda folder: write_model(folder, max_position_embeddings=32), "Set corpus.sequence_tokens=32"),
        (lambda folder: (folder / "model.safetensors").unlink(), "recovery.distillation.teacher = "),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(tmp_path, spoil, expected):
    """Logits of another vocabulary or tokenizer compared by position teach nonsense, and nothing fails."""
    write_model(tmp_path / "teacher")
    spoil(tmp_path / "teacher")
    problems = preflight(tiny_recipe(tmp_path, f"recovery.distillation={{teacher: {tmp_path}/teacher}}"))
    assert any(expected in problem for problem in problems) if expected else problems == []


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: write_model(folder, tokens=330), "ids up to 329, but its embedding holds 320 rows"),
        (lambda folder: write_model(folder, model_type="bloom"), "bloom"),
        (lambda folder: write_model(folder, model_type="opt", do_layer_norm_before=False), "a variant of opt"),
        (
            lambda folder: write_model(folder, model_type="phi3", hidden_size=80, rope_scaling={"short_factor": []}),
            "takes the quotient for the head size",
        ),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "never loaded here"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
            ),
            "lacks 2 of 2 weight files",
        ),
    ],
)
def test_a_source_directory_that_cannot_be_used_is_refused(tmp_path, spoil, expected):
    recipe = tiny_recipe(tmp_path)
    spoil(tmp_path / "model")
    assert any(expected in problem for problem in preflight(recipe))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134105712\n"


def _cut(folder, kept_bytes):
    write_weights(folder / "model.safetensors", a=np.zeros((8, 8), np.float32))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:kept_bytes])


@pytest.mark.parametrize(
    ("spoil", "file", "expected"),
    [
        (lambda folder: _cut(folder, -1), "model.safetensors", "bytes, where its header says"),
        (lambda folder: _cut(folder, 20), "model.safetensors", "is no whole safetensors file"),
        (lambda folder: _cut(folder, 0), "model.safetensors", "(0 bytes) is no whole safetensors file"),
        *[
            (lambda folder, name=name: (folder / name).write_text(POINTER), name, "run `git lfs pull` there")
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
        ],
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(POINTER),
            "model.safetensors.index.json",
            "run `git lfs pull` there",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "model.safetensors.index.json",
            "has no weight_map",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json", "holds no JSON mapping"),
    ],
)
@pytest.mark.parametrize("model", ["model", "teacher"])
def test_a_file_that_is_not_whole_is_named(tmp_path, model, spoil, file, expected):
    """A clone without its large files, or a download that broke off: found out hours later, or by a traceback."""
    write_model(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, f"recovery.distillation={{teacher: {tmp_path}/teacher}}")
    assert preflight(recipe) == []
    spoil(tmp_path / model)
    found = preflight(recipe)
    if (model, file) == ("teacher", "tokenizer_config.json"):  # of a teacher the ids alone are compared
        assert found == []
        return
    (problem,) = [problem for problem in found if problem.startswith(str(tmp_path / model / file))]
    assert expected in problem


def test_whole_weights_are_whole(tmp_path):
    """Another reading of the format than the library's own, in one file and in several."""
    recipe, folder = tiny_recipe(tmp_path), tmp_path / "model"
    write_weights(folder / "model.safetensors", a=np.zeros((3, 5), np.float16), b=np.zeros(0, np.float32))
    assert preflight(recipe) == []
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert preflight(recipe) == []


def test_source_and_train_exclude_each_other(problems):
    shape = "{num_layers: 4, hidden_size: 64, num_heads: 4, num_kv_heads: 4, head_size: 16, intermediate_size: 172}"
    train = f"{{steps: 1, global_batch_tokens: 512, tokenizer: {{vocab_size: 300}}, shape: {shape}}}"
    assert any("both given" in problem for problem in problems(f"source.train={train}"))
    assert problems(f"source.train={train}", "source.model=null") == []
    odd = problems(
        f"source.train={train}",
        "source.model=null",
        "source.train.shape.num_kv_heads=3",
        "source.train.shape.head_size=15",
    )
    assert any("num_kv_heads = 3; allowed for num_kv_heads: 1, 2, 4" in problem for problem in odd)
    assert any("head_size=16" in problem for problem in odd)


def test_a_file_in_place_of_a_folder_is_refused(problems, tmp_path):
    (tmp_path / "occupied").write_text("")
    assert any("is a file, not a folder" in problem for problem in problems(f"workspace={tmp_path}/occupied/run"))


def test_a_workspace_of_another_recipe_names_the_keys(tmp_path):
    """Going on with a checkpoint of another target gives a model that nobody asked for."""
    recipe = tiny_recipe(tmp_path)
    PRUNING_mark = PRUNING.rests_on(Context(recipe, None, None, None))
    open_workspace(recipe).begin("pruning", PRUNING_mark)
    assert preflight(recipe) == []
    other = tiny_recipe(tmp_path, "pruning.target.num_layers=2", "mixture.rule=static", "recovery.steps=30")
    (found,) = preflight(other)
    assert "pruning.target.num_layers: 3 -> 2" in found
    assert "mixture.rule: 'sheared' -> 'static'" in found
    assert "recovery" not in found  # recovery has not begun: its keys are free


def test_what_does_not_shape_the_result_may_change(tmp_path):
    """Resuming with another number of workers is promised."""
    open_workspace(tiny_recipe(tmp_path)).begin(
        "pruning", PRUNING.rests_on(Context(tiny_recipe(tmp_path), None, None, None))
    )
    changed = tiny_recipe(
        tmp_path, "engine.workers=1", "engine.zero_stage=3", "pruning.checkpoint_every_steps=3",
        "mixture.on_exhausted=stop", "engine.micro_batch_sequences=1", "engine.max_failures=9",
    )  # fmt: skip
    assert preflight(changed) == []
    (found,) = preflight(tiny_recipe(tmp_path, "engine.dtype=bfloat16"))
    assert "engine.dtype: 'float32' -> 'bfloat16'" in found


def test_preflight_loads_neither_torch_nor_ray_and_takes_a_moment(tmp_path):
    """A check that takes as long as a start is not made."""
    path = write_recipe(tmp_path)
    program = (
        "import sys\nfrom orchestrator.recipe_loading import load_recipe\n"
        "from orchestrator.preflight import preflight\n"
        "from orchestrator.plan import plan\n"
        f"recipe = load_recipe({path!r}, [])\nassert preflight(recipe) == []\nplan(recipe)\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'deepspeed', 'matplotlib') if name in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - started < 10  # 0.4 s when the machine is quiet


def test_a_scaling_law_is_fitted_before_the_run(tmp_path):
    """A file that no law fits would stop the run after the source model was trained."""
    file = tmp_path / "losses.yaml"
    file.write_text(
        yaml.safe_dump({"parameters": [1e6, 1e7, 1e8], "losses": {"wiki": [3, 2.5, 2.2], "code": [1, 2, 3]}})
    )
    found = preflight(tiny_recipe(tmp_path, "references.kind=scaling_law", f"references.file={file}"))
    assert any("do not fall with size" in problem for problem in found)
