"""The files of a merged model: which tensor goes where, written in any order, checked and put in place at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import field, frozen
from torch import Tensor

from kdcore.errors import InputError

__all__ = ["Layout", "Shard", "TensorPlace", "TensorSpec", "lay_out", "lay_out_file", "opened", "write_rows", "writing"]

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""The format's names of dtypes."""
HEADER_LENGTH = 8


@frozen
class TensorSpec:
    """A tensor to write; its name may begin with the folder of its part, ``FOLDER/``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def part(self) -> str:
        """The folder of its part; "" for the model's own."""
        return self.name.rpartition("/")[0]


@frozen
class TensorPlace:
    """Where a tensor's bytes lie.

    :ivar file: relative to the model's folder.
    :ivar offset: of its first byte in the file.
    """

    spec: TensorSpec
    file: str
    offset: int


@frozen
class Shard:
    """One file.

    :ivar header: the bytes before the tensors.
    :ivar size: of the whole.
    """

    file: str
    header: bytes
    size: int


@frozen
class Layout:
    """All files of weights of a model.

    :ivar shards: the files.
    :ivar places: of each tensor, by name.
    :ivar indices: file name to the content of an index.
    """

    shards: Sequence[Shard]
    places: Mapping[str, TensorPlace]
    indices: Mapping[str, Mapping[str, object]] = field(factory=dict)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(shard.size for shard in self.shards)


def lay_out(specs: Sequence[TensorSpec], shard_size: int, stems: Mapping[str, str] | None = None) -> Layout:
    """Assign tensors to files of at most ``shard_size`` bytes (more where one tensor alone is larger), in their order.

    :param stems: part to the name of its files; ``"model"`` by default.
    :raises InputError: the format has no name for a dtype.
    """
    shards: list[Shard] = []
    places: dict[str, TensorPlace] = {}
    indices: dict[str, Mapping[str, object]] = {}
    for part in dict.fromkeys(spec.part for spec in specs):
        groups = _groups([spec for spec in specs if spec.part == part], shard_size)
        folder = f"{part}/" if part else ""
        stem = folder + (stems or {}).get(part, "model")
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            end = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            shard, found = lay_out_file(f"{stem}{end}.safetensors", group)
            shards.append(shard)
            places |= found
            weight_map |= {name[len(folder) :]: shard.file[len(folder) :] for name in found}
        if len(groups) > 1:
            total = sum(spec.size for group in groups for spec in group)
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            indices[f"{stem}.safetensors.index.json"] = content
    return Layout(shards, places, indices)


def _groups(specs: Sequence[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.size
    return groups


def lay_out_file(file: str, specs: Sequence[TensorSpec]) -> tuple[Shard, dict[str, TensorPlace]]:
    """The header and places of one file; wide dtypes come first, so that each tensor is aligned.

    :raises InputError: the format has no name for a dtype.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        if spec.dtype not in NAMES:
            raise InputError(f"{spec.name}: safetensors cannot hold {spec.dtype}; set dtype")
        start, end = end, end + spec.size
        name = spec.name[len(spec.part) + 1 :] if spec.part else spec.name
        entries[name] = {"dtype": NAMES[spec.dtype], "shape": [*spec.shape], "data_offsets": [start, end]}
        starts[spec.name] = start
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_LENGTH)
    header = len(text).to_bytes(HEADER_LENGTH, "little") + text
    places = {spec.name: TensorPlace(spec, file, len(header) + starts[spec.name]) for spec in specs}
    return Shard(file, header, len(header) + end), places


@contextmanager
def opened(folder: Path, layout: Layout, suffix: str) -> Iterator[Mapping[str, int]]:
    """File descriptors of all files by name, their space reserved and their headers written.

    :param suffix: that their names have until they are complete.
    :raises OSError: there is not enough space.
    """
    descriptors: dict[str, int] = {}
    try:
        for shard in layout.shards:
            path = folder / (shard.file + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptors[shard.file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptors[shard.file], shard.size)
                os.posix_fallocate(descriptors[shard.file], 0, shard.size)
                os.pwrite(descriptors[shard.file], shard.header, 0)
            except OSError as error:
                error.filename = str(path)
                raise
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


@contextmanager
def writing(path: Path, specs: Sequence[TensorSpec]) -> Iterator[Callable[[str, Tensor], None]]:
    """A file of whole tensors that come in any order: ``write(name, tensor)``.

    :raises OSError: there is not enough space.
    """
    shard, places = lay_out_file(path.name, specs)
    with opened(path.parent, Layout([shard], places), "") as descriptors:

        def write(name: str, tensor: Tensor) -> None:
            write_rows(descriptors[shard.file], places[name], 0, tensor.detach())

        yield write


def write_rows(descriptor: int, place: TensorPlace, start: int, rows: Tensor) -> memoryview:
    """Write rows of a tensor, from row ``start`` on, in its dtype, and return their bytes.

    :param rows: of the tensor's shape but for axis 0; a scalar's is the scalar.
    :raises OSError: they cannot be written.
    """
    flat = rows.to("cpu", place.spec.dtype).contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    offset = place.offset + start * math.prod(place.spec.shape[1:]) * place.spec.dtype.itemsize
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)
    return content
