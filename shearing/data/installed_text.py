"""Real text that needs no download: what every installation of this project holds, sorted into domains that differ."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from shearing.data.config import CorpusConfig, DomainConfig
from shearing.errors import UserError
from shearing.storage import Store, open_store

INSTALLED_SCHEME = "installed"
INSTALLED_FOLDER = "installed-text"
DEFAULT_MEGABYTES = 4.0
_SMALLEST_CHARACTERS = 400
_LARGEST_BYTES = 200_000
_LONGEST_LINE = 500
_PROSE_PARAGRAPH = 60  # shorter paragraphs are headings and the like, which may well repeat
_BOILERPLATE = re.compile(r"licen[sc]e|copyright|all rights reserved|spdx", re.IGNORECASE)
_GENERATED = re.compile(r"generated (by|from|file|code|using|with)|do not edit|@generated", re.IGNORECASE)
_BADGES = re.compile(r"shields\.io|badge|^\s*<|^\s*\.\. (image|\|)|^\s*:target:|^\s*:alt:", re.IGNORECASE)


class InstalledDocument(NamedTuple):
    """A text and where it comes from, relative to the package's folder."""

    path: str
    text: str


Source = Iterator[InstalledDocument]

_LIBRARIES = (
    "stdlib ray deepspeed pip setuptools fsspec aiohttp requests rich pygments fontTools jinja2 click virtualenv"
)
_DOCUMENTED = "numpy pandas networkx sympy matplotlib torch pyarrow mpmath"
_TESTED = "pandas sympy numpy networkx pyarrow matplotlib"
_STUBBED = "torch numpy matplotlib pandas tokenizers cryptography PIL setuptools pydantic_core aiohttp"
_NATIVE = "torch pyarrow deepspeed numpy cffi"


def with_installed_text(config: CorpusConfig) -> CorpusConfig:
    """The same corpus with `installed:<domain>` replaced by files, written to `<corpus.path>/installed-text` once.

    `installed:python?megabytes=2` asks for another amount than the 4 megabytes that are the default.

    Raises:
        UserError: An unknown domain of installed text, or an amount that is no positive number.
    """
    domains: dict[str, DomainConfig] = {}
    problems: list[str] = []
    for name, domain in config.domains.items():
        texts = [domain.text] if isinstance(domain.text, str) else domain.text
        try:
            located = [_located(text, config.path) if is_installed_text(text) else text for text in texts]
        except UserError as error:
            problems.extend(f"corpus.domains.{name}.text: {problem}" for problem in error.problems)
            continue
        domains[name] = domain.model_copy(update={"text": located})
    if problems:
        raise UserError(problems)
    return config.model_copy(update={"domains": domains})


def is_installed_text(text: str) -> bool:
    """Whether a domain's text names installed text instead of files."""
    return urlsplit(text).scheme == INSTALLED_SCHEME


def parse_installed_text(text: str) -> tuple[str, int]:
    """The domain and the bytes that `installed:<domain>[?megabytes=n]` asks for.

    Raises:
        UserError: An unknown domain, or an amount that is no positive number.
    """
    parts = urlsplit(text)
    if parts.path not in INSTALLED_DOMAINS:
        allowed = ", ".join(f"installed:{name}" for name in INSTALLED_DOMAINS)
        raise UserError(f"{text!r} names no installed text; allowed: {allowed}.")
    amount = parse_qs(parts.query).get("megabytes", [str(DEFAULT_MEGABYTES)])[0]
    try:
        size_bytes = int(float(amount) * 1e6)
    except (ValueError, OverflowError):
        size_bytes = 0
    if size_bytes <= 0:
        raise UserError(f"{text!r}: megabytes={amount} is no amount of text; write a positive number, such as 4.")
    return parts.path, size_bytes


def write_installed_text(folder: Store | str, bytes_per_domain: int) -> dict[str, int]:
    """Writes every domain as `<folder>/<domain>/<domain>-00.jsonl`, lines of `text` and `meta.path`.

    What is there already is left as it is. Returns the bytes of text that each domain has.
    """
    store = open_store(folder) if isinstance(folder, str) else folder
    return {domain: _write_domain(store, domain, bytes_per_domain) for domain in INSTALLED_DOMAINS}


def _located(text: str, corpus_path: str) -> str:
    domain, size_bytes = parse_installed_text(text)
    store = open_store(corpus_path).child(INSTALLED_FOLDER).child(str(size_bytes))
    if not store.exists(_file_name(domain)):
        _write_domain(store, domain, size_bytes)
    return store.child(domain).uri


def _file_name(domain: str) -> str:
    return f"{domain}/{domain}-00.jsonl"


def _write_domain(store: Store, domain: str, size_bytes: int) -> int:
    name = _file_name(domain)
    if store.exists(name):
        return sum(len(json.loads(line)["text"].encode()) for line in store.read_bytes(name).splitlines())
    documents = installed_documents(domain, size_bytes)
    records = (json.dumps({"text": document.text, "meta": {"path": document.path}}) for document in documents)
    store.write_bytes(name, "".join(f"{record}\n" for record in records).encode())
    return sum(len(document.text.encode()) for document in documents)


def installed_documents(domain: str, size_bytes: int) -> list[InstalledDocument]:
    """At most `size_bytes` of one domain, an equal share of each package as far as it has so much; no text twice."""
    sources = INSTALLED_DOMAINS[domain]()
    taken_bytes = dict.fromkeys(range(len(sources)), 0)
    seen: set[bytes] = set()
    documents: list[InstalledDocument] = []
    while taken_bytes and sum(taken_bytes.values()) < size_bytes:
        poorest = min(taken_bytes, key=lambda number: (taken_bytes[number], number))
        document = next(sources[poorest], None)
        if document is None:
            # The others share what is left; their count starts where this one ends.
            size_bytes -= taken_bytes.pop(poorest)
            continue
        data = document.text.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in seen and sum(taken_bytes.values()) + len(data) <= size_bytes + _LARGEST_BYTES:
            seen.add(digest)
            documents.append(document)
            taken_bytes[poorest] += len(data)
    return documents


def _package_folder(package: str) -> Path | None:
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _files(package: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Files of a package in an order that looks random and is the same everywhere."""
    folder = _package_folder(package)
    if folder is None:
        return
    found: list[tuple[bytes, str, Path]] = []
    for path in folder.rglob("*"):
        name = f"{package}/{path.relative_to(folder).as_posix()}"
        if path.suffix in suffixes and not re.search(r"/(site|dist)-packages/", name):
            found.append((hashlib.blake2b(name.encode(), digest_size=8).digest(), name, path))
    for _, name, path in sorted(found):
        if path.is_file() and path.stat().st_size <= _LARGEST_BYTES:
            yield name, path


def _code(package: str, suffixes: tuple[str, ...], wanted: Callable[[str], bool]) -> Source:
    for name, path in _files(package, suffixes):
        if not wanted(name):
            continue
        text = _readable(path)
        if text is None or _GENERATED.search(text[:1500]):
            continue
        body = _without_licence(text)
        if len(body) >= _SMALLEST_CHARACTERS and max(map(len, body.splitlines())) <= _LONGEST_LINE:
            yield InstalledDocument(name, body)


def _readable(path: Path) -> str | None:
    try:
        text = path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    letters = sum(character.isascii() for character in text)
    return text if letters >= 0.97 * len(text) else None  # tables of characters are no language


def _without_licence(text: str) -> str:
    """Without the comment block that opens so many files with the same licence."""
    block = re.match(r"\s*(?:/\*.*?\*/|(?:(?://|#)[^\n]*(?:\n|$)\s*)+)", text, flags=re.DOTALL)
    if block and _BOILERPLATE.search(block.group()):
        return text[block.end() :].lstrip()
    return text


def _is_test(name: str) -> bool:
    return bool(re.search(r"/(tests?|testing)/|/test_[^/]*$|_test\.py$|/conftest\.py$", name))


def _docstrings(package: str) -> Source:
    """The documentation of one module as a document: each object's name and arguments, then its docstring."""
    for name, path in _files(package, (".py",)):
        text = None if _is_test(name) else _readable(path)
        if text is None or '"""' not in text:
            continue
        try:
            module = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        entries = list(_documented(module, ""))
        body = "\n\n\n".join(entries)
        if len(body) >= _SMALLEST_CHARACTERS:
            yield InstalledDocument(name, body + "\n")


def _documented(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            title = f"{prefix}{child.name}"
            docstring = ast.get_docstring(child, clean=False) or ""
            if len(docstring) >= 80:
                signature = "" if isinstance(child, ast.ClassDef) else f"({', '.join(a.arg for a in child.args.args)})"
                yield f"{title}{signature}\n\n{inspect.cleandoc(docstring)}"
            yield from _documented(child, f"{title}.")


def _topics() -> Source:
    """The language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield InstalledDocument(f"pydoc_data/{name}", topics[name].strip() + "\n")


def _readmes(distributions: list[importlib.metadata.Distribution]) -> Source:
    for distribution in distributions:
        metadata: Any = distribution.metadata  # an email message: the body holds the README, or an old header does
        text = metadata.get_payload() or metadata.get("Description") or ""
        yield InstalledDocument(f"{distribution.name}/README", str(text))


def _notices(distributions: list[importlib.metadata.Distribution]) -> Source:
    """Licences, notices, and what else lies as plain prose among a package's files."""
    for distribution in distributions:
        for file in distribution.files or []:
            words = re.search(r"(licen[sc]e|notice|copying|authors|readme|changes|changelog)[^/]*$", str(file), re.I)
            prose = file.suffix in (".md", ".rst") or (words and file.suffix in ("", ".txt"))
            text = _readable(Path(str(distribution.locate_file(file)))) if prose else None
            if text is not None:
                yield InstalledDocument(str(file), text)


def _prose(source: Source, seen: set[bytes]) -> Source:
    """Texts without badges and without paragraphs that any text before had: a hundred packages share one licence."""
    for document in source:
        lines = [line.rstrip() for line in document.text.splitlines() if not _BADGES.search(line)]
        kept = []
        for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
            digest = hashlib.blake2b(re.sub(r"\W+", " ", paragraph).lower().encode(), digest_size=16).digest()
            if paragraph.strip() and (len(paragraph) < _PROSE_PARAGRAPH or digest not in seen):
                kept.append(paragraph)
            seen.add(digest)
        text = "\n\n".join(kept).strip()
        if len(text) >= _SMALLEST_CHARACTERS and any(len(paragraph) >= _PROSE_PARAGRAPH for paragraph in kept):
            yield InstalledDocument(document.path, text + "\n")


def _prose_sources() -> list[Source]:
    seen: set[bytes] = set()
    distributions = _distributions()
    return [_prose(source, seen) for source in (_topics(), _readmes(distributions), _notices(distributions))]


def _distributions() -> list[importlib.metadata.Distribution]:
    """What is installed, by name; each once. A half-removed package has no name."""
    found = {str(each.name).lower(): each for each in importlib.metadata.distributions() if each.name}
    return [found[name] for name in sorted(found)]


def _code_sources(packages: str, suffixes: tuple[str, ...], wanted: Callable[[str], bool]) -> list[Source]:
    return [_code(package, suffixes, wanted) for package in packages.split()]


# Python source and docstrings come from different packages: a source file holds its own docstrings.
INSTALLED_DOMAINS: dict[str, Callable[[], list[Source]]] = {
    "python": partial(_code_sources, _LIBRARIES, (".py",), lambda name: not _is_test(name)),
    "models": partial(_code_sources, "transformers", (".py",), lambda name: "/models/" in name),
    "cpp": partial(_code_sources, _NATIVE, (".h", ".hpp", ".cuh", ".cu", ".cpp", ".cc"), lambda _: True),
    "tests": partial(_code_sources, _TESTED, (".py",), _is_test),
    "docstrings": lambda: [_docstrings(package) for package in _DOCUMENTED.split()],
    "prose": _prose_sources,
    "stubs": partial(_code_sources, _STUBBED, (".pyi",), lambda _: True),
}
