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

TENSORBOARD = "tensorboard"
Track = Callable[[Mapping[str, float], int], None]


@contextlib.contextmanager
def tracker(names: Sequence[str], folder: Path, title: str, accelerator: Any) -> Iterator[Track]:
    """Yield ``track({name: value}, step)`` that logs to every tracker in ``names``, on the first process.

    A resumed run repeats the steps since its checkpoint with the same values; TensorBoard, which would show them twice,
    gets none that it has.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    missing = sorted(set(names) - {kind.value for kind in get_available_trackers()})
    if missing:
        raise InputError(f"run.trackers: {missing[0]} is not installed; run `pip install {missing[0]}` or leave it out")
    trackers: dict[str, Any] = {}
    known = _last_steps(folder / TENSORBOARD / title) if accelerator.is_main_process and TENSORBOARD in names else {}
    if accelerator.is_main_process:
        for name in names:
            made = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": folder / name} if made.requires_logging_directory else {}
            trackers[name] = made(title, **place)
            if hasattr(trackers[name], "start"):
                trackers[name].start()

    def track(values: Mapping[str, float], step: int) -> None:
        for name, each in trackers.items():
            fresh = {key: v for key, v in values.items() if name != TENSORBOARD or step > known.get(key, -1)}
            if fresh:
                each.log(fresh, step=step)

    try:
        yield track
    finally:
        for each in trackers.values():
            each.finish()


def _last_steps(folder: Path) -> dict[str, int]:
    """The last step of every scalar that an earlier start of the run gave TensorBoard."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(folder), size_guidance={"scalars": 1})
    events.Reload()
    return {tag: events.Scalars(tag)[-1].step for tag in events.Tags()["scalars"]}


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
    path = folder / "events.log"
    if path.is_dir():
        raise InputError(f"{path}: is a folder, where kdcore keeps a file; move it away")
    handler = _Strict(path, encoding="utf-8")
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
