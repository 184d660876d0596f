"""Preparing a corpus on all cores of all nodes: Ray Data runs the units that shearing.data describes."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray.data import DataContext

from shearing.data.config import CorpusConfig
from shearing.data.manifest import Manifest, TokenizerEntry
from shearing.data.preparation import Preparation, check_early, finish_preparation, plan_preparation
from shearing.data.raw_files import ReadUnit
from shearing.data.tokenizing import load_corpus_tokenizer
from shearing.data.unit_work import UnitMark, prepare_unit
from shearing.errors import UserError
from shearing.patience import StorageError
from shearing.storage import Store, open_store

_REPORT_EVERY_S = 5.0
_EARLY_UNITS = 64
# Below this a task takes less time than Ray needs to start it on a fresh worker: one task a core, several units each.
_SMALL_BYTES_PER_CPU = 32 * 2**20


def prepare_corpus(config: CorpusConfig, tokenizer_dir: str, progress: Callable[[str], None]) -> tuple[Store, Manifest]:
    """The prepared corpus of this configuration and tokenizer; made now unless it is there already.

    Ray has to be running. Units that an earlier, interrupted preparation finished are not done again.

    Args:
        config: Raw text and how it is cut.
        tokenizer_dir: Hugging Face directory (path or URI) of the tokenizer.
        progress: Is given a line now and then: documents, tokens, tokens a second, time left.

    Raises:
        UserError: Text or tokenizer cannot be found or used, too many malformed lines, a split without a sequence.
    """
    preparation = plan_preparation(config, tokenizer_dir)
    if preparation.manifest is not None:
        progress(f"prepared before: {preparation.corpus.uri}")
        return preparation.corpus, preparation.manifest
    marks = list(preparation.done)
    meter = _ProgressMeter(preparation, progress)
    if preparation.pending:
        with _quiet_data():
            for mark in _run_units(preparation):
                marks.append(mark)
                if len(marks) <= _EARLY_UNITS:
                    check_early(marks, config.malformed_limit)
                meter.add(mark)
    return preparation.corpus, finish_preparation(preparation, marks)


def _run_units(preparation: Preparation) -> Iterator[UnitMark]:
    """Marks of the pending units in the order in which they end."""
    pending = preparation.pending
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    small = sum(unit.text_bytes for unit in pending) < _SMALL_BYTES_PER_CPU * cpus
    blocks = min(len(pending), cpus) if small else len(pending)
    # Blocks are contiguous, so units are dealt out like cards: no block gets all the large ones.
    dealt = [unit for first in range(blocks) for unit in pending[first::blocks]]
    work = {
        "config": preparation.config.model_dump_json(),
        "corpus": preparation.corpus.uri,
        "tokenizer": preparation.tokenizer.model_dump_json(),
    }
    dataset = ray.data.from_items([{"unit": unit.model_dump_json()} for unit in dealt], override_num_blocks=blocks).map(
        partial(_prepare, work=work), num_cpus=1
    )
    for row in dataset.iter_rows():
        if row["problem"]:
            raise UserError(row["problem"])
        if row["failure"]:
            raise StorageError(row["failure"])
        yield UnitMark.model_validate_json(row["mark"])


def _prepare(row: dict[str, Any], work: dict[str, str]) -> dict[str, str]:
    # One task has one core: threads of the tokenizer would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config = CorpusConfig.model_validate_json(work["config"])
    corpus = open_store(work["corpus"])
    entry = TokenizerEntry.model_validate_json(work["tokenizer"])
    tokenizer = load_corpus_tokenizer(work["corpus"], entry, config.boundary_token)
    try:
        mark = prepare_unit(ReadUnit.model_validate_json(row["unit"]), config, tokenizer, corpus)
    except UserError as error:  # raised here, it would reach the driver wrapped in a trace of Ray's own
        return {"mark": "", "problem": str(error), "failure": ""}
    except StorageError as error:
        return {"mark": "", "problem": "", "failure": str(error)}
    return {"mark": mark.model_dump_json(), "problem": "", "failure": ""}


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without its bars and without its time limit: one large compressed file may take an hour."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it announces every dataset, and that its bars are off
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


class _ProgressMeter:
    """Turns finished units into lines for a person, one every few seconds."""

    def __init__(self, preparation: Preparation, report: Callable[[str], None]) -> None:
        self._report = report
        self._sizes = {(unit.domain, unit.index): unit.text_bytes for unit in preparation.pending}
        self._total_bytes = sum(self._sizes.values())
        self._done_bytes = self._documents = self._tokens = self._units = 0
        self._started = self._reported = time.monotonic()
        if preparation.done:
            report(f"{len(preparation.done):,} of {len(preparation.done) + len(self._sizes):,} units were done before")

    def add(self, mark: UnitMark) -> None:
        self._done_bytes += self._sizes[mark.domain, mark.index]
        self._documents += mark.documents
        self._tokens += mark.tokens
        self._units += 1
        now = time.monotonic()
        if now - self._reported >= _REPORT_EVERY_S or self._units == len(self._sizes):
            self._reported = now
            self._report(self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        share = self._done_bytes / max(self._total_bytes, 1)
        left_s = seconds / share * (1 - share) if share else 0.0
        tokens_per_s = self._tokens / max(seconds, 1e-9)
        return (
            f"text {self._done_bytes / 1e6:,.1f} of {self._total_bytes / 1e6:,.1f} MB ({share:.0%}), "
            f"{self._documents:,} documents, {self._tokens:,} tokens, {tokens_per_s:,.0f} tokens/s, "
            f"{left_s:,.0f} s left"
        )
