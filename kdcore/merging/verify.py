"""Check a merged model: what is written is what was computed, and that is what float64 gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from attrs import frozen

from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.merging.carry import RECORD
from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.graph import Graph, Output
from kdcore.merging.lazy import LazyTensor, chunks
from kdcore.merging.plan import Plan
from kdcore.merging.stream import Job, Threads, digest_of

__all__ = ["Verification", "verify"]

ALLOWED, FEW = 1e-3, 8
"""The share of a tensor's entries that may be further off than rounding explains, and how many more, up to an eighth of
them: where methods choose between entries, a tie may fall either way."""
WORKING = 16 * torch.finfo(torch.float32).eps
"""What rounding in float32 may make of the largest numbers that a tensor is computed of."""


@frozen
class Verification:
    """What was found.

    :ivar tensors: how many there are; all have the checksums that they were written with.
    :ivar compared: entries computed anew in float64.
    :ivar beyond: those of them that are further off than rounding explains: one step of the dtype (one unit in the last
        place), or a few of float32 at the largest magnitude of what they are computed of.
    :ivar worst: the largest distance, in such steps, and the tensor where it is.
    """

    tensors: int
    compared: int
    beyond: int
    worst: float
    where: str


def verify(
    plan: Plan,
    out: Path,
    threads: Threads,
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Check a folder that `merge` wrote against its plan and its record, ``merge.json``.

    Every byte is compared with its checksum. Of every tensor the first, middle and last piece are computed anew in
    float64.

    :param advance: is told the bytes that are done.
    :raises InputError: a tensor is missing, of another shape or dtype, damaged, no number, or not what the plan gives.
    """
    record = read_json(out / RECORD)
    graph = Graph(plan, device, exact=True)
    job = Job.of(graph)
    digests = record.get("tensors") if isinstance(record, dict) else None
    if not isinstance(digests, dict):
        raise InputError(f"{out / RECORD}: has no checksums of tensors; merge again with --force")
    written = Checkpoint(out)
    names = [output.name for output in job.outputs]
    if foreign := sorted({*written} ^ {*names}):
        raise InputError(f"{out}: {foreign[0]} is {'not in' if foreign[0] in names else 'no part of'} the merge")
    for shard in job.layout.shards:
        if not _begins_with(out / shard.file, shard.header):
            raise InputError(f"{out / shard.file}: is not the file that the plan gives; merge again with --force")
    compared = beyond = 0
    worst, where = 0.0, ""
    for output in job.outputs:
        place = job.layout.places[output.name]
        tensor = written[output.name]
        if tuple(tensor.shape) != output.lazy.shape or tensor.dtype != output.dtype:
            raise InputError(f"{out}: {output.name} is {tensor.dtype} {[*tensor.shape]}, not as the plan says")
        descriptor = os.open(out / place.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if digest_of(descriptor, place, threads) != digests.get(output.name):
                raise InputError(f"{out / place.file}: {output.name} is damaged; merge again with --force")
        finally:
            os.close(descriptor)
        if output.dtype.is_floating_point:
            output.lazy.prepare(threads.map)
            entries = off = 0
            for bounds in _sample(output):
                rows = output.lazy.rows(*bounds)
                found = (tensor if not tensor.shape else tensor[slice(*bounds)]).double()
                if not torch.isfinite(found).all() and torch.isfinite(rows).all():
                    raise InputError(f"{out}: {output.name} holds what is no number; use a wider dtype")
                steps = _steps(found, rows, _scale(output.lazy, rows, bounds), output.dtype)
                entries += steps.numel()
                off += int((steps > 1).sum())
                if steps.numel() and steps.max().item() > worst:
                    worst, where = steps.max().item(), output.name
            if off > ALLOWED * entries + min(FEW, entries / 8):
                raise InputError(f"{out}: {output.name} is not what the plan gives, in {off} of {entries} entries")
            compared += entries
            beyond += off
        advance(place.spec.size)
    return Verification(len(names), compared, beyond, worst, where)


def _begins_with(path: Path, header: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _sample(output: Output) -> list[tuple[int, int]]:
    pieces = chunks(output.lazy.shape)
    return [pieces[index] for index in sorted({0, len(pieces) // 2, len(pieces) - 1})] if pieces else []


def _scale(lazy: LazyTensor, rows: torch.Tensor, bounds: tuple[int, int]) -> float:
    """The magnitude of the largest numbers in some rows of a tensor and of all that it is computed of."""
    largest = rows.abs().max().item() if rows.numel() else 0.0
    return largest + sum(_scale(each, each.rows(*bounds), bounds) for each in lazy.inputs)


def _steps(found: torch.Tensor, exact: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The distance in steps of the dtype at that magnitude, or of float32 at ``scale`` where those are larger."""
    limits = torch.finfo(dtype)
    exact = exact.cpu()
    magnitude = exact.abs().clamp_min(limits.smallest_normal)
    step = (torch.exp2(magnitude.log2().floor()) * limits.eps).clamp_min(scale * WORKING)
    distance = (found - exact).abs()
    return torch.nan_to_num(distance / step, nan=0.0)
