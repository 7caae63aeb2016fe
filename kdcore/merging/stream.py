"""Merging at disk speed: sources are mapped, pieces of rows are merged by several threads and written in place.

What is done is logged after it is written, with a checksum, in ``OUT.unfinished`` beside the folder that it becomes; a
merge that was stopped goes on there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
import xxhash
from attrs import frozen

from kdcore import __version__
from kdcore.errors import InputError
from kdcore.files import JsonLines
from kdcore.merging.graph import Graph, Output
from kdcore.merging.lazy import chunks
from kdcore.merging.shards import Layout, TensorPlace, lay_out, opened, write_rows

__all__ = ["LOCK", "LOG", "Job", "Threads", "digest_of", "finish", "stream", "tidy"]

T = TypeVar("T")
R = TypeVar("R")

PART = ".part"
LOG = "progress.jsonl"
LOCK = ".lock"
AHEAD = 16  # tensors that are being written while the next are prepared


class Threads:
    """A pool of threads, each of which computes by itself: torch's own are switched off meanwhile.

    :param count: by default one a processor.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or len(os.sched_getaffinity(0))

    def __enter__(self) -> Threads:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.count, "kdcore-merge", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """Begin one call."""
        return self._pool.submit(function, *arguments)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """As the built-in: results in order, few of them ahead; a single item is computed here and now."""
        if len(items) == 1:
            yield function(items[0])
            return
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(self._pool.submit(function, item))
            if len(ahead) > 4 * self.count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@frozen(eq=False)
class Job:
    """All that a merge writes.

    :ivar outputs: its tensors, in order.
    :ivar layout: where they go.
    :ivar fingerprint: of plan, sources and layout: what the progress in a folder has to be of.
    """

    outputs: Sequence[Output]
    layout: Layout
    fingerprint: str

    @classmethod
    def of(cls, graph: Graph) -> Job:
        """The job of a plan whose models are opened.

        :raises InputError: sources do not fit together.
        """
        outputs = graph.outputs()
        layout = lay_out([output.spec for output in outputs], graph.plan.shard_size, graph.stems())
        files = [path.resolve() for path in [*graph.files(), *graph.settings()]]
        facts = {
            "kdcore": __version__,
            "plan": attrs.asdict(graph.plan),
            "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "headers": [[shard.file, shard.header.hex()] for shard in layout.shards],
        }
        fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
        return cls(outputs, layout, fingerprint)


def tidy(job: Job, folder: Path) -> None:
    """Prepare a folder for `stream`: what is there of another merge goes, what is of this gets its first name again.

    :raises InputError: it is no folder of a merge.
    """
    _, offset = _progress(folder / LOG, job.fingerprint)
    foreign = sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != PART)
    if not (folder / LOG).exists() and foreign not in ([], [LOCK]):
        raise InputError(f"{folder}: holds what is of no merge ({foreign[-1]}); move it away, or name another --out")
    for path in [] if offset else folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    for shard in job.layout.shards:
        if (folder / shard.file).exists():
            (folder / shard.file).rename(folder / (shard.file + PART))


def stream(job: Job, folder: Path, threads: Threads, advance: Callable[[int], None]) -> dict[str, str]:
    """Write all tensors into ``folder``, which may hold a part of them already.

    :param folder: its files of weights end with ``.part`` until all is done.
    :param advance: is told the bytes that were written, or found written.
    :returns: the checksum of each tensor, by name.
    :raises OSError: the disk is full; the folder can be gone on with.
    """
    done, offset = _progress(folder / LOG, job.fingerprint)
    with (
        opened(folder, job.layout, PART) as descriptors,
        JsonLines(folder / LOG, offset) as log,
        _unwritten() as pending,
    ):
        if not offset:
            log.append({"merge": job.fingerprint})
        digests: dict[str, str] = {}

        def complete() -> None:
            place, futures = pending[0]
            digest = _combined(future.result() for future in futures)
            pending.popleft()
            log.append({"tensor": place.spec.name, "digest": digest})
            digests[place.spec.name] = digest
            advance(place.spec.size)

        for output in job.outputs:
            place = job.layout.places[output.name]
            descriptor = descriptors[place.file]
            if output.name in done and done[output.name] == digest_of(descriptor, place, threads):
                digests[output.name] = done[output.name]
                advance(place.spec.size)
                continue
            output.lazy.prepare(threads.map)
            write = partial(_write, output, descriptor, place)
            pending.append((place, [threads.submit(write, *bounds) for bounds in chunks(place.spec.shape)]))
            while len(pending) > AHEAD:
                complete()
        while pending:
            complete()
    return {output.name: digests[output.name] for output in job.outputs}


@contextlib.contextmanager
def _unwritten() -> Iterator[deque[tuple[TensorPlace, list[Future[bytes]]]]]:
    """Tensors that are being written; when the block ends, whatever ends it, no thread writes any more."""
    pending: deque[tuple[TensorPlace, list[Future[bytes]]]] = deque()
    try:
        yield pending
    finally:
        for _, futures in pending:
            for future in futures:
                future.cancel()
            wait(futures)


def _write(output: Output, descriptor: int, place: TensorPlace, start: int, stop: int) -> bytes:
    with torch.inference_mode():
        return xxhash.xxh3_64_digest(write_rows(descriptor, place, start, output.lazy.rows(start, stop)))


def digest_of(descriptor: int, place: TensorPlace, threads: Threads) -> str:
    """The checksum of a tensor as it is on disk."""
    row = place.spec.size // max(1, place.spec.shape[0]) if place.spec.shape else place.spec.size

    def digest(bounds: tuple[int, int]) -> bytes:
        start, stop = bounds
        return xxhash.xxh3_64_digest(os.pread(descriptor, (stop - start) * row, place.offset + start * row))

    return _combined(threads.map(digest, chunks(place.spec.shape)))


def _combined(digests: Any) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def _progress(path: Path, fingerprint: str) -> tuple[Mapping[str, str], int]:
    """The tensors that are done, with their checksums, and where the log of them ends; none of another merge."""
    if not path.is_file():
        return {}, 0
    done: dict[str, str] = {}
    offset = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if number == 0 and entry != {"merge": fingerprint}:
            return {}, 0
        if isinstance(entry, dict) and {*entry} == {"tensor", "digest"}:
            done[str(entry["tensor"])] = entry["digest"]
        offset += len(line)
    return done, offset


def finish(job: Job, folder: Path) -> None:
    """Give the files of weights their names and write the indices."""
    for shard in job.layout.shards:
        part = folder / (shard.file + PART)
        if part.exists():
            part.rename(folder / shard.file)
    for name, content in job.layout.indices.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
