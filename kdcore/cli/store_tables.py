"""What ``kdcore store`` prints of stores and journals."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdcore.reports.summary import size
from kdcore.synthesis.journal_inventory import JournalFacts
from kdcore.teachers.inventory import StoreFacts

__all__ = ["line", "print_journals", "print_stores", "to_json"]

STORES = ("store", "rows", "outputs", "size", "a row", "teacher", "kdcore", "last used")
COSTS = ("tokens in", "tokens out", "seconds", "price")
JOURNALS = ("journal", "answers", "rejected", *COSTS, "models", "size", "last used")
NUMBERS = ("rows", "size", "a row", "answers", *COSTS)
NAMED, LONGEST = 5, 40


def to_json(facts: StoreFacts | JournalFacts) -> dict[str, Any]:
    """All that is known, as JSON values; a store has ``folder``, a journal ``file``."""
    used = datetime.datetime.fromtimestamp(facts.used, datetime.UTC).isoformat(timespec="seconds")
    if isinstance(facts, StoreFacts):
        return {**attrs.asdict(facts), "folder": str(facts.folder), "used": used}
    known = {**attrs.asdict(facts), "file": str(facts.file), "used": used}
    return {**known, **known.pop("totals")}


def line(facts: StoreFacts | JournalFacts) -> str:
    """A store or journal in one line."""
    if isinstance(facts, StoreFacts):
        return f"{facts.folder}: {facts.rows:,} rows, {size(facts.bytes)}, last used {_ago(facts.used)}"
    count = f"{facts.totals.requests:,} answers for {facts.totals.price:,.2f}"
    return f"{facts.file}: {count}, {size(facts.bytes)}, last used {_ago(facts.used)}"


def print_stores(found: Sequence[StoreFacts]) -> None:
    """A table with a row for each store."""
    rows = []
    for facts in found:
        outputs = f"DAMAGED: {facts.problem}" if facts.problem else "; ".join(facts.outputs)
        row = size(facts.bytes / facts.rows) if facts.rows else "–"
        known = (facts.teacher or "–", facts.kdcore or "–", _ago(facts.used))
        rows.append((facts.folder.name, f"{facts.rows:,}", outputs, size(facts.bytes), row, *known))
    _print(STORES, rows)


def print_journals(found: Sequence[JournalFacts]) -> None:
    """A table with a row for each journal."""
    rows = []
    for facts in found:
        totals = facts.totals
        rejected = f"{sum(totals.rejected.values()):,}{_counts(totals.rejected, ' (', ')')}"
        if facts.problem:
            rejected = f"DAMAGED: {facts.problem}"
        tokens = (f"{totals.prompt_tokens:,}", f"{totals.answer_tokens:,}")
        cost = (f"{totals.seconds:,.0f}", f"{totals.price:,.4f}", _counts(facts.models) or "–")
        answers = f"{totals.requests:,}"
        rows.append((facts.file.name, answers, rejected, *tokens, *cost, size(facts.bytes), _ago(facts.used)))
    _print(JOURNALS, rows)


def _counts(counts: Mapping[str, int], before: str = "", after: str = "") -> str:
    """``12 too short, 3 no JSON``: the most frequent, on one line."""
    named = [f"{count:,} {_shortened(name)}" for name, count in [*counts.items()][:NAMED]]
    if len(counts) > NAMED:
        named.append("…")
    return f"{before}{', '.join(named)}{after}" if named else ""


def _shortened(text: str) -> str:
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _ago(moment: float) -> str:
    """How long ago: ``3 h ago``."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000, color_system=None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(column), justify="right" if column in NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
