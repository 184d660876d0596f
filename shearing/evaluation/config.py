"""What is asked about zero-shot tasks and about perplexity on a given text."""

from pydantic import Field

from shearing.config import Config

MOST_DEFAULT_TOKENS = 2048  # the window of the published figures


class TasksConfig(Config):
    """Tasks of the LM evaluation harness."""

    names: list[str] = Field(min_length=1, description="Tasks, groups or tags, as the harness calls them")
    fewshot: int | None = Field(
        None, ge=0, description="Solved examples before each question; default as each task says, 0 where it does not"
    )
    limit: int | None = Field(None, ge=1, description="Questions of each task, its first ones; default all")
    files: str | None = Field(
        None, description="Local folder of task files; paths to data inside them are relative to it"
    )


class TextConfig(Config):
    """Perplexity on one text, read in windows, as papers give it for WikiText-2."""

    file: str = Field(description="Path or URI of the text, UTF-8, tokenised whole as it stands")
    window_tokens: int | None = Field(
        None, ge=2, description="Positions of a window; default all that the model has, 2,048 at most"
    )
    stride_tokens: int | None = Field(
        None, ge=1, description="From the beginning of a window to the next one's; default side by side"
    )
    bos: bool = Field(False, description="Whether the model's begin-of-text token opens each window")

    def sizes(self, positions: int | None) -> tuple[int, int]:
        """Window and stride in tokens for a model of so many positions; None where they are not bounded."""
        window = self.window_tokens or min(positions or MOST_DEFAULT_TOKENS, MOST_DEFAULT_TOKENS)
        return window, self.stride_tokens or window - self.bos

    def size_problems(self, positions: int | None, model: str) -> list[str]:
        """Why these windows cannot be cut for a model; an empty list where they can."""
        window, stride = self.sizes(positions)
        problems, text_tokens = [], window - self.bos
        if positions is not None and window > positions:
            problems.append(f"window = {window} tokens; {model} has {positions} positions. Give {positions} at most.")
        if stride > text_tokens:
            holds = f"a window of {window} holds {text_tokens} tokens of text"
            problems.append(f"stride = {stride} tokens would leave tokens out: {holds}. Give 1 to {text_tokens}.")
        return problems
