"""A share of the calibration text on its way through the model, layer after layer, signal after signal.

A plain class that knows nothing of others: the driver sums what the shares return, decides, and tells them to go on.
Shape suffixes: N sequences, B a batch of them, T tokens, D hidden, K dimensions kept.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearing.models.family import SLICED
from shearing.models.layerwise import LayerwiseModel
from shearing.models.sliced_modeling import slice_layer
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.fusion import centred_rows
from shearing.pruning.slicing.plan import sliced_config
from shearing.pruning.slicing.weights import RotatedWeights


class CalibrationShare:
    """Hidden states of some calibration sequences, in the basis of the fused, unrotated model.

    The sliced network is followed in that basis: what slicing a signal loses is taken out of it by projection, and bare
    norms do not see a rotation, so the layers keep their own size and weights. One layer is in memory at a time.

    Args:
        folder: The source model's directory.
        tokens_NT: Token ids.
        attention_mask_NT: 1 for tokens, 0 for padding, which no covariance sees; None without padding.
        batch_sequences: Sequences that run through a layer at once.
        dtype: Of weights and hidden states.
        device: Where they are.
    """

    def __init__(
        self,
        folder: str | Path,
        tokens_NT: Tensor,
        attention_mask_NT: Tensor | None = None,
        *,
        batch_sequences: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self._model, self._dtype = LayerwiseModel(folder, dtype, device), dtype
        self._tokens_NT, self._mask_NT = tokens_NT, attention_mask_NT
        starts = range(0, len(tokens_NT), batch_sequences)
        self._batches = [slice(start, start + batch_sequences) for start in starts]
        self._hidden: list[Tensor] = []
        self._layer: tuple[int, Any] | None = None
        full = sliced_config(self._model.config, SlicingConfig(fraction=0.0))[SLICED]
        self._names, self._sizes, self._size = full["names"], full["layers"], full["size"]

    def digest(self) -> str:
        """A name for the text of this share."""
        mask = b"" if self._mask_NT is None else self._mask_NT.to(torch.uint8).numpy().tobytes()
        return hashlib.sha256(self._tokens_NT.to(torch.int64).numpy().tobytes() + mask).hexdigest()[:16]

    def embed(self) -> None:
        """Go to the first signal: what the first layer reads."""
        embedding, family = self._model.embedding(), self._model.family
        self._hidden = [
            self._without_padding(centred_rows(family, embedding(self._tokens_NT[rows], self._mask_of(rows))), rows)
            for rows in self._batches
        ]

    def covariance(self) -> Tensor:
        """The sum of x x' over all tokens of the present signal, float64 [D, D]."""
        total_DD = torch.zeros(self._size, self._size, dtype=torch.float64, device=self._model.device)
        for hidden_BTD in self._hidden:  # padding is zero
            for x_TD in hidden_BTD.double():
                total_DD.addmm_(x_TD.T, x_TD)
        return total_DD.cpu()

    @torch.no_grad()
    def follow(self, layer: int, half: str, basis_DK: Tensor | None) -> None:
        """Go to the next signal, of a network in which the present one is sliced.

        Args:
            layer: Number of the layer.
            half: What stands between the two signals: its `attention`, its `mlp`, or `both`.
            basis_DK: What is kept of the present signal; None for all of it.
        """
        module = self._fused(layer)
        basis = None if basis_DK is None else basis_DK.to(self._hidden[0])
        for number, rows in enumerate(self._batches):
            hidden = self._hidden[number]
            if basis is not None:
                hidden = hidden @ basis @ basis.T
            options = self._model.layer_options(hidden, self._mask_of(rows))[layer]
            if half != "mlp":
                normed = module.norm("attention", hidden)
                added = module.attend(normed, options)
                if half == "both":
                    added = added + module.feed(normed)
            else:
                added = module.feed(module.norm("mlp", hidden))
            self._hidden[number] = self._without_padding(hidden + added, rows)

    @torch.no_grad()
    def _fused(self, index: int) -> Any:
        """A layer of its own size between bare norms; in memory until the next one is asked for."""
        if self._layer is None or self._layer[0] != index:
            self._layer = None
            model, sizes = self._model, self._sizes[index]
            module = model.blank_layer(index)
            slice_layer(module, self._names, sizes | {"residuals": {}}, self._size)
            weights = RotatedWeights(model.family, model.tensors, self._dtype)
            module.load_state_dict(dict(weights.fused_layer(index)), assign=True)
            self._layer = (index, module.to(model.device).eval())
        return self._layer[1]

    def _mask_of(self, rows: slice) -> Tensor | None:
        return None if self._mask_NT is None else self._mask_NT[rows]

    def _without_padding(self, hidden_BTD: Tensor, rows: slice) -> Tensor:
        mask_BT = self._mask_of(rows)
        if mask_BT is None:
            return hidden_BTD
        return hidden_BTD.masked_fill(mask_BT.to(hidden_BTD.device)[..., None] == 0, 0.0)
