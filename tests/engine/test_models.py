import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcore.engine.models import StepModule, hash_weights
from kdcore.engine.sharding import load_weights, save_weights, whole_state


def test_modules_are_found_by_name_and_a_missing_one_is_explained():
    module = StepModule({"student": nn.Linear(2, 3)})
    assert module(lambda models: models.student(torch.ones(1, 2))).shape == (1, 3)
    assert module(lambda models: list(models)) == ["student"]
    with pytest.raises(AttributeError, match="builds no module 'critic'; it builds student"):
        module(lambda models: models.critic)


def test_the_hash_covers_every_value_name_and_buffer():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = hash_weights(module)
    assert hash_weights(module) == before
    module[1].num_batches_tracked += 1
    assert hash_weights(module) != before
    module[1].num_batches_tracked -= 1
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-6
    assert hash_weights(module) != before


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)


class Tied(nn.Module):
    _no_split_modules = ("Embedded", "Linear")

    def __init__(self):
        super().__init__()
        self.embedded = Embedded()
        self.inner, self.output = nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedded.table.weight


class Apart(nn.Module):
    _no_split_modules = ("Embedded",)

    def __init__(self):
        super().__init__()
        self.embedded = Embedded()


def test_a_module_that_shares_a_parameter_with_others_is_not_cut_alone():
    assert StepModule({"student": Tied()})._no_split_modules == []
    assert StepModule({"student": Apart()})._no_split_modules == ["Embedded"]


def test_of_tied_tensors_the_name_is_kept_that_safetensors_keeps(tmp_path):
    module, other = Tied(), Tied()
    save_weights(module, tmp_path / "whole.safetensors")
    stored = load_file(tmp_path / "whole.safetensors")
    assert {name for name, _ in whole_state(module)} == stored.keys()
    load_weights(other, tmp_path / "whole.safetensors")
    assert hash_weights(other) == hash_weights(module)
