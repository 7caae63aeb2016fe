"""Gradient caching: the gradients of the whole batch, with the graph of one chunk, alone and through whole runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.losses.gradient_cache import gradient_cached

SIMILARITIES = Path(__file__).parents[1] / "methods" / "similarities.py"
SIZES = (5, 5, 5, 2)
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
FSDP += ["--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2"]
FSDP += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Linear"]


def encoder(dropout: float = 0.3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8)
    return nn.Sequential(*layers).to(dtype)


def chunks(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, 6, generator=generator, dtype=dtype), torch.randn(n, 6, generator=generator, dtype=dtype))
        for n in SIZES
    ]


def contrast(queries: Tensor, passages: Tensor) -> Tensor:
    scores = F.normalize(queries, dim=-1) @ F.normalize(passages, dim=-1).T
    return F.cross_entropy(scores / 0.1, torch.arange(len(queries)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())
    model.zero_grad()
    return found


def whole(encode, parts, loss) -> Tensor:
    """The loss with all graphs at once, encoded chunk by chunk so that dropout is drawn alike."""
    return loss(*(torch.cat(column) for column in zip(*(encode(part) for part in parts))))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_and_value_are_those_of_the_whole_batch(dropout):
    model = encoder(dropout)
    encode = lambda pair: (model(pair[0]), model(pair[1]))  # noqa: E731
    torch.manual_seed(3)
    expected = whole(encode, chunks(), contrast)
    expected.backward()
    wanted = gradients(model)
    torch.manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for number, value in enumerate(gradient_cached(encode, chunks(), contrast)):
        found = value()
        found.backward()
        total += found.detach()
        torch.manual_seed(100 + number)  # the engine seeds each pass anew
    assert torch.allclose(total, expected, rtol=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)


def test_one_tensor_and_scaled_values():
    model, parts = encoder(0.0), [pair[0] for pair in chunks()]
    loss = lambda embeddings: (embeddings @ embeddings.T).logsumexp(1).sum()  # noqa: E731
    (0.25 * loss(model(torch.cat(parts)))).backward()
    wanted = gradients(model)
    for value in gradient_cached(model, parts, loss):
        (0.25 * value()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)


def test_what_the_loss_itself_learns_gets_its_gradient_once():
    model, scale = encoder(0.0), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    head = nn.Linear(8, 4, dtype=torch.float64)
    learned = nn.ModuleDict({"model": model, "head": head})
    learned.register_parameter("scale", scale)
    encode = lambda pair: (model(pair[0]), model(pair[1]))  # noqa: E731
    loss = lambda queries, passages: contrast(head(queries) * scale, head(passages)) + scale.exp()  # noqa: E731
    whole(encode, chunks(), loss).backward()
    wanted = gradients(learned)
    for value in gradient_cached(encode, chunks(), loss):
        value().backward()
    for name, gradient in gradients(learned).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)


def test_a_frozen_side_and_a_side_that_the_loss_ignores():
    model, frozen = encoder(0.0), encoder(0.0).requires_grad_(False)
    encode = lambda pair: (model(pair[0]), frozen(pair[1]), model(pair[1]))  # noqa: E731
    loss = lambda queries, passages, ignored: contrast(queries, passages)  # noqa: E731
    whole(encode, chunks(), loss).backward()
    wanted = gradients(model)
    for value in gradient_cached(encode, chunks(), loss):
        value().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))])
def test_buffers_of_the_model_move_once(layer):
    layer.double()
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    encode = lambda pair: (layer(pair[0]), layer(pair[1]))  # noqa: E731
    whole(encode, chunks(), contrast).backward()
    wanted, buffers = gradients(layer), {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.load_state_dict(start)
    for value in gradient_cached(encode, chunks(), contrast, model=layer):
        value().backward()
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=1e-12)
    for name, gradient in gradients(layer).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)


def test_under_autocast_the_loss_is_computed_in_float32_and_weights_keep_their_gradients():
    model, parts = encoder(0.0, torch.float32), chunks(torch.float32)
    encode = lambda pair: (model(pair[0]), model(pair[1]))  # noqa: E731
    told = []

    def loss(queries: Tensor, passages: Tensor) -> Tensor:
        told.append((queries.dtype, torch.is_autocast_enabled("cpu"), (queries @ passages.T).dtype))
        return contrast(queries, passages)

    with torch.autocast("cpu", torch.bfloat16):
        columns = zip(*(encode(part) for part in parts))
        with torch.autocast("cpu", enabled=False):
            expected = contrast(*(torch.cat(column).float() for column in columns))
    expected.backward()
    wanted = gradients(model)
    for value in gradient_cached(encode, parts, loss):
        with torch.autocast("cpu", torch.bfloat16):
            found = value()
        found.backward()
    assert told == [(torch.float32, False, torch.float32)]
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=0.02, atol=4e-3
        )  # sums over chunks are rounded to bfloat16


def test_random_numbers_of_every_kind_are_the_same_twice_and_go_on_afterwards():
    model, drawn = encoder(0.0), []

    def encode(pair: tuple[Tensor, Tensor]) -> Tensor:
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return model(pair[0]) * drawn[-1][0]

    values = [value() for value in gradient_cached(encode, chunks(), lambda embeddings: embeddings.square().mean())]
    assert drawn[: len(SIZES)] == drawn[len(SIZES) :]
    assert len(set(drawn)) == len(values) == len(SIZES)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) not in drawn


def test_a_value_that_nobody_asks_for_encodes_nothing():
    asked = []
    assert len(list(gradient_cached(asked.append, [1, 2], asked.append))) == 2
    assert asked == []


def test_without_gradients_the_values_still_add_up():
    model = encoder(0.0)
    encode = lambda pair: (model(pair[0]), model(pair[1]))  # noqa: E731
    with torch.no_grad():
        total = sum(value() for value in gradient_cached(encode, chunks(), contrast))
        assert torch.allclose(total, whole(encode, chunks(), contrast))


def test_misuse_is_refused():
    model = encoder()
    with pytest.raises(ValueError, match="at least one chunk"):
        next(gradient_cached(model, [], torch.sum))
    with pytest.raises(ValueError, match=r"has the shape \(5, 8\); return a scalar"):
        next(gradient_cached(model, [torch.ones(5, 6).double()], torch.exp))()
    sizes = iter([5, 4])
    values = gradient_cached(lambda pair: model(pair[: next(sizes)]), [torch.ones(5, 6).double()], torch.sum)
    with pytest.raises(ValueError, match=r"chunk 0 was encoded to the shape \(5, 8\) and then to \(4, 8\)"):
        next(values)()


class Saved:
    """A tensor that autograd keeps for a backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def most_saved() -> Iterator[list[int]]:
    """The largest number of tensors that autograd kept at one time within the block."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    most = [0]

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        most[0] = max(most[0], len(alive))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield most


def test_at_most_one_chunk_has_a_graph():
    model = encoder()
    encode = lambda pair: (model(pair[0]), model(pair[1]))  # noqa: E731
    parts = chunks()
    with most_saved() as of_one_chunk:
        encode(parts[0])
    with most_saved() as of_the_loss:
        embeddings = torch.ones(4, 8, requires_grad=True)
        contrast(embeddings, embeddings + 1)
    with most_saved() as of_all:
        whole(encode, parts, contrast).backward()
    surrogate = 2
    with most_saved() as cached:
        for value in gradient_cached(encode, parts, contrast):
            value().backward()
    assert of_all[0] >= len(parts) * of_one_chunk[0]
    assert cached[0] <= max(of_one_chunk[0] + surrogate, of_the_loss[0])


@pytest.fixture
def methods_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(SIMILARITIES.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SIMILARITIES.parent), os.environ.get("PYTHONPATH", "")]))


def student(folder: Path, arm: str = "distill") -> dict[str, Tensor]:
    return load_file(folder / "arms" / arm / "seed-0" / "distil" / "models" / "student.safetensors")


def logged(folder: Path) -> list[dict[str, float]]:
    text = (folder / "arms" / "distill" / "seed-0" / "distil" / "metrics.jsonl").read_text()
    return [line["terms"] for line in map(json.loads, text.splitlines()) if line["split"] == "train"]


@pytest.mark.usefixtures("methods_can_be_imported")
def test_a_whole_run_ends_with_the_same_weights_and_logs(execute):
    cached = execute(plugins=(SIMILARITIES,), compare=True, log_every=1, out="cached")
    plain = execute("cached=false", plugins=(SIMILARITIES,), compare=True, log_every=1, out="plain")
    for ours, theirs in zip(logged(cached), logged(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for arm in ("distill", "control"):
        for name, tensor in student(plain, arm).items():
            torch.testing.assert_close(student(cached, arm)[name], tensor, rtol=1e-3, atol=1e-5)
    assert not torch.equal(student(cached)["output.bias"], student(cached, "control")["output.bias"])


@pytest.mark.usefixtures("methods_can_be_imported")
def test_a_whole_run_keeps_fewer_graphs(execute):
    settings = ("steps=2", "accumulate=1")
    with most_saved() as cached:
        execute(*settings, plugins=(SIMILARITIES,), out="cached")
    with most_saved() as plain:
        execute(*settings, "cached=false", plugins=(SIMILARITIES,), out="plain")
    assert cached[0] < plain[0] / 3  # eight chunks


@pytest.mark.slow
@pytest.mark.usefixtures("methods_can_be_imported")
@pytest.mark.parametrize("launcher", [TORCHRUN, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_end_with_the_same_weights_with_and_without(tmp_path, launcher):
    launched = [sys.executable, "-m", *launcher, "-m", "kdcore"]
    for cached in ("true", "false"):  # two micro-batches, several passes, and passes of the control without a loss
        command = ["run", "--plugin", str(SIMILARITIES), "--compare", "--device", "cpu", "--set", f"cached={cached}"]
        done = subprocess.run(
            [*launched, *command, "--out", str(tmp_path / cached)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    for arm in ("distill", "control"):
        for name, tensor in student(tmp_path / "false", arm).items():
            torch.testing.assert_close(student(tmp_path / "true", arm)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.cuda
def test_dropout_on_cuda_is_the_same_twice():
    model = encoder().cuda()
    encode = lambda pair: (model(pair[0].cuda()), model(pair[1].cuda()))  # noqa: E731
    loss = lambda queries, passages: (queries @ passages.T).logsumexp(1).mean()  # noqa: E731
    torch.manual_seed(3)
    whole(encode, chunks(), loss).backward()
    wanted = gradients(model)
    torch.manual_seed(3)
    for value in gradient_cached(encode, chunks(), loss):
        value().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-10)
