"""Responses to prompts, and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kd_plugin_bai.tasks import reward
from kdcore.data.batch import Batch
from kdcore.recipe import Example, Metric
from kdcore.run import Run

__all__ = ["as_prompt", "as_text", "measure"]


def as_prompt(prompt: str, chat: bool) -> Any:
    """A prompt as trl takes it: the text, or with ``chat`` a conversation of one message of the user."""
    return [{"role": "user", "content": prompt}] if chat else prompt


def as_text(completion: Any) -> str:
    """A completion as trl gives it, the text or a conversation, as text."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def measure(
    run: Run, model: Any, examples: str | Sequence[Example], tokenizer: Any, *, marker: str, longest: int, chat: bool
) -> list[Metric]:
    """Reward, length in tokens and truncated share of the most probable responses (greedy).

    The length counts the token that ends a response. A response is truncated where it has none within the limit.

    :param marker: see `kd_plugin_bai.tasks.reward`.
    :param longest: tokens of the longest response.
    :param chat: prompts are messages of the tokenizer's chat template.
    """
    ends = _ends(model, tokenizer)

    def respond(called: Any, batch: Batch) -> dict[str, torch.Tensor]:
        inputs = _encoded(tokenizer, [example["prompt"] for example in batch.examples], chat).to(run.device)
        settings = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        written = called.generate(**inputs, **settings, eos_token_id=sorted(ends))[:, inputs["input_ids"].shape[1] :]
        responses = [_until_end(tokens, ends) for tokens in written.tolist()]
        texts = tokenizer.batch_decode([tokens for tokens, _ in responses], skip_special_tokens=True)
        rewards = [reward(text, example["answer"], marker) for text, example in zip(texts, batch.examples, strict=True)]
        lengths = [len(tokens) for tokens, _ in responses]
        truncated = [float(not ended) for _, ended in responses]
        figures = {"reward": rewards, "length": lengths, "truncated": truncated}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in figures.items()}

    chosen = run.data[examples] if isinstance(examples, str) else examples
    rows = run.predict(
        model, chosen, respond, item=lambda example: {"input_ids": tokenizer(example["prompt"])["input_ids"]}
    )
    metrics = []
    for name, better in (("reward", "higher"), ("length", "higher"), ("truncated", "lower")):
        samples = {example.id: float(row[name]) for example, row in zip(chosen, rows, strict=True)}
        metrics.append(Metric(name, sum(samples.values()) / len(samples), better, samples))  # type: ignore[arg-type]
    return metrics


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a response, as trl counts them."""
    declared = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}


def _encoded(tokenizer: Any, prompts: Sequence[str], chat: bool) -> Any:
    if not chat:
        return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        [as_prompt(prompt, chat) for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_dict=True,
    )


def _until_end(tokens: Sequence[int], ends: set[int]) -> tuple[Sequence[int], bool]:
    """The tokens up to the first that ends a response, and whether there is one."""
    place = next((number for number, token in enumerate(tokens) if token in ends), None)
    return (tokens, False) if place is None else (tokens[: place + 1], True)
