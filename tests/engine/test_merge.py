"""Sources of a merge, and what a failed one leaves behind."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdcore import InputError, Run, Stage, Target
from kdcore.engine.merge import merge, source_tensors
from kdcore.errors import PluginError
from kdcore.files import read_json, replacing, write_json


@pytest.fixture
def shards(tmp_path):
    """A folder with a model in two files."""
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file({"weight": torch.arange(6.0).reshape(3, 2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"bias": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    places = {name: f"model-0000{number}-of-00002.safetensors" for number, name in ((1, "weight"), (2, "bias"))}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    (folder / "config.json").write_text("{}")
    return folder


def job(tmp_path, source, answer):
    targets = [Target("student", [str(source)], lambda run: nn.Linear(2, 3))]
    return SimpleNamespace(
        run=Run(folder=tmp_path),
        stage=Stage(name="merge", targets=targets),
        folder=tmp_path / "merge",
        save_targets=lambda: None,
        written=replacing,
        finish=lambda done: write_json(tmp_path / "merge" / "done.json", done),
        plugins=SimpleNamespace(
            newest_first=lambda hook: ["joiner"],
            ask=lambda plugin, hook, *, sources, **_: answer(sources[str(source)]),
        ),
    )


def doubled(tensors):
    return ((name, 2 * tensor) for name, tensor in tensors.items())


def test_a_folder_in_several_files_is_one_source(shards):
    tensors = source_tensors(Run(folder=shards), str(shards))
    assert sorted(tensors) == ["bias", "weight"]
    assert len(tensors) == 2
    assert tensors["weight"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("earlier/student", "neither a finished stage's module nor a folder with safetensors"),
        ("{tmp}/none", "neither a finished stage's module nor a folder with safetensors"),
        ("{tmp}", r"has no \.safetensors file; name a folder that save_pretrained wrote"),
    ],
)
def test_a_source_that_is_nothing_is_refused(tmp_path, reference, reason):
    with pytest.raises(InputError, match=reason):
        source_tensors(Run(folder=tmp_path), reference.format(tmp=tmp_path))


def test_a_merge_is_written_in_the_dtype_of_its_skeleton(tmp_path, shards):
    made = job(tmp_path, shards, lambda tensors: ((name, tensor.double() / 3) for name, tensor in tensors.items()))
    made.stage.targets[0] = Target("student", [str(shards)], lambda run: nn.Linear(2, 3).half())
    merge(made)
    merged = load_file(tmp_path / "merge" / "models" / "student.safetensors")
    assert torch.equal(merged["weight"], (torch.arange(6.0, dtype=torch.float64).reshape(3, 2) / 3).half())


def test_a_merge_writes_what_it_was_given_and_that_it_is_done(tmp_path, shards):
    merge(job(tmp_path, shards, doubled))
    merged = load_file(tmp_path / "merge" / "models" / "student.safetensors")
    assert merged["weight"].tolist() == [[0, 2], [4, 6], [8, 10]]
    assert merged["bias"].tolist() == [2, 2, 2]
    assert read_json(tmp_path / "merge" / "done.json")["round_steps"] == []


def test_views_of_other_tensors_can_be_merged(tmp_path, shards):
    transposed = torch.arange(6.0).reshape(2, 3).T
    merge(job(tmp_path, shards, lambda tensors: [("weight", transposed), ("bias", tensors["bias"].expand(3))]))
    assert torch.equal(load_file(tmp_path / "merge" / "models" / "student.safetensors")["weight"], transposed)


def test_a_failed_merge_leaves_nothing_half_written(tmp_path, shards):
    def fails(tensors):
        yield "weight", tensors["weight"]
        raise OSError("a source is gone")

    with pytest.raises(OSError, match="gone"):
        merge(job(tmp_path, shards, fails))
    assert [path for path in (tmp_path / "merge").rglob("*") if path.is_file()] == []
    with pytest.raises(PluginError, match="left out 2 tensors of target 'student', first bias"):
        merge(job(tmp_path, shards, lambda tensors: []))
    assert not (tmp_path / "merge" / "done.json").exists()
    merge(job(tmp_path, shards, doubled))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


@pytest.mark.parametrize("names", [["embedding.weight"], ["output.weight"], ["output.weight", "embedding.weight"]])
def test_of_tied_tensors_one_is_enough(tmp_path, shards, names):
    made = job(tmp_path, shards, lambda sources: ((name, torch.full((5, 3), 7.0)) for name in names))
    made.stage.targets[0] = Target("student", [str(shards)], lambda run: Tied())
    merge(made)
    made.run.stage_folders["merge"] = made.folder
    module = made.run.load(Tied(), "merge/student")
    assert module.output.weight is module.embedding.weight
    assert (module.output.weight == 7).all()


def test_a_module_that_an_earlier_stage_lacks_is_refused_with_those_it_has(tmp_path):
    (tmp_path / "warm" / "models").mkdir(parents=True)
    save_file({"bias": torch.ones(3)}, tmp_path / "warm" / "models" / "student.safetensors")
    run = Run(folder=tmp_path)
    run.stage_folders["warm"] = tmp_path / "warm"
    with pytest.raises(InputError, match="warm/studnet: the stage has no such module; it has student"):
        source_tensors(run, "warm/studnet")
