"""A byte-level BPE tokenizer learned from samples of all domains, for a source model trained from nothing."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shearing.data.config import CorpusConfig, TrainedTokenizerConfig
from shearing.data.documents import Document, read_piece, sections, split_of
from shearing.data.installed_text import with_installed_text
from shearing.data.raw_files import Piece, RawFile, cut_file, list_domains
from shearing.data.tokenizing import TOKENIZER_FILE
from shearing.storage import Store, open_store

Item = TypeVar("Item")

END_OF_TEXT = "<|endoftext|>"
TOKENIZERS_FOLDER = "tokenizers"
_PLACES = 32  # a domain is sampled at so many places, spread over its files and inside them
_PLACE_BYTES = 2**18


def ensure_trained_tokenizer(config: CorpusConfig, settings: TrainedTokenizerConfig) -> str:
    """The Hugging Face directory of the tokenizer learned from this corpus, learned now if it was not before.

    It lies in `<corpus.path>/tokenizers/<name>`; the name follows from the raw files and the settings.

    Raises:
        UserError: The raw text cannot be found or read.
    """
    config = with_installed_text(config)
    files = list_domains(config)
    inputs = {
        "files": {
            domain: [(file.path, file.file_bytes, file.version) for file in listed] for domain, listed in files.items()
        },
        "text_field": config.text_field,
        "split": config.split.model_dump(),
        "section_characters": config.section_characters,
        "settings": settings.model_dump(),
    }
    name = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    folder = open_store(config.path).child(TOKENIZERS_FOLDER).child(name)
    if not folder.exists(TOKENIZER_FILE):
        texts = (
            text for listed in files.values() for text in sample_texts(listed, config, settings.sample_bytes_per_domain)
        )
        save_tokenizer(train_tokenizer(texts, settings.vocab_size), folder)
    return folder.uri


def sample_texts(files: list[RawFile], config: CorpusConfig, sample_bytes: int) -> Iterator[str]:
    """About `sample_bytes` of UTF-8 text of one domain from many places, of the `train` split only."""
    chosen = _spread(files, _PLACES)
    places_a_file = max(1, _PLACES // len(chosen))
    pieces = [
        piece
        for file in chosen
        for piece in _spread(cut_file(file, max(_PLACE_BYTES, file.file_bytes // 1024)), places_a_file)
    ]
    taken_bytes = 0
    for number, piece in enumerate(pieces):
        # What one place could not give, the next ones make up for.
        allowance_bytes = (sample_bytes - taken_bytes) // (len(pieces) - number)
        for text in _train_texts(piece, config):
            if allowance_bytes <= 0:
                break
            size_bytes = len(text.encode())
            taken_bytes += size_bytes
            allowance_bytes -= size_bytes
            yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with `<|endoftext|>` as id 0; any text survives encoding and decoding unchanged.

    The vocabulary has at most `vocab_size` tokens: fewer where the texts hold fewer pairs that occur twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Store) -> None:
    """Writes a tokenizer as a Hugging Face directory that stock `AutoTokenizer` loads."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2**31 - 1,
    }
    specials = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    folder.write_json("special_tokens_map.json", specials)
    folder.write_json("tokenizer_config.json", settings)
    folder.write_bytes(TOKENIZER_FILE, tokenizer.to_str(pretty=True).encode())  # last: its presence means complete


def _train_texts(piece: Piece, config: CorpusConfig) -> Iterator[str]:
    for item in read_piece(piece, config.text_field):
        if isinstance(item, Document):
            for text in sections(item.text, config.section_characters):
                if text and split_of(text.encode(), config.split) == "train":
                    yield text


def _spread(items: list[Item], wanted: int) -> list[Item]:
    """At most `wanted` of the items, evenly spread."""
    count = min(wanted, len(items))
    return [items[index * len(items) // count] for index in range(count)]
