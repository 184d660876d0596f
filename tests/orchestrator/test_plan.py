import json
from pathlib import Path

import pytest
from recipes_for_tests import tiny_recipe, write_model

from orchestrator.memory_forecast import checkpoint_bytes, worker_memory
from orchestrator.plan import plan
from orchestrator.plan_text import format_bytes, render_plan
from orchestrator.recipe_loading import load_recipe
from orchestrator.workspace import open_workspace
from shearing.models.shape import Shape
from shearing.training.config import EngineConfig

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def sheared_llama(tmp_path):
    """The shipped recipe, with a source directory that holds a config and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    for domain in ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4-rp"):
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "a.jsonl").write_text('{"text": "word"}\n')
    recipe = load_recipe(
        str(RECIPES / "sheared-llama-1.3b.yaml"),
        [f"source.model={tmp_path}", f"corpus.root={tmp_path}", f"workspace={tmp_path}/run"],
    )
    return plan(recipe)


def test_the_papers_recipe_has_the_papers_numbers(sheared_llama):
    """Parameters and tokens as published (arXiv 2310.06694, Table 7); a wrong count sizes the wrong machines."""
    source, target = sheared_llama.models
    assert source.parameters == 6_738_415_616
    assert target.parameters == 1_345_423_360
    assert source.prunable_parameters == 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    tokens = {phase.name: phase.tokens for phase in sheared_llama.phases}
    assert tokens == {"pruning": 419_430_400, "recovery": 50_331_648_000}
    assert sheared_llama.phases[0].batch_sequences == 32
    assert sheared_llama.phases[0].accumulation_steps == 1


def test_memory_follows_the_stated_formulas(sheared_llama):
    """ZeRO 3 over 16 workers in bfloat16: 2 N + 2 N + 12 N bytes, all over 16."""
    memory = sheared_llama.phases[0].memory
    parameters = 6_738_415_616
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(16 * parameters / 16)
    gates = 32 + 4096 + 32 * 32 + 32 * 11008
    assert memory.gates == 20 * gates
    tokens = 2 * 4096
    layer = 2 * tokens * (8 * 4096 + 2 * 3 * 4096 + 4 * 11008)
    assert memory.activations == 32 * 2 * tokens * 4096 + layer + tokens * 32000 * 10
    assert sheared_llama.phases[0].checkpoint_bytes == 12 * (parameters + gates)


@pytest.mark.parametrize(("stage", "weights", "gradients"), [(1, 4000, 4000), (2, 4000, 2000), (3, 2000, 2000)])
def test_zero_stages_divide_what_they_divide(stage, weights, gradients):
    shape = Shape(num_layers=1, hidden_size=4, num_heads=1, num_kv_heads=1, head_size=4, intermediate_size=8)
    memory = worker_memory(
        1000, shape, 10, EngineConfig(workers=2, zero_stage=stage, dtype="float32"), sequence_tokens=16
    )
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, 6000)


def test_a_teacher_stands_whole_on_every_worker(tmp_path):
    """Forgotten or divided by the workers, a 7B teacher beside a 1.3B student is the machine one size too small."""
    without, taught = (
        plan(tiny_recipe(tmp_path, "engine.zero_stage=3", "engine.workers=2", *overrides))
        for overrides in ((), ("recovery.distillation={}",))
    )
    source = taught.models[0].parameters
    memory = {phase.name: phase.memory for phase in taught.phases}
    assert memory["recovery"].teacher == 4 * source + 2 * 4 * 2 * 64 * 320
    assert memory["recovery"].total - without.phases[1].memory.total == memory["recovery"].teacher
    assert memory["pruning"].teacher == 0
    write_model(tmp_path / "other", num_hidden_layers=2)
    (other,) = [
        phase.memory.teacher
        for phase in plan(tiny_recipe(tmp_path, f"recovery.distillation={{teacher: {tmp_path}/other}}")).phases
        if phase.name == "recovery"
    ]
    assert 0 < other < memory["recovery"].teacher


def test_only_adapters_have_gradients_and_moments(tmp_path):
    """Counted as full training, a recovery that fits one card is planned for four."""
    whole, adapted = (
        plan(tiny_recipe(tmp_path, "engine.zero_stage=2", *overrides)).phases[1]
        for overrides in ((), ("recovery.lora={rank: 8, targets: [mlp]}",))
    )
    parameters = plan(tiny_recipe(tmp_path)).models[1].parameters
    adapters = 3 * 3 * 8 * (48 + 128)  # layers, linears, rank, rows and columns
    assert whole.checkpoint_bytes == 12 * parameters
    assert adapted.checkpoint_bytes == 12 * adapters
    assert adapted.memory.weights == 4 * (parameters + adapters)
    assert adapted.memory.gradients == 4 * adapters / 2
    assert adapted.memory.optimizer == 12 * adapters / 2
    assert adapted.memory.activations == whole.memory.activations


def test_adapters_are_said_in_words(tmp_path):
    lora = "recovery.lora={rank: 8, merge: false}"
    expected = (
        "rank 8, alpha 10, dropout 0.05 on every linear of attention and mlp; learning rate 0.0002; kept as files"
    )
    assert expected in render_plan(plan(tiny_recipe(tmp_path, lora)))
    assert "LoRA          none: continued pretraining trains every weight" in render_plan(plan(tiny_recipe(tmp_path)))


def test_mixture_and_distillation_are_said_in_words(tmp_path):
    overrides = ("mixture.rule=dro", "mixture.loss_from=train", "mixture.floor=0.02", "recovery.distillation={}")
    text = render_plan(plan(tiny_recipe(tmp_path, *overrides)))
    for expected in (
        "dro: the worst mixture within a chi-square ball of radius 0.1",
        "moved by the losses of training batches",
        "no share below 0.02",
        "0.5 cross-entropy + 0.5 KL to the source model at temperature 1",
    ):
        assert expected in text, expected
    assert "none: continued pretraining learns from the text alone" in render_plan(plan(tiny_recipe(tmp_path)))


def test_checkpoints_hold_weights_and_two_moments():
    assert checkpoint_bytes(100) == 1200


def test_the_plan_shows_stages_shapes_tokens_and_data(tmp_path):
    recipe = tiny_recipe(tmp_path, "scratch={}")
    open_workspace(recipe).begin("corpus", {"recipe": {}, "stages": {}})
    text = render_plan(plan(recipe))
    for expected in ("corpus", "begun", "to run", "hidden_size", "10,240", "scratch", "4 -> 3", "nothing is missing"):
        assert expected in text, expected


def test_the_plan_shows_how_units_are_chosen(tmp_path):
    """Catches a plan that counts steps which no method but `learned` takes, or forced layers that nobody sees."""
    learned = render_plan(plan(tiny_recipe(tmp_path, "pruning.keep.layers=[0, -1]", "pruning.drop.layers=[1]")))
    assert "pruning.method = learned" in learned
    assert "4 -> 3 (sparsity 0.2500); forced to stay: 0, 3; forced to go: 1" in learned
    assert "pruning goes on for at most 4 steps more" in learned
    assert "goes on" not in render_plan(plan(tiny_recipe(tmp_path, "pruning.gates.extra_steps=0")))
    chosen = plan(tiny_recipe(tmp_path, "pruning.method=activation", "pruning.calibration.sequences=40"))
    assert [phase.name for phase in chosen.phases] == ["recovery"]
    assert {use.phase.name for use in chosen.use} == {"recovery"}
    text = render_plan(chosen)
    assert "pruning.method = activation" in text
    assert "on 40 sequences of calibration text; no mask learning" in text


def test_the_plan_of_an_overall_sparsity(tmp_path):
    """Catches a target shape that is the source's own, and gates that nobody counts."""
    found = plan(tiny_recipe(tmp_path, "pruning.target={sparsity: 0.4}"))
    assert found.problems == []
    assert [model.name for model in found.models] == ["source"]
    text = render_plan(found)
    assert "197,632 -> at most 118,579 prunable parameters (sparsity 0.4000)" in text
    assert "attention_layer" in text
    assert "172 in each of 4 layers" in text


def test_the_plan_starts_and_writes_nothing(tmp_path):
    recipe = tiny_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    render_plan(plan(recipe))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_tells_what_is_missing_and_shows_the_rest(tmp_path):
    """One wrong key must not hide the whole plan."""
    text = render_plan(plan(tiny_recipe(tmp_path, "pruning.target.num_heads=9", "corpus.domains.wiki.text=none")))
    assert "to be mended" in text
    assert "larger than the source's" in text
    assert "none' does not exist" in text
    assert "code" in text


def test_epochs_are_forecast_from_bytes(tmp_path):
    """400 lines of 1,000 characters and a name: 101,4xx tokens of 4 bytes, 30 % of them for pruning."""
    recipe = tiny_recipe(tmp_path, "references.kind=source")
    use = next(use for use in plan(recipe).use if use.domain == "wiki" and use.phase.name == "pruning")
    size = (tmp_path / "text" / "wiki" / "a.jsonl").stat().st_size
    assert use.drawn == (20 + 4) * 512 / 64 * 0.75  # a fifth of the steps may come on top
    assert use.sequences == pytest.approx(size / 3 / 64 * 0.3)  # a vocabulary of 320: three bytes a token
    assert use.epochs == pytest.approx(use.drawn / use.sequences)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**42, "4.0 TiB")]
)
def test_sizes_read_well(size, text):
    assert format_bytes(size) == text
