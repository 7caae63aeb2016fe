"""Answers that must satisfy a JSON schema: checked here, whatever the server promises."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kdcore.errors import InputError, PluginError

__all__ = ["validated"]

FENCE = "```"
LONGEST = 200


def validated(schema: Mapping[str, Any], text: str) -> Any:
    """The JSON value that an answer holds, if it satisfies the schema.

    A fence of three backquotes around the whole answer, as chat models like to write it, is taken off.

    :param schema: of JSON Schema, draft 2020-12 unless its ``$schema`` names another. References lead nowhere outside
        of it.
    :raises ValueError: the answer is no JSON (what Python adds to it, such as NaN, is none), holds a number or text
        that cannot be written again (1e999, half of a surrogate pair), or breaks the schema; the short message names
        the place.
    :raises PluginError: the schema itself is wrong.
    :raises InputError: jsonschema is not installed.
    """
    validator = _validator(json.dumps(schema, sort_keys=True))
    try:
        value = json.loads(_without_fence(text), parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("no JSON: holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("no JSON: nested too deeply") from None
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        problem = best_match(validator.iter_errors(value))
    except Unresolvable as error:
        raise PluginError(f"JSON schema: {error}; a reference must stay inside of the schema") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if problem is not None:
        raise ValueError(_short(f"breaks the schema: {problem.json_path}: {problem.message}"))
    return value


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry
    except ImportError:
        raise InputError('answers by JSON schema need jsonschema: pip install "kdcore[llm]"') from None
    parsed = json.loads(schema)
    kind = validator_for(parsed, default=Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except SchemaError as error:
        raise PluginError(_short(f"JSON schema, {error.json_path}: {error.message}")) from None
    return kind(parsed, registry=Registry())


def _without_fence(text: str) -> str:
    first, _, rest = text.strip().partition("\n")
    opened = first.removeprefix(FENCE)
    if opened == first or opened.strip().lower() not in ("", "json") or not rest.endswith(FENCE):
        return text
    return rest.removesuffix(FENCE)


def _refuse(constant: str) -> None:
    raise ValueError(f"no JSON: {constant} is no JSON value")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(_short(f"no JSON: {number} is no number that can be held"))
    return value


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
