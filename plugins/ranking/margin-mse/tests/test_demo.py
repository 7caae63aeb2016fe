from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import ir_measures
import numpy
import pytest
from kd_plugin_margin_mse.demo import PACKAGES, demo_collection, demo_manifest
from kd_plugin_margin_mse.mining import bm25

from kdcore.errors import InputError
from kdcore.recipe import Example

SIZES = {"documents": 1200, "train": 500, "validation": 60, "test": 200}
Splits = Mapping[str, Sequence[Example]]


@pytest.fixture(scope="module")
def demo() -> Splits:
    return demo_collection(**SIZES, seed=0)


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_sizes_ids_and_judgements(demo: Splits) -> None:
    assert len(demo["corpus"]) == SIZES["documents"]
    documents = {document.id for document in demo["corpus"]}
    assert len(documents) == SIZES["documents"]
    for split in ("train", "validation", "test"):
        assert len(demo[split]) == SIZES[split]
        assert all(list(query["relevant"].values()) == [1] for query in demo[split])
        assert all(query["relevant"].keys() <= documents for query in demo[split])


def test_texts_are_distinct(demo: Splits) -> None:
    assert len({words(document["text"]) for document in demo["corpus"]}) == SIZES["documents"]
    questions = [words(query["query"]) for split in ("train", "validation", "test") for query in demo[split]]
    assert len(set(questions)) == len(questions)


def test_modules_do_not_straddle_splits(demo: Splits) -> None:
    groups = [{query.group for query in demo[split]} for split in ("train", "validation", "test")]
    assert all(groups)
    assert len(set.union(*groups)) == sum(map(len, groups))


def test_passages_do_not_repeat_the_question(demo: Splits) -> None:
    passages = {document.id: document["text"] for document in demo["corpus"]}
    for split in ("train", "validation", "test"):
        for query in demo[split]:
            (answer,) = query["relevant"]
            assert query["query"] not in passages[answer]
            assert 25 <= len(passages[answer].split()) <= 120
            assert 5 <= len(query["query"].split()) <= 25


def test_questions_and_answers_stand_in_the_source_that_their_id_names(demo: Splits) -> None:
    passages = {document.id: document["text"] for document in demo["corpus"]}
    folder = Path(numpy.__file__).parent
    checked = found = 0
    for query in (query for query in demo["train"] if query.group.startswith("numpy.")):
        path = folder.joinpath(*query.group.split(".")[1:])
        source = words((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        start = words(" ".join(passages[query.id.removeprefix("q:")].split()[:3]))
        checked += 1
        found += words(query["query"]) in source and start in source
    assert checked > 5
    assert found >= 0.8 * checked, "all but those with markup"


def test_equal_seeds_give_equal_collections(demo: Splits) -> None:
    def frozen(splits: Splits) -> dict[str, list[tuple[str, object]]]:
        return {name: [(example.id, dict(example.data)) for example in splits[name]] for name in splits}

    assert frozen(demo_collection(**SIZES, seed=0)) == frozen(demo)
    assert frozen(demo_collection(**SIZES, seed=1)) != frozen(demo)


def test_bm25_neither_solves_it_nor_fails(demo: Splits) -> None:
    rankings = bm25(demo["corpus"]).search([query["query"] for query in demo["test"]], 10)
    measure = ir_measures.nDCG @ 10
    measured = ir_measures.calc_aggregate(
        [measure],
        {query.id: query["relevant"] for query in demo["test"]},
        {query.id: dict(ranking) for query, ranking in zip(demo["test"], rankings)},
    )
    assert 0.3 < measured[measure] < 0.8


def test_manifest_names_installed_versions() -> None:
    manifest = demo_manifest()
    assert manifest["numpy"] == version("numpy")
    assert manifest.keys() == {"python", *PACKAGES}


def test_too_many_questions_are_refused() -> None:
    with pytest.raises(InputError, match="raise documents or ask for fewer"):
        demo_collection(documents=50, train=100, validation=1, test=1, seed=0)


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from kd_plugin_margin_mse import demo, formats, scores; "
        "demo.demo_collection(documents=60, train=10, validation=2, test=2, seed=0); "
        "print(sorted({'torch', 'scipy', 'transformers', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
