"""Folders that a recipe or a command line names: opened, or refused with words for whoever named them."""

from shearing.errors import UserError
from shearing.storage import Store, open_store


def open_named(key: str, uri: str) -> Store:
    """The folder at a path or URI. Raises UserError where nothing opens it.

    Args:
        key: Of the recipe, or the argument, that names it.
        uri: What it is.
    """
    try:
        return open_store(uri)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{key} = {uri!r} cannot be opened: {error}. Allowed: a folder, or a URI such as s3://bucket/x."
        ) from None


def unreadable(key: str, uri: str, error: OSError) -> str:
    """The problem of a folder that opens and cannot be looked into."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{key} = {uri!r} cannot be read: {reason}. Check the address, the credentials that this process has for it "
        f"and what they allow, and the network; or name another one."
    )
