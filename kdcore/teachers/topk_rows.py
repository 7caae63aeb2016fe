"""How the k most probable tokens of an output of logits lie in a store: as three plain outputs.

An output ``logits`` of ``Row(topk=k)`` is stored as ``logits.indices`` (int32), ``logits.log_probabilities`` (the row's
dtype) and ``logits.log_rest`` (float32), and comes back as a `kdcore.losses.topk.TopK`. A position of k = 32 in float16
takes 196 bytes, where 32,768 logits take 65,536.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcore.errors import InputError
from kdcore.recipe import Row

if TYPE_CHECKING:
    import torch

    from kdcore.losses.topk import TopK

__all__ = ["LOG_REST", "PARTS", "condense", "restore", "stored_schema"]

LOG_REST = ".log_rest"
PARTS = (".indices", ".log_probabilities", LOG_REST)
LOGITS_AT_ONCE = 2**24


def stored_schema(schema: Mapping[str, Row]) -> dict[str, Row]:
    """The plain outputs that a schema's rows are stored as.

    :raises InputError: two outputs would be stored under one name.
    """
    stored: dict[str, Row] = {}
    for name, row in schema.items():
        dtypes = dict.fromkeys([""], row.dtype)
        if row.topk is not None:
            dtypes = dict(zip(PARTS, ("int32", row.dtype, "float32")))
        for part, dtype in dtypes.items():
            if name + part in stored:
                raise InputError(f"output {name + part!r} is also a part of a top-k output; give it another name")
            stored[name + part] = Row(lengths=row.lengths, dtype=dtype)
    return stored


def condense(outputs: Mapping[str, Any], schema: Mapping[str, Row]) -> dict[str, Any]:
    """The plain outputs of what a teacher gave, for a batch or for one example.

    The top k of logits are taken on the logits' own device, so that no logits leave it.

    :param outputs: as ``schema`` names them; a top-k output is logits ``(..., vocabulary)``, or a `TopK` where the
        teacher gives no more.
    :raises InputError: k is larger than the vocabulary, or a `TopK` is of another k or temperature.
    """
    plain: dict[str, Any] = {}
    for name, value in outputs.items():
        row = schema.get(name)
        if row is None or row.topk is None:
            plain[name] = value
        else:
            plain.update(zip((name + part for part in PARTS), _condensed(name, value, row)))
    return plain


def _condensed(name: str, value: Any, row: Row) -> tuple[torch.Tensor, ...]:
    import torch

    from kdcore.losses.topk import TopK, top_k

    assert row.topk is not None
    if isinstance(value, TopK):
        k = value.indices.shape[-1]
        if (k, value.temperature) != (row.topk, row.temperature):
            raise InputError(
                f"output {name!r}: the teacher gave the top {k} at temperature {value.temperature}, its Row keeps the "
                f"top {row.topk} at {row.temperature}; make both alike"
            )
        top: tuple[torch.Tensor, ...] = value[:3]
    else:
        logits = torch.as_tensor(value)
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
    return indices.int(), log_probabilities.to(getattr(torch, row.dtype)), log_rest.float()


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
