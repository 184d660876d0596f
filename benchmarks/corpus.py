"""Tokens a second of corpus preparation against the tokenizer alone, on the same text and cores, in one run.

    python benchmarks/corpus.py [--megabytes 3] [--vocabulary 8192] [--rounds 3]

Preparation reads and checks lines, hashes, encodes, packs, shuffles, compresses and writes. The tokenizer alone
(`tokenizers`' own `encode_batch`, and `encode_batch_fast`, which leaves offsets out and is what preparation uses)
has its texts in memory and throws the tokens away.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray
from tokenizers import Tokenizer

from actors.corpus import prepare_corpus
from shearing.data.config import CorpusConfig, DomainConfig, SplitConfig, TrainedTokenizerConfig
from shearing.data.installed_text import INSTALLED_DOMAINS, write_installed_text
from shearing.data.manifest import Manifest
from shearing.data.preparation import prepare_in_process
from shearing.data.tokenizer_training import ensure_trained_tokenizer

BATCH_TEXTS = 256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Corpus preparation against the tokenizer alone.")
    parser.add_argument("--megabytes", type=float, default=3, help="text of each of the seven installed domains")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def configure(folder: Path, path: str) -> CorpusConfig:
    share = 1 / len(INSTALLED_DOMAINS)
    domains = {name: DomainConfig(text=str(folder / "text" / name), proportion=share) for name in INSTALLED_DOMAINS}
    return CorpusConfig(
        path=str(folder / path),
        domains=domains,
        sequence_tokens=1024,
        section_characters=8000,
        split=SplitConfig(eval=0.2, prune=0.2),  # so that a small amount of text also fills every split
    )


def encode_alone(texts: list[str], tokenizer_dir: str, parallel: bool, fast: bool) -> float:
    """Tokens a second of the tokenizer with nothing around it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if parallel else "false"
    backend = Tokenizer.from_file(f"{tokenizer_dir}/tokenizer.json")
    encode = backend.encode_batch_fast if fast else backend.encode_batch
    tokens, started = 0, time.perf_counter()
    for first in range(0, len(texts), BATCH_TEXTS):
        tokens += sum(
            len(encoding) for encoding in encode(texts[first : first + BATCH_TEXTS], add_special_tokens=False)
        )
    return tokens / (time.perf_counter() - started)


def prepare_alone(config: CorpusConfig, tokenizer_dir: str) -> float:
    """Tokens a second of preparation in this process, on one core, without Ray."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.perf_counter()
    _, manifest = prepare_in_process(config, tokenizer_dir)
    return tokens_of(manifest) / (time.perf_counter() - started)


def prepare_with_ray(config: CorpusConfig, tokenizer_dir: str) -> float:
    """Tokens a second of preparation by Ray Data on all cores, from the call to the finished manifest."""
    started = time.perf_counter()
    _, manifest = prepare_corpus(config, tokenizer_dir, lambda _: None)
    return tokens_of(manifest) / (time.perf_counter() - started)


def tokens_of(manifest: Manifest) -> int:
    """All tokens that a preparation made, those of no whole sequence too."""
    entries = [entry for splits in manifest.domains.values() for entry in splits.values()]
    return sum(entry.tokens + entry.dropped_tokens for entry in entries)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    sizes = write_installed_text(str(folder / "text"), int(options.megabytes * 1e6))
    print(f"{sum(sizes.values()) / 1e6:.1f} MB of text, {os.cpu_count()} cores, vocabulary {options.vocabulary:,}")
    texts = [
        json.loads(line)["text"]
        for name in INSTALLED_DOMAINS
        for line in (folder / "text" / name / f"{name}-00.jsonl").read_text().splitlines()
    ]
    trained = TrainedTokenizerConfig(vocab_size=options.vocabulary)
    tokenizer_dir = ensure_trained_tokenizer(configure(folder, "tokenizer"), trained)
    cold = prepare_with_ray(configure(folder, "cold"), tokenizer_dir)
    rates: dict[str, list[float]] = {"preparation by Ray Data, first call": [cold]}
    contestants: dict[str, Callable[[int], float]] = {
        "encode_batch, all cores": lambda _: encode_alone(texts, tokenizer_dir, parallel=True, fast=False),
        "encode_batch_fast, all cores": lambda _: encode_alone(texts, tokenizer_dir, parallel=True, fast=True),
        "preparation by Ray Data": lambda n: prepare_with_ray(configure(folder, f"ray-{n}"), tokenizer_dir),
        "encode_batch_fast, one core": lambda _: encode_alone(texts, tokenizer_dir, parallel=False, fast=True),
        "encode_batch, one core": lambda _: encode_alone(texts, tokenizer_dir, parallel=False, fast=False),
        "preparation, one core, no Ray": lambda n: prepare_alone(configure(folder, f"alone-{n}"), tokenizer_dir),
    }
    for number in range(options.rounds):  # in turn, so that what else runs on the machine meets all alike
        for name, contestant in contestants.items():
            rates.setdefault(name, []).append(contestant(number))
    return rates


def table(rates: dict[str, list[float]]) -> str:
    lines = [f"{'':38}{'tokens/s':>12}{'lowest':>12}{'highest':>12}{'/ encode_batch':>16}{'/ encode_batch_fast':>21}"]
    for name, values in rates.items():
        middle = statistics.median(values)
        cores = "one core" if "one core" in name else "all cores"
        ratios = [
            middle / statistics.median(rates[f"{kind}, {cores}"]) for kind in ("encode_batch", "encode_batch_fast")
        ]
        lines.append(
            f"{name:38}{middle:12,.0f}{min(values):12,.0f}{max(values):12,.0f}{ratios[0]:16.2f}{ratios[1]:21.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    options = parse()
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(table(measure(Path(folder), options)))
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
