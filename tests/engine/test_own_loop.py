"""Stages that own their loop, and merge stages whose targets a search finds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcore.config import read_run
from kdcore.engine.experiment import execute as run
from kdcore.errors import PluginError
from kdcore.files import read_json

METHODS = Path(__file__).parents[1] / "methods"

LOOP = '''
import torch
from accelerate import Accelerator
from attrs import frozen
from soft_labels import BagOfWords, item, splits
from torch.nn import functional

from kdcore import Data, Metric, Recipe, Stage, Target, Teacher, hookimpl, option
from kdcore.data.batch import Batch
from kdcore.data.padding import pad


def skeleton(run):
    return BagOfWords(16, dropout=0.0)


@frozen(kw_only=True)
class Loop:
    """A loop of its own, then the mean of its weights and of where they began."""

    search: bool = option(False, "let a search find the targets")

    @hookimpl
    def recipe(self, run):
        teachers = {"large": Teacher(build=lambda run: BagOfWords(64, dropout=0.0))}
        stages = [Stage(name="train", build=lambda run: {"student": skeleton(run)}, teachers=teachers, loop=self.loop,
                        data=Data(item=item))]
        fixed = [Target("student", ["train/student"], skeleton, {"scale": 0.5})]
        stages.append(Stage(name="merge", needs=["train"], targets=self.found if self.search else fixed,
                            data=Data(item=item),
                            build=lambda run: {"student": run.load(skeleton(run), "train/student")}))
        return Recipe(data=splits, headline="accuracy", identity=("text",), stages=stages)

    def loop(self, run, stage, models, folder):
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model, optimizer = accelerator.prepare(models.student, torch.optim.SGD(models.student.parameters(), 0.1))
        examples = list(run.data["train"])[:16]
        batch = Batch(pad([item(e) for e in examples]), examples)
        with torch.no_grad():
            target = functional.softmax(run.teacher("large")(batch["words"], batch.mask("words")), -1)
        for run.step in range(1, 4):
            loss = functional.cross_entropy(model(batch["words"], batch.mask("words")).float(), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return [Metric("loss", loss.item(), "lower")]

    def found(self, run, models):
        def search():
            rows = run.predict(models.student, "validation", lambda net, b: {"o": net(b["words"], b.mask("words"))})
            return [0.5, float(len(rows))]

        return [Target(f"scaled-{place}", ["train/student"], skeleton, {"scale": scale})
                for place, scale in enumerate(run.remember("scales", search))]

    @hookimpl
    def merge_weights(self, target, sources):
        [tensors] = sources.values()
        for name, tensor in tensors.items():
            yield name, tensor * target.options["scale"]

    @hookimpl
    def evaluate(self, run, model, split):
        rows = run.predict(model, split, lambda net, batch: {"logits": net(batch["words"], batch.mask("words"))})
        right = {e.id: float(row["logits"].argmax() == e["label"]) for e, row in zip(run.data[split], rows)}
        return [Metric("accuracy", sum(right.values()) / len(right), "higher", samples=right)]
'''


@pytest.fixture
def loop(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(METHODS))
    path = tmp_path / "loop.py"
    path.write_text(LOOP, encoding="utf-8")
    return path


def test_a_loop_has_its_own_accelerator_and_reaches_the_stages_teachers(execute, loop):
    folder = execute(plugins=(loop,), precision="no") / "arms" / "distill" / "seed-0"
    done = read_json(folder / "train" / "done.json")
    assert done["metrics"]["loss"] > 0
    assert done["weights_hash"] != done["initial_hash"]
    trained, merged = (load_file(folder / stage / "models" / "student.safetensors") for stage in ("train", "merge"))
    assert all(torch.equal(merged[name], tensor * 0.5) for name, tensor in trained.items())


def test_a_search_finds_the_targets_of_a_merge_and_what_it_found_is_kept(execute, loop, tmp_path):
    folder = execute("search=true", plugins=(loop,))
    arm = folder / "arms" / "distill" / "seed-0"
    rows = read_json(arm / "evaluation.json")["rows"]
    assert [row["subject"] for row in rows] == ["scaled-0", "scaled-1"]
    assert rows[0]["path"] == "student/scaled-0"
    scale = read_json(arm / "merge" / "facts" / "round-0.json")["scales"][1]
    trained = load_file(arm / "train" / "models" / "student.safetensors")
    found = load_file(arm / "merge" / "models" / "scaled-1.safetensors")
    assert all(torch.equal(found[name], tensor * scale) for name, tensor in trained.items())
    (arm / "evaluation.json").unlink()
    run(read_run(folder), resume=folder)
    assert read_json(arm / "evaluation.json")["rows"] == rows


def test_a_search_that_finds_others_when_it_is_called_again_is_refused(execute, loop):
    text = LOOP.replace('run.remember("scales", search)', "map(float, torch.rand(2, generator=GENERATOR))")
    loop.write_text(text.replace("@frozen(", "GENERATOR = torch.Generator()\n\n\n@frozen(", 1), encoding="utf-8")
    with pytest.raises(PluginError, match=r"its search for targets found others than before: keep what the search"):
        execute("search=true", plugins=(loop,))


def test_a_teacher_is_asked_for_inside_a_stage_only(tmp_path):
    from kdcore import Run

    with pytest.raises(PluginError, match=r"run.teacher\('large'\) is asked for outside of a stage"):
        Run(folder=tmp_path).teacher("large")
