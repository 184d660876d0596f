"""One rotation for every signal: found on the network that is sliced up to there (arXiv 2401.15024, section 3.3).

Shape suffixes: D hidden, K dimensions kept.
"""

import torch
from torch import Tensor

from shearing.pruning.slicing.job import SlicingJob
from shearing.pruning.slicing.plan import signal_sizes
from shearing.pruning.slicing.rotation import Rotation, rotation_of
from shearing.pruning.slicing.weights import Tensors

ROTATION = "rotation."  # before a half's name, beside the layer's weights


def slice_every_signal(job: SlicingJob) -> Tensors:
    """Walks all layers; the result's tensors, in the order of the model, once all are finished."""
    work, layers = job.work, job.model.num_layers
    whole = len(work.finished) > layers
    if not whole:
        job.shares.map("embed")
    if not work.finished:
        first = _rotation(job, 0)
        work.save({"rotation": first.basis_DK}, {"first": first.kept_variance})
    first_DK = basis_DK = work.load(0)["rotation"]
    for index in range(layers):
        if index + 1 == len(work.finished):
            basis_DK = _slice_layer(job, index, basis_DK)
            job.tell(index, work.finished[-1])
            continue
        saved = work.load(index + 1)  # finished before this run was killed: lead the shares through it
        for half in job.halves:
            if not whole:
                job.shares.map("follow", index, half, basis_DK)
            basis_DK = saved[f"{ROTATION}{half}"]
    return _assembled(job, first_DK, basis_DK)


def _slice_layer(job: SlicingJob, index: int, basis_DK: Tensor) -> Tensor:
    """Finds the rotations of the signals that a layer makes, and its weights; its last rotation."""
    bases, kept = [basis_DK], {}
    for number, half in enumerate(job.halves, 1 + index * len(job.halves)):
        found = _rotation(job, number, index, half, bases[-1])
        bases.append(found.basis_DK)
        kept[half] = found.kept_variance
    first, after, inside, last = bases[0], bases[1], bases[-2], bases[-1]
    tensors = dict(job.weights.layer(index, {"attention": first, "mlp": inside}, {"attention": after, "mlp": last}))
    names = ("residual",) if len(bases) == 2 else ("attention_residual", "mlp_residual")
    for name, read, written in zip(names, bases[:-1], bases[1:], strict=True):
        tensors |= dict(job.weights.residual(name, read, written))
    tensors |= {f"{ROTATION}{half}": basis for half, basis in zip(job.halves, bases[1:], strict=True)}
    job.work.save(tensors, kept)
    return last


def _rotation(
    job: SlicingJob, number: int, index: int = 0, half: str | None = None, basis_DK: Tensor | None = None
) -> Rotation:
    """The rotation of a signal, by its number, once the shares have come to it by a half of a layer."""
    slicing, sizes = job.slicing, signal_sizes(job.model.config, job.slicing)
    if number == len(sizes) - 1 and not slicing.head:  # of full size, and the head may read it as it is
        return Rotation(torch.eye(sizes[-1], dtype=torch.float64), 1.0)
    if half is not None:
        job.shares.map("follow", index, half, basis_DK)
    return rotation_of(job.covariance(), sizes[number], slicing.orientation, slicing.seed + number)


def _assembled(job: SlicingJob, first_DK: Tensor, last_DK: Tensor) -> Tensors:
    yield from job.weights.tables(first_DK)
    for index in range(job.model.num_layers):
        for name, tensor in job.work.load(index + 1).items():
            if not name.startswith(ROTATION):
                yield job.model.family.layer_module(index, name), tensor
    yield from job.weights.head(last_DK)
