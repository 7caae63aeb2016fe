"""The event log, and trackers that are always closed."""

import logging
import threading
from types import SimpleNamespace

import accelerate.tracking
import pytest

from kdcore import InputError
from kdcore.engine.tracking import event_log, tracker

FIRST, SECOND = (SimpleNamespace(is_main_process=main) for main in (True, False))


@pytest.fixture
def told(monkeypatch):
    """What a tracker in TensorBoard's place was told."""
    told = []

    class Fake:
        requires_logging_directory = True

        def __init__(self, title, logging_dir):
            told.append(("begin", title, logging_dir.name))

        def log(self, values, step):
            told.append((values, step))

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(
        accelerate.tracking, "get_available_trackers", lambda: [accelerate.tracking.LoggerType.TENSORBOARD]
    )
    return told


def test_a_tracker_is_closed_even_when_the_training_fails(told, tmp_path):
    with pytest.raises(ZeroDivisionError), tracker(["tensorboard"], tmp_path, "distill-seed-0", FIRST) as track:
        track({"train/loss": 0.5}, 3)
        raise ZeroDivisionError
    assert told == [("begin", "distill-seed-0", "tensorboard"), ({"train/loss": 0.5}, 3), "finish"]


def test_other_processes_track_nothing(told, tmp_path):
    with tracker(["tensorboard"], tmp_path, "title", SECOND) as track:
        track({"loss": 0.5}, 3)
    assert told == []


def test_a_tracker_that_is_not_installed_names_the_fix(told, tmp_path):
    with (
        pytest.raises(InputError, match="mlflow is not installed; run `pip install mlflow` or leave it out"),
        tracker(["tensorboard", "mlflow"], tmp_path, "title", FIRST),
    ):
        pass
    assert told == []


def test_events_of_the_run_are_kept_in_its_folder_and_of_nothing_else(tmp_path):
    log = logging.getLogger("kdcore")
    before = log.level, list(log.handlers), threading.excepthook
    for message in ("begun", "resumed"):
        with event_log(tmp_path):
            log.info("%s — ✓", message)
            log.debug("too fine")
        log.info("outside")
    lines = (tmp_path / "events.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO begun — ✓", "INFO resumed — ✓"]
    assert (log.level, list(log.handlers), threading.excepthook) == before


def test_an_error_in_a_trackers_thread_is_logged(tmp_path):
    def fail():
        raise OSError("No space left on device")

    with event_log(tmp_path):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert "ERROR in a thread: OSError('No space left on device')" in (tmp_path / "events.log").read_text()


def test_an_event_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device")

    with event_log(tmp_path):
        monkeypatch.setattr(logging.FileHandler, "format", full)
        with pytest.raises(OSError, match="No space"):
            logging.getLogger("kdcore").info("text")


@pytest.mark.filterwarnings("default")  # tensorboard's own
def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    """The second start begins again at step 3, before which the checkpoint was, and goes on to a second stage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((1, 6), (3, 9)):
        with tracker(["tensorboard"], tmp_path, "distill-seed-0", FIRST) as track:
            for step in range(start, stop):
                track({"warm/loss": 1 / step}, step)
    with tracker(["tensorboard"], tmp_path, "distill-seed-0", FIRST) as track:
        track({"warm/loss": 1.0, "distil/loss": 1.0}, 1)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "distill-seed-0"))
    events.Reload()
    assert [event.step for event in events.Scalars("warm/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.value for event in events.Scalars("warm/loss")] == pytest.approx([1 / n for n in range(1, 9)])
    assert [event.step for event in events.Scalars("distil/loss")] == [1]


def test_a_folder_in_the_event_logs_place_is_named(tmp_path):
    (tmp_path / "events.log").mkdir()
    words = r"events\.log: is a folder, where kdcore keeps a file; move it away"
    with pytest.raises(InputError, match=words), event_log(tmp_path):
        pass
