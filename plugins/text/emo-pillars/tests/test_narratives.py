"""Stories of a folder, and their passages."""

from __future__ import annotations

from pathlib import Path

import pytest
from kd_plugin_emo_pillars.narratives import passages_of, read_stories

from kdcore.errors import InputError


def test_text_files_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "Three.", "id": "x"}\n{"text": "Four."}\n', encoding="utf-8")
    (tmp_path / "notes.md").write_text("no story", encoding="utf-8")
    assert read_stories(tmp_path) == {"a": "One.\n\nTwo.", "x": "Three.", "b-2": "Four."}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no story"),
        ({"a.txt": "  \n"}, r"a\.txt: the story is empty"),
        (
            {"a.txt": "One.", "b.jsonl": '{"text": "Two.", "id": "a"}\n'},
            r"b\.jsonl:1: the story 'a' stands in .+a\.tx",
        ),
        ({"b.jsonl": '{"story": "Two."}\n'}, r"b\.jsonl:1: no column 'text'"),
        ({"a.txt": b"\xff\xfe"}, r"a\.txt:1: no UTF-8"),
    ],
)
def test_bad_stories_are_refused_in_one_line(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_stories(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a folder of stories"):
        read_stories(tmp_path / "nowhere")


def test_passages_end_between_paragraphs_where_they_fit() -> None:
    text = "one two three.\n\nfour five.\n \nsix seven eight nine."
    passages = passages_of("s", text, 5)
    assert [passage.text for passage in passages] == ["one two three. four five.", "six seven eight nine."]
    assert [(passage.story, passage.number) for passage in passages] == [("s", 0), ("s", 1)]


def test_long_paragraphs_are_cut_between_sentences_and_long_sentences_between_words() -> None:
    text = "a b c. d e f g. h i\nj k l m n o p."
    passages = [passage.text for passage in passages_of("s", text, 4)]
    assert passages == ["a b c.", "d e f g.", "h i j k", "l m n o", "p."]
    assert " ".join(passages).split() == text.split(), "nothing is lost"


def test_quotes_close_with_the_sentence_that_they_are_in() -> None:
    text = '"Go away!" said the Fox. (The Crow laughed.) "No," she said. “Why?”'
    passages = [passage.text for passage in passages_of("s", text, 3)]
    assert passages == ['"Go away!"', "said the Fox.", "(The Crow laughed.)", '"No," she said.', "“Why?”"]
