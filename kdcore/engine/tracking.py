"""Trackers (TensorBoard, W&B, MLflow, through accelerate) and the run's event log."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcore.errors import InputError

log = logging.getLogger("kdcore")

Track = Callable[[Mapping[str, float], int], None]


@contextlib.contextmanager
def tracker(names: Sequence[str], folder: Path, title: str, accelerator: Any) -> Iterator[Track]:
    """Yield ``track({name: value}, step)`` that logs to every tracker in ``names``, on the first process."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    missing = sorted(set(names) - {kind.value for kind in get_available_trackers()})
    if missing:
        raise InputError(f"run.trackers: {missing[0]} is not installed; run `pip install {missing[0]}` or leave it out")
    trackers: list[Any] = []
    if accelerator.is_main_process:
        for name in names:
            made = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": folder / name} if made.requires_logging_directory else {}
            trackers.append(made(title, **place))
            if hasattr(trackers[-1], "start"):
                trackers[-1].start()

    def track(values: Mapping[str, float], step: int) -> None:
        for each in trackers:
            each.log(dict(values), step=step)

    try:
        yield track
    finally:
        for each in trackers:
            each.finish()


class _Strict(logging.FileHandler):
    """Raises what goes wrong (a full disk) in place of printing it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise


def _log_thread_error(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises here what it raises again at the next write."""
    with contextlib.suppress(OSError):
        log.error("in a thread: %r", failed.exc_value)


@contextlib.contextmanager
def event_log(folder: Path) -> Iterator[None]:
    """Send kdcore's log messages, and the errors of trackers' threads, to ``events.log`` in the run folder."""
    handler = _Strict(folder / "events.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    before, threading.excepthook = threading.excepthook, _log_thread_error
    try:
        yield
    finally:
        threading.excepthook = before
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()
