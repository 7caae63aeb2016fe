"""Files of a merged model: sizes, indices, alignment, and what the safetensors library reads of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kdcore.errors import InputError
from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.shards import NAMES, TensorSpec, lay_out, lay_out_file, opened, write_rows, writing

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64, torch.int8]


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], shard_size: int) -> None:
    layout = lay_out(specs_of(tensors), shard_size)
    with opened(folder, layout, "") as descriptors:
        for name, tensor in tensors.items():
            write_rows(descriptors[layout.places[name].file], layout.places[name], 0, tensor)
    for name, content in layout.indices.items():
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("dtypes", list(permutations([torch.float32, torch.bfloat16, torch.uint8]))[:4])
@pytest.mark.parametrize("shard_size", [1, 40, 10**6])
def test_odd_sizes_of_mixed_dtypes(tmp_path: Path, dtypes: tuple[torch.dtype, ...], shard_size: int) -> None:
    shapes = [(3,), (1, 5), (), (0, 4), (7, 1, 3), (2, 0), (1,)]
    tensors = {
        f"t{number}.{place}": torch.full(shape, number + 1).to(dtype)
        for number, dtype in enumerate(dtypes)
        for place, shape in enumerate(shapes)
    }
    write(tmp_path, tensors, shard_size)
    found = Checkpoint(tmp_path)
    assert {*found} == {*tensors}
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert not tensor.numel() or found[name].data_ptr() % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"one": torch.ones(3).to(dtype), "odd": torch.zeros(5, dtype=torch.int8), "w": torch.eye(3).to(dtype)}
    write(tmp_path, tensors, 10**6)
    found = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_names_of_dtypes_are_the_librarys(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for dtype, name in NAMES.items():
        save_file({"w": torch.zeros(8, dtype=torch.uint8).view(dtype)}, tmp_path / "w.safetensors")
        with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
            assert file.get_slice("w").get_dtype() == name


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"w: safetensors cannot hold torch.complex128; set dtype"):
        lay_out_file("model.safetensors", [TensorSpec("w", torch.complex128, (2,))])


def test_shards_are_no_larger_than_asked_for_but_for_a_larger_tensor() -> None:
    sizes = [30, 50, 20, 500, 10, 10, 90, 10, 100]
    specs = [TensorSpec(f"t{number}", torch.uint8, (size,)) for number, size in enumerate(sizes)]
    layout = lay_out(specs, 100)
    held = [
        [place.spec.size for place in layout.places.values() if place.file == shard.file] for shard in layout.shards
    ]
    assert held == [[30, 50, 20], [500], [10, 10], [90, 10], [100]]
    assert [shard.file for shard in layout.shards] == [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    [(name, index)] = layout.indices.items()
    assert name == "model.safetensors.index.json"
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert index["weight_map"] == {name: place.file for name, place in sorted(layout.places.items())}
    assert layout.size == sum(len(shard.header) + sum(inner) for shard, inner in zip(layout.shards, held, strict=True))


def test_one_file_has_no_index() -> None:
    layout = lay_out([TensorSpec("a", torch.float32, (2,)), TensorSpec("b", torch.float32, (2,))], 16)
    assert [shard.file for shard in layout.shards] == ["model.safetensors"]
    assert not layout.indices


def test_parts_have_folders_and_indices_of_their_own() -> None:
    names = ["w", "unet/a", "unet/b", "text/a"]
    layout = lay_out([TensorSpec(name, torch.float32, (2,)) for name in names], 8, {"": "model", "unet": "diffusion"})
    files = {name: place.file for name, place in layout.places.items()}
    assert files == {
        "w": "model.safetensors",
        "unet/a": "unet/diffusion-00001-of-00002.safetensors",
        "unet/b": "unet/diffusion-00002-of-00002.safetensors",
        "text/a": "text/model.safetensors",
    }
    [(name, index)] = layout.indices.items()
    assert name == "unet/diffusion.safetensors.index.json"
    assert index["weight_map"] == {
        "a": "diffusion-00001-of-00002.safetensors",
        "b": "diffusion-00002-of-00002.safetensors",
    }


def test_rows_are_written_where_they_belong(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 2, 2)
    scalar = torch.tensor(7.0)
    with writing(tmp_path / "w.safetensors", specs_of({"s": scalar, "w": whole})) as put:
        put("s", scalar)
        put("w", whole.double())
    found = load_file(tmp_path / "w.safetensors")
    assert torch.equal(found["w"], whole)
    assert torch.equal(found["s"], scalar)
    layout = lay_out([TensorSpec("w", torch.float32, (6, 2, 2))], 10**6)
    with opened(tmp_path, layout, "") as descriptors:
        for start in (4, 0, 2):
            returned = write_rows(descriptors["model.safetensors"], layout.places["w"], start, whole[start : start + 2])
            assert bytes(returned) == whole[start : start + 2].numpy().tobytes()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], whole)


def test_transposed_and_expanded_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "e": torch.ones(1, 2).expand(3, 2)}
    with writing(tmp_path / "w.safetensors", specs_of(tensors)) as put:
        for name, tensor in tensors.items():
            put(name, tensor.requires_grad_())
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_space_is_reserved_before_anything_is_computed(disk: Callable[[str], Path]) -> None:
    folder = disk("size=1m")
    layout = lay_out([TensorSpec("w", torch.uint8, (2**21,))], 10**9)
    with pytest.raises(OSError, match="No space left on device") as caught, opened(folder, layout, ".part"):
        raise AssertionError("must not open")
    assert caught.value.filename == str(folder / "model.safetensors.part")
