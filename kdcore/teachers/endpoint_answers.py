"""What an endpoint's answer of status 200 says, however oddly it says it. Imports no client."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from kdcore.teachers.endpoint_errors import FailedAttemptError, one_line
from kdcore.teachers.text import TokenChoice

__all__ = ["Said", "read_answer", "well_formed", "without_key"]

SHORTEST_KEY = 12
MOST_TOKENS = 10**12


@frozen(kw_only=True)
class Said:
    """An answer.

    :param text: without halves of surrogate pairs.
    :param model: as the server names it; "" where it does not.
    :param finish: why it ended; ``"unknown"`` where the server's reason is no text.
    :param prompt_tokens: None: the server tells no number, or none that can be; so is ``answer_tokens``.
    :param tokens: with log-probabilities, where the server gave them.
    """

    text: str
    model: str
    finish: str
    prompt_tokens: int | None
    answer_tokens: int | None
    tokens: tuple[TokenChoice, ...]


def read_answer(content: bytes, key: str = "") -> Said:
    """Read a body of status 200, without the key where the server repeats it; its tokens are left out then.

    :raises FailedAttemptError: it is malformed, holds no answer, or tells of a failure.
    """
    whole = content.decode("utf-8-sig", "replace")
    body = without_key(whole, key)
    try:
        said = _said(json.loads(body), with_tokens=body == whole)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        said = None
    if said is None:
        raise FailedAttemptError(f"an answer that is malformed or empty ({one_line(body, key)})")
    if said.finish == "error":
        raise FailedAttemptError(f"an answer that ended in an error ({one_line(body, key)})")
    return said


def without_key(text: str, key: str) -> str:
    """A text with ``[key]`` in the place of the key, also where JSON escapes it.

    A key of less than 12 characters is none ("EMPTY", for servers that ask for nothing better), but may be a word.
    """
    if len(key) < SHORTEST_KEY:
        return text
    escaped = json.dumps(key)[1:-1]
    for form in (escaped.replace("/", "\\/"), escaped, key):
        text = text.replace(form, "[key]")
    return text


def well_formed(text: str) -> str:
    """The text with halves of surrogate pairs replaced: UTF-8 cannot hold them."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _said(body: Any, with_tokens: bool) -> Said:
    choice = body["choices"][0]
    message = choice["message"]
    text, refusal = _text(message.get("content")), message.get("refusal")
    finish = choice.get("finish_reason") or "stop"
    usage, choices = _mapping(body.get("usage")), _mapping(choice.get("logprobs")).get("content")
    if refusal and not text:
        text, finish = refusal if isinstance(refusal, str) else "", "content_filter"
    return Said(
        text=well_formed(text),
        model=str(body.get("model") or ""),
        finish=finish if isinstance(finish, str) else "unknown",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        answer_tokens=_count(usage.get("completion_tokens")),
        tokens=tuple(map(_token_choice, choices or ())) if with_tokens else (),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _count(value: Any) -> int | None:
    """A number of tokens; None: it is no such number."""
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return count if 0 <= count <= MOST_TOKENS else None


def _text(content: object) -> str:
    """A message's content; some servers give a list of parts."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "".join(part.get("text") or "" for part in content)
    if content is not None and not isinstance(content, str):
        raise TypeError
    return content or ""


def _token_choice(entry: Mapping[str, Any]) -> TokenChoice:
    alternatives = entry.get("top_logprobs") or ()
    pairs = [(well_formed(each["token"]), float(each["logprob"])) for each in alternatives]
    return TokenChoice(
        token=well_formed(entry["token"]),
        log_probability=float(entry["logprob"]),
        alternatives=tuple(sorted(pairs, key=lambda pair: -pair[1])),
    )
