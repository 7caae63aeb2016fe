"""A journal as JSON lines, and what an exported example says of the answers that it was made from."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kdcore.errors import InputError
from kdcore.files import placed
from kdcore.synthesis.journal_file import Answer, answer_name, explained, open_existing, rows

__all__ = ["answers_in", "export", "to_line", "writing"]


def export(journal: Path, file: Path, *, advance: Callable[[int], None] = lambda rows: None) -> int:
    """Write all answers of a journal to a new file, one line of JSON each, in the order in which they came.

    :param advance: called with a number of answers when they are written.
    :returns: how many answers.
    :raises InputError: the file exists, or an answer is damaged.
    """
    count = 0
    with writing(file) as lines:
        for answer in answers_in(journal):
            lines.write(to_line(_described(answer)))
            advance(1)
            count += 1
    return count


def answers_in(journal: Path) -> Iterator[Answer]:
    """All answers of a journal, in the order in which they came.

    :raises InputError: one is damaged.
    """
    with contextlib.closing(open_existing(journal)) as connection, explained(journal):
        for row in rows(connection):
            try:
                yield Answer.from_row(row)
            except ValueError as error:
                reason = f"{journal}: an answer is damaged ({error}); 'kdcore store verify' says which, and the fix"
                raise InputError(reason) from None


def _described(answer: Answer) -> dict[str, Any]:
    facts, said = answer.facts(), answer.completion
    return {
        "answer": answer_name(answer.key, answer.sample),
        "teacher": answer.teacher,
        "run": answer.run,
        "created": answer.created,
        "model": answer.model,
        "answered_by": said.model,
        **{name: facts[name] for name in ("messages", "parameters", "schema", "attachments", "identity")},
        "text": said.text,
        "finish": said.finish,
        "accepted": not answer.rejected,
        "rejected": answer.rejected,
        **{name: getattr(said, name) for name in ("prompt_tokens", "answer_tokens", "seconds", "price", "attempts")},
        "tokens": [
            {
                "token": each.token,
                "log_probability": each.log_probability,
                "alternatives": [
                    {"token": token, "log_probability": log_probability} for token, log_probability in each.alternatives
                ],
            }
            for each in said.tokens
        ],
    }


def to_line(value: Mapping[str, Any]) -> str:
    """One line of standard JSON: numbers that are not finite become null, lone surrogates are escaped."""
    line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(_finite(value), allow_nan=False)
    return line + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def writing(file: Path) -> Iterator[IO[str]]:
    """Yield a text file that becomes ``file``, which a user named, when the block ends without an error.

    :raises InputError: it exists, or cannot be made there.
    """
    if file.exists():
        raise InputError(f"{file}: exists, and nothing is overwritten; name a new file")
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    with placed(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = temporary.open("x", encoding="utf-8", newline="\n")
    try:
        with lines:
            yield lines
            lines.flush()
            os.fsync(lines.fileno())
        os.link(temporary, file)
    except FileExistsError:
        raise InputError(f"{file}: came there meanwhile, and is not overwritten; name a new file") from None
    except OSError as error:
        error.filename = str(file)  # a failed write does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
