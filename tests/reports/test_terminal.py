from __future__ import annotations

import io

from rich.console import Console

from kdcore.reports.terminal import print_table


def printed(folder, *, width, terminal):
    stream = io.StringIO()
    print_table(folder, Console(file=stream, width=width, force_terminal=terminal, color_system=None))
    return stream.getvalue()


def test_plain_output_keeps_each_figure_on_one_line(run_folder):
    lines = printed(run_folder, width=40, terminal=False).splitlines()
    assert lines[0].split("  ")[-1] == "student: distill (3 seeds)"
    assert lines[1].startswith("accuracy ↑")
    assert any(line.startswith("on disk") and "4.1 kB" in line and line.endswith("288 B") for line in lines)
    assert any(line.startswith("than teacher") and line.endswith("faster") for line in lines)
    assert any(line.startswith("distill - control: accuracy +") and "steps (300)" in line for line in lines)


def test_a_wide_terminal_shows_the_table(run_folder):
    lines = printed(run_folder, width=160, terminal=True).splitlines()
    assert "teacher: large" in lines[0]
    assert any(line.startswith("on disk") and "4.1 kB" in line and "288 B" in line for line in lines)


def test_a_narrow_terminal_shows_blocks_that_fit(run_folder):
    lines = printed(run_folder, width=50, terminal=True).splitlines()
    assert "  on disk: 288 B" in lines
    assert max(map(len, lines)) <= 50


def test_square_brackets_are_no_markup(run_folder):
    plan = run_folder / "plan.json"
    plan.write_text(plan.read_text().replace('"because": ""', '"because": "[bold]different[/bold]"'))
    assert "because [bold]different[/bold]" in printed(run_folder, width=80, terminal=False)
