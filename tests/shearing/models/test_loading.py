import json

import pytest
import torch
from tiny_models import GROUPED, TOKENS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from shearing.errors import UserError
from shearing.models.family import llama_config, shape_of
from shearing.models.loading import (
    StoredTensors,
    load_model,
    model_tensors,
    new_model,
    read_config,
    read_generation_config,
    write_model_directory,
)
from shearing.models.parameters import count_parameters


class TestDirectory:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("max_shard_bytes", [10**9, 5_000])
    def test_round_trip(self, tied, max_shard_bytes, tmp_path):
        model = tiny_model("llama", GROUPED, tied)
        folder = tmp_path / "model"
        write_model_directory(folder, model.config.to_dict(), model_tensors(model), max_shard_bytes=max_shard_bytes)
        loaded = load_model(folder)
        assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
        stored = StoredTensors(folder)
        assert sum(stored[name].numel() for name in stored) == count_parameters(read_config(folder))
        assert ("lm_head.weight" in stored) != tied
        files = sorted(path.name for path in folder.glob("*.safetensors*"))
        assert (files == ["model.safetensors"]) == (max_shard_bytes == 10**9)

    def test_carries_dtype_tokens_generation_and_tokenizer(self, tmp_path):
        model = tiny_model("qwen2", GROUPED, dtype=torch.bfloat16)
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text("{}")
        (tokenizer / "notes.txt").write_text("not of a tokenizer")
        generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": 2}
        folder = tmp_path / "model"
        write_model_directory(
            folder,
            tiny_config("qwen2", GROUPED) | {"torch_dtype": "float32"},
            model_tensors(model),
            tokenizer_folder=tokenizer,
            generation_config=generation,
        )
        assert read_config(folder)["dtype"] == "bfloat16"
        assert "torch_dtype" not in read_config(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.dtype == torch.bfloat16
        assert loaded.config.eos_token_id == 2
        assert loaded.config.rope_parameters["rope_theta"] == 5000.0
        assert GenerationConfig.from_pretrained(folder).temperature == 0.6
        assert read_generation_config(folder) == generation
        assert (folder / "tokenizer.json").is_file()
        assert not (folder / "notes.txt").exists()

    def test_is_complete_or_absent(self, tmp_path):
        """Catches a half-written directory that a resumed run would take for a finished one."""

        def breaks_off():
            yield "model.norm.weight", torch.ones(3)
            raise OSError("disk full")

        folder = tmp_path / "model"
        with pytest.raises(OSError, match="disk full"):
            write_model_directory(folder, tiny_config("llama", GROUPED), breaks_off())
        assert not folder.exists()
        model = tiny_model("llama", GROUPED)
        for _ in range(2):  # over the remains, and over itself
            write_model_directory(folder, model.config.to_dict(), model_tensors(model))
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_says_what_a_folder_lacks(self, tmp_path):
        with pytest.raises(UserError, match=r"config\.json"):
            read_config(tmp_path)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            StoredTensors(tmp_path)
        assert read_generation_config(tmp_path) is None


class TestNewModel:
    def test_of_a_shape(self):
        shape = GROUPED.model_copy(update={"head_size": 5 * 2})
        config = llama_config(shape, 100, 64, eos_token_id=3)
        model = new_model(config, seed=4)
        assert shape_of(model.config) == shape
        assert model.config.vocab_size == 100
        assert model.config.eos_token_id == 3
        assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config)
        assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert json.loads(json.dumps(config)) == config

    def test_seed_decides_and_global_random_state_stays(self):
        """Catches weights that depend on what ran before, and a resumed run whose dropout or data order moved."""
        config = tiny_config("llama", GROUPED)
        state = torch.get_rng_state()
        first, second, other = (new_model(config, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.lm_head.weight, second.lm_head.weight)
        assert not torch.equal(first.lm_head.weight, other.lm_head.weight)

    def test_only_weights_are_rounded(self, tmp_path):
        """Catches rotary frequencies in bfloat16: positions would differ from those of the same model reloaded."""
        model = new_model(tiny_config("llama", GROUPED), dtype=torch.bfloat16).eval()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
        write_model_directory(tmp_path / "model", model.config.to_dict(), model_tensors(model))
        loaded = load_model(tmp_path / "model", dtype=torch.bfloat16)
        assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
