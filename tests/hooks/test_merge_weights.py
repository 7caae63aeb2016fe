"""A merge stage that averages two trained modules."""

import pytest
import torch
from safetensors.torch import load_file

from kdcore.errors import PluginError
from kdcore.files import read_json

AVERAGE = """
@hookimpl(wrapper=True)
def recipe(self, run):
    recipe = yield
    [stage] = recipe.stages
    first, second = (attrs.evolve(stage, name=name) for name in ("first", "second"))
    target = Target("student", ["first/student", "second/student"], lambda run: stage.build(run)["student"])
    merge = Stage(name="merge", needs=["first", "second"], targets=[target], data=stage.data)
    return attrs.evolve(recipe, stages=[merge, first, second])

@hookimpl
def merge_weights(self, target, sources):
    tell(target.name, *sources)
    first, second = sources.values()
    for name in first:
        yield name, (first[name] + second[name]) / 2
"""


def test_hook_merge_weights_writes_the_target(execute, joiner, told):
    folder = execute("steps=4", plugins=joiner(AVERAGE))
    assert told() == ["student first/student second/student"]
    arm = folder / "arms" / "distill" / "seed-0"
    first, second, merged = (
        load_file(arm / stage / "models" / "student.safetensors") for stage in ("first", "second", "merge")
    )
    assert not torch.equal(first["hidden.weight"], second["hidden.weight"])
    assert set(merged) == set(first)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    [row] = read_json(arm / "evaluation.json")["rows"]
    assert 0 <= row["metrics"]["accuracy"]["value"] <= 1


def test_hook_merge_weights_leaves_the_target_where_users_look(execute, joiner):
    folder = execute("steps=4", plugins=joiner(AVERAGE))
    merged = load_file(folder / "arms" / "distill" / "seed-0" / "merge" / "models" / "student.safetensors")
    saved = load_file(folder / "student" / "model.safetensors")
    assert set(saved) == set(merged)
    assert all(torch.equal(saved[name], merged[name]) for name in merged)


def test_each_of_several_targets_has_a_folder_of_its_own(execute, joiner):
    target = 'Target("student", ["first/student", "second/student"], lambda run: stage.build(run)["student"])'
    both = AVERAGE.replace(target, f'[attrs.evolve({target}, name=name) for name in ("mean", "again")]')
    folder = execute("steps=2", plugins=joiner(both.replace("targets=[target]", "targets=target")))
    rows = read_json(folder / "arms" / "distill" / "seed-0" / "evaluation.json")["rows"]
    assert {row["subject"]: row["path"] for row in rows} == {"mean": "student/mean", "again": "student/again"}
    for row in rows:
        assert row["bytes"] == (folder / row["path"] / "model.safetensors").stat().st_size


def test_hook_merge_weights_asks_the_newest_joiner_first(execute, joiner):
    zeros = """
    @hookimpl
    def merge_weights(self, sources):
        first, _ = sources.values()
        return ((name, torch.zeros_like(first[name])) for name in first)
    """
    owner, average = joiner(AVERAGE)
    _, newest = joiner(zeros, "newest")
    folder = execute("steps=2", plugins=(owner, average, newest))
    merged = load_file(folder / "arms" / "distill" / "seed-0" / "merge" / "models" / "student.safetensors")
    assert all(not tensor.any() for tensor in merged.values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("/ 2", "/ 2 if 'bias' in name else first[name][:1]", r"gave embedding.weight of shape \(1, 16\)"),
        ("for name in first:", "for name in list(first)[1:]:", "left out 1 tensors of target 'student', first emb"),
        ("yield name,", "yield name + '.', ", r"gave embedding.weight\. .*no such tensor"),
        ("yield name, (first[name] + second[name]) / 2", "yield name", "gave 'embedding.weight' for .*: give pairs of"),
        ("/ 2", ".numpy()", "give pairs of a name and a tensor"),
        ("yield name,", "yield name, first[name]; yield name,", "gave embedding.weight twice .*give each tensor once"),
        ("/ 2", "* float('nan')", "gave NaN in embedding.weight"),
        ("first, second = sources", "return None\n    first, second = sources", "no plugin answers merge_weights"),
    ],
)
def test_hook_merge_weights_must_fit_the_skeleton(execute, joiner, old, new, message):
    body = AVERAGE.replace(old, new)
    if "return None" in new:
        body = body[: body.index("@hookimpl\n")] + "@hookimpl\ndef merge_weights(self):\n    return None\n"
    with pytest.raises(PluginError, match=message):
        execute("steps=2", plugins=joiner(body))
