"""Tokenizers of Hugging Face directories: loading, fingerprint and batch encoding."""

import functools
import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from shearing.data.manifest import TOKENIZER_FOLDER, TokenizerEntry
from shearing.errors import UserError
from shearing.storage import Store, open_store

TOKENIZER_FILE = "tokenizer.json"
# A longer text is encoded in pieces: one Encoding of a gigabyte of text would take tens of gigabytes.
_ENCODE_CHARACTERS = 2**20
# Of a Hugging Face directory, all that its tokenizer may be read from.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer as a corpus uses it. `boundary_first`: the boundary token opens each document, else it ends it."""

    backend: Tokenizer
    entry: TokenizerEntry
    boundary_first: bool

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens and without the boundary."""
        if all(len(text) <= _ENCODE_CHARACTERS for text in texts):
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _pieces(text):
            ids.extend(self.backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids)
        return ids


def load_tokenizer(folder: str, boundary: Literal["eos", "bos"]) -> CorpusTokenizer:
    """The fast tokenizer of a Hugging Face directory (a path or URI).

    Raises:
        UserError: No tokenizer there, a slow one that has no fast form, or no such boundary token.
    """
    store = open_store(folder)
    if store.exists(TOKENIZER_FILE):
        serialised = store.read_bytes(TOKENIZER_FILE)
        boundary_token = _declared_token(store, f"{boundary}_token")
    else:
        serialised, boundary_token = _convert(folder, f"{boundary}_token")
    try:
        backend = _backend(serialised)
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{folder}/{TOKENIZER_FILE} is not a tokenizer: {error}. Replace the file.") from None
    boundary_id = backend.token_to_id(boundary_token) if boundary_token is not None else None
    if boundary_id is None:
        other = "bos" if boundary == "eos" else "eos"
        raise UserError(
            f"the tokenizer in {folder} has no {boundary}_token (found {boundary_token!r}), which stands between "
            f"documents. Set corpus.boundary_token={other}, or name the token in tokenizer_config.json."
        )
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    entry = TokenizerEntry(
        sha256=hashlib.sha256(serialised).hexdigest(), vocab_size=vocab_size, boundary_token_id=boundary_id
    )
    return CorpusTokenizer(backend, entry, boundary_first=boundary == "bos")


@functools.lru_cache(maxsize=4)
def load_corpus_tokenizer(corpus_uri: str, entry: TokenizerEntry, boundary: Literal["eos", "bos"]) -> CorpusTokenizer:
    """The tokenizer stored in a corpus under preparation, read once a process."""
    backend = _backend(open_store(corpus_uri).read_bytes(f"{TOKENIZER_FOLDER}/{TOKENIZER_FILE}"))
    return CorpusTokenizer(backend, entry, boundary_first=boundary == "bos")


def copy_tokenizer(folder: str, corpus: Store) -> None:
    """Puts the tokenizer's files into the corpus, so that neither it nor what is made of it needs the source again."""
    source = open_store(folder)
    for name in TOKENIZER_FILES:
        if source.exists(name):
            corpus.write_bytes(f"{TOKENIZER_FOLDER}/{name}", source.read_bytes(name))
    if source.exists(TOKENIZER_FILE):
        return
    with tempfile.TemporaryDirectory() as temporary:
        _auto_tokenizer(folder).save_pretrained(temporary)
        saved = open_store(temporary)
        for name in saved.list():
            corpus.write_bytes(f"{TOKENIZER_FOLDER}/{name}", saved.read_bytes(name))


def _pieces(text: str) -> Iterable[str]:
    """The text in pieces of at most _ENCODE_CHARACTERS, cut after a line or before a word where there is one."""
    start = 0
    while start < len(text):
        stop = start + _ENCODE_CHARACTERS
        if stop < len(text):
            line, word = text.rfind("\n", start, stop), text.rfind(" ", start, stop)
            stop = line + 1 if line > start else word if word > start else stop
        yield text[start:stop]
        start = stop


def _backend(serialised: bytes) -> Tokenizer:
    backend = Tokenizer.from_buffer(serialised)
    # Lengths and padding stored with a tokenizer are made for inference and would cut or fill documents here.
    backend.no_truncation()
    backend.no_padding()
    # A document that spells a special token is text about it: no document may forge a boundary.
    backend.encode_special_tokens = True
    return backend


def _declared_token(store: Store, key: str) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if store.exists(name):
            token: Any = store.read_json(name).get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


def _convert(folder: str, key: str) -> tuple[bytes, str | None]:
    tokenizer = _auto_tokenizer(folder)
    return tokenizer.backend_tokenizer.to_str().encode(), getattr(tokenizer, key)


def _auto_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises a different class for every way to lack a tokenizer
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer in {folder}: {reason} Put {TOKENIZER_FILE} there.") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no fast form, which reading a corpus needs. "
            f"Convert it and put its {TOKENIZER_FILE} there."
        )
    return tokenizer
