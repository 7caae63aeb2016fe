"""The demo's collection: documentation of Python's standard library and of packages that are always installed.

A question is the summary line of a docstring, its answer the rest of that docstring. Source is parsed, never
imported, so the texts are real, need no network and no licence beyond the installed packages'.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

from attrs import frozen

from kdcore.errors import InputError
from kdcore.recipe import Example

__all__ = ["demo_collection", "demo_manifest"]

STDLIB = "python"
PACKAGES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "scipy": "scipy",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
SKIPPED_FOLDERS = {
    "__pycache__",
    "_dynamo",
    "_inductor",
    "dist-packages",
    "distutils",
    "externals",
    "idlelib",
    "lib2to3",
    "models",
    "site-packages",
    "test",
    "testing",
    "tests",
}
QUESTION_WORDS = (5, 25)
PASSAGE_WORDS = (25, 120)
PER_MODULE = 40
LARGEST = 60_000
LEAST_DOCUMENTED = 2

BOILERPLATE = re.compile(r"deprecat|alias (for|of)|^(see|same as|internal|private|todo)\b|not implemented", re.I)
CODE = re.compile(r"^\s*(>>>|\.\.\.( |$)|\.\. |\$ )|^\s*[-=~^*]{3,}\s*$")
LEFT_OUT = re.compile(r"^(examples?|references|see also|doctests?)\s*:{0,2}$", re.I)
KEPT = re.compile(
    r"^(notes?|warnings?|(other )?parameters|returns?|yields|raises|attributes|methods|arg(ument)?s)\s*:{0,2}$", re.I
)
MARKUP = re.compile(r":[a-z:]+:`~?([^`<]*?)(?: ?<[^`]*>)?`|`{1,2}([^`]*)`{1,2}_{0,2}|\*\*([^*]+)\*\*")
NO_LETTER = re.compile(r"[^A-Za-z ]+")
DOCUMENTED = re.compile(rb'"""[^"]{20,200}?\n\s*\n[^"]{150,}?"""')
SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]])[.?!](?=\s+[A-Z])")


@frozen
class Entry:
    """One documented symbol: where it stands, the question it answers, the passage that answers it."""

    module: str
    symbol: str
    question: str
    passage: str


def demo_manifest() -> dict[str, str]:
    """The sources of the demo's texts: package to installed version."""
    versions = {STDLIB: platform.python_version()}
    return versions | {name: version(PACKAGES[name]) for name in PACKAGES if _folder(name) is not None}


def demo_collection(
    *, documents: int, train: int, validation: int, test: int, seed: int
) -> dict[str, Sequence[Example]]:
    """Build the demo's collection, with the splits and fields of `read_collection`.

    Modules are read in an order drawn with ``seed``, packages in turn, until there are ``documents`` passages; those
    without a question of their own are distractors. All questions of a module (the example's group) stay in one
    split. Equal for equal seeds and installed versions (`demo_manifest`).

    :raises InputError: the installed packages hold fewer documents or questions.
    """
    entries = _collect(documents, seed)
    repeated = Counter(_key(entry.question) for entry in entries)
    modules: dict[str, list[Entry]] = {}
    for entry in entries:
        if repeated[_key(entry.question)] == 1:
            modules.setdefault(entry.module, []).append(entry)
    sizes = {"test": test, "validation": validation, "train": train}
    splits: dict[str, Sequence[Example]] = {
        "corpus": [Example(id=entry.symbol, data={"title": "", "text": entry.passage}) for entry in entries]
    }
    order = iter(sorted(modules, key=lambda module: _hash(f"{seed} split {module}")))
    for split, size in sizes.items():
        chosen: list[Example] = []
        while len(chosen) < size:
            module = next(order, None)
            if module is None:
                questions = sum(map(len, modules.values()))
                raise InputError(
                    f"the demo found {questions} questions in {len(entries)} passages of the installed packages, too "
                    f"few for train {train} + validation {validation} + test {test}: raise documents or ask for fewer"
                )
            chosen += [_question(entry) for entry in modules[module]]
        splits[split] = chosen[:size]
    return splits


def _question(entry: Entry) -> Example:
    return Example(
        id=f"q:{entry.symbol}", data={"query": entry.question, "relevant": {entry.symbol: 1}}, group=entry.module
    )


def _collect(documents: int, seed: int) -> list[Entry]:
    entries: list[Entry] = []
    seen: set[str] = set()
    symbols: set[str] = set()
    for module, path in _modules(seed):
        found = 0
        for entry in _entries(module, path):
            if _key(entry.passage) in seen or entry.symbol in symbols:
                continue
            seen.add(_key(entry.passage))
            symbols.add(entry.symbol)
            entries.append(entry)
            found += 1
            if len(entries) == documents:
                return entries
            if found == PER_MODULE:
                break
    raise InputError(f"the installed packages hold {len(entries)} documented passages, not {documents}: ask for fewer")


def _folder(package: str) -> Path | None:
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _modules(seed: int) -> Iterator[tuple[str, Path]]:
    """Module names and files, in an order drawn with the seed, one of each package in turn."""
    columns: list[list[tuple[str, Path]]] = []
    for package in (STDLIB, *PACKAGES):
        folder = _folder(package)
        if folder is None:
            continue
        found = list(_sources(package, folder))
        columns.append(sorted(found, key=lambda module: _hash(f"{seed} {module[0]}")))
    for turn in zip_longest(*columns):
        yield from (module for module in turn if module is not None)


def _sources(package: str, folder: Path) -> Iterator[tuple[str, Path]]:
    for directory, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        prefix = ".".join((package, *Path(directory).relative_to(folder).parts))
        for name in files:
            if name.endswith(".py"):
                yield f"{prefix}.{name[:-3]}".removesuffix(".__init__"), Path(directory, name)


def _entries(module: str, path: Path) -> Iterator[Entry]:
    try:
        source = path.read_bytes()
        if len(source) > LARGEST or len(DOCUMENTED.findall(source)) < LEAST_DOCUMENTED:
            return
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    pending: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [(module, tree)]
    while pending:
        symbol, node = pending.pop(0)
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            question, passage = _split(docstring)
            if _usable(question, passage):
                yield Entry(module, symbol, question, passage)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [
                (f"{symbol}.{child.name}", child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not child.name.startswith("_")
            ]


def _split(docstring: str) -> tuple[str, str]:
    """The summary (the first sentence of the first paragraph) and the rest, both as plain text."""
    first, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    summary = _plain(first)
    end = SENTENCE_END.search(summary)
    question, more = (summary[: end.end()], summary[end.end() :]) if end else (summary, "")
    question = question.rstrip(".: ")
    words = f"{more} {_plain(_prose(rest))}".replace(question, " ").split()
    return question, " ".join(words[: PASSAGE_WORDS[1]])


def _prose(text: str) -> str:
    """Without code, rulers, headings, and the sections that hold examples or references."""
    kept: list[str] = []
    left_out = False
    for line in text.splitlines():
        heading = line.strip()
        if LEFT_OUT.match(heading):
            left_out = True
        elif KEPT.match(heading):
            left_out = False
        elif not left_out and not CODE.match(line):
            kept.append(line)
    return "\n".join(kept)


def _plain(text: str) -> str:
    return " ".join(MARKUP.sub(lambda match: next(filter(None, match.groups()), ""), text).split())


def _usable(question: str, passage: str) -> bool:
    words = passage.split()
    return (
        QUESTION_WORDS[0] <= len(question.split()) <= QUESTION_WORDS[1]
        and len(words) >= PASSAGE_WORDS[0]
        and not BOILERPLATE.search(question)
        and _english(question)
        and _english(passage)
    )


def _english(text: str) -> bool:
    """ASCII, and mostly letters."""
    return text.isascii() and len(NO_LETTER.sub("", text)) >= 0.8 * len(text)


def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
