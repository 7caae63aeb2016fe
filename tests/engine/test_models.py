import pytest
import torch
from torch import nn

from kdcore.engine.models import StepModule, hash_weights


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
