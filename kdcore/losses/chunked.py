"""Divergences from hidden states and output matrices, so that the logits of a vocabulary are never held whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.distributions import Vocabulary, common_size
from kdcore.losses.divergences import Divergence
from kdcore.losses.positions import at_least_float32, check_mask, rows_of_a_loss, slices
from kdcore.losses.topk import TopK
from kdcore.losses.vocabulary import SharedTokens

__all__ = ["chunked_divergence"]

CPU_PRODUCT_ROWS, DEVICE_PRODUCT_ROWS = 128, 4096
"""On a CPU a product of so many rows is about as fast a row as one of all, and its logits are small beside the weights.
Elsewhere adding one of so many to the weight's gradient costs little beside it."""
TEACHER_ROWS = 128
"""At least; the teacher's logits have no gradient to add up, so are made when the loss needs them."""


def chunked_divergence(
    divergence: Divergence,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopK,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    reduction: Literal["sum", "mean"] = "mean",
    vocabulary: Vocabulary = None,
    chunk: int | None = None,
) -> Tensor:
    """A divergence of the logits ``hidden @ weight.T + bias`` of student and teacher, some positions at a time.

    Equal to the function of `kdcore.losses.divergences` on whole logits, with its gradients to the student's hidden
    states, weight and bias. The gradients are computed with each chunk in the forward pass, as liger-kernel's fused
    linear losses do, so nothing is computed twice, and what is kept until the backward pass is no larger than the
    inputs. The teacher gets no gradient, and an input that requires none costs none.

    Products are taken in the dtype of the inputs, or in autocast's where it is on, as by a linear layer; the divergence
    is computed in float32. The weight's gradient is summed over the chunks in float32 and rounded once to the weight's
    dtype, as that of a whole product is. For half precision this costs 4 bytes a weight while it is summed, and for
    float16, whose range is too small for the sum, until the backward pass has scaled it.

    :param divergence: a function of `kdcore.losses.divergences`; ``functools.partial`` gives it its own parameters.
    :param student_hidden: (..., student's width).
    :param student_weight: the output matrix, (vocabulary, student's width), as ``torch.nn.Linear`` has it.
    :param teacher: its hidden states of the same positions, (..., teacher's width), or a `TopK`.
    :param teacher_weight: (teacher's vocabulary, teacher's width); None with a `TopK`.
    :param temperature: as of the divergence; so are ``mask`` and ``vocabulary``. Masked positions cost nothing.
    :param student_bias: (vocabulary,); likewise ``teacher_bias``.
    :param student_softcap: c of the logits ``c tanh(logits / c)`` (Gemma 2, arXiv 2408.00118); likewise
        ``teacher_softcap``.
    :param reduction: ``"mean"`` or ``"sum"`` over the positions that count.
    :param chunk: positions of a matrix product, by default 128 on a CPU and 4096 elsewhere. The student's logits of a
        chunk are held at a time, in the dtype of the product.
    :return: a scalar, float32, or float64 where the inputs are.
    :raises ValueError: shapes, sizes, chunk or reduction do not fit.
    :raises RuntimeError: its backward pass is asked for a second derivative.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    size = student_weight.shape[0]
    teacher_size = size if teacher_weight is None else teacher_weight.shape[0]
    if not isinstance(vocabulary, SharedTokens):
        size = teacher_size = common_size(size, teacher_size, vocabulary)

    def rows(tensor: Tensor) -> Tensor:
        return _rows(tensor, student_hidden.shape[:-1], mask)

    if isinstance(teacher, TopK) and teacher_weight is None:
        of_teacher: Callable[[slice], Tensor | TopK] = partial(_part, teacher.detach().map(rows))
    elif isinstance(teacher, Tensor) and teacher_weight is not None:
        of_teacher = _head(rows(teacher), teacher_weight[:teacher_size], teacher_bias)
    else:
        raise ValueError("give a teacher's hidden states with its weight, or a TopK without one")

    def loss(logits: Tensor, of_teacher: Tensor | TopK) -> Tensor:
        if isinstance(of_teacher, Tensor):
            of_teacher = _softcapped(of_teacher, teacher_softcap)
        logits = _softcapped(logits, student_softcap)
        return divergence(logits, of_teacher, temperature, reduction="sum", vocabulary=vocabulary)

    hidden, weight = _as_of_linear(rows(student_hidden)), _as_of_linear(student_weight)
    bias = None if student_bias is None else _as_of_linear(student_bias)
    products = chunk or (CPU_PRODUCT_ROWS if hidden.device.type == "cpu" else DEVICE_PRODUCT_ROWS)
    losses = rows_of_a_loss(hidden.device, size)
    total: Tensor = _Chunked.apply(hidden, weight, bias, size, of_teacher, loss, products, losses)
    return total if reduction == "sum" else total / max(hidden.shape[0], 1)


class _Chunked(torch.autograd.Function):
    """The sum of a loss of logits over chunks of rows; the gradients are made along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        size: int,
        of_teacher: Callable[[slice], Tensor | TopK],
        loss: Callable[[Tensor, Tensor | TopK], Tensor],
        products: int,
        losses: int,
    ) -> Tensor:
        """Sum ``loss(logits, of_teacher(rows))``.

        :param size: the first tokens, which have logits; the gradient of the others is 0.
        :param products: rows of a matrix product.
        :param losses: rows of a loss, whose gradient takes the place of its logits.
        """
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        accurate = torch.promote_types(weight.dtype, torch.float32)
        head, head_bias = weight[:size], None if bias is None else bias[:size]
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        weight_grad = torch.empty_like(weight, dtype=accurate) if of_weight else None
        if weight_grad is not None:
            weight_grad[size if hidden.shape[0] else 0 :] = 0
        bias_grad = torch.zeros_like(bias, dtype=accurate) if of_bias and bias is not None else None
        total = hidden.new_zeros((), dtype=accurate)
        with torch.autocast(hidden.device.type, enabled=False):
            for chosen in slices(hidden.shape[0], products):
                part = hidden[chosen]
                logits = F.linear(part, head, head_bias)
                for taught in slices(part.shape[0], max(losses, TEACHER_ROWS)):
                    teacher = of_teacher(slice(chosen.start + taught.start, chosen.start + taught.stop))
                    of_student = logits[taught]
                    for some in slices(len(of_student), losses):
                        leaf = of_student[some].detach().requires_grad_(any(ctx.needs_input_grad))
                        with torch.enable_grad():
                            value = loss(leaf, _part(teacher, some))
                        total += value.detach()
                        if value.requires_grad:
                            of_student[some] = torch.autograd.grad(value, leaf, materialize_grads=True)[0]
                        elif leaf.requires_grad:
                            of_student[some] = 0
                if hidden_grad is not None:
                    torch.mm(logits, head, out=hidden_grad[chosen])
                if weight_grad is not None:
                    _add_product(weight_grad[:size], logits.T, part, beta=int(chosen.start > 0))
                if bias_grad is not None:
                    bias_grad[:size] += logits.sum(0, dtype=accurate)
                del logits, of_student, teacher
        kept = accurate if weight.dtype == torch.float16 else weight.dtype
        of_head = (None if grad is None else grad.to(kept) for grad in (weight_grad, bias_grad))
        ctx.save_for_backward(hidden_grad, *of_head)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("chunked_divergence has no second derivative: backward without create_graph=True")
        of_inputs = (None if grad is None else grad * grad_output for grad in ctx.saved_tensors)
        return *of_inputs, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """``total = beta * total + left @ right``, where the factors may have half the total's precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, left, right, total.dtype, beta=beta, out=total)
    elif beta:
        total += left @ right
    else:
        total.copy_(left @ right)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[slice], Tensor]:
    """A teacher's logits of some rows, without a graph."""
    with torch.no_grad():
        hidden, weight = _as_of_linear(hidden), _as_of_linear(weight)
        bias = None if bias is None else _as_of_linear(bias[: weight.shape[0]])
    return lambda chosen: F.linear(hidden[chosen], weight, bias)


def _part(teacher: Tensor | TopK, chosen: slice) -> Tensor | TopK:
    return teacher.map(lambda tensor: tensor[chosen]) if isinstance(teacher, TopK) else teacher[chosen]


def _softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(at_least_float32(logits) / softcap)


def _rows(tensor: Tensor, positions: torch.Size, mask: Tensor | None) -> Tensor:
    """The positions that count, as rows."""
    if tensor.shape[: len(positions)] != positions:
        raise ValueError(f"the teacher's positions must be the student's {tuple(positions)}, not {tuple(tensor.shape)}")
    if mask is None:
        return tensor.reshape(positions.numel(), *tensor.shape[len(positions) :])
    check_mask(mask, positions)
    return tensor[mask]


def _as_of_linear(tensor: Tensor) -> Tensor:
    """As a linear layer takes it: in autocast's dtype where it is on. Without gradient there is no graph."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        tensor = tensor.to(torch.get_autocast_dtype(device))
    return tensor if torch.is_grad_enabled() else tensor.detach()
