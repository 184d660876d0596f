"""What the driver hears of an error that a task ended with."""

import pytest
import ray

from actors.tasks import task_result
from shearing.errors import UserError


def test_the_users_errors_come_as_themselves_and_bugs_with_where_they_were(ray_session):
    """Catches a ValueError out of torch or numpy in a task, shown without the lines that raised it."""

    @ray.remote(num_cpus=0.1)
    def mended(problems):
        raise UserError(problems)

    @ray.remote(num_cpus=0.1)
    def broken():
        return int("no number")

    with pytest.raises(UserError) as found:
        task_result(mended.remote(["one", "two"]))
    assert found.value.problems == ["one", "two"]
    with pytest.raises(ray.exceptions.RayTaskError) as bug:
        task_result(broken.remote())
    assert 'return int("no number")' in str(bug.value)
