"""Perplexity on one text, read in windows: with window, stride and rule of beginning stated.

Two protocols for the same text and model can differ by more than two methods do, so a figure goes with all of its
protocol. Shapes: N windows, T tokens, V vocabulary.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shearing.errors import UserError
from shearing.evaluation.config import TextConfig
from shearing.evaluation.inference import Inference
from shearing.evaluation.losses import evaluation_mode, loss_sum, perplexity
from shearing.storage import open_store


@dataclass(frozen=True)
class Windows:
    """How a text is cut into what the model sees at once.

    Attributes:
        window_tokens: Positions of a window, the begin-of-text token included.
        stride_tokens: From the beginning of a window to the next one's, in tokens of the text.
        bos_token_id: What opens each window; None where nothing does.
    """

    window_tokens: int
    stride_tokens: int
    bos_token_id: int | None

    @property
    def text_tokens(self) -> int:
        """Tokens of the text in a window."""
        return self.window_tokens - (self.bos_token_id is not None)

    def cut(self, tokens: int) -> Iterator[tuple[int, int, int]]:
        """Each window of a text: begin, end, and the first of its tokens that no window before it has scored."""
        scored = begin = 0
        while scored < tokens:
            end = min(begin + self.text_tokens, tokens)
            yield begin, end, scored
            scored, begin = end, begin + self.stride_tokens


def plan_windows(config: TextConfig, model_dir: str, inference: Inference) -> Windows:
    """The windows that a configuration means for a model.

    Raises:
        UserError: The model has no tokenizer or no begin-of-text token, the window is longer than its positions, the
            stride would leave tokens out, or there is no such text; every problem at once.
    """
    folder, problems = open_store(model_dir), []
    try:
        begin = inference.load_tokenizer(model_dir).bos_token_id
        if config.bos and begin is None:
            problems.append(f"bos: the tokenizer in {model_dir} names no begin-of-text token; score without one")
    except UserError as error:
        begin, problems = None, error.problems
    positions = folder.read_json("config.json").get("max_position_embeddings")
    problems += config.size_problems(positions, model_dir)
    where = open_store(config.file)
    if not where.filesystem.get_file_info(where.path).is_file:
        problems.append(f"{config.file} is no file; name the text to score")
    if problems:
        raise UserError(problems)
    return Windows(*config.sizes(positions), begin if config.bos else None)


def window_losses(
    model: nn.Module, ids_T: Tensor, windows: Windows, batch_sequences: int, device: torch.device | str = "cpu"
) -> tuple[float, int]:
    """Summed next-token loss of a text in nats, and the tokens that it is over.

    Every token is predicted once, in the first window that holds it, from all before it in that window. A token with
    nothing before it there is not predicted: without a begin-of-text token, the text's first, and where windows lie
    side by side the first of each.

    Args:
        model: Goes to evaluation mode meanwhile.
        ids_T: The text's token ids, two at least.
        windows: How it is cut.
        batch_sequences: Windows of one forward pass.
        device: Where the forward pass runs.
    """
    opening = [] if windows.bos_token_id is None else [windows.bos_token_id]
    *full, last = windows.cut(len(ids_T))  # the last one alone can be shorter
    batches = [full[start : start + batch_sequences] for start in range(0, len(full), batch_sequences)]
    total, count = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for batch in [*batches, [last]]:
            rows = [torch.cat([ids_T.new_tensor(opening), ids_T[begin:end]]) for begin, end, _ in batch]
            ids_NT = torch.stack(rows).to(device)
            logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
            for row, (begin, end, scored) in enumerate(batch):
                first = max(1, scored - begin + len(opening))  # of the window's tokens to be predicted
                total += loss_sum(logits_NTV[row : row + 1, first - 1 :], ids_NT[row : row + 1, first - 1 :])
                count += max(0, len(opening) + end - begin - first)
    return total, count


def score_text(model_dir: str, config: TextConfig, inference: Inference) -> dict[str, Any]:
    """Loss and perplexity of a model on a text, with the whole protocol in words and numbers.

    Raises:
        UserError: As `plan_windows`, or the text is not UTF-8, or too short to predict anything.
    """
    torch.set_num_threads(inference.threads)
    windows = plan_windows(config, model_dir, inference)
    text = read_text(config.file)
    tokenizer = inference.load_tokenizer(model_dir)
    ids_T = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if len(ids_T) < 2:
        raise UserError(f"{config.file} holds {len(ids_T)} tokens: too few to predict one. Give a longer text.")
    model = inference.load_model(model_dir)
    total, count = window_losses(model, ids_T, windows, inference.batch_sequences, inference.device)
    return {
        "loss": total / count,
        "perplexity": perplexity(total / count),
        "protocol": {
            "file": config.file,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text_tokens": len(ids_T),
            "predicted_tokens": count,
            "windows": len(list(windows.cut(len(ids_T)))),
            **asdict(windows),
            **describe(windows),
            "dtype": inference.dtype,
            "device": inference.device,
        },
    }


def describe(windows: Windows) -> dict[str, str]:
    """The protocol in words."""
    overlap = windows.text_tokens - windows.stride_tokens
    side = "side by side" if overlap == 0 else f"each beginning {windows.stride_tokens} tokens after the one before"
    if windows.bos_token_id is not None:
        begin = f"token {windows.bos_token_id} (begin of text) opens each window, so that every token is predicted"
    elif overlap:
        begin = "nothing is put before a window; the text's first token is read and not predicted"
    else:
        begin = "nothing is put before a window; the first token of each is read and not predicted"
    return {
        "window_rule": f"the text is tokenised whole and cut into windows of {windows.window_tokens} positions, "
        f"{side}; a token is predicted once, in the first window that holds it; the last window may be shorter",
        "bos_rule": begin,
        "perplexity": "exp(mean next-token loss in nats) over all predicted tokens",
    }


def read_text(file: str) -> str:
    """A text file at a path or URI. Raises UserError where it is not UTF-8."""
    try:
        return open_store(file).read_bytes("").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}); convert it") from None
