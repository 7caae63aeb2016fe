"""What a run leaves for its readers: ``result.json``, model cards, ``report.html`` and a table on the terminal.

All are pure functions of a run folder, finished or not.
"""

from __future__ import annotations

from pathlib import Path

from kdcore.errors import InputError

__all__ = ["write_all"]


def write_all(folder: Path) -> list[Path]:
    """Write ``result.json``, every student's model card and ``report.html``; return their paths in this order.

    :raises InputError: when it is no run folder, a file in it is not valid, or it cannot be written.
    """
    from kdcore.reports.card import cards_of
    from kdcore.reports.html import report_of
    from kdcore.reports.result import save_result
    from kdcore.reports.summary import summarise

    summary = summarise(folder)
    try:
        return [save_result(folder, summary.result), *cards_of(summary), report_of(summary)]
    except (IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{error.filename}: cannot be written ({error.strerror}); move it away") from None
