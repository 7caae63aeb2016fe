"""A transformers language model in this process, asked like an endpoint."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from attrs import frozen
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from kdcore.engine.seeds import derive
from kdcore.errors import InputError, RunError
from kdcore.model_source import expanded, gguf_file, loading, resolve_source
from kdcore.teachers.sampling import Draw, GumbelSampler, RowLimits
from kdcore.teachers.text import Completion, RefusedError, Request, TokenChoice, always
from kdcore.text_model import TextModel

__all__ = ["LocalClient"]

PARAMETERS = ("logprobs", "max_tokens", "seed", "stop", "temperature", "top_k", "top_logprobs", "top_p")
GATHERING_SECONDS = 0.005

log = logging.getLogger("kdcore")


@frozen
class _Job:
    """A request, made ready in the event loop.

    :ivar ids: of its prompt.
    """

    request: Request
    ids: Sequence[int]
    draw: Draw
    longest: int
    stops: Sequence[str]
    answer: asyncio.Future[Completion]
    may_send: Callable[[], None]

    def is_wanted(self) -> bool:
        """Whether anybody still waits for the answer, and may have it."""
        if not self.answer.done():
            try:
                self.may_send()
            except Exception as error:
                self.answer.set_exception(error)
        return not self.answer.done()


class LocalClient:
    """Runs a causal language model with transformers, up to ``in_flight`` requests in one batch.

    What arrives within 5 ms, or while a batch is computed in a thread, goes into the next one. An answer is a function
    of its request and sample: its noise is seeded by them, whatever its batch. Only rounding depends on the batch, so a
    token differs where two have all but equal scores.

    The prompt is what the tokenizer's chat template makes of the messages; without one, their contents joined by an
    empty line. Of the parameters it knows temperature, top_p, top_k, max_tokens, stop, seed, logprobs and top_logprobs.
    A JSON schema does not constrain what is generated, nor is it put into the prompt: `validated` alone checks it.
    Of the defaults that a model brings for generation only the tokens that end an answer are used. Weights are float32
    on a CPU and as stored elsewhere. Code that a model brings along is never run.

    :param model: its ``model`` is a folder, a hub name, ``package:MODULE``, or a GGUF file (needs the package gguf).
    :param device: of the weights.
    :raises InputError: it cannot be loaded.
    """

    def __init__(self, model: TextModel, *, device: torch.device | str = "cpu") -> None:
        self._settings = model
        self._tokenizer, self._model = _load(model.model, torch.device(device))
        self._ends = _ends(self._model, self._tokenizer)
        self._model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends) or None, pad_token_id=min(self._ends, default=0)
        )
        self._waiting: list[_Job] = []
        self._serving: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdcore-language-model")

    async def complete(self, request: Request, may_send: Callable[[], None] = always) -> Completion:
        """See `kdcore.teachers.text.TextClient.complete`."""
        job = self._job(request, may_send)
        self._waiting.append(job)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await job.answer

    async def close(self) -> None:
        """Wait for the batch that is being computed, then free the model."""
        for job in self._waiting:
            job.answer.cancel()
        self._waiting.clear()
        if self._serving is not None:
            await asyncio.wait([self._serving])
        self._thread.shutdown()
        del self._model

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(GATHERING_SECONDS)
            size = self._settings.in_flight
            taken, self._waiting = self._waiting[:size], self._waiting[size:]
            jobs = [job for job in taken if job.is_wanted()]
            if not jobs:
                continue
            try:
                completions = await loop.run_in_executor(self._thread, self._generate, jobs)
            except Exception as error:  # each of the callers gets it
                for job in jobs:
                    if not job.answer.done():
                        job.answer.set_exception(_failure(self._settings.model, error))
                continue
            for job, completion in zip(jobs, completions):
                if not job.answer.done():
                    job.answer.set_result(completion)

    def _job(self, request: Request, may_send: Callable[[], None]) -> _Job:
        """Make a request ready.

        :raises InputError: it has a parameter or attachment that this client does not know.
        :raises RefusedError: it is too long, empty, or of a form that the chat template does not know.
        """
        parameters = request.parameters
        if unknown := sorted(set(parameters) - set(PARAMETERS)):
            raise InputError(f"extra: a model run here knows no {unknown[0]}; it knows {', '.join(PARAMETERS)}")
        if request.attachments:
            raise InputError(f"{self._settings.model}: a model run here takes text only; name an endpoint for images")
        ids = self._prompt(request.messages)
        longest = int(parameters.get("max_tokens", self._settings.max_tokens))
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and len(ids) + longest > room:
            raise RefusedError(
                f"{self._settings.model}: the prompt of {len(ids)} tokens and an answer of {longest} do not fit the "
                f"model's {room}; shorten it or lower max_tokens"
            )
        draw = Draw(
            seed=derive(request.key(), request.sample),
            temperature=float(parameters.get("temperature", self._settings.temperature)),
            top_p=float(parameters.get("top_p", 1.0)),
            top_k=int(parameters.get("top_k", 0)),
            alternatives=int(parameters.get("top_logprobs") or 0) if parameters.get("logprobs") else None,
        )
        stop = parameters.get("stop") or []
        stops = [stop] if isinstance(stop, str) else list(stop)
        return _Job(request, ids, draw, longest, stops, asyncio.get_running_loop().create_future(), may_send)

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if self._tokenizer.chat_template:
            try:
                text = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
                )
            except TemplateError as error:
                raise RefusedError(
                    f"{self._settings.model}: its chat template refuses the messages ({error})"
                ) from None
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        if not ids:
            raise RefusedError(f"{self._settings.model}: the prompt is empty")
        return ids

    def _generate(self, jobs: Sequence[_Job]) -> list[Completion]:
        began = time.perf_counter()
        width = max(len(job.ids) for job in jobs)
        padded = [[0] * (width - len(job.ids)) + list(job.ids) for job in jobs]
        mask = [[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in jobs]
        longest = [job.longest for job in jobs]
        sampler = GumbelSampler([job.draw for job in jobs])
        limits = RowLimits(self._tokenizer, width, longest, [job.stops for job in jobs])
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor(padded, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                do_sample=False,
                max_new_tokens=max(longest),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([limits]),
            )
        seconds = time.perf_counter() - began
        answers = output[:, width:].tolist()
        return [
            self._completion(job, ids, choices, seconds) for job, ids, choices in zip(jobs, answers, sampler.choices)
        ]

    def _completion(self, job: _Job, ids: list[int], choices: Sequence[Any], seconds: float) -> Completion:
        ids = ids[: job.longest]
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        said = ids[:end]
        text = self._text(said)
        cut = min((text.find(stop) for stop in job.stops if stop in text), default=None)
        while cut is not None and any(stop in self._text(said[:-1]) for stop in job.stops):
            said = said[:-1]  # a row that was done went on with its batch
        kept = len(said)
        while cut is not None and len(self._text(said[:kept])) > cut:
            kept -= 1
        answer_tokens = len(said) + (end is not None and cut is None)
        return Completion(
            text=text[:cut],
            model=self._settings.model,
            finish="length" if end is None and cut is None else "stop",
            prompt_tokens=len(job.ids),
            answer_tokens=answer_tokens,
            seconds=seconds,
            price=self._settings.price(len(job.ids), answer_tokens),
            tokens=tuple(self._choice(token, *choice) for token, choice in zip(said[:kept], choices)),
        )

    def _choice(self, token: int, log_probability: float, alternatives: Sequence[tuple[int, float]]) -> TokenChoice:
        named = tuple((self._tokenizer.decode([other]), value) for other, value in alternatives)
        return TokenChoice(self._tokenizer.decode([token]), log_probability, named)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _load(source: str, device: torch.device) -> tuple[Any, Any]:
    path = gguf_file(source) if _may_hold_gguf(source) else None
    place, options = (resolve_source(source), {}) if path is None else (str(path.parent), {"gguf_file": path.name})
    dtype = torch.float32 if device.type == "cpu" else "auto"
    with loading(f"model: {source}"):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
        model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False, dtype=dtype, **options)
    return tokenizer, model.to(device).eval()


def _may_hold_gguf(source: str) -> bool:
    """Whether a GGUF file is what there is to load: a folder with a configuration is a model as it is."""
    return source.startswith("package:") or not (expanded(source) / "config.json").is_file()


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    named = model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    return {end for end in [*ends, tokenizer.eos_token_id] if end is not None}


def _failure(name: str, error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f"{name}: out of memory; lower in_flight or max_tokens, then resume the run")
    return error
