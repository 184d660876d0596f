"""A corpus from raw text: what there is to do, and the manifest once every unit of it is done."""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shearing.data.config import CorpusConfig
from shearing.data.installed_text import with_installed_text
from shearing.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    MalformedLine,
    Manifest,
    SourceFile,
    Split,
    SplitEntry,
    TokenizerEntry,
    load_manifest,
)
from shearing.data.packing import Packer
from shearing.data.raw_files import RawFile, ReadUnit, list_domains, plan_units
from shearing.data.tokenizing import copy_tokenizer, load_tokenizer
from shearing.data.unit_work import (
    MARKS_FOLDER,
    ShardWriter,
    UnitMark,
    decode_remainder,
    mark_name,
    prepare_unit,
    token_dtype,
)
from shearing.errors import UserError
from shearing.storage import Store, open_store

FORMAT_VERSION = 1  # raised whenever the same input would make another corpus
_PROBLEMS_KEPT = 100
_PROBLEMS_SHOWN = 5
_READ_THREADS = 16


@dataclass(frozen=True)
class Preparation:
    """A corpus on its way. `pending` units are to be done, largest first; `manifest` is there once all is done."""

    config: CorpusConfig
    corpus: Store
    fingerprint: str
    tokenizer: TokenizerEntry
    files: dict[str, list[RawFile]]
    pending: list[ReadUnit]
    done: list[UnitMark]
    manifest: Manifest | None


def plan_preparation(config: CorpusConfig, tokenizer_dir: str) -> Preparation:
    """Finds the raw files, names the corpus and tells what of it is not there yet; copies the tokenizer into it.

    The text of `installed:` domains is written first. A corpus lies in `<corpus.path>/<12 digits of fingerprint>`.

    Raises:
        UserError: Text or tokenizer that cannot be found or used; a finished corpus with too many malformed lines.
    """
    config = with_installed_text(config)
    files = list_domains(config)
    tokenizer = load_tokenizer(tokenizer_dir, config.boundary_token).entry
    fingerprint = corpus_fingerprint(config, tokenizer, files)
    corpus = open_store(config.path).child(fingerprint[:12])
    if corpus.exists(MANIFEST_NAME):
        manifest = load_manifest(corpus)
        _check_malformed(manifest.malformed_lines, manifest.lines, manifest.malformed, config.malformed_limit)
        return Preparation(config, corpus, fingerprint, tokenizer, files, [], [], manifest)
    copy_tokenizer(tokenizer_dir, corpus)
    units = plan_units(files, config.read_unit_bytes)
    done = _read_marks(corpus, units)
    finished = {(mark.domain, mark.index) for mark in done}
    pending = [unit for unit in units if (unit.domain, unit.index) not in finished]
    pending.sort(key=lambda unit: unit.text_bytes, reverse=True)
    return Preparation(config, corpus, fingerprint, tokenizer, files, pending, done, None)


def prepare_in_process(config: CorpusConfig, tokenizer_dir: str) -> tuple[Store, Manifest]:
    """The prepared corpus, made now unless it is there already, one unit after another: what any engine has to equal.

    Raises:
        UserError: As `plan_preparation` and `finish_preparation`.
    """
    preparation = plan_preparation(config, tokenizer_dir)
    if preparation.manifest is not None:
        return preparation.corpus, preparation.manifest
    tokenizer = load_tokenizer(tokenizer_dir, config.boundary_token)
    marks = [prepare_unit(unit, preparation.config, tokenizer, preparation.corpus) for unit in preparation.pending]
    return preparation.corpus, finish_preparation(preparation, [*preparation.done, *marks])


def corpus_fingerprint(config: CorpusConfig, tokenizer: TokenizerEntry, files: dict[str, list[RawFile]]) -> str:
    """SHA-256 over all that shapes the corpus: settings, tokenizer, raw files. Proportions and limits are not in it."""
    shaping = config.model_dump(mode="json", exclude={"path", "root", "domains", "malformed_limit"})
    listed = {
        domain: [[file.path, file.file_bytes, file.version] for file in domain_files]
        for domain, domain_files in files.items()
    }
    inputs = {"format": FORMAT_VERSION, "settings": shaping, "tokenizer": tokenizer.model_dump(), "files": listed}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def check_early(marks: list[UnitMark], malformed_limit: float) -> None:
    """Stops a preparation that goes wrong from the start: a field that is not there, files of another kind.

    Raises:
        UserError: More than half of a thousand lines are malformed, and the limit is not even higher.
    """
    lines = sum(piece.lines for mark in marks for piece in mark.pieces)
    malformed = sum(piece.malformed for mark in marks for piece in mark.pieces)
    if lines >= 1000 and malformed > lines // 2:
        _check_malformed(malformed, lines, _malformed_lines(marks), malformed_limit)


def finish_preparation(preparation: Preparation, marks: list[UnitMark]) -> Manifest:
    """Joins what the units left over, writes the manifest, and removes the marks.

    Args:
        preparation: The plan.
        marks: One of every unit of the plan, in any order.

    Raises:
        UserError: Too many malformed lines, or a split of a domain without a single sequence.
    """
    config, corpus = preparation.config, preparation.corpus
    marks = sorted(marks, key=lambda mark: (mark.domain, mark.index))
    lines = sum(piece.lines for mark in marks for piece in mark.pieces)
    malformed_lines = sum(piece.malformed for mark in marks for piece in mark.pieces)
    malformed = _malformed_lines(marks)
    _check_malformed(malformed_lines, lines, malformed, config.malformed_limit)
    domains = {
        domain: _domain_entry(preparation, domain, [mark for mark in marks if mark.domain == domain])
        for domain in config.domains
    }
    _check_sequences(domains, config)
    manifest = Manifest(
        fingerprint=preparation.fingerprint,
        sequence_tokens=config.sequence_tokens,
        token_dtype=token_dtype(preparation.tokenizer.vocab_size),
        tokenizer=preparation.tokenizer,
        domains=domains,
        sources=_sources(preparation, marks),
        malformed=malformed,
        malformed_lines=malformed_lines,
        lines=lines,
    )
    corpus.write_json(MANIFEST_NAME, manifest.model_dump(mode="json"))
    corpus.delete(MARKS_FOLDER)
    return manifest


def _read_marks(corpus: Store, units: list[ReadUnit]) -> list[UnitMark]:
    there = {domain: set(corpus.list(f"{MARKS_FOLDER}/{domain}")) for domain in {unit.domain for unit in units}}
    names = [mark_name(unit.domain, unit.index) for unit in units]
    names = [name for name in names if name.rsplit("/", 1)[1] in there[name.split("/")[1]]]
    with ThreadPoolExecutor(_READ_THREADS) as pool:  # a remote store answers slowly, but many at once
        return list(pool.map(lambda name: UnitMark.model_validate(corpus.read_json(name)), names))


def _domain_entry(preparation: Preparation, domain: str, marks: list[UnitMark]) -> dict[Split, SplitEntry]:
    return {split: _split_entry(preparation, domain, split, marks) for split in SPLITS}


def _split_entry(preparation: Preparation, domain: str, split: Split, marks: list[UnitMark]) -> SplitEntry:
    config, tokenizer = preparation.config, preparation.tokenizer
    dtype = token_dtype(tokenizer.vocab_size)
    packer = Packer(config.sequence_tokens, dtype, tokenizer.boundary_token_id, boundary_first=False)
    writer = ShardWriter(preparation.corpus, domain, split, len(marks), config)
    parts = [mark.splits[split] for mark in marks]
    for part in parts:
        writer.add(packer.add_tokens(decode_remainder(part.remainder, dtype)))
    shards = [shard for part in parts for shard in part.shards] + writer.finish()
    sequences = sum(shard.sequences for shard in shards)
    return SplitEntry(
        sequences=sequences,
        tokens=sequences * config.sequence_tokens,
        dropped_tokens=len(packer.remainder),
        documents=sum(part.documents for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        shards=shards,
    )


def _sources(preparation: Preparation, marks: list[UnitMark]) -> list[SourceFile]:
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for mark in marks:
        for piece in mark.pieces:
            documents, malformed = counts.get((mark.domain, piece.name), (0, 0))
            counts[mark.domain, piece.name] = (documents + piece.documents, malformed + piece.malformed)
    sources = []
    for domain, files in preparation.files.items():
        for file in files:
            documents, malformed = counts.get((domain, file.name), (0, 0))
            sources.append(
                SourceFile(
                    path=file.name,
                    domain=domain,
                    file_bytes=file.file_bytes,
                    documents=documents,
                    malformed=malformed,
                )
            )
    return sources


def _malformed_lines(marks: list[UnitMark]) -> list[MalformedLine]:
    """The first malformed lines; their numbers count from 1 in the file."""
    found: list[MalformedLine] = []
    lines_before: dict[tuple[str, str], int] = {}
    units_before: Counter[str] = Counter()
    for mark in sorted(marks, key=lambda mark: (mark.domain, mark.index)):
        if units_before[mark.domain] != mark.index:
            continue  # the units before are not all done, so nobody knows the number of a line in the file
        units_before[mark.domain] += 1
        for piece in mark.pieces:
            before = lines_before.get((mark.domain, piece.name), 0)
            found.extend(
                MalformedLine(path=piece.name, line=before + line + 1, problem=problem)
                for line, problem in piece.problems
            )
            lines_before[mark.domain, piece.name] = before + piece.lines
    return found[:_PROBLEMS_KEPT]


def _check_malformed(malformed: int, lines: int, examples: list[MalformedLine], limit: float) -> None:
    if malformed <= limit * lines:
        return
    shown = "; ".join(f"{line.path}:{line.line}: {line.problem}" for line in examples[:_PROBLEMS_SHOWN])
    raise UserError(
        f"{malformed:,} of {lines:,} lines are malformed ({malformed / lines:.3%}); allowed: {limit:.3%}. "
        f"The first: {shown or 'not known yet'}. Correct them, set corpus.text_field, or raise corpus.malformed_limit."
    )


def _check_sequences(domains: dict[str, dict[Split, SplitEntry]], config: CorpusConfig) -> None:
    problems = []
    for domain, splits in domains.items():
        for split, entry in splits.items():
            if entry.sequences:
                continue
            wanted = "" if split == "train" else f"raise corpus.split.{split} (now {getattr(config.split, split)}), "
            section = config.section_characters
            cut = f"lower it from {section}" if section else "for a few long documents, such as 20000"
            problems.append(
                f"corpus.domains.{domain}: split {split} has no sequence: {entry.documents:,} documents with "
                f"{entry.dropped_tokens:,} tokens, and one sequence takes {config.sequence_tokens:,}. Give more text, "
                f"{wanted}set corpus.section_characters ({cut}), or lower corpus.sequence_tokens."
            )
    if problems:
        raise UserError(problems)
