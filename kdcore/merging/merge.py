"""Merge a plan's models into a folder, or say beforehand what that would take."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from attrs import frozen

from kdcore.engine.progress import Progress
from kdcore.errors import InputError
from kdcore.files import locked, make_durable, placed, read_json
from kdcore.merging.carry import RECORD, carry
from kdcore.merging.graph import Graph
from kdcore.merging.lazy import CHUNK, LazyTensor, chunks, row_elements
from kdcore.merging.plan import Plan
from kdcore.merging.stream import LOCK, LOG, Job, Threads, finish, stream, tidy

__all__ = ["Estimate", "estimate", "merge", "readable"]

UNFINISHED, EARLIER = ".unfinished", ".earlier"
SAMPLED_SECONDS = 2.0


def merge(
    plan: Plan,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Merge and write a model that loads like its sources; killed in the middle, the same call goes on.

    :param out: the folder to write. Until all is done, what there is lies in ``OUT.unfinished``.
    :param device: where to compute.
    :param threads: that compute and write; by default one a processor.
    :param force: replace an earlier merge, be it this one.
    :returns: the folder.
    :raises InputError: the models do not fit together, or something is in the way.
    :raises OSError: the disk is full; what is done is kept.
    """
    progress = progress or Progress(quiet=True)
    graph = Graph(plan, device)
    job = Job.of(graph)
    if not force and _is_done(out, job):
        _remove_traces(out)
        progress.line(f"{out}: is this merge already")
        return out
    _refuse_occupied(out, graph, force)
    target = Path(os.path.realpath(out))
    unfinished = target.with_name(target.name + UNFINISHED)
    with placed(out):
        unfinished.mkdir(parents=True, exist_ok=True)
    with locked(unfinished):
        tidy(job, unfinished)
        _refuse_full(unfinished, job)
        with progress.bar("merging", job.layout.size, is_bytes=True) as bar, Threads(threads) as pool:
            digests = stream(job, unfinished, pool, bar.advance)
        carry(graph, job, unfinished, digests, target.name)
        finish(job, unfinished)
        make_durable(unfinished)
        _refuse_occupied(out, graph, force)
        _replace(target, unfinished)
    _remove_traces(out)
    return out


def _remove_traces(out: Path) -> None:
    """Remove what only an unfinished merge needs; after that of the folder's name, so that it can be gone on with."""
    for name in (LOG, LOCK):
        (out / name).unlink(missing_ok=True)


def _replace(target: Path, made: Path) -> None:
    """Give a folder its place, so that at any moment there is a whole one there, or none."""
    earlier = made.with_name(made.name + EARLIER)
    if target.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        target.rename(earlier)
    made.rename(target)
    shutil.rmtree(earlier, ignore_errors=True)


def _is_done(out: Path, job: Job) -> bool:
    record = read_json(out / RECORD) if (out / RECORD).is_file() else {}
    if not isinstance(record, dict) or record.get("fingerprint") != job.fingerprint:
        return False
    for shard in job.layout.shards:
        path = out / shard.file
        if not path.is_file() or path.stat().st_size != shard.size:
            raise InputError(f"{path}: is missing or of another size; merge again with --force")
    return True


def _refuse_occupied(out: Path, graph: Graph, force: bool) -> None:
    if out.resolve() == Path.cwd():
        raise InputError(f"{out}: is the current folder; name a new one in it")
    folders = [leaf.checkpoint.folder for leaf in graph.leaves.values()]
    folders += [leaf.adapter.folder for leaf in graph.leaves.values() if leaf.adapter is not None]
    for source in (folder.resolve() for folder in folders):
        if out.resolve() == source or source in out.resolve().parents or out.resolve() in source.parents:
            raise InputError(f"{out}: overlaps {source}, which is merged; name another folder")
    if out.is_file():
        raise InputError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / RECORD).is_file():
            raise InputError(f"{out}: holds something else than a merge; name a new folder")
        if not force:
            raise InputError(f"{out}: holds another merge; name a new folder, or replace it with --force")


def _refuse_full(folder: Path, job: Job) -> None:
    there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    needed = job.layout.size - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent}: needs {readable(needed)} more, {readable(free)} are free; free some space there, or "
            "name another folder"
        )


@frozen
class Estimate:
    """What a merge would take.

    :ivar graph: its models, opened.
    :ivar job: what would be written.
    :ivar read: bytes of weights to read.
    :ivar seconds: of computing, from a sample; writing to the disk comes on top where it is slower.
    :ivar memory: bytes that are held at a time, beside mapped files.
    """

    graph: Graph
    job: Job
    read: int
    seconds: float
    memory: int

    def dtype_changes(self) -> dict[str, int]:
        """The number of tensors by ``"float32 to bfloat16"``, against the model that the rest is carried from."""
        stored = self.graph.leaves[self.graph.plan.carrier()].checkpoint
        changes: Counter[str] = Counter()
        for output in self.job.outputs:
            before = stored[output.name].dtype if output.name in stored else output.dtype
            if before != output.dtype:
                changes[f"{before} to {output.dtype}".replace("torch.", "")] += 1
        return dict(changes)

    @property
    def written(self) -> int:
        """Bytes of weights to write."""
        return self.job.layout.size


def estimate(plan: Plan, *, device: torch.device | str = "cpu", threads: int | None = None) -> Estimate:
    """Open a plan's models and merge a sample of pieces, writing nothing.

    :raises InputError: the models do not fit together.
    """
    graph = Graph(plan, device)
    job = Job.of(graph)
    read = sum(path.stat().st_size for path in graph.files())
    outputs = sorted(job.outputs, key=lambda output: output.spec.size)
    began, sampled = time.perf_counter(), 0
    with Threads(threads) as pool, torch.inference_mode():
        for output in outputs[len(outputs) // 2 :] + outputs[: len(outputs) // 2]:
            output.lazy.prepare(pool.map)
            for _ in pool.map(partial(_compute, output.lazy), chunks(output.lazy.shape)):
                pass
            sampled += output.spec.size
            if time.perf_counter() - began > SAMPLED_SECONDS:
                break
    seconds = (time.perf_counter() - began) * sum(output.spec.size for output in outputs) / max(1, sampled)
    largest = max(max(CHUNK, row_elements(each.lazy.shape)) * each.lazy.dtype.itemsize for each in outputs)
    held = largest * (3 * len(graph.leaves) + 4) * pool.count
    return Estimate(graph, job, read, seconds, held)


def _compute(lazy: LazyTensor, bounds: tuple[int, int]) -> None:
    lazy.rows(*bounds)


def readable(size: int) -> str:
    """Bytes in the largest unit that leaves a whole number before the point."""
    value, unit = float(size), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
