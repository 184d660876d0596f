"""A small valid recipe on a model directory and text written for the test, to be spoilt one key at a time."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from orchestrator.recipe import Recipe
from orchestrator.recipe_loading import load_recipe

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
RECIPE = """
name: tiny
workspace: {folder}/run
corpus:
  path: {folder}/corpora
  root: {folder}/text
  sequence_tokens: 64
  split: {{eval: 0.1, prune: 0.3}}
  domains:
    wiki: {{text: wiki, proportion: 0.75}}
    code: {{text: code, proportion: 0.25}}
source: {{model: "{folder}/model"}}
engine: {{workers: 2, micro_batch_sequences: 2, dtype: float32, cpus_per_worker: 0.5}}
pruning:
  steps: 20
  global_batch_tokens: 512
  warmup_steps: 2
  target: {{num_layers: 3, hidden_size: 48, num_heads: 3, intermediate_size: 128}}
  gates: {{sparsity_warmup_steps: 5}}
recovery: {{steps: 20, global_batch_tokens: 512}}
evaluation: {{sequences_per_domain: 4}}
scores: {{prompt_tokens: 32, decode_tokens: 8}}
"""


def write_model(folder: Path, tokens: int = 320, **config: object) -> None:
    """A directory that looks like a model to whoever reads no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    vocabulary = {f"t{number}": number for number in range(tokens - 1)}
    added = [{"content": "</s>", "id": tokens - 1}]
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": added})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    write_weights(folder / "model.safetensors")


def write_weights(file: Path, **tensors: np.ndarray) -> None:
    save_file(tensors, file)


def write_text(folder: Path, kilobytes: int = 400) -> None:
    for domain in ("wiki", "code"):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": "word " * 200})
        (folder / domain / "a.jsonl").write_text(f"{line}\n" * kilobytes)


def write_recipe(folder: Path) -> str:
    write_model(folder / "model")
    write_text(folder / "text")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return str(path)


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(folder), list(overrides))
