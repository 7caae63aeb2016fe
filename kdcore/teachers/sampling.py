"""Sampling that is a function of the request alone: the same noise whatever batch the request is computed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import field, frozen
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

__all__ = ["Draw", "GumbelSampler", "RowLimits", "keep_most_probable"]


@frozen
class Draw:
    """How the tokens of one request are drawn.

    :param seed: of its noise.
    :param temperature: 0 takes the most probable token.
    :param top_p: only the most probable tokens that together have this probability; 1: all.
    :param top_k: only so many most probable tokens; 0: all.
    :param alternatives: how many tokens to keep the log-probabilities of at each place; None: not even the drawn one's.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    alternatives: int | None = None
    generator: torch.Generator = field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))


def keep_most_probable(scores: Tensor, top_p: float, top_k: int) -> Tensor:
    """The scores with all tokens but the most probable at minus infinity.

    :param scores: (vocabulary,) logits at the temperature of sampling.
    """
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered, places = scores.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        dropped = places[probabilities.cumsum(-1) - probabilities >= top_p]  # what those before them have is enough
        scores = scores.index_fill(0, dropped[dropped != places[0]], -torch.inf)
    return scores


class GumbelSampler(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise to log-probabilities: the most probable token then is a sample of the softmax.

    So a generation that takes the most probable token samples, each row with a generator of its own.

    :ivar choices: of each row and step, where asked for: the drawn token's log-probability and the most probable tokens
        with theirs, at temperature 1 and before any filter.
    """

    def __init__(self, draws: Sequence[Draw]) -> None:
        self._draws = draws
        self.choices: list[list[tuple[float, list[tuple[int, float]]]]] = [[] for _ in draws]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy scores, (rows, vocabulary) like ``scores``."""
        noisy = torch.stack([self._noisy(draw, row) for draw, row in zip(self._draws, scores.float())])
        for draw, chosen, row, choices in zip(self._draws, noisy.argmax(-1).tolist(), scores, self.choices):
            if draw.alternatives is not None:
                log_probabilities = row.float().log_softmax(-1)
                best = log_probabilities.topk(min(draw.alternatives, len(row)))
                alternatives = list(zip(best.indices.tolist(), best.values.tolist()))
                choices.append((log_probabilities[chosen].item(), alternatives))
        return noisy

    @staticmethod
    def _noisy(draw: Draw, scores: Tensor) -> Tensor:
        if draw.temperature == 0:
            return scores
        exponential = torch.empty(len(scores)).exponential_(generator=draw.generator)
        kept = keep_most_probable(scores / draw.temperature, draw.top_p, draw.top_k)
        return kept - exponential.log().to(scores.device)


class RowLimits(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at its own longest length, or where one of its stop texts has appeared.

    :param prompt: length of the padded prompts.
    :param longest: most tokens of each row's answer.
    :param stops: texts of each row.
    """

    def __init__(self, tokenizer: object, prompt: int, longest: Sequence[int], stops: Sequence[Sequence[str]]) -> None:
        self._tokenizer, self._prompt, self._longest, self._stops = tokenizer, prompt, longest, stops

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Whether each row is done, (rows,)."""
        answers = input_ids[:, self._prompt :]
        done = [
            answers.shape[1] >= longest or any(stop in self._tail(answer, stops) for stop in stops)
            for answer, longest, stops in zip(answers, self._longest, self._stops)
        ]
        return torch.tensor(done, device=input_ids.device)

    def _tail(self, answer: Tensor, stops: Sequence[str]) -> str:
        """The end of an answer's text, long enough to hold any of the stop texts that its last token may complete."""
        length = max((len(stop.encode()) for stop in stops), default=0)
        text: str = self._tokenizer.decode(answer[-length - 4 :], skip_special_tokens=True) if length else ""  # type: ignore[attr-defined]
        return text
