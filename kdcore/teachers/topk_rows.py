"""How the k most probable tokens of an output of logits lie in a store: as three plain outputs.

An output ``logits`` of ``Row(topk=k)`` is stored as ``logits.indices`` (int32), ``logits.log_probabilities`` (the row's
dtype) and ``logits.log_rest`` (float32), and comes back as a `kdcore.losses.topk.TopK`. A position of k = 32 in float16
takes 196 bytes, where 32,768 logits take 65,536.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcore.errors import InputError
from kdcore.recipe import Row

if TYPE_CHECKING:
    import torch

    from kdcore.losses.topk import TopK

__all__ = ["PARTS", "condense", "may_be_impossible", "restore", "stored_schema"]

PARTS = (".indices", ".log_probabilities", ".log_rest")
ROUNDING = 0.05
LOGITS_AT_ONCE = 2**24


def stored_schema(schema: Mapping[str, Row]) -> dict[str, Row]:
    """The plain outputs that a schema's rows are stored as.

    :raises InputError: two outputs would be stored under one name.
    """
    stored: dict[str, Row] = {}
    for name, row in schema.items():
        dtypes = {"": row.dtype}
        if row.topk is not None:
            dtypes = dict(zip(PARTS, ("int32", row.dtype, "float32")))
        for part, dtype in dtypes.items():
            if name + part in stored:
                raise InputError(f"output {name + part!r} is also a part of a top-k output; give it another name")
            stored[name + part] = Row(lengths=row.lengths, dtype=dtype)
    return stored


def may_be_impossible(schema: Mapping[str, Row]) -> set[str]:
    """The plain outputs that hold log-probabilities: minus infinity is a value of theirs."""
    return {name + part for name, row in schema.items() if row.topk is not None for part in PARTS[1:]}


def condense(
    outputs: Mapping[str, Any], schema: Mapping[str, Row], mask: Callable[[str], torch.Tensor] | None = None
) -> dict[str, Any]:
    """The plain outputs of what a teacher gave, for a batch or for one example.

    The top k of logits are taken on the logits' own device, so that no logits leave it.

    :param outputs: as ``schema`` names them; a top-k output is logits ``(..., vocabulary)``, or a `TopK` where the
        teacher gives no more; its parts may be arrays or lists.
    :param mask: of a batch, the field in ``Row(lengths=)`` to the real positions, (rows, longest).
    :raises InputError: k is larger than the vocabulary, or a `TopK` is of another k or temperature, or no distribution.
    """
    plain: dict[str, Any] = {}
    for name, value in outputs.items():
        row = schema.get(name)
        if row is None or row.topk is None:
            plain[name] = value
        else:
            plain.update(zip((name + part for part in PARTS), _condensed(name, value, row, mask)))
    return plain


def _condensed(name: str, value: Any, row: Row, mask: Callable[[str], torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    import torch

    from kdcore.losses.topk import TopK, top_k

    assert row.topk is not None
    if isinstance(value, TopK):
        top = _given(name, value, row)
        real = None if mask is None or row.lengths is None else mask(row.lengths)
        _refuse_no_distribution(name, top, real)
    else:
        logits = _tensor(value)
        if logits.ndim == 0:
            raise InputError(f"output {name!r}: a scalar has no vocabulary to keep the top {row.topk} of")
        *shape, vocabulary = logits.shape
        if row.topk > vocabulary:
            raise InputError(
                f"output {name!r}: Row(topk={row.topk}) is more than the vocabulary of {vocabulary}; lower topk"
            )
        pieces = torch.split(logits.detach().reshape(-1, vocabulary), max(1, LOGITS_AT_ONCE // vocabulary))
        tops = [top_k(piece, row.topk, row.temperature)[:3] for piece in pieces]
        top = tuple(torch.cat(parts).reshape((*shape, *parts[0].shape[1:])) for parts in zip(*tops))
    indices, log_probabilities, log_rest = top
    return indices.int(), _rounded(log_probabilities, getattr(torch, row.dtype)), log_rest.float()


def _given(name: str, value: TopK, row: Row) -> tuple[torch.Tensor, ...]:
    """The parts of what a teacher gave, as tensors that fit together and the row."""
    indices, log_probabilities, log_rest = parts = tuple(map(_tensor, value[:3]))
    if indices.ndim == 0 or indices.shape != log_probabilities.shape or indices.shape[:-1] != log_rest.shape:
        raise InputError(
            f"output {name!r}: the teacher gave a TopK of {[tuple(part.shape) for part in parts]}; its indices and "
            "log_probabilities need the shape (..., k), its log_rest (...)"
        )
    k = indices.shape[-1]
    if (k, value.temperature) != (row.topk, row.temperature):
        raise InputError(
            f"output {name!r}: the teacher gave the top {k} at temperature {value.temperature}, its Row keeps the "
            f"top {row.topk} at {row.temperature}; make both alike"
        )
    return parts


def _refuse_no_distribution(name: str, top: tuple[torch.Tensor, ...], real: torch.Tensor | None) -> None:
    import torch

    if real is not None:
        real = real[:, : top[0].shape[1]].to(top[0].device)
        top = tuple(part[:, : real.shape[1]][real] for part in top)
    indices, log_probabilities, log_rest = top
    if indices.is_floating_point():
        raise InputError(f"output {name!r}: the token ids of a TopK are {indices.dtype}; give integers")
    ordered = indices.sort(-1).values
    if (ordered[..., :1] < 0).any() or (ordered[..., 1:] == ordered[..., :-1]).any():
        raise InputError(f"output {name!r}: a TopK has a token id below 0, or one twice; give k different tokens")
    total = torch.cat([log_probabilities.double(), log_rest.double().unsqueeze(-1)], -1).logsumexp(-1)
    wrong = ~(total.abs() < ROUNDING)
    if wrong.any():
        raise InputError(
            f"output {name!r}: the probabilities of a TopK and its rest sum to {total[wrong][0].exp():.3g}, not to 1; "
            "give natural logs, and in log_rest that of all other tokens"
        )


def _rounded(log_probabilities: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a dtype that may have a smaller range; what is possible stays possible."""
    import torch

    limited = log_probabilities.clamp(min=torch.finfo(dtype).min)
    return torch.where(log_probabilities.isneginf(), log_probabilities, limited).to(dtype)


def _tensor(value: Any) -> torch.Tensor:
    import torch

    return value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))


def restore(columns: Mapping[str, torch.Tensor], schema: Mapping[str, Row]) -> dict[str, torch.Tensor | TopK]:
    """The outputs that a schema names, from the plain ones of its rows.

    In a `TopK` the padding of ragged rows is 0 everywhere: k times token 0, with log-probability 0. Every divergence is
    finite there, so a mask makes it 0 and leaves no NaN in a gradient.

    :param columns: plain output to ``(rows, [longest,] ...)``, on any device.
    """
    from kdcore.losses.topk import TopK

    found: dict[str, torch.Tensor | TopK] = {}
    for name, row in schema.items():
        if row.topk is None:
            found[name] = columns[name]
        else:
            indices, log_probabilities, log_rest = (columns[name + part] for part in PARTS)
            found[name] = TopK(indices.long(), log_probabilities.float(), log_rest, row.temperature)
    return found
