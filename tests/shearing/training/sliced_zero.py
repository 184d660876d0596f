"""A sliced model under ZeRO 3, on one rank of a group; in a module of its own, for the group imports it by name."""

import torch
from tiny_models import TOKENS

from shearing.models.loading import load_model
from shearing.training.engine import partitioned_loading, prepare_deepspeed


def losses_under_zero_3(rank, world, folder):
    """The largest difference of logits from the plain model's, and losses of a few steps."""
    prepare_deepspeed()
    import deepspeed

    with torch.no_grad():
        plain = load_model(folder)(input_ids=TOKENS, use_cache=False).logits
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }
    keep = partitioned_loading(config)
    model = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    del keep
    losses, difference = [], None
    for _ in range(4):
        found = engine(input_ids=TOKENS, labels=TOKENS, use_cache=False)
        if difference is None:
            difference = float((found.logits - plain).detach().abs().max())
        engine.backward(found.loss)
        engine.step()
        losses.append(found.loss.item())
    whole = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return difference, losses, whole
