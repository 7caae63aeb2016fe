"""Taxonomies: the built-in one, files, mappings, and the words that name an emotion."""

from __future__ import annotations

from pathlib import Path

import pytest
from kd_plugin_emo_pillars.taxonomy import GOEMOTIONS, read_taxonomy

from kdcore.errors import InputError


def taxonomy_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "taxonomy.txt"
    path.write_text(text, encoding="utf-8")
    read_taxonomy.cache_clear()
    return str(path)


def test_goemotions_has_28_labels_in_the_order_of_its_indices() -> None:
    taxonomy = read_taxonomy(GOEMOTIONS)
    assert len(taxonomy.labels) == 28
    assert [taxonomy.labels[index] for index in (0, 4, 17, 25, 27)] == [
        "admiration",
        "approval",
        "joy",
        "sadness",
        "neutral",
    ]
    assert all(label in taxonomy.index for label in taxonomy.words.values())


def test_names_are_found_whatever_their_case() -> None:
    taxonomy = read_taxonomy(GOEMOTIONS)
    assert taxonomy.label(" Joy ") == "joy"
    assert taxonomy.label("happiness") is None
    assert taxonomy.mapped("Happiness") == "joy"
    assert taxonomy.mapped("guilt") == "remorse"
    assert taxonomy.mapped("none") == "neutral"
    for word in ("other", "others", "weltschmerz"):
        assert taxonomy.mapped(word) is None


@pytest.mark.parametrize(
    ("label", "text", "word"),
    [
        ("anger", "I am so ANGRY now", "ANGRY"),
        ("anger", "Anger?", "Anger"),
        ("anger", "the danger is over, a hungry man", ""),
        ("love", "gloves and clover", ""),
        ("joy", "what a killjoy, enjoy", ""),
        ("fear", "I love this", ""),
        ("neutral", "The other dog walks by the river.", ""),
        ("neutral", "None of the others is here.", ""),
        ("neutral", "I feel neutral about it.", "neutral"),
    ],
)
def test_a_word_names_its_own_emotion_only(label: str, text: str, word: str) -> None:
    assert read_taxonomy(GOEMOTIONS).named(label, text) == word


def test_a_file_of_labels_and_mappings(tmp_path: Path) -> None:
    taxonomy = read_taxonomy(taxonomy_of(tmp_path, "# two\nGlee\nDread of heights\n\nmirth -> glee\n"))
    assert taxonomy.labels == ("Glee", "Dread of heights")
    assert taxonomy.mapped("MIRTH") == "Glee"
    assert taxonomy.named("Dread of heights", "my dread of heights") == "dread of heights"
    assert taxonomy.mapped("happiness") is None


def test_a_file_of_mappings_alone_adds_to_goemotions(tmp_path: Path) -> None:
    taxonomy = read_taxonomy(taxonomy_of(tmp_path, "mirth -> joy\nhappiness -> amusement\n"))
    assert len(taxonomy.labels) == 28
    assert taxonomy.mapped("mirth") == "joy"
    assert taxonomy.mapped("happiness") == "amusement", "the file's word goes before the built-in one"
    assert taxonomy.mapped("guilt") == "remorse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"taxonomy\.txt: names no label"),
        ("joy\nJOY\n", r"taxonomy\.txt:2: 'JOY' stands in line 1 too"),
        ("joy\nmirth -> jy\n", r"taxonomy\.txt:2: 'jy' is outside of the taxonomy; did you mean joy\?"),
        ("joy\nglee\njoy -> glee\n", r"taxonomy\.txt:3: 'joy' is a label itself"),
        ("joy\nmirth -> joy\nmirth -> joy", r"taxonomy\.txt:3: 'mirth' stands in line 2 too"),
        ("joy\n-> joy\n", r"taxonomy\.txt:2: '-> joy': write a label, or 'word -> label'"),
        ("joy\nmirth ->\n", r"taxonomy\.txt:2: 'mirth ->': write a label"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_taxonomy(taxonomy_of(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt: cannot be read"):
        read_taxonomy("nowhere.txt")
