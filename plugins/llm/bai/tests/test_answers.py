"""Responses are measured as they are: their end, their length, their answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_plugin_bai.answers import as_prompt, as_text, measure
from kd_plugin_bai.demo import demo_tokenizer

from kdcore.recipe import Example
from kdcore.run import Run

TOKENIZER: Any = demo_tokenizer()


@pytest.fixture
def says(small_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Any]:
    """A model that continues each prompt with a text, whatever the others of its batch are."""

    def make(texts: dict[str, str]) -> Any:
        model = small_model(0)

        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
            from transformers.modeling_outputs import CausalLMOutputWithPast

            logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
            for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool())):
                written = TOKENIZER.decode(ids[mask])
                prompt = next(prompt for prompt in texts if written.startswith(prompt))
                whole = TOKENIZER(prompt + texts[prompt])["input_ids"]
                logits[row, -1, whole[min(int(mask.sum()), len(whole) - 1)]] = 9.0
            return CausalLMOutputWithPast(logits=logits)

        monkeypatch.setattr(model, "forward", forward)
        model.generation_config.use_cache = False
        return model

    return make


def test_reward_length_and_truncation(says: Callable[[dict[str, str]], Any], tmp_path: Path) -> None:
    responses = {"1+1=": "2\n", "38+27=": "8+7=15 #### 65\n", "5+5=": "10 and so on", "2+2=": "5\n"}
    answers = {"1+1=": "2", "38+27=": "65", "5+5=": "10", "2+2=": "4"}
    examples = [Example({"prompt": p, "answer": a}, id=p) for p, a in answers.items()]
    run = Run(folder=tmp_path)
    found = measure(run, says(responses), examples, TOKENIZER, marker="####", longest=16, chat=False)
    samples = {metric.name: metric.samples for metric in found}
    assert samples["reward"] == {"1+1=": 1, "38+27=": 1, "5+5=": 0, "2+2=": 0}
    assert samples["length"] == {"1+1=": 2, "38+27=": 15, "5+5=": 16, "2+2=": 2}
    assert samples["truncated"] == {"1+1=": 0, "38+27=": 0, "5+5=": 1, "2+2=": 0}
    assert {metric.name: metric.value for metric in found} == {"reward": 0.5, "length": 8.75, "truncated": 0.25}


def test_prompts_and_completions_are_texts_or_conversations() -> None:
    assert as_prompt("1+1=", chat=False) == "1+1="
    assert as_prompt("1+1=", chat=True) == [{"role": "user", "content": "1+1="}]
    assert as_text("2") == as_text([{"role": "assistant", "content": "2"}]) == "2"
