"""The reward of a response, and tables that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from kd_plugin_bai.tasks import read_tasks, reward

from kdcore.errors import InputError


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("65", 1),
        (" 6 5\n", 1),
        ("8+7=15, 3+2+1=6 #### 65", 1),
        ("#### 64 no: #### 65", 1),
        ("#### 65 #### 64", 0),
        ("8+7=15, 3+2+1=6 ####", 0),
        ("8+7=15, 3+2", 0),
        ("65.", 0),
        ("", 0),
    ],
)
def test_reward(response: str, right: float) -> None:
    assert reward(response, "65", "####") == right
    assert reward(response, "38 + 27 #### 65", "####") == right


def test_tasks_have_text_fields_and_ids(tasks: Path) -> None:
    splits = read_tasks(tasks, "prompt", "answer")
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 6, "validation": 6, "test": 6}
    assert splits["test"][3].data == {"prompt": "3+2=", "answer": "5"}
    assert splits["test"][3].id == "test-3"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.jsonl", '{"prompt": "1+1="}\n', r"train\.jsonl:1: .*'answer'"),
        ("test.jsonl", '{"prompt": "", "answer": "2"}\n', r"test\.jsonl:1: .*'prompt'"),
        (
            "train.jsonl",
            '{"prompt": [{"role": "user"}], "answer": "2"}\n',
            r"train\.jsonl:1: 'prompt' is \[.* give a text",
        ),
        ("validation.jsonl", None, "no validation split"),
    ],
)
def test_a_bad_table_is_one_line(tasks: Path, name: str, content: str | None, words: str) -> None:
    if content is None:
        (tasks / name).unlink()
    else:
        (tasks / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as error:
        read_tasks(tasks, "prompt", "answer")
    assert "\n" not in str(error.value)
