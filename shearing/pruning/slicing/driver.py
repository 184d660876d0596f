"""A model directory sliced, layer by layer, over shares of calibration text wherever they are (arXiv 2401.15024).

In memory here are one layer's weights and a few matrices [D, D]; the text's hidden states are with the shares.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shearing.errors import UserError
from shearing.models.layerwise import LayerwiseModel
from shearing.models.loading import MAX_SHARD_BYTES, read_generation_config, write_model_directory
from shearing.models.parameters import count_parameters
from shearing.pruning.slicing.calibration import CalibrationShare
from shearing.pruning.slicing.config import SlicingConfig
from shearing.pruning.slicing.plan import check_slicing, halves_of, shared_size, signal_sizes, sliced_config
from shearing.pruning.slicing.rotation import Rotation, rotation_of, shared_rotation
from shearing.pruning.slicing.weights import RotatedWeights, Tensors
from shearing.pruning.slicing.work import SlicingWork

ROTATION = "rotation."  # before a half's name, beside the layer's weights


class Shares(Protocol):
    """Shares of the calibration text, here or elsewhere; see `CalibrationShare` for their methods."""

    def map(self, method: str, *args: Any) -> Iterable[Any]:
        """What every share's method returns, in the order of the shares."""


class SharesHere:
    """Shares in this process."""

    def __init__(self, shares: Iterable[CalibrationShare]) -> None:
        self._shares = list(shares)

    def map(self, method: str, *args: Any) -> Iterable[Any]:
        """What every share's method returns, one after another."""
        return [getattr(share, method)(*args) for share in self._shares]


@dataclass(frozen=True)
class LayerReport:
    """A layer that is finished.

    Attributes:
        layer: Its number.
        num_layers: How many there are.
        kept_variance: Share of the sum of squares that slicing leaves of the signals it makes, by the half of the layer
            before each; with a shared rotation, empty: that is known at the end only.
    """

    layer: int
    num_layers: int
    kept_variance: Mapping[str, float]


@dataclass(frozen=True)
class SlicingReport:
    """A finished run.

    Attributes:
        parameters: Of the result, all of them, residual matrices included.
        kept_variance: Of the signals in the order of the model; with a shared rotation, of all of them together.
    """

    parameters: int
    kept_variance: list[float]


def slice_model(
    source: str | Path,
    target: str | Path,
    work: str | Path,
    slicing: SlicingConfig,
    shares: Shares,
    *,
    dtype: torch.dtype | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> SlicingReport:
    """Slices a model directory into another one; called again after it was killed, it goes on at the same layer.

    Args:
        source: A Hugging Face directory of a registered family.
        target: Written when all layers are finished.
        work: Folder of what is finished so far; the caller deletes it.
        slicing: What is asked for.
        shares: The calibration text.
        dtype: Of the result's weights; default the source's.
        on_layer: Called after every layer.
        max_shard_bytes: Size of the result's files.

    Returns:
        Figures. The same shares give the same bits, resumed or not.

    Raises:
        UserError: A model that cannot be sliced so, or a work folder of another run.
    """
    model = LayerwiseModel(source)
    problems = check_slicing(model.config, slicing)
    if problems:
        raise UserError(problems)
    dtype = dtype or model.tensors[f"{model.family.embedding}.weight"].dtype
    settings = {
        "source": _digest(model),
        "slicing": json.loads(slicing.model_dump_json(exclude={"calibration"})),
        "calibration text": list(shares.map("digest")),
        "type": str(dtype),
    }
    run = _Run(model, slicing, shares, SlicingWork(work, settings), dtype, on_layer)
    tensors = run.shared() if slicing.rotation == "shared" else run.per_signal()
    config = sliced_config(model.config, slicing)
    write_model_directory(
        target,
        config,
        tensors,
        tokenizer_folder=source,
        generation_config=read_generation_config(source),
        max_shard_bytes=max_shard_bytes,
    )
    return SlicingReport(count_parameters(config), run.kept_variance)


def _digest(model: LayerwiseModel) -> str:
    """A name for the source: its config, the names of its weights and some of them."""
    family, found = model.family, hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    found.update(json.dumps(sorted(model.tensors)).encode())
    for name in (family.final_norm, family.layer_module(model.num_layers - 1, family.output)):
        found.update(model.tensors[f"{name}.weight"].double().numpy().tobytes())
    return found.hexdigest()[:16]


class _Run:
    def __init__(
        self,
        model: LayerwiseModel,
        slicing: SlicingConfig,
        shares: Shares,
        work: SlicingWork,
        dtype: torch.dtype,
        on_layer: Callable[[LayerReport], None] | None,
    ) -> None:
        self._model, self._slicing, self._shares, self._work = model, slicing, shares, work
        self._weights = RotatedWeights(model.family, model.tensors, dtype)
        self._halves, self._on_layer = halves_of(model.config), on_layer
        self.kept_variance: list[float] = []

    def per_signal(self) -> Tensors:
        """Walk all layers; the result's tensors, in the order of the model."""
        work, layers = self._work, self._model.num_layers
        resumes = len(work.finished) <= layers
        if resumes:
            self._shares.map("embed")
        if not work.finished:
            first = self._rotation(0)
            work.save({"rotation": first.basis_DK}, {"first": first.kept_variance})
        first_DK = basis_DK = work.load(0)["rotation"]
        for index in range(layers):
            if index + 1 < len(work.finished):
                basis_DK = self._pass_finished(index, basis_DK, resumes)
            else:
                basis_DK = self._slice_layer(index, basis_DK)
                self._tell(index, work.finished[-1])
        self.kept_variance = [kept for figures in work.finished for kept in figures.values()]
        return self._assembled(first_DK, basis_DK)

    def _pass_finished(self, index: int, basis_DK: Tensor, resumes: bool) -> Tensor:
        """Leads the shares through a layer by the rotations that were found for it; its last rotation."""
        saved = self._work.load(index + 1)
        for half in self._halves:
            if resumes:
                self._shares.map("follow", index, half, basis_DK)
            basis_DK = saved[f"{ROTATION}{half}"]
        return basis_DK

    def _slice_layer(self, index: int, basis_DK: Tensor) -> Tensor:
        """Finds the rotations of a layer's signals and makes its weights; its last rotation."""
        bases, kept = [basis_DK], {}
        for number, half in enumerate(self._halves, 1 + index * len(self._halves)):
            found = self._rotation(number, index, half, bases[-1])
            bases.append(found.basis_DK)
            kept[half] = found.kept_variance
        first, after, inside, last = bases[0], bases[1], bases[-2], bases[-1]
        tensors = dict(
            self._weights.layer(index, {"attention": first, "mlp": inside}, {"attention": after, "mlp": last})
        )
        names = ("residual",) if len(self._halves) == 1 else ("attention_residual", "mlp_residual")
        for name, read, written in zip(names, bases[:-1], bases[1:], strict=True):
            tensors |= dict(self._weights.residual(name, read, written))
        rotations = {f"{ROTATION}{half}": basis for half, basis in zip(self._halves, bases[1:], strict=True)}
        self._work.save(tensors | rotations, kept)
        return last

    def _rotation(self, number: int, index: int = 0, half: str = "", basis_DK: Tensor | None = None) -> Rotation:
        """The rotation of a signal, by its number, once the shares have come to it by a half of a layer."""
        slicing, sizes = self._slicing, signal_sizes(self._model.config, self._slicing)
        if number == len(sizes) - 1 and not slicing.head:  # the head reads the stream as it is
            return Rotation(torch.eye(sizes[-1], dtype=torch.float64), 1.0)
        if half:
            self._shares.map("follow", index, half, basis_DK)
        return rotation_of(self._covariance(), sizes[number], slicing.orientation, slicing.seed + number)

    def _covariance(self) -> Tensor:
        total_DD, *others = self._shares.map("covariance")
        for share_DD in others:
            total_DD += share_DD
        return total_DD

    def _tell(self, index: int, kept: Mapping[str, float]) -> None:
        if self._on_layer is not None:
            self._on_layer(LayerReport(index, self._model.num_layers, kept))

    def _assembled(self, first_DK: Tensor, last_DK: Tensor) -> Tensors:
        yield from self._weights.tables(first_DK)
        for index in range(self._model.num_layers):
            for name, tensor in self._work.load(index + 1).items():
                if not name.startswith(ROTATION):
                    yield self._model.family.layer_module(index, name), tensor
        yield from self._weights.head(last_DK)

    def shared(self) -> Tensors:
        """Walk all layers of the whole model, then slice it by one rotation; the result's tensors."""
        total_DD, slicing = self._summed(), self._slicing
        size = shared_size(self._model.config, slicing)
        found = shared_rotation(self._model.family, total_DD, size, slicing.orientation, slicing.seed)
        self.kept_variance = [found.kept_variance]
        return self._plain(found.basis_DK)

    def _summed(self) -> Tensor:
        """The sum of all signals' covariances, each divided by its own sum of squares."""
        work, layers = self._work, self._model.num_layers
        if len(work.finished) <= layers:
            self._shares.map("embed")
        if not work.finished:
            work.save({"covariance": self._relative()}, {})
        total_DD = work.load(len(work.finished) - 1)["covariance"]
        for index in range(layers):
            measured = index + 1 < len(work.finished)
            if measured and len(work.finished) > layers:
                continue
            for half in self._halves:
                self._shares.map("follow", index, half, None)
                if not measured:
                    total_DD = total_DD + self._relative()
            if not measured:
                work.save({"covariance": total_DD}, {})
                work.forget(index)
                self._tell(index, {})
        return total_DD

    def _relative(self) -> Tensor:
        covariance_DD = self._covariance()
        return covariance_DD / covariance_DD.trace()

    def _plain(self, basis_DK: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Weights of a plain model.

        A plain norm divides by the number K of dimensions that it has, a bare one by D. Of a stream multiplied by
        c = root(K / D), a plain norm with the model's own epsilon makes what the bare one makes, over c. Writers put c
        in, readers take it out, and norms are left with weights of 1.
        """
        family, weights, size = self._model.family, self._weights, basis_DK.shape[1]
        scale = (size / basis_DK.shape[0]) ** 0.5
        read = dict.fromkeys(("attention", "mlp"), basis_DK / scale)
        written = dict.fromkeys(("attention", "mlp"), basis_DK * scale)
        # an embedding that is scaled by the root of the hidden size is c times smaller of itself
        yield from weights.tables(basis_DK if family.scaled_embedding else basis_DK * scale)
        for index in range(self._model.num_layers):
            for name, tensor in weights.layer(index, read, written):
                yield family.layer_module(index, name), tensor
            for norm in family.pre_norms:
                yield from weights.plain_norm(family.layer_module(index, norm), size)
        yield from weights.plain_norm(family.final_norm, size)
        yield from weights.head(basis_DK / scale)
