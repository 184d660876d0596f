"""Where and how a model is run while it is scored, and its tokenizer."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shearing.errors import UserError
from shearing.models import loading
from shearing.models.directories import local_directory


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a model is run.

    Args:
        batch_sequences: Sequences of one forward pass.
        dtype: Of the weights.
        device: `cpu` or `cuda`.
        threads: Of torch, on CPU.
        trust_remote_code: Whether a model directory may bring its own code.
    """

    batch_sequences: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    trust_remote_code: bool = False

    def load_model(self, model_dir: str) -> nn.Module:
        """The model of a Hugging Face directory (path or URI) on its device, in evaluation mode."""
        folder, dtype = local_directory(model_dir), getattr(torch, self.dtype)
        model: Any = loading.load_model(folder, dtype, self.trust_remote_code)
        return cast(nn.Module, model.to(self.device).eval())

    def load_tokenizer(self, model_dir: str) -> PreTrainedTokenizerBase:
        """The tokenizer beside a model. Raises UserError where there is none."""
        folder = local_directory(model_dir)
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{model_dir} holds no tokenizer that can be loaded ({reason}); copy tokenizer.json and "
                "tokenizer_config.json of the model's tokenizer into it"
            ) from None
