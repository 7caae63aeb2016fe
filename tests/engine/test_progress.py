"""Progress on a terminal and where there is none."""

import pytest

from kdcore.engine import progress as module
from kdcore.engine.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """``clock[0] = seconds`` sets the time that bars see."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_few_lines_with_the_time_left_since_the_resumption(clock, capsys):
    with Progress().bar("distill seed 0", 100) as bar:
        bar.start_at(40)
        for _ in range(5):
            clock[0] += 4
            bar.advance(2, "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "distill seed 0: 100 to do",
        "distill seed 0: 46/100  loss 0.5  108 s left",  # 6 done in 12 s, whatever was done before
        "distill seed 0: done in 20.0 s",
    ]


def test_what_fails_is_not_said_to_be_done(capsys):
    with pytest.raises(OSError, match="full"), Progress().bar("teacher large", 3):
        raise OSError("full")
    assert capsys.readouterr().out == "teacher large: 3 to do\n"


def test_lines_are_printed_as_they_are(capsys):
    text = "data: [bold]no markup[/nothing] " + "x" * 300
    Progress().line(text)
    assert capsys.readouterr().out == text + "\n"


def test_other_processes_are_quiet(capsys):
    progress = Progress(quiet=True)
    progress.line("text")
    with progress.bar("title", 2) as bar:
        bar.advance(2)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress().bar("distill seed 0", 7) as bar:
        bar.start_at(3)
        bar.advance(4, "loss 0.25")
    shown = capsys.readouterr().out
    assert "7/7" in shown
    assert "loss 0.25" in shown
    assert "to do" not in shown


def test_names_in_brackets_are_no_markup(capsys, monkeypatch):
    monkeypatch.setattr("kdcore.engine.progress.SECONDS_BETWEEN_LINES", 0.0)
    with Progress().bar("distil [/nsp]", 2) as bar:
        bar.advance(1, "mse[hidden] 0.5")
    assert "distil [/nsp]: 1/2  mse[hidden] 0.5" in capsys.readouterr().out
