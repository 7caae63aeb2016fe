"""The order of stages, where they lie, and what they leave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcore import Run, Stage
from kdcore.engine.models import Models
from kdcore.engine.stages import load_subject, ordered, save_subject, stage_folder
from kdcore.errors import PluginError


def stage(name, *needs, **fields):
    return Stage(name=name, needs=needs, **{"loop": lambda *_: [], "build": lambda run: {}, **fields})


def test_what_is_needed_comes_first():
    stages = [stage("merge", "first", "second"), stage("second", "first"), stage("first")]
    assert [each.name for each in ordered(stages)] == ["first", "second", "merge"]


def test_a_list_that_is_in_order_stays_as_it_is():
    stages = [stage("warm"), stage("teach", "warm"), stage("distil", "teach"), stage("merge", "distil", "warm")]
    assert ordered(stages) == stages


def test_a_need_moves_no_other_stage():
    stages = [stage("warm"), stage("distil", "warm"), stage("independent")]
    assert ordered(stages) == stages


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([stage("a"), stage("a")], "names two stages alike"),
        ([stage("a", "b")], "stage 'a' needs 'b', which the recipe does not have"),
        ([stage("a", "b"), stage("b", "a")], "in a circle: a, b"),
        ([stage("a"), stage("b", "a", shared="arms")], "'b' is shared by arms but needs 'a', which is not"),
        ([stage("a", "a")], "in a circle: a"),
    ],
)
def test_an_impossible_order_is_refused(stages, words):
    with pytest.raises(PluginError, match=words):
        ordered(stages)


def test_shared_stages_lie_where_all_arms_or_seeds_find_them():
    places = {
        shared: {
            stage_folder(Path("run"), Path(f"run/arms/{arm}/seed-{seed}"), seed, stage("s", shared=shared))
            for arm in ("distill", "control")
            for seed in (0, 1)
        }
        for shared in ("", "arms", "seeds")
    }
    assert {shared: len(found) for shared, found in places.items()} == {"": 4, "arms": 2, "seeds": 1}
    assert not set.intersection(*places.values())


def test_without_a_way_to_save_the_bare_weights_are_saved_and_loaded_again(tmp_path):
    torch.manual_seed(5)
    built = stage("s", build=lambda run: {"student": nn.Sequential(nn.Linear(2, 2), nn.Dropout())})
    modules = nn.ModuleDict(built.build(None))
    run = Run(folder=tmp_path)
    (tmp_path / "s" / "models").mkdir(parents=True)
    save_subject(run, built, Models(modules), tmp_path / "s" / "models")
    weights = tmp_path / "s" / "models" / "model.safetensors"
    assert torch.equal(load_file(weights)["0.weight"], modules["student"][0].weight)
    weights.rename(weights.with_name("student.safetensors"))
    loaded = load_subject(run, built, tmp_path / "s", "student")
    assert torch.equal(loaded[0].weight, modules["student"][0].weight)
    assert not loaded.training


def test_a_method_saves_its_subject_its_own_way(tmp_path):
    def save(run, models, folder):
        (folder / "student.txt").write_text(str(sum(p.numel() for p in models.student.parameters())))

    save_subject(
        Run(folder=tmp_path), stage("s", save=save), Models(nn.ModuleDict({"student": nn.Linear(2, 3)})), tmp_path
    )
    assert [path.name for path in tmp_path.iterdir()] == ["student.txt"]
    assert (tmp_path / "student.txt").read_text() == "9"
