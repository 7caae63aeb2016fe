"""Taps on small real models: what they give, when they end, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel

from kdcore import tapped
from kdcore.engine.models import StepModule

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=3, **SIZES), add_pooling_layer=False)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_layers_of_bert_are_its_hidden_states_with_their_graph(bert):
    bert.eval()
    with tapped(bert, "encoder.layer.*", "embeddings") as hidden:
        output = bert(IDS, output_hidden_states=True)
    assert list(hidden) == ["embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]
    for ours, theirs in zip(hidden.values(), output.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    hidden["encoder.layer.1"].sum().backward()
    assert bert.encoder.layer[1].output.dense.weight.grad is not None
    assert bert.encoder.layer[2].output.dense.weight.grad is None


def test_hooks_are_removed_at_the_end_and_after_an_error(bert):
    with tapped(bert, "encoder.layer.0"):
        assert hooks(bert) == 1
    assert hooks(bert) == 0
    with pytest.raises(RuntimeError), tapped(bert, "encoder.layer.0", "embeddings"):
        raise RuntimeError
    assert hooks(bert) == 0


def test_of_a_tuple_the_first_is_kept():
    recurrent = nn.LSTM(4, 5)
    with tapped(recurrent, "") as taps:
        sequence, _ = recurrent(torch.ones(3, 2, 4))
    assert taps[""] is sequence


def test_of_several_calls_the_last_stands_and_all_are_kept(bert):
    with tapped(bert, "encoder.layer.2") as taps:
        first = bert(IDS).last_hidden_state
        second = bert(IDS[:1]).last_hidden_state
    assert taps["encoder.layer.2"] is second
    assert taps.calls("encoder.layer.2") == [first, second]

    shared = AlbertModel(AlbertConfig(num_hidden_layers=4, embedding_size=8, **SIZES)).eval()
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    with tapped(shared, layer) as taps:
        states = shared(IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(taps.calls(layer), states[1:], strict=True))


def test_both_names_of_one_module_are_tapped():
    linear = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": linear, "second": linear})
    with tapped(model, "*") as taps:
        output = linear(torch.ones(1, 2))
    assert taps["first"] is taps["second"] is output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.layers.1", r"BertModel has no module 'encoder.layers.1'; near it are encoder.layer.1"),
        ("head", "near it are embeddings, encoder"),
        ("encoder.*.*.*.*.*.*", "has no module"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(bert, name, message):
    with pytest.raises(ValueError, match=message), tapped(bert, "encoder.layer.0", name):
        pass
    assert hooks(bert) == 0


def test_what_is_missing_says_why(bert):
    with tapped(bert, "encoder.layer.*") as taps:
        with pytest.raises(KeyError, match=r"'encoder.layer.0' has not been called"):
            taps["encoder.layer.0"]
        with pytest.raises(KeyError, match=r"'encoder.layer.7' is not tapped; tapped are encoder.layer.0, "):
            taps["encoder.layer.7"]


def test_inside_the_wrapped_forward_of_a_step(bert):
    module = StepModule({"student": bert})

    def loss(models):
        with tapped(models.student, "encoder.layer.0") as taps:
            models.student(IDS)
        return taps["encoder.layer.0"].square().mean()

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        wrapped(loss).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_a_checkpointed_layer_is_recorded_once_and_keeps_its_gradient():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    values = torch.ones(2, 4, requires_grad=True)
    gradients = []
    for run in (layers, lambda values: checkpoint(layers, values, use_reentrant=False)):
        with tapped(layers, "1") as taps:
            output = run(values)
        total = taps["1"].square().sum() + output.sum()
        gradients.append(torch.autograd.grad(total, [values, *layers.parameters()]))
        assert len(taps.calls("1")) == 1
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("compiled", ["encoder", "encoder.layer.1", "", "encoder.layer.1.attention"])
def test_compiled_modules_are_tapped(bert, compiled):
    bert.eval()
    expected = bert(IDS, output_hidden_states=True).hidden_states[2]
    graphs, runs = [], []

    def backend(graph, inputs):
        graphs.append(graph)

        def run(*arguments):
            runs.append(graph)
            return graph(*arguments)

        return run

    bert.get_submodule(compiled).compile(backend=backend)
    bert(IDS)
    before, usual = len(graphs), len(runs)
    assert usual > 0
    for _ in range(2):
        runs.clear()
        with tapped(bert, "encoder.layer.1") as taps:
            bert(IDS)
        torch.testing.assert_close(taps["encoder.layer.1"], expected)
        assert len(runs) == (0 if compiled in ("", "encoder") else usual)
    runs.clear()
    bert(IDS)
    assert (len(graphs), len(runs)) == (before, usual)


@torch.no_grad()
def test_modules_wrapped_by_compile_are_tapped(bert):
    bert.eval()
    expected = bert(IDS, output_hidden_states=True).hidden_states[1]
    bert.encoder.layer[0] = torch.compile(bert.encoder.layer[0], backend="eager")
    bert(IDS)
    with tapped(bert, "encoder.layer.0", "encoder.layer.0._orig_mod.attention") as taps:
        bert(IDS)
    torch.testing.assert_close(taps["encoder.layer.0"], expected)
    assert taps["encoder.layer.0._orig_mod.attention"].shape == expected.shape
