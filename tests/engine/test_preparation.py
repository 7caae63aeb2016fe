"""Compiled submodules and checkpointed activations: the same results, chosen by configuration."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import modeling_utils

from kdcore.engine.models import StepModule
from kdcore.engine.preparation import checkpoint_activations, compile_submodules
from kdcore.errors import InputError, PluginError

METHODS = Path(__file__).parents[1] / "methods"
TINY_BERT = METHODS / "tiny_bert.py"


@pytest.fixture(autouse=True)
def methods_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(METHODS))


def compiled(module: StepModule) -> list[str]:
    return [name for name, each in module.models.named_modules() if each._compiled_call_impl is not None]


def layers() -> StepModule:
    return StepModule({"student": nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["student"], ["student"]),
        (["student.*"], ["student.0", "student.1"]),
        (["student.0.0", "student.1"], ["student.0.0", "student.1"]),
        (["student.0.*", "student.0"], ["student.0"]),
    ],
)
def test_the_outermost_matching_submodules_are_compiled_in_place(patterns, names):
    module = layers()
    before = list(module.state_dict())
    compile_submodules(module, patterns)
    assert compiled(module) == names
    assert list(module.state_dict()) == before


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(PluginError, match=r"run.compile: 'student.9' matches no submodule \(student, student.0"):
        compile_submodules(layers(), ["student.9"])


def test_without_a_model_that_can_recompute_checkpointing_is_refused():
    with pytest.raises(InputError, match=r"run.gradient_checkpointing: the stage builds no model of transformers"):
        checkpoint_activations(layers())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "arms" / "distill" / "seed-0" / "distil" / "models" / "student.safetensors")


def test_recomputed_activations_give_the_same_weights(execute, monkeypatch):
    calls = []
    checkpointed = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: calls.append(a) or checkpointed(*a, **k))
    options = {"plugins": (TINY_BERT,)}
    plain = weights(execute("dropout=0.1", "steps=3", **options))
    assert not calls
    recomputed = weights(execute("dropout=0.1", "steps=3", gradient_checkpointing=True, out="less", **options))
    assert len(calls) == 6
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_the_same_weights_up_to_rounding(execute):
    options = {"plugins": (TINY_BERT,)}
    plain = weights(execute("steps=3", **options))
    quick = weights(execute("steps=3", compile=True, out="compiled", **options))
    assert plain.keys() == quick.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(quick[name], tensor, atol=1e-4, rtol=1e-3)
