import pytest

from shearing.models.families import FAMILIES
from shearing.models.family import llama_config
from shearing.models.shape import Shape, TargetShape
from shearing.pruning.config import PruningConfig
from shearing.pruning.target import check_pruning, check_target, gate_groups, pruning_groups, target_shape

LLAMA_7B = Shape(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, head_size=128, intermediate_size=11008)
MISTRAL_7B = LLAMA_7B.model_copy(update={"num_kv_heads": 8, "intermediate_size": 14336})


def problems(source=LLAMA_7B, groups=None, family="llama", **target):
    return check_target(FAMILIES[family], source, TargetShape(**target), groups)


class TestGoodTargets:
    def test_the_papers(self):
        """2.7B: 32 layers, hidden 2560, intermediate 6912, 20 heads."""
        target = TargetShape(hidden_size=2560, num_heads=20, intermediate_size=6912)
        assert check_target(FAMILIES["llama"], LLAMA_7B, target) == []
        shape = target_shape(LLAMA_7B, target)
        assert shape.num_kv_heads == 20  # every head has its own key and value
        groups = gate_groups(LLAMA_7B, shape)
        assert {name: (spec.shape, spec.target) for name, spec in groups.items()} == {
            "hidden": ((4096,), 2560),
            "head": ((32, 32), 20),
            "intermediate": ((32, 11008), 6912),
        }
        assert groups["hidden"].target_sparsity == pytest.approx(0.375)

    def test_whole_groups_go_with_their_queries(self):
        target = TargetShape(num_heads=16, num_kv_heads=4)
        assert check_target(FAMILIES["mistral"], MISTRAL_7B, target) == []
        groups = gate_groups(MISTRAL_7B, target_shape(MISTRAL_7B, target))
        assert {name: (spec.shape, spec.target) for name, spec in groups.items()} == {"kv_head": ((32, 8), 4)}

    def test_queries_go_inside_every_group(self):
        groups = gate_groups(MISTRAL_7B, target_shape(MISTRAL_7B, TargetShape(num_heads=24)))
        assert {name: (spec.shape, spec.target) for name, spec in groups.items()} == {"head": ((32, 4), 3)}

    def test_both(self):
        groups = gate_groups(MISTRAL_7B, target_shape(MISTRAL_7B, TargetShape(num_heads=8, num_kv_heads=4)))
        assert {name: (spec.shape, spec.target) for name, spec in groups.items()} == {
            "head": ((32, 4), 2),
            "kv_head": ((32, 8), 4),
        }

    def test_a_group_asked_for_without_change_keeps_all(self):
        shape = target_shape(LLAMA_7B, TargetShape(hidden_size=2560))
        assert gate_groups(LLAMA_7B, shape, ["hidden", "layer"])["layer"].target_sparsity == 0


class TestProblems:
    def test_all_that_is_larger_at_once(self):
        """Catches a check that stops at the first problem."""
        found = problems(hidden_size=8192, num_layers=40)
        assert len(found) == 2
        assert "pruning.target.num_layers = 40 is larger than the source's 32" in found[0]
        assert "Set pruning.target.hidden_size to 4096 or less" in found[1]

    def test_heads_that_groups_do_not_divide(self):
        (found,) = problems(MISTRAL_7B, family="mistral", num_heads=18)
        assert found == (
            "pruning.target.num_heads = 18 is not a multiple of num_kv_heads = 8; allowed: 8, 16, 24, 32. "
            "Set pruning.target.num_heads=16."
        )

    def test_fewer_groups_with_more_queries_each(self):
        """Catches a target with heads in no group of the source: only num_kv_heads was lowered."""
        (found,) = problems(MISTRAL_7B, family="mistral", num_kv_heads=4)
        assert "num_heads = 32 (the source's, since the target leaves it out)" in found
        assert "allowed: 4, 8, 12, 16. Set pruning.target.num_heads=16." in found

    def test_multi_head_attention_stays_multi_head(self):
        (found,) = problems(num_heads=16, num_kv_heads=8)
        assert "num_kv_heads = 8 differs from num_heads = 16" in found

    def test_hidden_size_that_the_config_class_refuses(self):
        """Catches a target whose extraction could not be loaded: found only after hours of training."""
        (found,) = problems(hidden_size=2048, num_heads=20)
        assert "hidden_size = 2048 is not a multiple of num_heads = 20" in found
        assert "Set pruning.target.hidden_size=2040." in found
        assert problems(family="qwen2", hidden_size=2048, num_heads=20) == []

    def test_head_size_that_the_model_computes_from_the_hidden_size(self):
        """Catches a model whose rotary embedding or attention scale would change with its width."""
        source = LLAMA_7B.model_copy(update={"num_layers": 6, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 8})
        pythia = source.model_copy(update={"head_size": 64, "intermediate_size": 2048})
        (found,) = problems(pythia, family="gpt_neox", hidden_size=384)
        assert found == (
            "pruning.target.hidden_size = 384 is not num_heads x head size = 8 x 64, and Hugging Face's "
            "GPTNeoXForCausalLM takes the quotient for the head size, which pruning keeps; allowed: 512, or "
            "num_heads = 6 with this size. Set pruning.target.hidden_size=512."
        )
        (found,) = problems(pythia, family="opt", hidden_size=400, num_heads=6)
        assert "allowed: 384 with 6 heads. Set pruning.target.hidden_size=384." in found
        assert problems(pythia, family="gpt_neox", hidden_size=384, num_heads=6) == []
        assert problems(pythia, family="gpt_neox", num_layers=4, intermediate_size=1024) == []

    def test_rope_factors_that_the_config_class_counts_by_that_quotient(self):
        """Catches a Phi-3 with long context that is refused when the result is loaded, after all the training."""
        target = TargetShape(hidden_size=2048)
        for key in ("rope_parameters", "rope_scaling"):
            config = {"model_type": "phi3", key: {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}
            (found,) = check_target(FAMILIES["phi3"], LLAMA_7B, target, config=config)
            assert "is not num_heads x head size = 32 x 128" in found
        assert check_target(FAMILIES["phi3"], LLAMA_7B, target, config={"model_type": "phi3"}) == []

    def test_nothing_to_prune(self):
        (found,) = problems(hidden_size=4096)
        assert "there is nothing to prune" in found

    def test_a_changed_dimension_without_its_gates(self):
        """Catches the published code's silent failure: the dimension would be cut at random."""
        found = problems(hidden_size=2560, intermediate_size=6912, groups=["hidden"])
        assert len(found) == 1
        assert "lacks 'intermediate'" in found[0]
        assert "11008 -> 6912 in each layer" in found[0]
        assert "hidden, intermediate" in found[0]

    def test_a_group_that_the_source_does_not_have(self):
        (found,) = problems(hidden_size=2560, groups=["hidden", "kv_head"])
        assert "'kv_head'" in found
        assert "allowed: layer, hidden, head, intermediate" in found


def pruning(num_layers=24, keep=(), drop=(), **target):
    layers = {"keep": {"layers": list(keep)}, "drop": {"layers": list(drop)}}
    return PruningConfig(steps=1, global_batch_tokens=1, target={"num_layers": num_layers, **target}, **layers)


class TestForcedLayers:
    def test_numbers_from_either_end(self):
        """Catches -1 taken for layer 1, and a layer counted twice."""
        groups = pruning_groups(LLAMA_7B, pruning(keep=[0, 1, -1, 31], drop=[-2]))
        assert (groups["layer"].kept, groups["layer"].dropped) == ((0, 1, 31), (30,))

    def test_need_no_layer_gates_where_all_layers_stay(self):
        config = pruning(num_layers=None, hidden_size=2048, keep=[0])
        assert check_pruning(FAMILIES["llama"], LLAMA_7B, config) == []
        assert set(pruning_groups(LLAMA_7B, config)) == {"hidden"}

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (
                pruning(keep=[0, 32]),
                "pruning.keep.layers names 32, which a source with 32 layers does not have; allowed: 0 to 31",
            ),
            (pruning(drop=[-33]), "pruning.drop.layers names -33"),
            (pruning(keep=[0, 31], drop=[-1]), "both name layers 31"),
            (pruning(num_layers=2, keep=[0, 1, -1]), "forces 3 layers to stay, but the target keeps 2 of 32"),
            (pruning(num_layers=30, drop=[4, 5, 6]), "allowed: at most 2. Set pruning.target.num_layers=29"),
            (
                pruning(num_layers=None, hidden_size=2048, drop=[4]),
                "forces 1 layers to go, but the target keeps 32 of 32",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, config, expected):
        """Each of these would otherwise end in an extraction at another size, after all the steps."""
        (found,) = check_pruning(FAMILIES["llama"], LLAMA_7B, config)
        assert expected in found


class TestReach:
    """Overall targets that gates can or cannot come to; 7B's own figures."""

    @pytest.mark.parametrize(
        ("target", "changed", "expected"),
        [
            ({"sparsity": 0.6}, {}, []),
            ({"sparsity": 0.9}, {"gates": {"groups": ["head"]}}, ["pruning.target.sparsity = 0.9 asks for"]),
            ({"sparsity": 0.99}, {"keep": {"layers": list(range(32))}}, []),
            ({"sparsity": 0.3}, {"gates": {"groups": ["head", "intermediate"]}, "drop": {"layers": [1]}},
             ["pruning.drop.layers needs gates over attention and MLP of a layer; pruning.gates.groups lacks"]),
            ({"sparsity": 0.3}, {"drop": {"layers": list(range(32))}}, ["pruning.drop.layers names every layer"]),
            ({"parameters": 3_000_000_000}, {"gates": {"groups": ["head"]}},
             ["pruning.target.parameters = 3,000,000,000 asks for"]),
        ],
    )  # fmt: skip
    def test_what_is_said_before_a_run(self, target, changed, expected):
        """Catches a target that is missed after all steps, and layers that are named in vain."""
        config = PruningConfig(steps=1, global_batch_tokens=1, target=target, **changed)
        source = llama_config(LLAMA_7B, 32000, 4096)
        found = check_pruning(FAMILIES["llama"], LLAMA_7B, config, source_config=source)
        assert [problem.startswith(words) for problem, words in zip(found, expected, strict=True)] == [True] * len(
            found
        )
