"""Whatever changes (a byte of a store, the teacher, its vocabulary, the data), no wrong row is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kdcore import Data, Example, Row, Run, Stage, Teacher
from kdcore.engine.progress import Progress
from kdcore.errors import InputError
from kdcore.teachers.stage_teachers import StageTeachers
from kdcore.teachers.store import Store, row_key
from kdcore.teachers.topk_rows import condense
from kdcore.teachers.verify import problems_of

ROWS = range(4)
KEYS = [row_key({"row": number}) for number in ROWS]
SCHEMAS = {
    "top-k": {"logits": Row(topk=2, dtype="float16", temperature=2.0)},
    "ragged top-k": {"logits": Row(lengths="ids", topk=2, dtype="bfloat16")},
    "ragged": {"states": Row(lengths="ids"), "score": Row()},
}


def row(name: str, number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    if name == "top-k":
        given = {"logits": torch.randn(9, generator=generator)}
    elif name == "ragged top-k":
        given = {"logits": torch.randn(number, 9, generator=generator)}
    else:
        given = {"states": torch.randn(number, 2, generator=generator), "score": torch.tensor(number + 0.5)}
    return condense(given, SCHEMAS[name])


def opened(root: Path, name: str) -> Store:
    return Store.open(root, name="large", fingerprint="abc", schema=SCHEMAS[name])


@pytest.fixture(params=SCHEMAS)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A store of four rows in two appends: its root and the schema's name."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    with opened(tmp_path, request.param) as made:
        for numbers in ([0, 1, 2], [3]):
            made.append([KEYS[n] for n in numbers], [row(request.param, n) for n in numbers])
        assert problems_of(made.folder) == []
    return tmp_path, request.param


def assert_right_or_missing(store: Store, name: str) -> list[int]:
    """Every row that is there is right; returns those that are not there."""
    missing = store.missing(KEYS)
    for number in set(ROWS).difference(missing):
        found = store.read([KEYS[number]])
        for output, values in row(name, number).items():
            stored = values.view(torch.uint16) if values.dtype is torch.bfloat16 else values
            assert torch.equal(torch.as_tensor(found[output][0]), stored), (number, output)
    return missing


def outcome(root: Path, name: str, path: Path) -> str:
    """What opening and reading says: an error that names the file and a fix, or which rows are missing."""
    try:
        with opened(root, name) as store:
            missing = assert_right_or_missing(store, name)
    except InputError as error:
        said = str(error)
    else:
        return f"missing {missing}" if missing else ""
    assert path.name in said
    assert "delete" in said
    assert "\n" not in said
    return said


def test_every_flipped_byte_of_every_file(store: tuple[Path, str]) -> None:
    root, name = store
    [folder] = root.iterdir()
    flipped = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for position in range(len(content)):
            mask = 1 << position % 8
            path.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
            problems = problems_of(folder)
            assert any(path.name.partition(".")[0] in problem for problem in problems), (path, position)
            assert all("; " in problem for problem in problems)
            assert outcome(root, name, path), (path, position)
        path.write_bytes(content)
        flipped += len(content)
    assert flipped > 500
    assert (problems_of(folder), outcome(root, name, folder)) == ([], "")


def test_every_length_of_every_file(store: tuple[Path, str]) -> None:
    root, name = store
    [folder] = root.iterdir()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            said = outcome(root, name, path)
            whole_append = path.suffix == ".index" and not length % (len(content) // 4)
            assert said, (path, length)
            assert problems_of(folder) or whole_append, (path, length)
        path.write_bytes(content)
    assert (problems_of(folder), outcome(root, name, folder)) == ([], "")


@pytest.mark.parametrize("kind", ["flipped", "cut"])
def test_missing_rows_are_recomputed_to_the_same_bytes(store: tuple[Path, str], kind: str) -> None:
    """After an interrupted append its rows are simply appended again, after damage once the named files are deleted."""
    root, name = store
    [folder] = root.iterdir()
    index, data = folder / "rows-00000-000.index", folder / "rows-00000-000.data"
    content, rows = index.read_bytes(), data.read_bytes()
    for position in range(len(content) * 3 // 4, len(content)):
        damaged = content[:position] + bytes([content[position] ^ 0x20]) + content[position + 1 :]
        index.write_bytes(damaged if kind == "flipped" else content[:position])
        lost = [[3]]
        if kind == "flipped":
            assert f"delete {data.name} and {index.name}" in outcome(root, name, index)
            index.unlink()
            data.unlink()
            lost = [[0, 1, 2], [3]]
        with opened(root, name) as store_again:
            assert assert_right_or_missing(store_again, name) == [number for numbers in lost for number in numbers]
            for numbers in lost:
                store_again.append([KEYS[n] for n in numbers], [row(name, n) for n in numbers])
            assert assert_right_or_missing(store_again, name) == []
        assert (index.read_bytes(), data.read_bytes()) == (content, rows)


# What a store is of


class Tokenizer:
    """Words to numbers in the order of a vocabulary."""

    def __init__(self, words: str) -> None:
        self.words = words.split()

    def __call__(self, example: Example) -> dict[str, list[int]]:
        return {"ids": [self.words.index(word) for word in example["text"].split()]}


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., int]:
    """``fill(...)`` fills a store, and returns how many examples its teacher was asked about."""

    def call(
        texts: list[str],
        weight: float = 1.0,
        words: str = "a b c",
        row: Row = Row(lengths="ids", topk=2),  # noqa: B008
    ) -> int:
        source, asked = tmp_path / "teacher.safetensors", 0
        save_file({"weight": torch.full((3, 5), weight)}, source)

        def teacher_outputs(plugin: str, hook: str, *, batch: Any, **_: Any) -> dict[str, torch.Tensor]:
            nonlocal asked
            asked += len(batch)
            return {"logits": weight * torch.nn.functional.one_hot(batch["ids"], 5).float()}

        plugins: Any = SimpleNamespace(
            source_of=lambda hook: "", newest_first=lambda hook: ["only"], ask=teacher_outputs
        )
        teacher = Teacher(build=lambda run: torch.nn.Identity(), source=str(source), store={"logits": row})
        stage = Stage(
            name="s",
            loop=lambda *_: [],
            build=lambda run: {},
            data=Data(item=Tokenizer(words)),
            teachers={"large": teacher},
        )
        teachers = StageTeachers(Run(folder=tmp_path), stage, plugins, tmp_path / "store", refuse=False)
        examples = [Example({"text": text}, id=str(number)) for number, text in enumerate(texts)]
        teachers.fill(examples, Progress(quiet=True))
        stored = teachers.store("large")
        for example in examples:
            found = stored.read_padded([teachers.key("large", example)])
            ids = Tokenizer(words)(example)["ids"]
            expected = condense({"logits": weight * torch.nn.functional.one_hot(torch.tensor([ids]), 5).float()},
                                {"logits": row})  # fmt: skip
            assert all(torch.equal(found[output], values) for output, values in expected.items())
        teachers.release()
        return asked

    return call


def test_nothing_stale_is_read(fill: Callable[..., int]) -> None:
    texts = ["a b", "c", "b b a"]
    assert fill(texts) == 3
    assert fill(texts) == 0
    assert fill(texts, weight=2.0) == 3  # another teacher in the same file
    assert fill(texts, words="c b a") == 3  # another tokenizer
    assert fill(["a b", "c a", "b b a"]) == 1  # a changed data row
    assert fill(["b b a", "a b"]) == 0  # other order and ids
    assert fill(texts, row=Row(lengths="ids", topk=3)) == 3
    assert fill(texts, row=Row(lengths="ids", topk=2, temperature=2.0)) == 3
    assert fill(texts, weight=2.0) == 0  # both teachers' rows are still there
    assert fill(texts) == 0
