"""The demo's sums, texts and tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from kd_plugin_bai.demo import MARKER, PIECE, PROSE, SUMS, demo_splits, demo_tokenizer, new_model, working
from kd_plugin_bai.tasks import reward
from transformers import AutoTokenizer

SPLITS = demo_splits()


def test_the_working_of_every_sum_is_right() -> None:
    for first in range(10, 100):
        for second in range(10, 100):
            steps, _, total = working(first, second).partition(f" {MARKER}")
            units, tens = (step.split("=") for step in steps.split(", "))
            assert eval(units[0]) == int(units[1])
            assert eval(tens[0]) == int(tens[1])
            assert 10 * int(tens[1]) + int(units[1]) % 10 == int(total) == first + second


def test_no_sum_is_in_two_splits_nor_a_tested_one_in_the_corpus() -> None:
    prompts = {split: {e["prompt"] for e in SPLITS[split]} for split in ("train", "validation", "test")}
    assert {split: len(each) for split, each in prompts.items()} == {"train": 7800, "validation": 100, "test": 200}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))
    held = prompts["validation"] | prompts["test"]
    written = {found for e in SPLITS["corpus"] for found in re.findall(r"(?<=\n)\d\d\+\d\d=", e["text"])}
    assert len(written) > 5000
    assert not written & held


def test_the_short_and_the_long_answer_of_an_example_have_the_reward() -> None:
    for example in SPLITS["test"]:
        assert reward(example["answer"], example["answer"], MARKER) == 1
        assert reward(example["working"], example["answer"], MARKER) == 1


def test_the_corpus_is_prose_and_written_sums() -> None:
    texts = [example["text"] for example in SPLITS["corpus"]]
    assert {len(text) for text in texts} == {PIECE}
    prose, sums = texts[:PROSE], texts[PROSE:]
    assert len(sums) == SUMS
    assert sum(sum(map(str.isalpha, text)) > PIECE / 2 for text in prose) > 4000
    assert all(set(text) <= set("0123456789+=,# \n") for text in sums)
    assert sum(" #### " in text for text in sums) > 4000


def test_the_tokenizer_is_saved_and_loses_nothing(tmp_path: Path) -> None:
    demo_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for split in ("corpus", "train"):
        for example in SPLITS[split][:50]:
            text = example["text"] if split == "corpus" else example["prompt"] + example["working"]
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text


def test_a_model_is_drawn_from_the_global_generator() -> None:
    torch.manual_seed(1)
    first = new_model()
    torch.manual_seed(1)
    second = new_model()
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert sum(parameter.numel() for parameter in first.parameters()) < 150_000
