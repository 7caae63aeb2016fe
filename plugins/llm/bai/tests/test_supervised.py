"""What the demo's models learn from: the response alone, up to its end."""

from __future__ import annotations

from typing import Any

import torch
from kd_plugin_bai.demo import demo_tokenizer
from kd_plugin_bai.supervised import encode, learned, next_token_loss

from kdcore.data.batch import Batch
from kdcore.data.padding import pad
from kdcore.recipe import Example

TOKENIZER: Any = demo_tokenizer()
EXAMPLES = [
    Example({"prompt": "38+27=", "answer": "65", "text": "prose"}),
    Example({"prompt": "1+1=", "answer": "2", "text": "xy"}),
]


def batch(response: str) -> Batch:
    return Batch(pad([encode(TOKENIZER, example, response) for example in EXAMPLES]), EXAMPLES)


def test_a_response_is_learned_up_to_its_end_and_no_prompt() -> None:
    answers = batch("answer")
    tokens = [answers["input_ids"][row][learned(answers)[row]].tolist() for row in range(2)]
    assert [TOKENIZER.decode(each) for each in tokens] == ["65\n", "2\n"]


def test_a_text_is_learned_but_for_its_first_token() -> None:
    texts = batch("text")
    tokens = [texts["input_ids"][row][learned(texts)[row]].tolist() for row in range(2)]
    assert [TOKENIZER.decode(each) for each in tokens] == ["rose", "y"]


def test_the_loss_is_that_of_transformers_on_the_same_labels(small_model: Any) -> None:
    model, total = small_model(0), torch.zeros(())
    for example in EXAMPLES:
        item = encode(TOKENIZER, example, "answer")
        ids = torch.tensor([item["input_ids"]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < item["begin"], -100)
        total = total + model(input_ids=ids, labels=labels).loss * (labels != -100).sum()
    torch.testing.assert_close(next_token_loss(model, batch("answer")), total)
