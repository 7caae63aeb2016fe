"""What the answers of a journal cost, and how many were rejected, by reason."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from attrs import field, frozen

from kdcore.synthesis.journal_file import to_bytes, to_sql, to_text

__all__ = ["Totals", "models_of", "totals_of"]


@frozen(kw_only=True)
class Totals:
    """Sums over answers.

    :param requests: answers, rejected ones included.
    :param seconds: as if all had been asked one after the other.
    :param price: in the currency of the models' prices.
    :param rejected: answers by reason of rejection, the most frequent first.
    """

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    price: float = 0.0
    rejected: Mapping[str, int] = field(factory=dict)


def totals_of(connection: sqlite3.Connection, run: str | None = None, teacher: str | None = None) -> Totals:
    """Sums over the answers that a run paid for, of a teacher; of all where neither is named."""
    chosen = {name: value for name, value in (("run", run), ("teacher", teacher)) if value is not None}
    where = " AND ".join(["1", *(f"{name} = ?" for name in chosen)])
    values = [to_sql(to_bytes(value)) for value in chosen.values()]
    sums = "count(*), sum(prompt_tokens), sum(answer_tokens), total(seconds), total(price)"
    [[requests, prompt, answer, seconds, price]] = connection.execute(
        f"SELECT {sums} FROM answers WHERE {where}", values
    ).fetchall()
    rejected = connection.execute(
        f"SELECT rejected, count(*) FROM answers WHERE {where} AND rejected != '' GROUP BY rejected "
        "ORDER BY count(*) DESC, rejected",
        values,
    ).fetchall()
    return Totals(
        requests=requests,
        prompt_tokens=prompt or 0,
        answer_tokens=answer or 0,
        seconds=seconds,
        price=price,
        rejected={to_text(reason): count for reason, count in rejected},
    )


def models_of(connection: sqlite3.Connection) -> dict[str, int]:
    """Answers by the model that was asked, the most frequent first."""
    grouped = "SELECT model, count(*) FROM answers GROUP BY model ORDER BY count(*) DESC, model"
    return {to_text(model): count for model, count in connection.execute(grouped).fetchall()}
