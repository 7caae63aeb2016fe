"""A merge that is far larger than the memory it may take: about 20 GB under 2 GiB.

Synthetic models with an embedding and large matrices are written piece by piece, every entry random, as a base and two
fine-tunes near it; with the result they have the size asked for, or as much as the disk has room for. ``kdcore merge``
then runs under the limit. With ``--cgroup`` that is the kernel's own: a child of that control group (v2, or v1's memory
controller) holds the process, page cache included. Without, the process is killed as soon as a sample, one every 10 ms,
finds more anonymous memory than the limit; RLIMIT_DATA cannot serve, since it counts mapped safetensors too. Rows of
all tensors, with TIES of some, are compared with a direct computation at last.

Example::

    python benchmarks/merge_big.py --work /tmp/big --cgroup /sys/fs/cgroup/mine
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from attrs import field, frozen
from measured import Measured, measure
from merge_models import METHODS, configuration
from merge_reference import Weights, steps
from torch import Tensor

from kdcore.merging.plan_file import parse_size

PACKAGES = ("kdcore", "torch", "safetensors")
SOURCES = ("base", "tuned-1", "tuned-2")
PIECE = 2**23  # entries that are written at a time
WIDTH = 8192
HEADER = 2**16
SHARD = 10**9
GROUP = "kdcore-merge-big"


def shapes_of(size: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of about ``size`` bytes in bfloat16; a fifth is the embedding."""
    row = 2 * WIDTH
    side = min(WIDTH, max(64, size // (10 * row)))
    layers = max(1, (size - size // 5) // (side * row))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size // 5 // row, WIDTH)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"model.layers.{layer}.mlp.weight"] = (side, WIDTH)
    return shapes


def write_model(folder: Path, shapes: Mapping[str, tuple[int, ...]], place: int) -> None:
    """A model in files of about a gigabyte; each is set to its size first, then filled."""
    folder.mkdir(parents=True)
    runs: list[list[str]] = [[]]
    for name in shapes:
        if runs[-1] and sum(2 * math.prod(shapes[each]) for each in (*runs[-1], name)) > SHARD:
            runs.append([])
        runs[-1].append(name)
    weight_map = {}
    for number, names in enumerate(runs, 1):
        file = f"model-{number:05}-of-{len(runs):05}.safetensors"
        _write_file(folder / file, {name: shapes[name] for name in names}, place)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def _write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], place: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode().ljust(HEADER)
    with path.open("wb") as file:
        file.truncate(8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for start in range(0, math.prod(shape), PIECE):
                file.write(_bits(name, start, min(PIECE, math.prod(shape) - start), place).tobytes())


def _bits(name: str, start: int, count: int, place: int) -> np.ndarray[Any, Any]:
    """bfloat16 numbers of magnitude 2^-7 to 2^-3; a fine-tune's differ in the last five of their seven digits."""

    def random(which: int) -> np.ndarray[Any, Any]:
        generator = np.random.SFC64(zlib.crc32(f"{name}/{start}/{which}".encode()))
        return generator.random_raw(-(-count // 4)).view(np.uint16)[:count]

    bits = random(0) & np.uint16(0x81FF) | np.uint16(0x3C00)
    return bits ^ (random(place) & np.uint16(0x1F)) if place else bits


@frozen(eq=False)
class Limit:
    """How memory is limited.

    :ivar group: a control group to run in; None for a limit by sampling.
    """

    size: int
    group: Path | None
    found: dict[str, int] = field(factory=dict)

    @property
    def words(self) -> str:
        """For the report."""
        if self.group is None:
            return "killed where a sample, one every 10 ms, finds more anonymous memory"
        version = "v2, memory.max" if (self.group / "memory.max").exists() else "v1, memory.limit_in_bytes"
        return f"a control group ({version}), page cache included"

    def run(self, command: Sequence[str]) -> Measured:
        """Run under the limit."""
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": None}
        if self.group is None:
            return measure(command, environment=environment, limit=self.size)
        with self._child(self.group) as child:
            tasks = child / "cgroup.procs"
            return measure(command, environment=environment, before=lambda: _join(tasks))

    @contextmanager
    def _child(self, group: Path) -> Iterator[Path]:
        child = group / GROUP
        child.mkdir()
        try:
            second = (child / "memory.max").exists()
            (child / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(self.size))
            if second and (child / "memory.swap.max").exists():
                (child / "memory.swap.max").write_text("0")
            yield child
            peak = child / ("memory.peak" if second else "memory.max_usage_in_bytes")
            if peak.exists():
                self.found["peak"] = int(peak.read_text())
        finally:
            child.rmdir()


def _join(tasks: Path) -> None:
    tasks.write_text(str(os.getpid()))


def check(method: str, folders: Sequence[Path], out: Path, rows: int, tensors: int) -> dict[str, Any]:
    """Compare rows of the result with what they have to be.

    :param rows: of each tensor.
    :param tensors: how many are looked at with TIES, where the whole tensor has to be searched.
    """
    found = {"tensors": 0, "entries": 0, "equal": 0, "beyond a step": 0}
    with ExitStack() as stack:
        merged, *sources = (Weights(folder, stack) for folder in (out, *folders))
        if sorted(merged.names) != sorted(sources[0].names):
            raise SystemExit(f"{out}: lacks tensors")
        names = sorted(merged.names, key=lambda name: -sources[0][name].numel())
        for name in names[: tensors if method == "ties" else None]:
            wanted = [source[name] for source in sources]
            thresholds = [_threshold(wanted[0], each) for each in wanted[1:]] if method == "ties" else []
            places = np.linspace(0, len(wanted[0]) - 1, rows).astype(int).tolist()
            right = _direct(method, [each[places].float() for each in wanted], thresholds)
            entries, step = merged[name][places].double(), steps([right])
            found["tensors"] += 1
            found["entries"] += entries.numel()
            found["equal"] += int((entries == right.bfloat16().double()).sum())
            found["beyond a step"] += int(((entries - right).abs() > step).sum())
    return found


def _threshold(base: Tensor, source: Tensor) -> float:
    magnitude = np.empty(base.numel(), np.float32)
    flat, other = base.reshape(-1), source.reshape(-1)
    for start in range(0, len(flat), PIECE):
        delta = other[start : start + PIECE].float() - flat[start : start + PIECE].float()
        magnitude[start : start + PIECE] = delta.abs_().numpy()
    place = len(magnitude) - max(1, int(METHODS["ties"]["density"] * len(magnitude)))
    magnitude.partition(place)
    return float(magnitude[place])


def _direct(method: str, rows: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    weights = METHODS[method]["weight"]
    if method == "linear":
        return sum((row.double() * weight for row, weight in zip(rows, weights)), torch.zeros(())) / sum(weights)
    base, *tuned = rows
    deltas = [row - base for row in tuned]
    kept = [
        torch.where(delta.abs() >= threshold, delta, 0.0).double() * weight
        for delta, threshold, weight in zip(deltas, thresholds, weights)
    ]
    positive = sum(kept, torch.zeros(())) >= 0
    agree = [torch.where(positive, each > 0, each < 0) for each in kept]
    divisor = sum((fits.double() * weight for fits, weight in zip(agree, weights)), torch.zeros(()))
    total = sum((each * fits for each, fits in zip(kept, agree)), torch.zeros(()))
    return base + total / divisor.masked_fill(divisor == 0, 1.0)


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for models and result")
    parser.add_argument("--bytes", default="20GB", help="of sources and result together (default: %(default)s)")
    parser.add_argument("--limit", default="2GiB", help="of memory (default: %(default)s)")
    parser.add_argument("--cgroup", type=Path, metavar="FOLDER", help="a control group that may have children")
    parser.add_argument("--method", default="ties", choices=("linear", "ties"), help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="checked of each tensor (default: %(default)s)")
    parser.add_argument("--tensors", type=int, default=4, help="checked with TIES (default: %(default)s)")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    models = work / "models"
    shutil.rmtree(models, ignore_errors=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    asked, room = parse_size(given.bytes), int(0.95 * shutil.disk_usage(work).free)
    total = min(asked, room)
    shapes = shapes_of(total // (len(SOURCES) + 1))
    folders = [models / name for name in SOURCES]
    for place, folder in enumerate(folders):
        print(f"writing {folder.name}", flush=True)
        write_model(folder, shapes, place)
    (work / "plan.yaml").write_text(configuration(given.method, folders), encoding="utf-8")
    os.sync()
    limit = Limit(parse_size(given.limit), given.cgroup)
    command = [sys.executable, "-m", "kdcore", "merge", str(work / "plan.yaml"), "--out", str(work / "out")]
    print(f"merging under {given.limit}: {limit.words}", flush=True)
    run = limit.run(command)
    if run.code:
        print(f"ended with {run.code}, anonymous memory {run.anonymous / 2**20:.0f} MiB:\n{run.output[-2000:]}")
        return 1
    found = check(given.method, folders, work / "out", given.rows, given.tensors)
    written = sum(path.stat().st_size for folder in (*folders, work / "out") for path in folder.glob("*.safetensors"))
    shutil.rmtree(models)
    shutil.rmtree(work / "out")
    return write(given, run, limit, found, {"asked": asked, "total": written, "tensors": len(shapes)})


def write(given: Any, run: Measured, limit: Limit, found: dict[str, Any], sizes: dict[str, int]) -> int:
    """The results; the exit code."""
    right = found["beyond a step"] == 0
    short = "" if sizes["total"] > 0.9 * sizes["asked"] else f" ({sizes['asked'] / 1e9:.1f} GB were asked for)"
    group = f"; peak of the group {limit.found['peak'] / 2**20:.0f} MiB" if limit.found else ""
    checked = (
        f"{found['entries']:,} entries of {found['tensors']} tensors, computed directly: {found['equal']:,} equal, "
        f"{found['beyond a step']} further off than one step of bfloat16"
    )
    rows = [
        ("sources and result, GB", f"{sizes['total'] / 1e9:.1f}{short}"),
        ("wall s", f"{run.seconds:.0f}"),
        ("CPU s", f"{run.cpu:.0f}"),
        ("MB a second, read and written", f"{sizes['total'] / 1e6 / run.seconds:.0f}"),
        ("peak of anonymous memory, MiB", f"{run.anonymous / 2**20:.0f}"),
        ("peak of mapped files, MiB", f"{run.mapped / 2**20:.0f}"),
    ]
    text = "\n".join(
        [
            recording.table((f"{given.method} of three models, {sizes['tensors']} tensors each", ""), rows),
            "",
            f"- Limit: {given.limit}, {limit.words}{group}.",
            f"- {checked}.",
        ]
    )
    result = {
        "environment": recording.environment(*PACKAGES),
        "settings": {name: getattr(given, name) for name in ("bytes", "limit", "method", "rows", "tensors")},
        "limit": {"kind": limit.words, **limit.found},
        "sizes": sizes,
        "seconds": round(run.seconds, 2),
        "cpu": round(run.cpu, 2),
        "anonymous": run.anonymous,
        "mapped": run.mapped,
        "checked": found,
    }
    recording.write(given.results, "merge-big", "A merge larger than memory", result, text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
