"""What an endpoint's failures mean: try again after some time, or one line for the user. Imports no client."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from kdcore.errors import InputError, KDCoreError, RunError
from kdcore.teachers.text import RefusedError, Request
from kdcore.text_model import TextModel

__all__ = ["FailedAttemptError", "judge", "one_line", "retry_after"]

LONGEST = 300
CONTEXT = re.compile(r"context[_ -]?(length|size|window)|too many tokens|prompt is too long", re.IGNORECASE)
FORMAT = re.compile(r"response_format|json_schema|structured output|grammar", re.IGNORECASE)
OF_ALL_REQUESTS = (401, 403, 404)
SPENT = ("insufficient_quota", "billing_hard_limit_reached")


class FailedAttemptError(Exception):
    """One attempt failed and another may succeed.

    :ivar wait: seconds that the server asks to wait; None: it does not say.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def one_line(text: object, key: str = "") -> str:
    """A server's words on one line of bounded length, without the key."""
    words = str(text)
    if key:
        words = words.replace(key, "[key]")
    words = " ".join(words.split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from ``retry-after-ms`` or ``Retry-After`` (seconds or an HTTP date); None: not said."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def judge(
    status: int, body: object, headers: Mapping[str, str], *, model: TextModel, request: Request, key: str
) -> FailedAttemptError | KDCoreError:
    """What to raise for an answer of HTTP status 400 or more.

    :param body: the error's object, or the body's text.
    """
    fields: Mapping[str, Any] = body if isinstance(body, Mapping) else {"message": body or ""}
    inner = fields.get("error")
    if isinstance(inner, Mapping):
        fields = inner
    said = one_line(fields.get("message") or inner or fields.get("detail") or "", key)
    codes = {str(fields.get(name)) for name in ("code", "type")}
    reason = f"HTTP {status}{f' ({said})' if said else ''}"
    if status == 402 or codes.intersection(SPENT):
        told = said or reason
        return RunError(f"{model.endpoint}: the account's quota is used up ({told}); raise it, then resume the run")
    if status in (408, 409, 429) or status >= 500:
        return FailedAttemptError(reason, retry_after(headers))
    kind = InputError if status in OF_ALL_REQUESTS else RefusedError
    return kind(f"{model.endpoint}: {_refusal(status, said, codes, fields, model, request, key)}")


def _refusal(
    status: int,
    said: str,
    codes: set[str],
    fields: Mapping[str, Any],
    model: TextModel,
    request: Request,
    key: str,
) -> str:
    variable = model.key_variable
    reason = f"HTTP {status}{f', {said}' if said else ''}"
    if status == 401:  # what the server says may hold a part of the key
        if not variable:
            return "asks for a key (HTTP 401); name its environment variable as key_variable"
        if not key:
            return f"asks for a key (HTTP 401), and {variable} is not set; export {variable}"
        return f"refuses the key in {variable} (HTTP 401); correct {variable}"
    if status == 403:
        return f"the key in {variable or '(none)'} may not use {request.model} ({reason}); use another key or model"
    if codes & {"context_length_exceeded", "exceed_context_size_error"} or CONTEXT.search(said):
        return f"the prompt is too long for {request.model} ({reason}); shorten it or lower max_tokens"
    if "model_not_found" in codes or status == 404:
        return f"knows no model {request.model} or no such address ({reason}); check model, and endpoint (often .../v1)"
    parameter = str(fields.get("param") or "")
    if request.schema is not None and (parameter.startswith("response_format") or FORMAT.search(said)):
        return (
            f"refuses the JSON schema of the answer ({reason}); with extra = {{ response_format = "
            '{ type = "json_object" } } it is told of no schema, and answers are checked all the same'
        )
    known = parameter if parameter in request.parameters else _named_in(said, request.parameters)
    if known == "max_tokens" and "max_completion_tokens" in said:
        return f"refuses max_tokens ({reason}); set extra = {{ max_completion_tokens = {model.max_tokens} }}"
    if known:
        return f"refuses the parameter {known} ({reason}); change or remove it"
    return f"refuses the request ({reason}); correct model, extra or the prompt"


def _named_in(text: str, names: Mapping[str, Any]) -> str:
    return next((name for name in names if re.search(rf"\b{re.escape(name)}\b", text)), "")
