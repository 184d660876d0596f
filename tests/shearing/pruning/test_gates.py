import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shearing.pruning.config import GatesConfig
from shearing.pruning.gates import (
    LOG_ALPHA_LIMIT,
    Gates,
    expected_units,
    largest_gates,
    open_probability,
    sample_gates,
    soft_scores,
)
from shearing.pruning.lagrangian import (
    ExtraSteps,
    Lagrangian,
    build_gate_optimizer,
    constraint,
    final_gaps,
    load_optimizer_tensors,
    optimizer_tensors,
    ramped_sparsity,
    sparsity_metrics,
    unconverged,
)
from shearing.pruning.target import GroupSpec

GOLDEN = Path(__file__).parents[4] / "shared/golden/gates"
STATES = ("init", "spread", "trained_like")
# The published gates' names of what our groups' gates multiply.
Z_NAMES = {
    "head": ["head_z"],
    "intermediate": ["intermediate_z"],
    "hidden": ["hidden_z"],
    "layer": ["head_layer_z", "mlp_z"],
    "head_layer": ["head_layer_z"],
    "mlp": ["mlp_z"],
}
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden gates beside this checkout")


def small_groups():
    return {
        "layer": GroupSpec(4, 3),
        "hidden": GroupSpec(64, 48),
        "head": GroupSpec(4, 3, 4),
        "intermediate": GroupSpec(172, 128, 4),
    }


@pytest.fixture(scope="module", params=["l0_A_paper", "l0_A_layersep_notarget"])
def golden(request):
    tensors = np.load(GOLDEN / f"{request.param}.npz")
    return json.loads((GOLDEN / f"{request.param}.json").read_text()), {k: torch.tensor(tensors[k]) for k in tensors}


def _groups(golden, state):
    return [name.rsplit("/", 1)[1] for name in golden[1] if name.startswith(f"{state}/z_loga/")]


class TestAgainstThePublishedNumbers:
    """Figures computed with the published implementation; catches any constant or formula that is off."""

    pytestmark = needs_golden

    @pytest.mark.parametrize("state", STATES)
    def test_sampled_gates_and_their_gradients(self, golden, state):
        _, tensors = golden
        for group in _groups(golden, state):
            log_alpha = tensors[f"{state}/z_loga/{group}"].requires_grad_()
            z = sample_gates(log_alpha, tensors[f"{state}/eps/{group}"])
            for name in Z_NAMES[group]:
                torch.testing.assert_close(z, tensors[f"{state}/z_sample/{name}"].reshape(z.shape), atol=1e-5, rtol=0)
            weight = sum(tensors[f"{state}/grad_w/{name}"].reshape(z.shape) for name in Z_NAMES[group])
            (grad,) = torch.autograd.grad((weight * z).sum(), log_alpha)
            torch.testing.assert_close(grad, tensors[f"{state}/grad_zloga_of_wz/{group}"], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("exact", [True, False])
    def test_deterministic_gates(self, golden, state, exact):
        info, tensors = golden
        for group in _groups(golden, state):
            target = info["masks"][group]["target_mask_size"] if exact else None
            if exact and target is None:
                continue
            log_alpha = tensors[f"{state}/z_loga/{group}"]
            units = expected_units(open_probability(log_alpha)) if target is None else target
            z = largest_gates(soft_scores(log_alpha), units)
            for name in Z_NAMES[group]:
                theirs = tensors[f"{state}/z_det_eval_target_{exact}/{name}"].reshape(z.shape)
                if state == "init":  # all scores are equal there, so only counts compare
                    assert torch.equal(z.count_nonzero(-1), theirs.count_nonzero(-1))
                else:
                    torch.testing.assert_close(z, theirs, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("state", STATES)
    def test_expected_size(self, golden, state):
        _, tensors = golden
        for group in _groups(golden, state):
            p = open_probability(tensors[f"{state}/z_loga/{group}"])
            torch.testing.assert_close(p, tensors[f"{state}/expected_score/{group}"], atol=1e-5, rtol=0)
            torch.testing.assert_close(1 - p.mean(-1), tensors[f"{state}/expected_sparsity/{group}"], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("state", STATES)
    def test_constraint_and_its_gradients_with_a_target_shape(self, state):
        info = json.loads((GOLDEN / "l0_A_paper.json").read_text())
        tensors = np.load(GOLDEN / "l0_A_paper.npz")
        groups = small_groups()
        lagrangian = Lagrangian(groups, info["lagrangian_warmup_steps"])
        gates = Gates(groups)
        with torch.no_grad():
            for name in groups:
                lagrangian.linear[name].fill_(info["lambdas"][f"lambda_1_{name}"])
                lagrangian.quadratic[name].fill_(info["lambdas"][f"lambda_2_{name}"])
                gates.log_alpha[name].copy_(torch.tensor(tensors[f"{state}/z_loga/{name}"]))
        for step in info["steps"]:
            theirs = info["states"][state]["lagrangian"][str(step)]
            assert lagrangian.loss(gates.expected_sparsity(), step).item() == pytest.approx(theirs["loss"], abs=1e-5)
            for name, target in lagrangian.target_sparsity(step).items():
                assert target == pytest.approx(theirs["info"][f"target_{name}_sparsity"], abs=1e-7)
        lagrangian.loss(gates.expected_sparsity(), 50).backward()
        multipliers = info["states"][state]["lag50_grad_lambda"]
        for name in groups:
            expected = torch.tensor(tensors[f"{state}/lag50_grad_zloga/{name}"])
            torch.testing.assert_close(gates.log_alpha[name].grad, expected, atol=1e-5, rtol=0)
            assert float(lagrangian.linear[name].grad) == pytest.approx(multipliers[f"lambda_1_{name}"], abs=1e-5)
            assert float(lagrangian.quadratic[name].grad) == pytest.approx(multipliers[f"lambda_2_{name}"], abs=1e-5)

    @pytest.mark.parametrize("state", STATES)
    def test_constraint_on_one_overall_sparsity(self, state):
        info = json.loads((GOLDEN / "l0_A_layersep_notarget.json").read_text())
        linear, quadratic = (torch.tensor(info["lambdas"][name]) for name in ("lambda_1", "lambda_2"))
        for step in info["steps"]:
            theirs = info["states"][state]["lagrangian"][str(step)]
            target = ramped_sparsity(
                info["target_sparsity"],
                step,
                info["lagrangian_warmup_steps"],
                info["config"]["l0_module"]["start_sparsity"],
            )
            assert target == pytest.approx(theirs["target_sparsity_global"])
            expected = torch.tensor(theirs["info"]["expected_sparsity"])
            loss = float(constraint(expected, target, linear, quadratic))
            assert loss == pytest.approx(theirs["loss"], abs=1e-5)


class TestFormulas:
    """The same formulas on constants worked out by hand (with bc, from exp and log alone)."""

    def test_open_probability_is_where_the_stretched_variable_leaves_zero(self):
        # P(z > 0) = sigmoid(log_alpha + 2/3 log 11); 2/3 log 11 = 1.598596849
        assert float(open_probability(torch.tensor(0.0))) == pytest.approx(0.831822184, abs=1e-6)
        assert float(open_probability(torch.tensor(-2.0))) == pytest.approx(0.400975264, abs=1e-6)

    def test_open_probability_is_the_share_of_samples_above_zero(self):
        """Catches a sample and a probability that do not belong together."""
        gates = Gates({"hidden": GroupSpec(200_000, 1)}, initial_log_alpha=-1.0, initial_log_alpha_std=0.0)
        z = gates.sample(gates.noise(seed=3, step=0))["hidden"]
        expected = float(open_probability(torch.tensor(-1.0)))
        assert float((z > 0).float().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 200_000))

    def test_sample_of_given_noise(self):
        # u = 0.3, log_alpha = 0.5: s = sigmoid((log(3/7) + 0.5) / (2/3)) = 0.3726309; z = 1.2 s - 0.1
        s = 1 / (1 + math.exp(-(math.log(0.3 / 0.7) + 0.5) * 1.5))
        z = sample_gates(torch.tensor(0.5), torch.tensor(0.3))
        assert float(z) == pytest.approx(1.2 * s - 0.1, abs=1e-6)
        assert float(z) == pytest.approx(0.3471570, abs=1e-6)

    def test_soft_score(self):
        assert float(soft_scores(torch.tensor(1.0))) == pytest.approx(1 / (1 + math.exp(-1.2)), abs=1e-6)

    def test_smallest_are_closed_row_by_row(self):
        """Catches a top-k over the whole group instead of every row."""
        log_alpha = torch.tensor([[4.0, 3.0, 2.0, 1.0], [-4.0, -1.0, -3.0, -2.0]])
        z = largest_gates(soft_scores(log_alpha), 2)
        assert (z != 0).tolist() == [[True, True, False, False], [False, True, False, True]]
        kept = z != 0
        torch.testing.assert_close(z[kept], soft_scores(log_alpha)[kept])

    def test_expected_size_is_rounded(self):
        # P = sigmoid(4.6 + 1.6) three times and sigmoid(-4.6 + 1.6) = 0.047 three times: 3.13 units expected
        log_alpha = torch.tensor([4.6, -4.6, 4.6, -4.6, 4.6, -4.6])
        assert int(expected_units(open_probability(log_alpha))) == 3

    def test_equal_scores_still_give_the_exact_size(self):
        """Catches a threshold instead of a ranking."""
        assert int(largest_gates(torch.ones(7), 5).count_nonzero()) == 5


class TestGates:
    def test_start_distinct_and_below_the_clamp(self):
        gates = Gates(small_groups(), initial_log_alpha=3.0, initial_log_alpha_std=0.1, seed=5)
        for log_alpha in gates.log_alpha.values():
            assert log_alpha.dtype == torch.float32
            assert len(log_alpha.detach().reshape(-1).unique()) > 0.99 * log_alpha.numel()
            assert log_alpha.max().item() < LOG_ALPHA_LIMIT

    def test_same_seed_same_start(self):
        first, second, other = (Gates(small_groups(), seed=seed) for seed in (1, 1, 2))
        assert all(torch.equal(first.log_alpha[name], second.log_alpha[name]) for name in small_groups())
        assert not torch.equal(first.log_alpha["hidden"], other.log_alpha["hidden"])

    def test_noise_is_a_function_of_seed_step_and_rank(self):
        """Catches noise from global random state, and one rank's noise given to another."""
        gates = Gates(small_groups())
        draws = [gates.noise(1, 2), gates.noise(1, 2), gates.noise(1, 3), gates.noise(2, 2), gates.noise(1, 2, rank=0)]
        draws += [gates.noise(1, 2, rank=1)]
        assert torch.equal(draws[0]["hidden"], draws[1]["hidden"])
        for other in draws[2:]:
            assert not torch.equal(draws[0]["hidden"], other["hidden"])
        assert not torch.equal(draws[4]["hidden"], draws[5]["hidden"])
        assert all(float(u.min()) >= 1e-6 and float(u.max()) <= 1 - 1e-6 for draw in draws for u in draw.values())

    def test_clamp(self):
        gates = Gates({"hidden": GroupSpec(2, 1)})
        with torch.no_grad():
            gates.log_alpha["hidden"].copy_(torch.tensor([9.0, -9.0]))
        gates.clamp_()
        assert gates.log_alpha["hidden"].tolist() == pytest.approx([math.log(100), -math.log(100)])

    def test_undecided_counts_gates_between(self):
        gates = Gates({"hidden": GroupSpec(4, 1)})
        with torch.no_grad():
            gates.log_alpha["hidden"].copy_(torch.tensor([4.0, -4.605, 0.0, -1.6]))
        assert {name: int(count) for name, count in gates.undecided().items()} == {"hidden": 2}

    def test_state_is_plain_tensors(self):
        gates = Gates(small_groups(), seed=1)
        state = {name: tensor.clone() for name, tensor in gates.state_dict().items()}
        assert all(type(tensor) is torch.Tensor for tensor in state.values())
        fresh = Gates(small_groups(), seed=2)
        fresh.load_state_dict(state)
        assert all(torch.equal(fresh.log_alpha[name], gates.log_alpha[name]) for name in small_groups())


class TestForced:
    """Layers that a recipe forces to stay (0, 2) or go (3), of five."""

    def made(self, *values):
        gates = Gates({"layer": GroupSpec(5, 3, kept=(0, 2), dropped=(3,))}, seed=2)
        with torch.no_grad():
            gates.log_alpha["layer"][[1, 4]] = torch.tensor(values)
        return gates

    def test_sampled_and_expected_are_constants(self):
        """Catches a forced layer that noise closes now and then, or that counts as not quite open."""
        gates = self.made(0.0, -1.0)
        for step in range(50):
            z = gates.sample(gates.noise(0, step))["layer"]
            assert z[[0, 2, 3]].tolist() == [1, 1, 0]
        free = sum(float(open_probability(torch.tensor(a))) for a in (0.0, -1.0))
        assert float(gates.expected_sparsity()["layer"].detach()) == pytest.approx(1 - (2 + free) / 5, abs=1e-6)
        assert int(gates.undecided()["layer"]) == 2

    def test_no_gradient_moves_them(self):
        """Catches constants that drift away under the optimiser, and a constraint that pushes on what cannot move."""
        gates = self.made(3.0, 3.0)
        lagrangian = Lagrangian(gates.groups)
        optimizer = build_gate_optimizer(gates, lagrangian, GatesConfig(learning_rate=0.5))
        for step in range(30):
            optimizer.zero_grad()
            (
                gates.sample(gates.noise(0, step))["layer"].sum() + lagrangian.loss(gates.expected_sparsity(), step)
            ).backward()
            assert gates.log_alpha["layer"].grad[[0, 2, 3]].tolist() == [0, 0, 0]
            optimizer.step()
        limit = math.log(100)
        assert gates.log_alpha["layer"][[0, 2, 3]].tolist() == pytest.approx([limit, limit, -limit])
        assert abs(float(gates.log_alpha["layer"][1].detach()) - 3.0) > 0.1

    @pytest.mark.parametrize("free", [(LOG_ALPHA_LIMIT, 1.0), (1.0, LOG_ALPHA_LIMIT), (-4.0, -4.5)])
    def test_exact_target_keeps_and_drops_them(self, free):
        """Catches a tie at the clamp that takes a free layer in place of a forced one."""
        z = self.made(*free).deterministic(exact=True)["layer"]
        assert z[[0, 2, 3]].tolist() == [1, 1, 0]
        assert int(z.count_nonzero()) == 3
        assert (z[1] > 0) == (free[0] > free[1])

    def test_expected_size_never_cuts_them(self):
        z = self.made(-4.6, -4.6).deterministic(exact=False)["layer"]
        assert (z > 0).tolist() == [True, False, True, False, False]


class TestExtraSteps:
    def test_penalty_by_hand(self):
        """Catches a penalty before its time, one that grows from one, and one that multipliers feed on."""
        groups = {"hidden": GroupSpec(10, 6)}
        lagrangian = Lagrangian(groups, extra=ExtraSteps(after=100, growth=1.1))
        with torch.no_grad():
            lagrangian.linear["hidden"].fill_(-3.0)
            lagrangian.quadratic["hidden"].fill_(2.0)
        expected = {"hidden": torch.tensor(0.3)}
        base = -3.0 * -0.1 + 2.0 * 0.01
        for step, rise in ((99, 0.0), (100, 0.1), (101, 0.21), (100_000, 1e3)):
            lagrangian.zero_grad()
            loss = lagrangian.loss(expected, step)
            assert float(loss.detach()) == pytest.approx(base + rise * 5.0 * 0.01, rel=1e-4)
            loss.backward()
            assert float(lagrangian.linear["hidden"].grad) == pytest.approx(-0.1, rel=1e-4)
            assert float(lagrangian.quadratic["hidden"].grad) == pytest.approx(0.01, rel=1e-4)


class TestConstraint:
    def test_ramp(self):
        assert [ramped_sparsity(0.5, step, 100, 0.1) for step in (0, 50, 100, 900)] == pytest.approx(
            [0.1, 0.3, 0.5, 0.5]
        )
        assert ramped_sparsity(0.5, 0, 0) == 0.5

    def test_mean_over_layers_of_hand_worked_gaps(self):
        """Catches a sum over layers, and a square of the mean instead of a mean of squares."""
        loss = constraint(torch.tensor([0.5, 0.1]), 0.2, torch.tensor(2.0), torch.tensor(10.0))
        assert float(loss) == pytest.approx((2 * 0.3 + 10 * 0.09 + 2 * -0.1 + 10 * 0.01) / 2)

    def test_optimiser_reaches_the_target_and_says_so(self):
        """Catches multipliers that descend, a missing clamp and gates that drift past the target."""
        groups = small_groups()
        gates, lagrangian = Gates(groups, seed=1), Lagrangian(groups, sparsity_warmup_steps=20)
        optimizer = build_gate_optimizer(gates, lagrangian, GatesConfig(learning_rate=0.1))
        pull = {
            name: torch.randn(spec.shape, generator=torch.Generator().manual_seed(4)) for name, spec in groups.items()
        }
        assert unconverged(gates, 0.01)
        for step in range(400):
            z = gates.sample(gates.noise(0, step))
            value = sum((0.02 * pull[name] * z[name]).sum() for name in groups)  # some units are worth keeping
            optimizer.zero_grad()
            (value + lagrangian.loss(gates.expected_sparsity(), step)).backward()
            optimizer.step()
            assert all(a.abs().max().item() <= LOG_ALPHA_LIMIT + 1e-6 for a in gates.log_alpha.values())
        assert any(multiplier.item() != 0 for multiplier in lagrangian.linear.values())
        metrics = sparsity_metrics(gates, lagrangian, 400)
        for name, spec in groups.items():
            assert metrics[name]["target"] == pytest.approx(spec.target_sparsity)
            assert metrics[name]["largest_layer_gap"] == pytest.approx(max(final_gaps(gates)[name]), abs=1e-6)
            assert metrics[name]["largest_layer_gap"] < 0.1, name
            kept = [float(open_probability(row).sum()) for row in gates.log_alpha[name].detach().reshape(-1, spec.size)]
            assert metrics[name]["expected_units"] == pytest.approx(kept, abs=0.006)
            assert metrics[name]["target_units"] == pytest.approx(spec.target)
            assert sum(metrics[name]["undecided_units"]) == metrics[name]["undecided"]

    def test_multipliers_ascend_by_exactly_the_learning_rate_at_first(self):
        gates, lagrangian = Gates(small_groups()), Lagrangian(small_groups())
        optimizer = build_gate_optimizer(gates, lagrangian, GatesConfig(learning_rate=0.5))
        lagrangian.loss(gates.expected_sparsity(), 0).backward()
        optimizer.step()
        # expected is below target, so the gap is negative and ascent makes the linear multiplier negative
        assert float(lagrangian.linear["hidden"]) == pytest.approx(-0.5, rel=1e-4)
        assert float(lagrangian.quadratic["hidden"]) == pytest.approx(0.5, rel=1e-4)

    def test_multipliers_have_a_rate_of_their_own(self):
        gates, lagrangian = Gates(small_groups()), Lagrangian(small_groups(), initial_quadratic=50)
        optimizer = build_gate_optimizer(gates, lagrangian, GatesConfig(multiplier_learning_rate=0.1))
        lagrangian.loss(gates.expected_sparsity(), 0).sum().backward()
        optimizer.step()
        assert lagrangian.linear["hidden"].item() == pytest.approx(-0.1, rel=1e-4)
        assert lagrangian.quadratic["hidden"].item() == pytest.approx(50.1, rel=1e-4)

    def test_a_penalty_from_the_start_keeps_from_overshooting(self):
        """Catches multipliers that wind up while gates have not moved yet, and close twice what was asked for."""

        def highest_sparsity(initial_quadratic, **rates):
            groups = {"hidden": GroupSpec(64, 48)}
            gates, lagrangian = Gates(groups, seed=1), Lagrangian(groups, 20, initial_quadratic=initial_quadratic)
            optimizer = build_gate_optimizer(gates, lagrangian, GatesConfig(**rates))
            highest = 0.0
            for step in range(120):
                optimizer.zero_grad()
                z = gates.sample(gates.noise(0, step))
                closed = 1 - z["hidden"].mean()
                damage = 0.5 * (1 - torch.exp(-closed / 0.2))  # the first that close cost most, as in a model
                (damage + lagrangian.loss(gates.expected_sparsity(), step)).backward()
                optimizer.step()
                highest = max(highest, float(gates.expected_sparsity()["hidden"]))
            return highest, float(gates.expected_sparsity()["hidden"])

        wound_up, _ = highest_sparsity(0.0, learning_rate=0.25)
        held, at_the_end = highest_sparsity(50.0, learning_rate=1.0, multiplier_learning_rate=0.1)
        assert wound_up > 0.4
        assert held < 0.3
        assert at_the_end == pytest.approx(0.25, abs=0.03)

    def test_unconverged_names_the_layers(self):
        groups = {"head": GroupSpec(4, 2, 2)}
        gates = Gates(groups)
        with torch.no_grad():
            gates.log_alpha["head"].copy_(torch.tensor([[4.6, 4.6, -4.6, -4.6], [4.6, 4.6, 4.6, 4.6]]))
        (message,) = unconverged(gates, 0.05)
        assert "'head'" in message
        assert "1 of 2 layers (layer 1: 0.49" in message

    def test_optimiser_state_goes_through_tensors_exactly(self):
        """Catches state lost or given to another parameter: the next steps must be bitwise the same."""

        def steps(gates, lagrangian, optimizer, numbers):
            for step in numbers:
                optimizer.zero_grad()
                z = gates.sample(gates.noise(0, step))
                loss = sum((gate * gate).sum() for gate in z.values()) * 1e-2
                (loss + lagrangian.loss(gates.expected_sparsity(), step)).backward()
                optimizer.step()

        def made():
            gates, lagrangian = Gates(small_groups(), seed=3), Lagrangian(small_groups(), 10)
            return gates, lagrangian, build_gate_optimizer(gates, lagrangian, GatesConfig(learning_rate=0.1))

        gates, lagrangian, optimizer = made()
        steps(gates, lagrangian, optimizer, range(3))
        saved = optimizer_tensors(optimizer)
        assert all(type(tensor) is torch.Tensor for tensor in saved.values())
        other_gates, other_lagrangian, other_optimizer = made()
        other_gates.load_state_dict(gates.state_dict())
        other_lagrangian.load_state_dict(lagrangian.state_dict())
        load_optimizer_tensors(other_optimizer, saved)
        steps(gates, lagrangian, optimizer, range(3, 6))
        steps(other_gates, other_lagrangian, other_optimizer, range(3, 6))
        for ours, theirs in ((gates, other_gates), (lagrangian, other_lagrangian)):
            for name, tensor in ours.state_dict().items():
                assert torch.equal(tensor, theirs.state_dict()[name]), name

    def test_optimiser_state_goes_where_its_parameters_are(self):
        # catches moments read from a file that stay on the CPU beside gates on a GPU
        gates, lagrangian = Gates(small_groups()), Lagrangian(small_groups())
        optimizer = build_gate_optimizer(gates, lagrangian, GatesConfig())
        for parameter in (*gates.parameters(), *lagrangian.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        saved = optimizer_tensors(optimizer)
        other = build_gate_optimizer(gates.to("meta"), lagrangian.to("meta"), GatesConfig())
        load_optimizer_tensors(other, saved)
        for state in other.state.values():
            assert {name: value.device.type for name, value in state.items()} == {
                "step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"
            }  # fmt: skip

    def test_optimiser_state_of_other_groups_is_refused(self):
        gates, lagrangian = Gates(small_groups()), Lagrangian(small_groups())
        optimizer = build_gate_optimizer(gates, lagrangian, GatesConfig())
        with pytest.raises(ValueError, match=r"log_alpha\.attic"):
            load_optimizer_tensors(optimizer, {"log_alpha.attic/exp_avg": torch.zeros(1)})
