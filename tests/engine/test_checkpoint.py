import pytest
import torch
from torch import nn

from kdcore import InputError, adamw
from kdcore.engine.checkpoint import Checkpoints, TrainingState


def trained(seed):
    torch.manual_seed(seed)
    module = nn.ModuleDict({"student": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))})
    optimizer = adamw(1e-2)(list(module.named_parameters()))
    module["student"](torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    return module, {"student": optimizer}


def test_modules_buffers_optimisers_and_state_come_back(tmp_path):
    module, optimizers = trained(0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainingState(step=3), module, optimizers, None)
    state = TrainingState(step=7, round=1, round_steps=[5], history=[(5, 0.25)], best_step=5, order_hash="ab")
    checkpoints.save(state, module, optimizers, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-7"]
    other, others = trained(1)
    assert Checkpoints(tmp_path).load(other, others, None) == state
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    first, second = (list(o["student"].state.values()) for o in (optimizers, others))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(first, second))


def test_a_step_that_is_written_is_not_written_again(tmp_path):
    module, optimizers = trained(0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainingState(step=3), module, optimizers, None)
    written = (tmp_path / "step-3" / "state.json").stat().st_ino
    checkpoints.save(TrainingState(step=3, round=1), module, optimizers, None)
    assert (tmp_path / "step-3" / "state.json").stat().st_ino == written


def test_no_checkpoint_is_none_and_a_half_written_one_is_ignored(tmp_path):
    module, optimizers = trained(0)
    (tmp_path / "step-9.tmp").mkdir()
    assert Checkpoints(tmp_path).load(module, optimizers, None) is None


@pytest.mark.parametrize("name", ["models.safetensors", "optimizers.pt", "state.json"])
def test_a_truncated_checkpoint_is_named_with_its_fix(tmp_path, name):
    module, optimizers = trained(0)
    Checkpoints(tmp_path).save(TrainingState(step=3), module, optimizers, None)
    path = tmp_path / "step-3" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"step-3.*(delete|resume)"):
        Checkpoints(tmp_path).load(module, optimizers, None)
