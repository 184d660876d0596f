"""Errors that are the user's to put right, shown without a traceback."""


class UserError(ValueError):
    """Something in a recipe, a file or a folder that the user has to change.

    Args:
        problems: What is wrong, one complete message a problem: what was found, what is allowed
            and what to change. A single message may be given as a plain string.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        return "\n".join(self.problems)

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[str]]]:
        # The default would rebuild the error from the joined text and merge its problems into one.
        return (type(self), (self.problems,))
