"""Gradient caching: a loss over a large batch, with the graph of one chunk at a time."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["gradient_cached"]

Chunk = TypeVar("Chunk")


def gradient_cached(
    encode: Callable[[Chunk], Tensor | tuple[Tensor, ...]],
    chunks: Sequence[Chunk],
    loss: Callable[..., Tensor],
    *,
    model: nn.Module | None = None,
) -> Iterator[Callable[[], Tensor]]:
    """A loss over the embeddings of a whole micro-batch, as one term for each of its chunks.

    For a generator of `student_loss`, whose passes have one backward each::

        rows = torch.arange(len(batch)).tensor_split(4)
        encode = lambda rows: (embed(batch["query"][rows]), embed(batch["passage"][rows]))
        for value in gradient_cached(encode, rows, in_batch_cross_entropy):
            yield [LossTerm("contrastive", value)]

    The first value encodes all chunks without a graph and computes the loss and its gradient with respect to the
    embeddings. Each value then encodes its own chunk again, with a graph, and returns a scalar whose gradient with
    respect to the encoder's parameters is the chunk's part of the loss's. The scalars add up to the loss, so logs are
    right; weights, micro-batches and ``per`` scale them as any other term. It costs one more forward.

    Randomness is the same in both encodings of a chunk. Parameters and graphs that ``loss`` itself reaches (a learned
    temperature) get their gradient with the first chunk. Only the chunks of one micro-batch on one rank are seen
    together: raise the batch rather than ``accumulate`` for more negatives.

    :param encode: one chunk to its embeddings, (n, ...), or to a tuple of them; called twice.
    :param chunks: parts of the batch, such as indices; in several processes as many in each, whatever its share of the
        batch.
    :param loss: receives what ``encode`` gives, each joined over all chunks along axis 0, in float32 or float64 with
        autocast off, and returns a scalar.
    :param model: its buffers are put back before the second encoding, so that each moves once and is seen alike
        (batch norm, spectral norm). Without it they move twice.
    :returns: one callable a chunk, to be called in order: a term whose weight is 0 is then not even encoded.
    :raises ValueError: there is no chunk; the loss is no scalar; a chunk gives other shapes when encoded again.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    arXiv 2101.06983, section 3.2.
    """
    if not chunks:
        raise ValueError("gradient_cached needs at least one chunk")
    cache = _Cache(encode, chunks, loss, model)
    for number in range(len(chunks)):
        yield partial(cache.value, number)


class _Cache(Generic[Chunk]):
    """The loss of all chunks, and its gradient with respect to what each of them was encoded to."""

    def __init__(
        self,
        encode: Callable[[Chunk], Tensor | tuple[Tensor, ...]],
        chunks: Sequence[Chunk],
        loss: Callable[..., Tensor],
        model: nn.Module | None,
    ) -> None:
        self.encode, self.chunks, self.loss, self.model = encode, chunks, loss, model

    def value(self, number: int) -> Tensor:
        """The share of one chunk in the loss, with the graph of that chunk."""
        total, gradients, beside = self._first
        with self._states[number].restored():
            embeddings = _as_tuple(self.encode(self.chunks[number]))
        pairs = [(embedding, gradient) for embedding, gradient in zip(embeddings, gradients[number], strict=True)]
        if number == 0:
            pairs += beside
        surrogate = total.new_zeros(())
        for tensor, gradient in pairs:
            if tensor.shape != gradient.shape:
                raise ValueError(
                    f"chunk {number} was encoded to the shape {tuple(gradient.shape)} and then to "
                    f"{tuple(tensor.shape)}; encode must give the same twice"
                )
            surrogate = surrogate + (tensor.to(gradient.dtype) * gradient).sum()
        return surrogate - surrogate.detach() + total / len(self.chunks)

    @cached_property
    def _first(self) -> tuple[Tensor, list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
        """The loss; its gradient by chunk and embedding; what else it depends on, each with its gradient."""
        encoded = self._encoded()
        sizes = [len(parts[0]) for parts in encoded]
        device = encoded[0][0].device.type
        # An own graph of the loss alone, though a trace of the control runs without gradients.
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            joined = [torch.cat(parts).requires_grad_() for parts in zip(*encoded, strict=True)]
            total = self.loss(*joined)
            if total.ndim != 0:
                raise ValueError(f"the loss of gradient_cached has the shape {tuple(total.shape)}; return a scalar")
            beside = _leaves(total, besides=joined)
            found = torch.autograd.grad(total, [*joined, *beside], materialize_grads=True)
        by_chunk = zip(*(torch.split(gradient, sizes) for gradient in found[: len(joined)]))
        return total.detach(), [list(parts) for parts in by_chunk], list(zip(beside, found[len(joined) :]))

    def _encoded(self) -> list[list[Tensor]]:
        """The embeddings of each chunk in at least float32, without a graph."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()} if self.model else {}
        self._states: list[_RandomState] = []
        encoded = []
        with torch.no_grad():
            for chunk in self.chunks:
                self._states.append(_RandomState())
                parts = _as_tuple(self.encode(chunk))
                encoded.append([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts])
            for name, buffer in self.model.named_buffers() if self.model else ():
                buffer.copy_(buffers[name])
        torch.clear_autocast_cache()  # it holds weights that were cast without a graph
        return encoded


class _RandomState:
    """The state of the global generators of Python, numpy and torch, of torch those of the CPU and of the device."""

    def __init__(self) -> None:
        self.python, self.numpy, self.cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.device: Tensor | None = None
        module = _device_module()
        if module is not None:
            self.device = module.get_rng_state()

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            _device_module().set_rng_state(self.device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """This state within the block, and after it the one from before."""
        outside = _RandomState()
        self.restore()
        try:
            yield
        finally:
            outside.restore()


def _device_module() -> Any:
    """What holds the generator of the accelerator in use (``torch.cuda``), or None where there is none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda
    return torch.mps if torch.backends.mps.is_available() else None


def _as_tuple(embeddings: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (embeddings,) if isinstance(embeddings, Tensor) else tuple(embeddings)


def _leaves(total: Tensor, besides: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of a graph, such as parameters, without those in ``besides``."""
    known = {id(tensor) for tensor in besides}
    found: list[Tensor] = []
    seen, ahead = set(), [total.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if leaf is not None and id(leaf) not in known:
            known.add(id(leaf))
            found.append(leaf)
        ahead += [following for following, _ in node.next_functions]
    return found
