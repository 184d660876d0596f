import pickle

import pytest
import ray
import ray.train
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from orchestrator.failures import storage_failure
from shearing.patience import StorageError

AWAY = StorageError("writing s3://bucket/run/x failed 9 times in 60 s: it is away")


def of_a_task():
    return ray.exceptions.RayTaskError("task", "Traceback ...", AWAY).as_instanceof_cause()


def of_a_worker():
    return ray.train.WorkerGroupError("rank 1", {1: UserExceptionWithTraceback(of_a_task(), "Traceback ...")})


def of_the_controller():
    return ray.train.ControllerError(AWAY)


def of_a_stage():
    try:
        raise RuntimeError("a stage failed") from AWAY
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("made", [lambda: AWAY, of_a_task, of_a_worker, of_the_controller, of_a_stage])
def test_a_storage_that_failed_is_found_in_whatever_came_of_it(made):
    """Catches a screen of Ray's own tracebacks where one sentence would do."""
    assert str(storage_failure(made())) == str(AWAY)
    assert type(storage_failure(made())) is StorageError


def test_other_failures_keep_their_traceback():
    # catches a bug that is told as a failure of the storage
    assert storage_failure(RuntimeError("a bug")) is None
    assert storage_failure(OSError("a full disk")) is None


def test_it_comes_back_from_ray_as_it_was():
    # catches an error that loses its words on the way between processes
    assert str(pickle.loads(pickle.dumps(AWAY))) == str(AWAY)
