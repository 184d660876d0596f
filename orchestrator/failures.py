"""What an error that came back from Ray stands for."""

from shearing.patience import StorageError

INNER = ("cause", "controller_failure", "health_check_failure", "_base_exc", "__cause__")
"""Where errors of Ray, Ray Train and Python keep the one that they are about."""


def storage_failure(error: BaseException) -> StorageError | None:
    """The failure of a storage that an error, or one that it is about, comes from; None where it is another's."""
    found: list[BaseException] = [error]
    for each in found:  # which grows
        if type(each) is StorageError:  # Ray's own copies of a type say where, at length, in place of what
            return each
        inner = [getattr(each, name, None) for name in INNER] + list(getattr(each, "worker_failures", {}).values())
        found += [one for one in inner if isinstance(one, BaseException) and all(one is not other for other in found)]
    return None
