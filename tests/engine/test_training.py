"""Whole small runs: what arms share, what accumulation and early stopping do, what a resume restores."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcore.config import read_run
from kdcore.engine.experiment import execute as run
from kdcore.errors import InputError, PluginError, RunError
from kdcore.files import read_json

SOFT_LABELS = Path(__file__).parents[1] / "methods" / "soft_labels.py"


def done(folder: Path, arm: str = "distill", seed: int = 0) -> dict:
    return read_json(folder / "arms" / arm / f"seed-{seed}" / "distil" / "done.json")


def weights(folder: Path, arm: str = "distill") -> dict[str, torch.Tensor]:
    return load_file(folder / "arms" / arm / "seed-0" / "distil" / "models" / "student.safetensors")


def lines(folder: Path, arm: str = "distill") -> list[dict]:
    text = (folder / "arms" / arm / "seed-0" / "distil" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_arms_share_weights_order_and_steps_and_differ_in_the_end(execute):
    folder = execute(compare=True)
    method, control = done(folder), done(folder, "control")
    for fact in ("initial_hash", "order_hash", "round_steps"):
        assert method[fact] == control[fact]
    assert method["weights_hash"] != control["weights_hash"]
    terms = [set(line["terms"]) for line in lines(folder, "control") if line["split"] == "train"]
    assert all(names == {"soft-labels/cross_entropy"} for names in terms)


def test_seeds_differ_in_weights_and_order(execute):
    folder = execute(seeds=2)
    first, second = done(folder), done(folder, seed=1)
    assert first["initial_hash"] != second["initial_hash"]
    assert first["order_hash"] != second["order_hash"]


def test_method_and_control_end_bit_equal_where_no_distill_term_has_a_weight(execute):
    folder = execute("distill_weight=0.0", compare=True)
    assert done(folder)["weights_hash"] == done(folder, "control")["weights_hash"]


@pytest.mark.parametrize("settings", [("evaluate_every=5", "keep=last"), ("checkpoints=1",)])
def test_checks_and_checkpoints_change_nothing(execute, settings):
    plain = execute("keep=last", "checkpoints=1000")
    assert done(execute("keep=last", *settings, out="often"))["weights_hash"] == done(plain)["weights_hash"]


def test_micro_batches_add_up_to_the_whole_batch(execute):
    whole = execute("dropout=0.0", "evaluate_every=100")
    parts = execute("dropout=0.0", "evaluate_every=100", "accumulate=3", out="parts")
    assert done(whole)["order_hash"] == done(parts)["order_hash"]
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-3, atol=1e-4)


def test_two_data_workers_give_the_same_bits(execute):
    alone = execute()
    assert done(execute(workers=2, out="workers"))["weights_hash"] == done(alone)["weights_hash"]


def test_patience_stops_the_method_and_binds_the_control(execute):
    settings = ("steps=200", "evaluate_every=2", "patience=3")
    folder = execute(*settings, compare=True)
    steps = done(folder)["steps"]
    assert steps < 200
    assert done(folder, "control")["steps"] == steps


def test_the_control_has_the_methods_rates_where_patience_ended_it_early(execute):
    settings = ("steps=200", "evaluate_every=2", "patience=3")
    folder = execute(*settings, compare=True, log_every=1)
    rates = [
        [line["learning_rate"] for line in lines(folder, arm) if line["split"] == "train"]
        for arm in ("distill", "control")
    ]
    assert len(rates[0]) < 200
    assert rates[0] == rates[1]


def test_the_best_weights_are_kept(execute):
    folder = execute("steps=40", "evaluate_every=4")
    checks = {line["step"]: line["metrics"]["accuracy"] for line in lines(folder) if line["split"] == "validation"}
    assert checks[done(folder)["best_step"]] == max(checks.values())


def test_max_steps_shortens_and_the_schedule_still_ends_at_zero(execute):
    folder = execute("steps=500", max_steps=10, log_every=1)
    assert done(folder)["steps"] == 10
    rates = [line["learning_rate"]["student"] for line in lines(folder) if line["split"] == "train"]
    assert rates[-1] < 0.2 * max(rates)


def test_a_run_of_one_step_moves_the_weights(execute):
    one = done(execute("steps=1"))
    assert one["weights_hash"] != one["initial_hash"]


def test_the_methods_steps_bind_every_stage_of_the_control(execute, tmp_path):
    two = tmp_path / "two.py"
    two.write_text(
        "import attrs\nfrom kdcore import hookimpl\n\n\n@attrs.frozen\nclass Two:\n"
        "    @hookimpl(wrapper=True)\n    def recipe(self, run):\n        recipe = yield\n"
        "        [distil] = recipe.stages\n"
        "        first = attrs.evolve(distil, name='first', patience=2, evaluate_every=2, steps=40)\n"
        "        return attrs.evolve(recipe, stages=[first, distil])\n"
    )
    folder = execute("steps=4", plugins=(SOFT_LABELS, two), compare=True)
    stages = [folder / "arms" / arm / "seed-0" / "first" / "done.json" for arm in ("distill", "control")]
    method, control = (read_json(path)["steps"] for path in stages)
    assert method == control < 40


def test_a_teacher_that_raises_does_not_disturb_the_control_but_the_method(execute, tmp_path):
    raising = tmp_path / "raising.py"
    raising.write_text(
        "from attrs import frozen\nfrom kdcore import hookimpl\n\n\n@frozen(kw_only=True)\nclass Raising:\n"
        "    @hookimpl(wrapper=True)\n    def teacher_outputs(self):\n        yield\n        raise OSError('asked')\n"
    )
    soft = Path(__file__).parents[1] / "methods" / "soft_labels.py"
    with pytest.raises(OSError, match="asked"):
        execute(plugins=(soft, raising))
    folder = execute("distill_weight=0.0", plugins=(soft,), compare=True, out="sound")
    assert "control" in {path.name for path in (folder / "arms").iterdir()}


def test_nothing_left_to_train_on_is_refused_before_the_teacher_is_asked(execute, tmp_path):
    text = (Path(__file__).parents[1] / "methods" / "soft_labels.py").read_text()
    changed = text.replace('LossTerm("cross_entropy", cross_entropy, "task", 1 - weight, control=1.0),', "")
    only = tmp_path / "only_soft.py"
    only.write_text(changed)
    with pytest.raises(InputError, match="distil: no loss term has a weight in the control"):
        execute(plugins=(only,), compare=True)
    assert not (tmp_path / "run" / "store").exists()


def test_a_turn_that_trains_nothing_is_refused(execute, tmp_path):
    text = (Path(__file__).parents[1] / "methods" / "soft_labels.py").read_text()
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace('trains=["student.*"]', 'trains=["studnet.*"]'))
    with pytest.raises(PluginError, match="matches no parameter"):
        execute(plugins=(wrong,))


SETTINGS = ["--set", "steps=60", "--set", "evaluate_every=20", "--set", "keep=best"]
RUN = ["run", "--plugin", str(SOFT_LABELS), "--no-compare", "--device", "cpu", *SETTINGS]


@pytest.fixture(scope="module")
def never_killed(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start([*RUN, "--out", str(folder)]).wait() == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "delay"),
    [
        ("store/*/rows-*.data", 0.0),
        ("arms/*/*/distil/metrics.jsonl", 0.05),
        ("arms/*/*/distil/checkpoints/step-7*", 0.0),
        ("arms/*/*/distil/checkpoints/step-*.tmp", 0.0),
        ("arms/*/*/distil/best/*", 0.02),
        ("arms/*/*/distil/done.json", 0.0),  # the test evaluation
        ("arms/*/*/evaluation.json", 0.0),
        ("result.json", 0.0),  # the report
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(start, killed_at, never_killed, tmp_path, moment, delay):
    killed = tmp_path / "killed"
    for _ in range(5):
        if killed_at(RUN, killed, moment, delay):
            break
        shutil.rmtree(killed)
    else:
        pytest.skip("the run was always over before it could be killed")
    assert start(["run", "--resume", str(killed)]).wait() == 0
    before, after = done(never_killed), done(killed)
    before.pop("seconds"), after.pop("seconds")
    assert before == after
    assert evaluated(killed) == evaluated(never_killed)
    for name in ("report.html", "result.json", "student/README.md"):
        assert (killed / name).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["arms/*/*/distil/metrics.jsonl", "arms/*/*/distil/checkpoints/step-14*"])
def test_a_killed_run_with_dropout_augmentation_and_workers_resumes_to_the_same_bits(
    start, killed_at, tmp_path, moment
):
    command = [*RUN, "--plugin", str(SOFT_LABELS.with_name("augmented.py")), "--workers", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start([*command, "--out", str(whole)]).wait() == 0
    assert killed_at(command, killed, moment)
    assert start(["run", "--resume", str(killed)]).wait() == 0
    assert {**done(killed), "seconds": 0} == {**done(whole), "seconds": 0}
    assert evaluated(killed) == evaluated(whole)


def evaluated(folder: Path) -> list[dict]:
    return read_json(folder / "arms" / "distill" / "seed-0" / "evaluation.json")["rows"]


class KillError(Exception):
    """Stands for a kill at a chosen place."""


@pytest.mark.parametrize(
    ("settings", "options", "place"),
    [
        (["evaluate_every=unset", "checkpoints=10"], {"max_steps": 20}, "kdcore.engine.checks.Checks.measure"),
        (["evaluate_every=2", "checkpoints=2", "patience=1", "steps=200"], {}, "kdcore.engine.checks.Checks.keep"),
    ],
)
def test_a_resumption_without_a_step_left_closes_the_round(execute, tmp_path, monkeypatch, settings, options, place):
    whole = execute(*settings, compare=True, out="whole", **options)

    def stop(*_):
        raise KillError

    with monkeypatch.context() as patch, pytest.raises(KillError):
        patch.setattr(place, stop)
        execute(*settings, compare=True, out="killed", **options)
    killed = tmp_path / "killed"
    run(read_run(killed), resume=killed)
    for arm in ("distill", "control"):
        before, after = done(whole, arm), done(killed, arm)
        assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_numpy_and_python_draw_the_same_in_a_loss_with_and_without_workers(execute, variant):
    drawn = "        import numpy, random\n        logits = (numpy.random.rand() + random.random()) * models.student"
    plugin = variant({"        logits = models.student": drawn})
    alone, workers = execute(plugins=(plugin,)), execute(plugins=(plugin,), workers=2, out="workers")
    assert done(alone)["weights_hash"] == done(workers)["weights_hash"]


def test_more_micro_batches_than_examples_are_refused(execute):
    with pytest.raises(
        InputError, match="a step has 16 examples for 64 micro-batches in 1 processes; lower accumulate"
    ):
        execute("accumulate=64", "batch_size=16")


def test_a_stage_that_does_not_build_its_subject_is_refused_before_it_trains(execute, variant, tmp_path):
    with pytest.raises(PluginError, match="stage 'distil' builds student but no 'pupil', its subject"):
        execute(plugins=(variant({'name="distil",': 'name="distil", subject="pupil",'}),))
    assert not list(tmp_path.glob("run/arms/*/*/distil/metrics.jsonl"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"task", 1 - weight,', '"task", float("nan") if models.student.training else 0,'),
        ("schedule=linear(0.1)", 'schedule=lambda progress: float("nan") if progress > 0.3 else 1.0'),
    ],
)
def test_what_is_not_finite_ends_the_run_before_it_is_saved(execute, variant, tmp_path, old, new):
    with pytest.raises(RunError, match=r"not finite|is nan"):
        execute("steps=6", "evaluate_every=unset", "checkpoints=5", plugins=(variant({old: new}),))
    assert not list(tmp_path.glob("run/**/done.json"))
    assert not list(tmp_path.glob("run/**/checkpoints/step-*"))


def test_the_logged_loss_is_the_weighted_sum(execute):
    [line, *_] = [line for line in lines(execute("distill_weight=0.25", log_every=1)) if line["split"] == "train"]
    hard, soft = (line["terms"][f"soft-labels/{name}"] for name in ("cross_entropy", "divergence"))
    assert line["loss"] == pytest.approx(0.75 * hard + 0.25 * soft)


def test_tracing_the_control_leaves_the_methods_start_untouched(execute, variant):
    plugin = variant({"nn.Linear(width, width)": "nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))"})
    folder = execute("distill_weight=0.0", "steps=3", "keep=last", plugins=(plugin,), compare=True)
    method, control = weights(folder), weights(folder, "control")
    assert all(torch.equal(method[name], control[name]) for name in method)


def test_a_teacher_whose_source_changed_is_refused_at_the_next_seed(execute, tmp_path):
    teacher, shapes = tmp_path / "teacher.safetensors", {"hidden.weight": (64, 64), "output.weight": (6, 64)}
    tensors = {"hidden.bias": torch.zeros(64), "output.bias": torch.zeros(6), "embedding.weight": torch.ones(4096, 64)}
    save_file({**tensors, **{name: torch.ones(shape) for name, shape in shapes.items()}}, teacher)
    folder = execute(f"teacher={teacher}", out="taught")
    save_file({**tensors, **{name: torch.zeros(shape) for name, shape in shapes.items()}}, teacher)
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("seeds = 1", "seeds = 2"))
    with pytest.raises(InputError, match=r"the teacher's source .* has changed since the run began"):
        run(read_run(folder), resume=folder)
