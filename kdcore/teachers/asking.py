"""Ask the text teachers of a run: journal first, then the budget, then the teacher; check, and repair once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import asdict, define, evolve, field, frozen

from kdcore.errors import BudgetError, InputError, PluginError, RejectedError
from kdcore.recipe import Teacher
from kdcore.synthesis.ordered import refuse_if_stopped
from kdcore.synthesis.slots import literal, plain
from kdcore.teachers.text import Attachment, Completion, RefusedError, Request, TextClient
from kdcore.text_model import TextModel

if TYPE_CHECKING:
    from kdcore.synthesis.journal import Journal

__all__ = ["Answer", "Budget", "Prompt", "TextTeachers"]

T = TypeVar("T")
Prompt = str | Sequence[Mapping[str, str]]

NO_ANSWER = "(no answer)"  # for servers and chat templates that refuse an empty turn
REPAIR = "Your answer cannot be used: {reason} Answer again, in the form that was asked for and nothing else."
KEPT_SAMPLES = 20


@frozen
class Answer:
    """What a text teacher answered.

    :param text: as it stands.
    :param value: what ``check`` made of it; without one the value that the schema asked for, or the text.
    :param key: of its row in the journal, for ``Example.answers``.
    :param completion: tokens, price, seconds and log-probabilities.
    """

    text: str
    value: Any
    key: str
    completion: Completion


@frozen
class Budget:
    """What a run may ask of its text teachers; None is no limit.

    :param max_cost: in the currency of the models' prices, over all starts of the run.
    :param max_requests: answers asked for and not found in the journal, over all starts of the run.
    :param max_seconds: from the first request of this start.
    """

    max_cost: float | None = None
    max_requests: int | None = None
    max_seconds: float | None = None


@define
class Tally:
    """What one teacher was asked and answered, since the count began.

    :ivar paid: how many of the requests were not in the journal.
    :ivar rejected: reason to count; reasons are told apart by what stands before their first colon.
    """

    model: str = ""
    requests: int = 0
    paid: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    price: float = 0.0
    rejected: Counter[str] = field(factory=Counter)

    def add(self, completion: Completion, paid: bool) -> None:
        """Count one completion."""
        self.model = completion.model
        self.requests += 1
        self.paid += paid
        self.prompt_tokens += completion.prompt_tokens
        self.answer_tokens += completion.answer_tokens
        self.seconds += completion.seconds
        self.price += completion.price


class _EventLoop:
    """An event loop in a thread of its own, in which clients live."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kdcore-ask", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its result."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop; what still runs there is cancelled, and those who wait for it are told."""
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class TextTeachers:
    """The text teachers of a run, with their journal and budget; clients start at their first question.

    :param folder: of the journal.
    :param run: the run's identifier, under which the journal keeps what it paid.
    :param device: where models run that are loaded here.
    :param threads: of a model that runs on this machine's CPU.
    """

    def __init__(self, folder: Path, run: str, budget: Budget, device: Any = "cpu", threads: int = 1) -> None:
        self._path, self._run, self._budget = folder / "journal.sqlite", run, budget
        self._device, self._threads = device, threads
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._loop: _EventLoop | None = None
        self._clients: dict[str, tuple[TextClient, threading.Semaphore]] = {}
        self._began: float | None = None
        self._requests, self._price = 0, 0.0
        self.reset_counts()

    # Asking

    def ask(
        self,
        name: str,
        teacher: Teacher,
        prompt: Prompt,
        *,
        check: Callable[[Any], Any] | None = None,
        schema: Mapping[str, Any] | None = None,
        attachments: Sequence[Attachment] = (),
        sample: int = 0,
        parameters: Mapping[str, Any] | None = None,
    ) -> Answer:
        """One checked answer; see `kdcore.run.Run.ask`."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(each) for each in prompt]
        try:
            request = Request(
                model=model_name(name, teacher),
                messages=messages,
                parameters=plain({**_parameters(teacher), **(parameters or {})}, "parameters"),
                schema=None if schema is None else plain(schema, "schema"),
                attachments=tuple(attachments),
                identity=_identity(teacher),
                sample=sample,
            )
        except TypeError as error:
            raise InputError(f"teacher {name}: {error}") from None
        completion = self._complete(name, teacher, request)
        try:
            return self._answer(name, request, completion, check)
        except RejectedError as error:
            rejected = error
        turns = _repair_turns(completion.text, str(rejected))
        repair = evolve(request, messages=[*messages, *turns], attached_to=len(messages) - 1)
        try:
            completion = self._complete(name, teacher, repair)
        except RefusedError as error:
            raise rejected from error
        return self._answer(name, repair, completion, check)

    def _answer(
        self, name: str, request: Request, completion: Completion, check: Callable[[Any], Any] | None
    ) -> Answer:
        """The answer where schema and check accept it; else it is rejected in the journal, with the reason."""
        key = request.key()
        try:
            value: Any = completion.text
            if request.schema is not None:
                from kdcore.teachers.llm import validated

                value = validated(request.schema, completion.text)
            if check is not None:
                value = check(value)
        except ValueError as error:
            reason = " ".join(str(error).split()) or "refused"
            if completion.finish == "length":
                reason = f"cut off at {completion.answer_tokens} tokens: {reason}"
            self._reject(name, request, completion, key, reason)
            raise RejectedError(reason) from error
        return Answer(completion.text, value, f"{key}/{request.sample}", completion)

    def _complete(self, name: str, teacher: Teacher, request: Request) -> Completion:
        refuse_if_stopped()

        def pay() -> Completion:
            refuse_if_stopped()
            with self._lock:
                self._refuse_beyond_budget()
                self._requests += 1
            completion = self._from_teacher(teacher, request)
            with self._lock:
                self._price += completion.price
            return completion

        completion, paid = self.journal.obtain(request, pay, teacher=name, run=self._run)
        with self._lock:
            self._tallies.setdefault(name, Tally()).add(completion, paid)
        return completion

    def _from_teacher(self, teacher: Teacher, request: Request) -> Completion:
        if not isinstance(teacher.text, TextModel):
            assert teacher.text is not None
            began = time.monotonic()
            text = teacher.text(request)
            if not isinstance(text, str):
                raise PluginError(f"the rule of a text teacher gave a {type(text).__name__}; return a string")
            return Completion(text=text, model=request.model, seconds=time.monotonic() - began)
        client, slots = self._client(teacher.text)
        with slots:
            refuse_if_stopped()
            assert self._loop is not None
            return self._loop.run(client.complete(request))

    def _client(self, model: TextModel) -> tuple[TextClient, threading.Semaphore]:
        with self._lock:
            key = repr(model)
            if key not in self._clients:
                from kdcore.teachers.llm import client_of

                self._loop = self._loop or _EventLoop()
                client = client_of(model, device=self._device, threads=self._threads)
                self._clients[key] = client, threading.Semaphore(model.in_flight)
            return self._clients[key]

    def _refuse_beyond_budget(self) -> None:
        self._began = self._began or time.monotonic()
        spent = {
            "max_cost": self._price,
            "max_requests": self._requests,
            "max_seconds": time.monotonic() - self._began,
        }
        for limit, value in spent.items():
            most = getattr(self._budget, limit)
            if most is not None and value >= most:
                flag = "--" + limit.replace("_", "-")
                raise BudgetError(
                    f"the budget is spent: {value:,.4g} of {limit} {most:,.4g}; every answer is kept, go on with a "
                    f"larger {flag}"
                )

    # Journal and counts

    @property
    def journal(self) -> Journal:
        """The journal, opened at first use."""
        with self._lock:
            if self._journal is None:
                from kdcore.synthesis.journal import Journal

                self._journal = Journal.open(self._path)
                spent = self._journal.totals(run=self._run)
                self._requests, self._price = spent.requests, spent.price
            return self._journal

    def _reject(self, name: str, request: Request, completion: Completion, key: str, reason: str) -> None:
        self.journal.reject(key, request.sample, reason)
        with self._lock:
            self._tallies[name].rejected[reason.partition(":")[0]] += 1
            if len(self.rejected_samples) < KEPT_SAMPLES:
                prompt = request.messages[-1]["content"]
                self.rejected_samples.append({"reason": reason, "text": completion.text, "prompt": prompt})

    def reset_counts(self) -> None:
        """Begin to count anew: a round of synthesis begins."""
        with self._lock:
            self._tallies: dict[str, Tally] = {}
            self.rejected_samples: list[dict[str, str]] = []

    def counts(self) -> dict[str, dict[str, Any]]:
        """The `Tally` of each teacher since `reset_counts`, as JSON values."""
        with self._lock:
            return {name: {**asdict(tally), "rejected": dict(tally.rejected)} for name, tally in self._tallies.items()}

    def close(self) -> None:
        """Close clients, event loop and journal."""
        if self._loop is not None:
            for client, _ in self._clients.values():
                self._loop.run(client.close())
            self._loop.close()
        if self._journal is not None:
            self._journal.close()
        self._clients, self._loop, self._journal = {}, None, None


def _repair_turns(text: str, reason: str) -> list[dict[str, str]]:
    """What follows a question whose answer was refused."""
    return [
        {"role": "assistant", "content": text if text.strip() else NO_ANSWER},
        {"role": "user", "content": REPAIR.format(reason=literal(reason))},
    ]


def model_name(name: str, teacher: Teacher) -> str:
    """What a text teacher is called in the journal: the model's name, for a rule the teacher's."""
    return teacher.text.model if isinstance(teacher.text, TextModel) else name


def _identity(teacher: Teacher) -> str:
    own = teacher.text.identity if isinstance(teacher.text, TextModel) else ""
    return "\n".join(part for part in (own, teacher.identity) if part)


def _parameters(teacher: Teacher) -> dict[str, Any]:
    if not isinstance(teacher.text, TextModel):
        return {}
    model = teacher.text
    return {"temperature": model.temperature, "max_tokens": model.max_tokens, **model.extra}
