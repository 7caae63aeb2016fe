"""Progress: a bar per stage on a terminal, quiet plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """One task: rich's bar, or a line every ten seconds."""

    def __init__(
        self,
        console: Console,
        title: str,
        total: int | None,
        rich: RichProgress | None,
        task: Any,
        show: Callable[[int], str] = str,
    ) -> None:
        self._console, self._title, self._total, self._rich, self._task = console, title, total, rich, task
        self._show = show
        self._done = 0
        self._began = self._printed = time.monotonic()
        self._skipped = 0

    def start_at(self, done: int) -> None:
        """Begin at ``done`` (a resumed stage)."""
        self._done = self._skipped = done
        if self._rich is not None:
            self._rich.update(self._task, completed=done)

    def advance(self, count: int, text: str = "") -> None:
        """Move on by ``count`` and show ``text`` (loss terms, examples per second)."""
        self._done += count
        if self._rich is not None:
            if text:
                self._rich.update(self._task, text=text)
            self._rich.advance(self._task, count)
            return
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            rate = (self._done - self._skipped) / (now - self._began)
            place, left = self._show(self._done), ""
            if self._total is not None:
                place += f"/{self._show(self._total)}"
                left = f"  {(self._total - self._done) / rate if rate > 0 else 0:.0f} s left"
            self._console.print(f"{self._title}: {place}  {text}{left}", highlight=False, markup=False)


class Progress:
    """Makes bars and prints lines.

    :param quiet: print nothing (processes other than the first).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, soft_wrap=True)
        self._live = self.console.is_terminal and not quiet

    def line(self, text: str) -> None:
        """Print one line of plain text."""
        self.console.print(text, highlight=False, markup=False)

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None, *, is_bytes: bool = False) -> Iterator[Bar]:
        """A bar over ``total`` units, None where nobody knows how many, for the length of the block.

        :param is_bytes: the units are bytes, shown as KB, MB or GB.
        """
        show = decimal if is_bytes else str
        if not self._live:
            began = time.monotonic()
            if total is not None:
                self.line(f"{title}: {show(total)} to do")
            bar = Bar(self.console, title, total, None, None, show)
            yield bar
            self.line(f"{title}: done in {time.monotonic() - began:.1f} s")
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn() if is_bytes else MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        with RichProgress(*columns, console=self.console, expand=True) as rich:
            yield Bar(self.console, title, total, rich, rich.add_task(title, total=total, text=""))
