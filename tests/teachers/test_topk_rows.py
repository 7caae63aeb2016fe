"""Logits go into a store and come back as their top k."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcore import Data, Example, Row, Run, Stage, Teacher
from kdcore.engine.progress import Progress
from kdcore.errors import InputError, PluginError
from kdcore.losses.topk import TopK, top_k
from kdcore.teachers.header import HEADER
from kdcore.teachers.outputs import TeacherOutputs
from kdcore.teachers.sealed import read_sealed, write_sealed
from kdcore.teachers.stage_teachers import StageTeachers
from kdcore.teachers.store import Store

VOCABULARY = 50
TEXTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3], [5], [8, 9, 7]]


class Embedding(torch.nn.Module):
    """Logits that depend on the token alone."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.nn.Parameter(4 * torch.randn(10, vocabulary, generator=generator))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits[tokens]


class Plugins:
    """One plugin whose `teacher_outputs` is ``answer(model, batch)``."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def source_of(self, hook: str) -> str:
        return ""

    def newest_first(self, hook: str) -> list[str]:
        return ["only"]

    def ask(self, plugin: str, hook: str, **asked: Any) -> Any:
        return self.answer(asked["model"], asked["batch"])


def by_token(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    return {"logits": model(batch["tokens"])}


def by_text(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    return {"logits": model(batch["tokens"])[:, 0]}


EXAMPLES = [Example({"tokens": tokens}, id=str(number)) for number, tokens in enumerate(TEXTS)]


def teachers_of(root: Path, row: Row, answer: Any = None, **changed: Any) -> StageTeachers:
    fields = {"build": lambda run: Embedding(), "identity": "embedding", "store": {"logits": row}, "batch_size": 2}
    stage = Stage(
        name="distil",
        loop=lambda *_: [],
        build=lambda run: {},
        data=Data(item=lambda example: {"tokens": example["tokens"]}),
        teachers={"large": Teacher(**{**fields, **changed})},
    )
    plugins: Any = Plugins(answer or (by_token if row.lengths else by_text))
    return StageTeachers(Run(folder=root), stage, plugins, root / "store", refuse=False)


def read(teachers: StageTeachers, examples: list[Example] = EXAMPLES) -> TopK:
    batch = teachers._batch(examples)
    found = TeacherOutputs(teachers, batch, SimpleNamespace())["large/logits"]  # type: ignore[arg-type]
    assert isinstance(found, TopK)
    return found


def filled(root: Path, row: Row, answer: Any = None, **changed: Any) -> StageTeachers:
    teachers = teachers_of(root, row, answer, **changed)
    teachers.fill(EXAMPLES, Progress(quiet=True))
    return teachers


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_ragged_logits_come_back_as_their_top_k(
    tmp_path: Path, dtype: Any, tolerance: float, temperature: float
) -> None:
    row = Row(lengths="tokens", dtype=dtype, topk=7, temperature=temperature)
    found = read(filled(tmp_path, row))
    assert found.temperature == temperature
    assert found.indices.dtype is torch.int64
    for place, tokens in enumerate(TEXTS):
        logits = Embedding()(torch.tensor(tokens)).detach().double() / temperature
        probabilities = logits.softmax(-1)
        expected, indices = probabilities.sort(-1, descending=True)
        rest = expected[:, 7:].sum(-1)
        assert torch.equal(found.indices[place, : len(tokens)], indices[:, :7])
        kept = found.log_probabilities[place, : len(tokens)].double()
        torch.testing.assert_close(kept, expected[:, :7].log(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found.log_rest[place, : len(tokens)].double(), rest.log(), atol=1e-5, rtol=1e-5)
        for tensor in found[:3]:
            assert tensor[place, len(tokens) :].count_nonzero() == 0


def test_what_is_read_is_what_top_k_gives_bit_for_bit(tmp_path: Path) -> None:
    found = read(filled(tmp_path, Row(topk=5, temperature=2.0)))
    expected = top_k(Embedding()(torch.tensor([tokens[0] for tokens in TEXTS])).detach(), 5, 2.0)
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3]))
    again = teachers_of(tmp_path, Row(topk=5, temperature=2.0), build=lambda run: pytest.fail("was loaded"))
    again.fill(EXAMPLES, Progress(quiet=True))
    assert all(torch.equal(one, other) for one, other in zip(read(again)[:3], expected[:3]))


def test_a_whole_vocabulary_leaves_no_rest(tmp_path: Path) -> None:
    found = read(filled(tmp_path, Row(topk=VOCABULARY)))
    assert found.log_rest.isneginf().all()
    torch.testing.assert_close(found.log_probabilities.exp().sum(-1), torch.ones(len(TEXTS)))


def test_a_teacher_may_give_a_top_k_itself(tmp_path: Path) -> None:
    row = Row(lengths="tokens", topk=3, temperature=1.5)

    def answer(model: Any, batch: Any) -> dict[str, TopK]:
        return {"logits": top_k(model(batch["tokens"]), 3, 1.5)}

    found, expected = read(filled(tmp_path / "a", row, answer)), read(filled(tmp_path / "b", row))
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3]))

    def hotter(model: Any, batch: Any) -> dict[str, TopK]:
        return {"logits": top_k(model(batch["tokens"]), 3, 2.0)}

    with pytest.raises(InputError, match=r"the top 3 at temperature 2.0, its Row keeps the top 3 at 1.5; make both al"):
        filled(tmp_path / "c", row, hotter)


def test_a_teacher_of_rows_gives_logits_or_a_top_k_of_each_example(tmp_path: Path) -> None:
    logits = {example.id: Embedding()(torch.tensor(example["tokens"])).detach() for example in EXAMPLES}
    row = Row(lengths="tokens", topk=3)

    def given(one: str, form: Callable[[torch.Tensor], Any]) -> TopK:
        return TopK(*map(form, top_k(logits[one], 3)[:3]))

    forms = {
        "arrays": lambda run, wanted: ((one, {"logits": logits[one].numpy()}) for one in wanted),
        "top": lambda run, wanted: ((one, {"logits": top_k(logits[one], 3)}) for one in wanted),
        "top of arrays": lambda run, wanted: ((one, {"logits": given(one, torch.Tensor.numpy)}) for one in wanted),
        "top of lists": lambda run, wanted: ((one, {"logits": given(one, torch.Tensor.tolist)}) for one in wanted),
    }
    expected = read(filled(tmp_path / "model", row))
    for name, rows in forms.items():
        found = read(filled(tmp_path / name, row, build=None, rows=rows))
        assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3]))


def test_ruled_out_tokens_and_large_logits_are_stored(tmp_path: Path) -> None:
    def answer(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        logits = 1e5 * model(batch["tokens"])
        logits[..., 2:] = -math.inf
        return {"logits": logits}

    found = read(filled(tmp_path, Row(lengths="tokens", topk=4, dtype="float16"), answer))
    assert found.log_probabilities[0, 0, 2:].isneginf().all()
    assert found.log_probabilities[0, 0, 1] == torch.finfo(torch.float16).min


# What is refused


def test_a_top_k_may_be_anything_in_the_padding(tmp_path: Path) -> None:
    def answer(model: Any, batch: Any) -> dict[str, TopK]:
        top = top_k(model(batch["tokens"]), 3)
        padding = ~batch.mask("tokens")
        return {
            "logits": top.map(lambda part: part.masked_fill(padding.view(padding.shape + (1,) * (part.ndim - 2)), -1))
        }

    row = Row(lengths="tokens", topk=3)
    found, expected = read(filled(tmp_path / "a", row, answer)), read(filled(tmp_path / "b", row))
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3]))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [np.float32, torch.tensor, list])
def test_rows_that_are_not_finite(tmp_path: Path, broken: float, form: Callable[[Any], Any]) -> None:
    def rows(run: Run, wanted: list[str]) -> Any:
        return ((one, {"logits": form([1.0, broken if one == "3" else 2.0])}) for one in wanted)

    with pytest.raises(InputError, match=r"teacher 'large' gave NaN or infinite 'logits' for '3': none of these was"):
        filled(tmp_path, Row(), build=None, rows=rows)
    assert teachers_of(tmp_path, Row(), build=None, rows=rows).store("large").rows == 0


def test_a_row_that_cannot_be_condensed_is_named(tmp_path: Path) -> None:
    def rows(run: Run, wanted: list[str]) -> Any:
        return ((one, {"logits": "words"}) for one in wanted)

    with pytest.raises(TypeError) as error:
        filled(tmp_path, Row(topk=2), build=None, rows=rows)
    assert error.value.__notes__ == ["in the row '0' of teacher 'large'"]


def test_more_than_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        filled(tmp_path, Row(topk=VOCABULARY + 1))
    assert str(error.value) == "output 'logits': Row(topk=51) is more than the vocabulary of 50; lower topk"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite(tmp_path: Path, broken: float) -> None:
    def answer(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        logits = model(batch["tokens"]).clone()
        logits[0, 0, 0] = broken
        return {"logits": logits}

    with pytest.raises(InputError, match=r"NaN or infinite 'logits.log_probabilities' for one of"):
        filled(tmp_path, Row(topk=4), answer)


def test_tokens_that_are_ruled_out_may_have_logits_of_minus_infinity(tmp_path: Path) -> None:
    def answer(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        logits = model(batch["tokens"])[:, 0].clone()
        logits[:, 4:] = -math.inf
        return {"logits": logits}

    assert read(filled(tmp_path, Row(topk=4), answer)).log_rest.isneginf().all()


# Headers


def test_another_k_temperature_or_dtype_is_another_store(tmp_path: Path) -> None:
    rows = [
        Row(),
        Row(topk=4),
        Row(topk=5),
        Row(topk=4, temperature=2.0),
        Row(topk=4, dtype="float16"),
        Row(topk=4, lengths="tokens"),
    ]
    folders = [
        Store.open(tmp_path, name="large", fingerprint="f", schema={"logits": row}).folder for row in [*rows, *rows]
    ]
    assert len(set(folders)) == len(rows)


def test_stores_of_plain_outputs_keep_the_folders_that_they_had(tmp_path: Path) -> None:
    schema = {"score": Row(), "tokens": Row(lengths="ids", dtype="int8")}
    store = Store.open(tmp_path, name="large", fingerprint="abc", schema=schema)
    assert store.folder.name == "large-1372c8b92e6f841a"
    assert store.header["schema"] == {
        "score": {"dtype": "float32"},
        "tokens": {"dtype": "int8", "lengths": "ids"},
    }


@pytest.mark.parametrize(("field", "value"), [("topk", 9), ("temperature", 3.0), ("dtype", "bfloat16")])
def test_a_header_that_says_something_else_is_refused_with_both_values(
    tmp_path: Path, field: str, value: object
) -> None:
    schema = {"logits": Row(topk=4, temperature=2.0, dtype="float16")}
    header = Store.open(tmp_path, name="large", fingerprint="f", schema=schema).folder / HEADER
    content = read_sealed(header)
    assert content is not None
    before = content["schema"]["logits"][field]
    content["schema"]["logits"][field] = value
    header.unlink()
    write_sealed(header, content)
    with pytest.raises(InputError) as error:
        Store.open(tmp_path, name="large", fingerprint="f", schema=schema)
    message = str(error.value)
    assert str(header) in message
    assert f"{field!r}: {value!r}" in message
    assert f"{field!r}: {before!r}" in message
    assert "delete the folder" in message


@pytest.mark.parametrize("stored", [True, False])
def test_the_vocabulary_is_asked_for_once_and_before_a_teacher_is_loaded(tmp_path: Path, stored: bool) -> None:
    asked = []

    def vocabulary(run: Run) -> str:
        asked.append(run)
        if len(asked) > 1:
            raise InputError("the student has another vocabulary")
        return "words-1"

    store = {"logits": Row(topk=3)} if stored else None
    teachers = teachers_of(tmp_path, Row(), store=store, vocabulary=vocabulary)
    for _ in range(2):
        teachers.fill(EXAMPLES, Progress(quiet=True))
        teachers.module("large")
    assert len(asked) == 1
    other = teachers_of(
        tmp_path, Row(), store=store, vocabulary=vocabulary, build=lambda run: pytest.fail("was loaded")
    )
    with pytest.raises(InputError, match="the student has another vocabulary"):
        (other.fill(EXAMPLES, Progress(quiet=True)) if stored else other.module("large"))


def test_the_vocabulary_is_asked_for_before_a_teacher_known_by_its_weights_is_loaded(tmp_path: Path) -> None:
    def vocabulary(run: Run) -> str:
        raise InputError("the student has another vocabulary")

    unknown = teachers_of(
        tmp_path, Row(topk=3), identity="", vocabulary=vocabulary, build=lambda run: pytest.fail("was loaded")
    )
    with pytest.raises(InputError, match="the student has another vocabulary"):
        unknown.fill(EXAMPLES, Progress(quiet=True))


def test_the_vocabulary_of_a_teacher_in_place_is_asked_for_once(tmp_path: Path) -> None:
    asked = []
    own = teachers_of(
        tmp_path,
        Row(),
        lambda model, batch: {"logits": torch.zeros(len(batch), 3)},
        build=None,
        identity="",
        store=None,
        inplace=True,
        vocabulary=lambda run: asked.append(run) or "words-1",
    )
    for _ in range(2):
        own.compute("large", own._batch(EXAMPLES))
    assert len(asked) == 1


def test_another_vocabulary_is_refused_with_both_values(tmp_path: Path) -> None:
    filled(tmp_path, Row(topk=3), vocabulary=lambda run: "words-1").release()
    filled(tmp_path, Row(topk=3), vocabulary=lambda run: "words-1").release()
    for now in (lambda run: "words-2", None):
        with pytest.raises(InputError, match=r"vocabulary is 'words-1', but ('words-2'|None) is asked for"):
            teachers_of(tmp_path, Row(topk=3), vocabulary=now).store("large")


def test_a_vocabulary_is_a_hash(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"the vocabulary of teacher 'large' gave 30522; return its hash"):
        teachers_of(tmp_path, Row(), vocabulary=lambda run: 30522).store("large")


def test_bytes_on_disk(tmp_path: Path) -> None:
    store = filled(tmp_path, Row(lengths="tokens", topk=32, dtype="float16")).store("large")
    positions = sum(map(len, TEXTS))
    [data] = store.folder.glob("*.data")
    assert data.stat().st_size == positions * (32 * 4 + 32 * 2 + 4)
    assert len(store.keys()) == len(set(store.keys())) == len(TEXTS)
    assert store.missing(store.keys()) == []


def test_a_student_learns_the_same_from_the_top_of_all_classes(
    execute: Callable[..., Path], variant: Callable[..., Path]
) -> None:
    """Through the engine: the six most probable of six classes are the teacher's whole distribution."""
    method = variant(
        {
            'store={"logits": Row()}': 'store={"logits": Row(topk=6, temperature=2.0)}',
            "student_loss(self, models, batch, teacher)": "student_loss(self, models, batch, teacher, memo)",
            'target = functional.log_softmax(teacher["large/logits"] / temperature, -1)': (
                'memo["top"] = top = teacher.live("large/logits")\n'
                '            assert type(top).__name__ == type(teacher["large/logits"]).__name__ == "TopK"\n'
                "            target = torch.zeros(len(top.indices), CLASSES).scatter(1, top.indices, "
                "top.log_probabilities)"
            ),
        }
    )
    settings = ("steps=8", "keep=last", "distill_weight=1.0")
    plain, top = execute(*settings, out="plain"), execute(*settings, plugins=(method,), out="top")
    weights = [load_file(run / "student" / "model.safetensors") for run in (plain, top)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4)
