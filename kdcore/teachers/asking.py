"""Ask the text teachers of a run: journal first, then the budget, then the teacher; check, and repair once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, define, evolve, field, frozen

from kdcore.errors import InputError, PluginError, RejectedError
from kdcore.recipe import Teacher
from kdcore.synthesis.ordered import stop_check
from kdcore.synthesis.slots import literal, plain
from kdcore.teachers.budget import Budget, Spending
from kdcore.teachers.clients import Clients
from kdcore.teachers.text import Attachment, Completion, RefusedError, Request
from kdcore.text_model import TextModel

if TYPE_CHECKING:
    from kdcore.synthesis.journal import Journal
    from kdcore.synthesis.journal_file import Answer as Stored

__all__ = ["Answer", "Budget", "Prompt", "TextTeachers"]

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
    :param refused: the completions before it, which ``check`` or the schema refused.
    """

    text: str
    value: Any
    key: str
    completion: Completion
    refused: Sequence[Completion] = ()

    @property
    def completions(self) -> Sequence[Completion]:
        """All that was paid for it."""
        return (*self.refused, self.completion)


@define
class Tally:
    """What one teacher was asked and answered, since the count began.

    :ivar paid: how many of the requests were not in the journal.
    :ivar price: of the answers that the run paid for, by this start or by an earlier one.
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

    def add(self, completion: Completion, paid: bool, price: float) -> None:
        """Count one completion, at the price that the run paid for it."""
        self.model = completion.model
        self.requests += 1
        self.paid += paid
        self.prompt_tokens += completion.prompt_tokens
        self.answer_tokens += completion.answer_tokens
        self.seconds += completion.seconds
        self.price += price


class TextTeachers:
    """The text teachers of a run, with their journal and budget; clients start at their first question.

    :param folder: of the journal.
    :param run: the run's identifier, under which the journal keeps what it paid.
    :param device: where models run that are loaded here.
    :param threads: of a model that runs on this machine's CPU.
    """

    def __init__(self, folder: Path, run: str, budget: Budget, device: Any = "cpu", threads: int = 1) -> None:
        self._path, self._run, self._budget = folder / "journal.sqlite", run, budget
        self._spending = Spending(budget)
        self._began = time.time()
        self._clients = Clients(device, threads)
        self._lock = threading.Lock()
        self._journal: Journal | None = None
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
        stored = self._complete(name, teacher, request)
        try:
            return self._answer(name, request, stored, check)
        except RejectedError as error:
            rejected = error
        turns = _repair_turns(stored.completion.text, str(rejected))
        repair = evolve(request, messages=[*messages, *turns], attached_to=len(messages) - 1)
        try:
            stored = self._complete(name, teacher, repair)
        except RefusedError as error:
            raise rejected from error
        return self._answer(name, repair, stored, check, rejected.completions)

    def _answer(
        self,
        name: str,
        request: Request,
        stored: Stored,
        check: Callable[[Any], Any] | None,
        refused: Sequence[Completion] = (),
    ) -> Answer:
        """The answer where schema and check accept it; else it is rejected in the journal, with the reason."""
        key, completion = stored.key, stored.completion
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
            raise RejectedError(reason, [*refused, completion]) from error
        if stored.rejected:
            self.journal.accept(key, request.sample)
        return Answer(completion.text, value, f"{key}/{request.sample}", completion, refused)

    def _complete(self, name: str, teacher: Teacher, request: Request) -> Stored:
        refuse_if_stopped = stop_check()
        refuse_if_stopped()

        def may_send() -> None:
            refuse_if_stopped()
            self._spending.refuse_if_spent()

        def pay() -> Completion:
            refuse_if_stopped()
            self._spending.begin()
            try:
                completion = self._from_teacher(teacher, request, may_send)
            except BaseException:
                self._spending.failed()
                raise
            self._spending.answered(completion.price)
            return completion

        stored, paid = self.journal.obtain(request, pay, teacher=name, run=self._run)
        ours = paid or (stored.run == self._run and stored.created < self._began)  # what this start paid is counted
        with self._lock:
            tally = self._tallies.setdefault(name, Tally())
            tally.add(stored.completion, paid, stored.completion.price if ours else 0.0)
        return stored

    def _from_teacher(self, teacher: Teacher, request: Request, may_send: Callable[[], None]) -> Completion:
        if isinstance(teacher.text, TextModel):
            self._refuse_without_prices(teacher.text)
            return self._clients.complete(teacher.text, request, may_send)
        assert teacher.text is not None
        began = time.monotonic()
        text = teacher.text(request)
        if not isinstance(text, str):
            raise PluginError(f"the rule of a text teacher gave a {type(text).__name__}; return a string")
        return Completion(text=text, model=request.model, seconds=time.monotonic() - began)

    def _refuse_without_prices(self, model: TextModel) -> None:
        """Refuse a budget that a model's answers would never use up; a model on this machine costs nothing."""
        if self._budget.max_cost is not None and model.is_remote and not (model.prompt_price or model.answer_price):
            raise InputError(
                f"max_cost: the prices of {model.model} at {model.endpoint} are 0, so it is never reached; set "
                "prompt_price and answer_price, or use --max-requests"
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
                self._spending.resume(spent.requests, spent.price)
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
        self._clients.close()
        if self._journal is not None:
            self._journal.close()
        self._journal = None


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
