"""One rotation for all signals: no matrix turns the residual stream, and the result is a plain model of the family.

Shape suffixes: D hidden, K dimensions kept.
"""

from torch import Tensor

from shearing.pruning.slicing.job import SlicingJob
from shearing.pruning.slicing.plan import shared_size
from shearing.pruning.slicing.rotation import shared_rotation
from shearing.pruning.slicing.weights import Tensors


def slice_all_signals(job: SlicingJob) -> Tensors:
    """Walks all layers of the whole model, then slices it by one rotation; the result's tensors."""
    total_DD, slicing = _summed(job), job.slicing
    size = shared_size(job.model.config, slicing)
    found = shared_rotation(job.model.family, total_DD, size, slicing.orientation, slicing.seed)
    if len(job.work.finished) == job.model.num_layers + 1:
        job.work.save({"rotation": found.basis_DK}, {"all": found.kept_variance})
    return _plain(job, found.basis_DK)


def _summed(job: SlicingJob) -> Tensor:
    """The sum of all signals' covariances, each divided by its own sum of squares.

    A norm reads a signal whatever its size, so what is lost counts by its share of the signal. In a plain sum the large
    signals, which are the late ones, would take all directions for themselves.
    """
    work, layers = job.work, job.model.num_layers
    if len(work.finished) <= layers:
        job.shares.map("embed")
    if not work.finished:
        work.save({"covariance": _relative(job)}, {})
    total_DD = work.load(min(len(work.finished) - 1, layers))["covariance"]
    if len(work.finished) > layers:
        return total_DD
    for index in range(layers):
        measured = index + 1 < len(work.finished)
        for half in job.halves:
            job.shares.map("follow", index, half, None)
            if not measured:
                total_DD = total_DD + _relative(job)
        if not measured:
            work.save({"covariance": total_DD}, {})
            work.forget(index)
            job.tell(index, {})
    return total_DD


def _relative(job: SlicingJob) -> Tensor:
    covariance_DD = job.covariance()
    return covariance_DD / covariance_DD.trace()


def _plain(job: SlicingJob, basis_DK: Tensor) -> Tensors:
    """Weights of a plain model.

    A plain norm divides by the number K of dimensions that it has, a bare one by D. Of a stream multiplied by
    c = root(K / D), a plain norm with the model's own epsilon makes what the bare one makes, over c. Writers put c in,
    readers take it out, and norms are left with weights of 1.
    """
    family, weights, (size_D, size) = job.model.family, job.weights, basis_DK.shape
    scale = (size / size_D) ** 0.5
    read = dict.fromkeys(("attention", "mlp"), basis_DK / scale)
    written = dict.fromkeys(("attention", "mlp"), basis_DK * scale)
    # an embedding that the model multiplies by the root of its hidden size is c times smaller of itself
    yield from weights.tables(basis_DK if family.scaled_embedding else basis_DK * scale)
    for index in range(job.model.num_layers):
        for name, tensor in weights.layer(index, read, written):
            yield family.layer_module(index, name), tensor
        for norm in family.pre_norms:
            yield from weights.plain_norm(family.layer_module(index, norm), size)
    yield from weights.plain_norm(family.final_norm, size)
    yield from weights.head(basis_DK / scale)
