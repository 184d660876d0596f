"""The learning rate as a pure function of the step, so that nothing of it needs saving."""

import math

from shearing.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of the update that makes `step` into `step + 1`: linear warm-up, then a cosine.

    The cosine ends at `final_learning_rate_fraction` of the peak (arXiv 2310.06694, Table 7: 10 %).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span_steps = max(config.steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span_steps, 1.0)
    floor = config.final_learning_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
