import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from shearing.training.config import TrainingConfig
from shearing.training.schedule import learning_rate


def config(steps=3200, warmup_steps=320, floor=0.1):
    return TrainingConfig(
        steps=steps,
        global_batch_tokens=1,
        learning_rate=1e-4,
        warmup_steps=warmup_steps,
        final_learning_rate_fraction=floor,
    )


class TestLearningRate:
    def test_known_points(self):
        # the recipe of arXiv 2310.06694, table 7; catches a warm-up that starts at zero (a lost step) and a wrong floor
        paper = config()
        assert learning_rate(paper, 0) == pytest.approx(1e-4 / 320)
        assert learning_rate(paper, 319) == pytest.approx(1e-4)
        assert learning_rate(paper, 320) == pytest.approx(1e-4)
        assert learning_rate(paper, 320 + 1440) == pytest.approx(0.55e-4)
        assert learning_rate(paper, 3200) == pytest.approx(1e-5)
        assert learning_rate(paper, 10_000) == pytest.approx(1e-5)

    @pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
    def test_cosine_of_transformers(self, floor):
        # catches a cosine over all steps in place of those after the warm-up
        steps, warmup = 50, 7
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=floor)
        for step in range(steps):
            if step >= warmup:
                found = learning_rate(config(steps, warmup, floor), step)
                assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            schedule.step()

    @pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 9), (2, 1)])
    def test_short_phases(self, steps, warmup):
        # catches a division by zero, and rates outside (0, peak], where warm-up leaves no room
        rates = [learning_rate(config(steps, warmup), step) for step in range(steps)]
        assert all(0 < rate <= 1e-4 * (1 + 1e-12) for rate in rates)
        assert rates[: warmup or 1] == sorted(rates[: warmup or 1])
