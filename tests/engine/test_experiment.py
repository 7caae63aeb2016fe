"""A run that is only planned, and one that is already over."""

from pathlib import Path

import pytest
from torch import nn

from kdcore import reports
from kdcore.config import configure, read_run
from kdcore.engine.dry_run import dry_run
from kdcore.engine.experiment import execute as run
from kdcore.engine.new_folder import has_results
from kdcore.engine.training import Training
from kdcore.errors import InputError
from kdcore.files import read_json, write_json, write_text
from kdcore.plugins import load
from kdcore.recipe import Teacher
from kdcore.reports import terminal
from kdcore.teachers.asking import Budget, TextTeachers
from kdcore.toml import to_toml

SOFT_LABELS = Path(__file__).parents[1] / "methods" / "soft_labels.py"


def test_a_dry_run_builds_nothing_and_writes_nothing(tmp_path, monkeypatch, capsys):
    def build(*arguments, **options):
        raise AssertionError("a model was built")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "__init__", build)
    dry_run(configure([load(str(SOFT_LABELS))], None, [], {"device": "cpu", "compare": True, "seeds": 2}))
    lines = capsys.readouterr().out.splitlines()
    assert "arms      distill, control" in lines
    assert "stage     distil: 30 steps of 16 examples; done 4 times" in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["/nope/teacher", "./nope", "a/b/c"])
def test_a_dry_run_misses_a_teacher_that_is_not_there(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{source}: no such file or folder"):
        dry_run(configure([load(str(SOFT_LABELS))], None, [f"teacher={source}"], {"device": "cpu"}))


@pytest.mark.parametrize("start", [dry_run, run])
def test_a_patience_that_nothing_counts_against_is_refused(tmp_path, start):
    settings = ["patience=3", "evaluate_every=unset"]
    options = {"device": "cpu", "out": str(tmp_path / "run")}
    with pytest.raises(InputError, match="stage 'distil': patience counts validation checks: set evaluate_every too"):
        start(configure([load(str(SOFT_LABELS))], None, settings, options))


def test_validation_and_test_have_the_same_precision(kdcore, variant):
    tells = (
        "rows = run.predict(model, split, lambda net, batch: {**self.teacher_outputs(net, batch), 'bf16': "
        "torch.full((len(batch),), torch.is_autocast_enabled('cpu'))}); print(split, {bool(r['bf16']) for r in rows})"
    )
    plugin = variant({"rows = run.predict(model, split, self.teacher_outputs)": tells})
    run = ["run", "--plugin", str(plugin), "--no-compare", "--device", "cpu", "--set", "steps=2"]
    result = kdcore(*run, "--precision", "bf16")
    assert "validation {True}" in result.stdout
    assert "test {True}" in result.stdout


def test_a_finished_run_is_not_trained_again(execute, monkeypatch):
    monkeypatch.setattr(reports, "write_all", lambda folder: None)
    monkeypatch.setattr(terminal, "print_table", lambda folder: None)
    folder = execute("steps=2")
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert before

    def train(self):
        raise AssertionError("a finished stage was trained again")

    monkeypatch.setattr(Training, "train", train)
    assert run(read_run(folder), folder) == folder
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("store/large-00/rows-0.index", True),
        ("arms/distill/seed-0/s/checkpoints/step-7/state.json", True),
        ("shared/s/done.json", True),
        ("arms/distill/seed-0/s/metrics.jsonl", False),
    ],
)
def test_a_folder_is_worth_resuming_once_something_was_paid_for(tmp_path, file, expected):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert has_results(tmp_path) is expected


@pytest.mark.parametrize("shared", [False, True])
def test_answers_that_the_run_paid_for_are_worth_resuming(tmp_path, shared):
    folder = tmp_path / "run"
    store = tmp_path / "answers" if shared else folder / "store"
    write_json(folder / "plan.json", {"id": "ours"})
    options = {"store": str(store) if shared else ""}
    write_text(folder / "config.toml", to_toml(configure([load(str(SOFT_LABELS))], None, [], options)))
    for run_id, expected in (("theirs", False), ("ours", True)):
        texts = TextTeachers(store, run_id, Budget())
        assert (texts.journal.totals(run_id).requests, has_results(folder)) == (0, False)
        texts.ask("rule", Teacher(text=lambda request: "an answer"), run_id)
        texts.close()
        assert has_results(folder) is expected
    (store / "journal.sqlite").write_bytes(b"damaged")
    assert has_results(folder)


def test_one_process_may_run_configurations_of_several_precisions(execute):
    folders = [execute("steps=2", precision=each, out=f"run-{i}") for i, each in enumerate(["no", "bf16", "no"])]
    one, other, again = (
        read_json(folder / "arms" / "distill" / "seed-0" / "distil" / "done.json")["weights_hash"] for folder in folders
    )
    assert one == again != other
