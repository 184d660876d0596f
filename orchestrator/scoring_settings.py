"""What a recipe means for a task that runs one model: how the model is run and scored, and what the task takes.

Importing this loads no torch.
"""

from typing import TYPE_CHECKING, Any

from orchestrator.recipe import Recipe

if TYPE_CHECKING:
    from shearing.evaluation.scoring import ScoreProtocol


def inference_settings(recipe: Recipe) -> dict[str, Any]:
    """How models are run: the arguments of `shearing.evaluation.inference.Inference`."""
    engine = recipe.engine
    return {
        "batch_sequences": engine.micro_batch_sequences,
        "dtype": engine.dtype,
        "device": "cuda" if engine.gpus_per_worker else "cpu",
        "threads": max(1, int(engine.cpus_per_worker)),
        "trust_remote_code": recipe.source.trust_remote_code,
    }


def protocol_of(recipe: Recipe, corpus_uri: str) -> "ScoreProtocol":
    """How models are scored on a prepared corpus."""
    from shearing.evaluation.scoring import ScoreProtocol
    from shearing.evaluation.throughput import Load

    scores = recipe.scores
    return ScoreProtocol(
        corpus_uri=corpus_uri,
        sequences_per_domain=recipe.evaluation.sequences_per_domain,
        load=Load(scores.prompt_tokens, scores.decode_tokens, scores.batch_sequences),
        **inference_settings(recipe),
    )


def task_resources(recipe: Recipe) -> dict[str, float]:
    """CPUs and GPUs of a task that holds one model: what one worker has."""
    return {"cpus": recipe.engine.cpus_per_worker, "gpus": recipe.engine.gpus_per_worker}
