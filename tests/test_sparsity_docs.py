"""What docs/sparsity.md says about zeros in place is so."""

import json
import re
from pathlib import Path
from typing import get_args

import torch
from tiny_models import GROUPED, TOKENS, tiny_model

from shearing.models.loading import model_tensors, write_model_directory
from shearing.pruning.sparsity.config import SparsityConfig, SparsityMethod
from shearing.pruning.sparsity.semi_structured import CAPABILITY, fits_kernel
from shearing.pruning.sparsity.sparsegpt import BLOCK_COLUMNS, DAMPING

PAGE = (Path(__file__).parents[1] / "docs" / "sparsity.md").read_text(encoding="utf-8")


def test_methods_keys_and_constants_are_the_codes_own():
    """A method that is announced and missing; a key that was renamed; a constant that was changed."""
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(get_args(SparsityMethod))
    keys = set(re.findall(r"`sparsifying\.(\w+)", PAGE))
    assert {"method", "pattern", "fraction", "calibration"} == keys <= set(SparsityConfig.model_fields)
    assert SparsityConfig().pattern == "2:4"
    assert SparsityConfig(pattern="unstructured").dropped == 0.5
    assert f"blocks\nof {BLOCK_COLUMNS}" in PAGE
    assert DAMPING == 0.01
    assert f"compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer" in PAGE
    assert fits_kernel(torch.zeros(32, 64))


def test_the_lines_shown_run(tmp_path, monkeypatch):
    """An example that everybody copies first, with a name that was changed."""
    model = tiny_model("llama", GROUPED)
    write_model_directory(tmp_path / "model", model.config.to_dict(), model_tensors(model))
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"source": str(tmp_path / "model"), "tokens_NT": TOKENS}
    exec(compile(code, "docs/sparsity.md", "exec"), names)
    record = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert record == names["record"]
    entry = record["linears"]["model.layers.0.mlp.up_proj"]
    for key in entry:
        assert f"`{key}`" in PAGE
    assert entry["fraction"] >= 0.5
    assert not (tmp_path / "sparse.layers").exists()
