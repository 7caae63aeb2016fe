"""A question to a text model and its completion, as clients send them and the journal keeps them."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from attrs import field, frozen

from kdcore.errors import InputError

__all__ = ["Attachment", "Completion", "RefusedError", "Request", "TextClient", "TokenChoice", "always"]

CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class RefusedError(InputError):
    """The teacher refuses this request, which is too long or of a form that it does not take; others may pass."""


@frozen
class Attachment:
    """A file that goes with a message of a request, such as an image.

    :param media_type: as of HTTP, ``"image/png"``.
    :param data: its bytes.
    """

    media_type: str
    data: bytes = field(repr=False)


def _whole(number: Any) -> int:
    """A plain integer: the journal stores no other."""
    try:
        return int(operator.index(number))
    except TypeError:
        raise TypeError(f"sample is {number!r}: give an integer") from None


@frozen(kw_only=True)
class Request:
    """One question, with all that its answer depends on but chance.

    :param model: the model's name.
    :param messages: role and content of each turn, as in a chat: ``{"role": "user", "content": "..."}``.
    :param parameters: of sampling, as OpenAI's chat completions name them (temperature, max_tokens, stop, seed,
        logprobs, top_logprobs, ...), JSON values.
    :param schema: the JSON schema that the answer must satisfy; None: free text.
    :param attachments: go with one of the messages.
    :param attached_to: the index of that message; None: the last.
    :param identity: anything else that tells the model from others of its name.
    :param sample: an integer of any type, which tells apart several answers to the same question.
    :raises TypeError: ``sample`` is no integer.
    """

    model: str
    messages: Sequence[Mapping[str, str]]
    parameters: Mapping[str, Any] = field(factory=dict)
    schema: Mapping[str, Any] | None = None
    attachments: Sequence[Attachment] = ()
    attached_to: int | None = None
    identity: str = ""
    sample: int = field(default=0, converter=_whole)

    def facts(self) -> dict[str, Any]:
        """All of it but the sample, as JSON values; attachments by their sha256."""
        return {
            "model": self.model,
            "identity": self.identity,
            "messages": [dict(message) for message in self.messages],
            "parameters": dict(self.parameters),
            "schema": self.schema,
            "attachments": [
                {"media_type": each.media_type, "sha256": hashlib.sha256(each.data).hexdigest()}
                for each in self.attachments
            ],
            **({} if self.attached_to is None or not self.attachments else {"attached_to": self.attached_to}),
        }

    def canonical(self) -> bytes:
        """`facts` as JSON of one form, UTF-8 in which lone surrogates pass."""
        return CANONICAL.encode(self.facts()).encode("utf-8", "surrogatepass")

    def key(self) -> str:
        """The sha256 of `canonical`, 64 hexadecimal digits: with the sample it names a completion in the journal."""
        return hashlib.sha256(self.canonical()).hexdigest()


@frozen
class TokenChoice:
    """One token of a completion.

    :param token: its text.
    :param log_probability: natural logarithm.
    :param alternatives: the most probable tokens at this place with their log-probabilities, the most probable first.
    """

    token: str
    log_probability: float
    alternatives: Sequence[tuple[str, float]] = ()


@frozen(kw_only=True)
class Completion:
    """What a text model said, and what it cost.

    :param text: the answer; empty where there was none.
    :param model: as the server names the model that answered.
    :param finish: why it ended: ``"stop"``, ``"length"`` (cut off), ``"content_filter"``.
    :param prompt_tokens: as the server counts them; so are ``answer_tokens``.
    :param seconds: from sending the attempt that succeeded to its last byte.
    :param price: in the currency of the model's prices; 0 where none are given.
    :param attempts: how often it was sent.
    :param tokens: with log-probabilities, where they were asked for.
    """

    text: str
    model: str = ""
    finish: str = "stop"
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    price: float = 0.0
    attempts: int = 1
    tokens: Sequence[TokenChoice] = ()


def always() -> None:
    """Any request may be sent."""


class TextClient(Protocol):
    """Anything that completes requests: an endpoint, a local model. Used in one event loop."""

    async def complete(self, request: Request, may_send: Callable[[], None] = always) -> Completion:
        """Complete one request, after as many retries as its configuration allows.

        :param may_send: called right before each attempt is sent, and some times a second while it waits; whatever it
            raises ends the request. An attempt that was sent is waited for.
        :raises RunError: the teacher cannot be reached, or failed too often; the run can be resumed.
        :raises RefusedError: it refuses this request, such as a prompt that is too long.
        :raises InputError: it refuses every request (key, model name).
        """
        ...

    async def close(self) -> None:
        """Release connections, processes and memory."""
        ...
