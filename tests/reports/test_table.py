from __future__ import annotations

from kdcore.reports.summary import summarise
from kdcore.reports.table import NONE, table_of


def test_a_column_for_each_subject_and_a_row_for_each_figure(run_folder):
    summary = summarise(run_folder)
    table = table_of(summary)
    assert table.columns == ["teacher: large", "control (3 seeds)", "student: distill (3 seeds)"]
    assert list(table.rows)[:3] == ["accuracy ↑", "log loss ↓", "calibration error ↓"]
    assert list(table.rows)[3:] == ["parameters", "on disk", "latency ms", "than teacher"]
    assert {len(cells) for cells in table.rows.values()} == {3}
    for column, line in enumerate(summary.lines):
        assert table.rows["accuracy ↑"][column] == str(line.metrics["accuracy"])
    assert table.rows["than teacher"][0] == NONE
    assert table.rows["than teacher"][2].startswith("14.2x smaller, ")


def test_a_row_without_figures_is_left_out(make, tmp_path):
    folder = make(tmp_path / "untimed", seeds=(0,))
    for path in folder.rglob("evaluation.json"):
        path.write_text(path.read_text().replace("latency_ms", "unused"))
    rows = table_of(summarise(folder)).rows
    assert "latency ms" not in rows
    assert "on disk" in rows
