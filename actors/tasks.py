"""What Ray tasks come back with."""

from typing import Any

import ray

from shearing.errors import UserError


def task_result(reference: Any) -> Any:
    """What a task returned; an error of the user's is raised as itself, not as Ray's report of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
