"""The pool of a round: sealed before it is used, and read again after that."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from attrs import frozen

from kdcore import Data, Example, Metric, Run, Splits, Stage, Synth, hookimpl
from kdcore.engine.models import Models
from kdcore.engine.progress import Progress
from kdcore.engine.rounds import LazyReport, Rounds
from kdcore.errors import PluginError
from kdcore.plugins import Plugins

MODELS = Models(torch.nn.ModuleDict({"student": torch.nn.Dropout()}))
TRAIN = [Example({}, id="given"), Example({}, id="told", teacher="llm")]


@frozen
class Writing:
    """Two examples a round, the second from a teacher; tells each time it is asked."""

    told: list
    reads: bool = False

    @hookimpl
    def data_synth(self, run, report):
        self.told.append(run.round)
        if self.reads:
            self.told.append(report["size"].value)
        yield Example({"n": 1}, id=f"{run.round}/own")
        yield Example({"n": 2}, id=f"{run.round}/llm", teacher="llm")


def rounds(folder, plugin, synth, *, split="train", control=False, identity=("n",)):
    run = Run(folder=folder)
    run.data = Splits({"train": TRAIN, "validation": [Example({"n": 8}, id="v")], "test": [Example({"n": 9}, id="t")]})
    stage = Stage(
        name="s", loop=lambda *_: [], build=lambda run: {}, data=Data(item=lambda example: {}, split=split, synth=synth)
    )
    accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
    plugins = Plugins({"writing": plugin})
    return Rounds(
        SimpleNamespace(
            recipe=SimpleNamespace(identity=identity),
            run=run,
            stage=stage,
            folder=folder / "s",
            plugins=plugins,
            control=control,
            accelerator=accelerator,
            title="distill seed 0 s",
            progress=Progress(quiet=True),
            teachers=SimpleNamespace(texts=None),
        )
    )


def ids(pool):
    return [example.id for example in pool]


def never():
    raise AssertionError("validation was measured although nobody read the report")


def test_a_sealed_round_is_never_drawn_again(tmp_path):
    told = []
    assert ids(rounds(tmp_path, Writing(told), Synth(rounds=2)).pool(0, MODELS, never)) == [
        "given", "told", "0/own", "0/llm",
    ]  # fmt: skip
    resumed = rounds(tmp_path, Writing(told), Synth(rounds=2))
    resumed.job.run.round = 1
    assert ids(resumed.pool(1, MODELS, never)) == ["given", "told", "0/own", "0/llm", "1/own", "1/llm"]
    assert ids(resumed.pool(1, MODELS, never)) == ids(resumed.pool(1, MODELS, never))
    assert told == [0, 1]


def test_a_late_process_draws_what_the_first_has_just_sealed_and_waits_with_it(tmp_path, monkeypatch):
    told, waits = [], []
    rounds(tmp_path, Writing(told), Synth()).pool(0, MODELS, never)
    late = rounds(tmp_path, Writing(told), Synth())
    late.job.run.rank, late.job.run.world = 1, 2
    monkeypatch.setattr(late.job.run, "share", lambda value: False)  # the first looked before it drew
    late.job.accelerator.wait_for_everyone = lambda: waits.append(1)
    assert ids(late.pool(0, MODELS, never)) == ["given", "told", "0/own", "0/llm"]
    assert (told, waits) == ([0, 0], [1])


def test_a_draw_that_fails_seals_nothing(tmp_path):
    @frozen
    class Failing:
        @hookimpl
        def data_synth(self):
            yield Example({}, id="paid")
            raise ConnectionError("no answer")

    with pytest.raises(ConnectionError):
        rounds(tmp_path, Failing(), Synth()).pool(0, MODELS, never)
    assert ids(rounds(tmp_path, Writing([]), Synth(), split=None).pool(0, MODELS, never)) == ["0/own", "0/llm"]


def test_the_control_has_neither_given_nor_made_knowledge_of_a_teacher(tmp_path):
    assert ids(rounds(tmp_path, Writing([]), Synth(), control=True).pool(0, MODELS, never)) == ["given", "0/own"]
    assert ids(rounds(tmp_path, Writing([]), None, control=True).pool(0, MODELS, never)) == ["given"]


def test_a_look_at_the_controls_examples_keeps_nothing(tmp_path):
    looked = rounds(tmp_path, Writing([]), Synth()).control_examples(2, MODELS, never)
    assert ids(looked) == ["given", "0/own"]
    assert list(tmp_path.iterdir()) == []


def test_the_report_may_be_measured_inside_the_seal(tmp_path):
    told = []
    made = rounds(tmp_path, Writing(told, reads=True), Synth())
    made.pool(0, MODELS, lambda: {"size": Metric("size", len(made.job.run.data["validation"]))})
    assert told == [0, 1]


def test_a_report_is_measured_once_and_only_when_read():
    measured = []
    report = LazyReport(lambda: measured.append(1) or {"f1": Metric("f1", 0.5)})
    assert measured == []
    assert report["f1"].value == 0.5
    assert (list(report), len(report), "f1" in report, "f2" in report) == (["f1"], 1, True, False)
    assert measured == [1]


def test_threads_that_first_read_the_report_together_measure_it_once():
    measured = []

    def validate():
        measured.append(1)
        time.sleep(0.05)
        return {"f1": Metric("f1", 0.5)}

    report = LazyReport(validate)
    with ThreadPoolExecutor(4) as threads:
        assert [metric.value for metric in threads.map(report.__getitem__, ["f1"] * 4)] == [0.5] * 4
    assert measured == [1]


@frozen
class Numbers:
    """One example for each number, with the round's number before its id."""

    numbers: tuple
    told: list

    @hookimpl
    def data_synth(self, run, models):
        self.told.append((models.student.training, torch.is_grad_enabled()))
        yield from (Example({"n": number}, id=f"{number}") for number in self.numbers)


def test_modules_are_in_eval_mode_while_examples_are_drawn(tmp_path):
    MODELS.student.train()
    told = []
    rounds(tmp_path, Numbers((1,), told), Synth()).pool(0, MODELS, never)
    assert told == [(False, True)]
    assert MODELS.student.training


@frozen
class Copying:
    """Two texts a round, each of them twice, under ids that every round has."""

    @hookimpl
    def data_synth(self, run):
        yield from (Example({"n": f"{run.round}, {number // 2}"}, id=f"{number}") for number in range(4))


def test_copies_are_left_out_whatever_ids_earlier_rounds_had(tmp_path):
    made = rounds(tmp_path, Copying(), Synth(rounds=2, window=1, near=1), split=None)
    for made.job.run.round in range(2):
        assert ids(made.pool(made.job.run.round, MODELS, never)) == ["0", "2"]


def test_what_equals_an_example_of_validation_or_test_is_left_out(tmp_path, caplog):
    with caplog.at_level("INFO", "kdcore"):
        pool = rounds(tmp_path, Numbers((7, 8, 9, 10), []), Synth(take=2)).pool(0, MODELS, never)
    assert ids(pool) == ["given", "told", "7", "10"]
    assert "left out '8': leak: equals an example of validation" in caplog.text
    assert "left out '9': leak: equals an example of test" in caplog.text


def test_an_id_of_an_earlier_round_is_refused_while_that_is_in_the_pool(tmp_path):
    made = rounds(tmp_path, Numbers((1, 2), []), Synth(rounds=2))
    made.pool(0, MODELS, never)
    with pytest.raises(PluginError, match="gave the id '1', which is empty or already in the pool"):
        made.pool(1, MODELS, never)
    replaced = rounds(tmp_path / "window", Numbers((1, 2), []), Synth(rounds=2, window=1))
    replaced.pool(0, MODELS, never)
    assert ids(replaced.pool(1, MODELS, never)) == ["given", "told", "1", "2"]
