"""Verification: what a merge wrote passes, and no damage does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcore.errors import InputError
from kdcore.merging import verify as verifying
from kdcore.merging.merge import merge
from kdcore.merging.plan_file import read_plan
from kdcore.merging.registry import METHODS
from kdcore.merging.stream import Threads
from kdcore.merging.verify import Verification, verify

LINEAR = '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n'


@pytest.fixture
def check(llama: Callable[..., Path], plan_file: Callable[..., Path]) -> Callable[..., Verification]:
    """``check(out, text, merge_first=True, **top)`` verifies a merge of three models."""

    def call(out: Path, text: str = LINEAR, merge_first: bool = False, **top: Any) -> Verification:
        models = {"a": llama(1, dtype="bfloat16"), "b": llama(2, dtype="float16"), "c": llama(3)}
        plan = read_plan(plan_file(models, text, **{"shard_size": "20KB", **top}))
        if merge_first:
            merge(plan, out, threads=2)
        with Threads(2) as threads:
            return verify(plan, out, threads)

    return call


def plan_of(method: str) -> str:
    known = METHODS[method]
    base = 'base = "c"\n' if known.base == "required" else ""
    sources = '["a"]' if known.most == 1 else '["a", "b"]'
    density = "density = 0.5\n" if "density" in known.per_source else ""
    return f'[merges.m]\nmethod = "{method}"\n{base}sources = {sources}\n{density}'


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_merge_wrote_passes(check: Callable[..., Verification], tmp_path: Path, method: str, dtype: str) -> None:
    found = check(tmp_path / "merged", plan_of(method), merge_first=True, dtype=dtype)
    assert found.tensors == 39
    assert found.compared == 35104
    assert found.beyond <= 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_a_byte(plan_file: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "model").mkdir()
    save_file({"w": torch.linspace(-3, 3, 40).view(5, 8).to(dtype)}, tmp_path / "model" / "model.safetensors")
    plan = read_plan(plan_file(dict.fromkeys("ab", tmp_path / "model"), LINEAR))
    merge(plan, tmp_path / "merged", threads=1)
    with Threads(1) as threads:
        assert verify(plan, tmp_path / "merged", threads).beyond == 0


def test_differences_that_are_small_against_what_they_are_of(
    check: Callable[..., Verification], tmp_path: Path
) -> None:
    """Rounding is that of the large numbers."""
    text = '[merges.m]\nmethod = "linear"\nsources = [{ model = "a", weight = 1 }, { model = "b", weight = -1 }]\n'
    found = check(tmp_path / "merged", text.replace('"b"', '"a"') + "normalize = false\n", merge_first=True)
    assert found.beyond == 0
    found = check(tmp_path / "other", text + "normalize = false\n", merge_first=True, dtype="float32")
    assert found.beyond == 0


@pytest.fixture
def made(check: Callable[..., Verification], tmp_path: Path) -> Path:
    out = tmp_path / "merged"
    check(out, merge_first=True)
    return out


def refuse(check: Callable[..., Verification], out: Path, message: str, *arguments: Any, **top: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check(out, *arguments, **top)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.1, 0.5, 0.77, 1.0])
def test_a_flipped_byte_anywhere(check: Callable[..., Verification], made: Path, place: float) -> None:
    for path in sorted(made.glob("*.safetensors")):
        before = path.read_bytes()
        content = bytearray(before)
        content[int(place * (len(content) - 1))] ^= 4
        path.write_bytes(content)
        refuse(check, made, "merge again with --force|fetch it again|restore|not as the plan says|of the merge|lacks")
        path.write_bytes(before)
    check(made)


def test_any_byte_of_a_header(check: Callable[..., Verification], made: Path) -> None:
    path = made / "model-00002-of-00004.safetensors"
    before = path.read_bytes()
    length = 8 + int.from_bytes(before[:8], "little")
    for place in range(0, length, 29):
        content = bytearray(before)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError):
            check(made)
    path.write_bytes(before)
    check(made)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def swap(folder: Path) -> None:
    first, second = shards(folder)[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def swap_as_the_index(folder: Path) -> None:
    """Two shards swapped together with their entries: it loads all the same."""
    first, second = shards(folder)[:2]
    swap(folder)
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace(first.name, "X").replace(second.name, first.name).replace("X", second.name)
    index.write_text(text)


def rewrite(change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in shards(folder):
            place = layout(path).get(name)
            if place is not None:
                start, stop = place["data_offsets"]
                content = bytearray(path.read_bytes())
                begin = len(content) - body(path) + start
                content[begin : begin + stop - start] = (
                    change(load_file(path)[name]).contiguous().view(torch.uint8).numpy().tobytes()
                )
                path.write_bytes(content)

    return damage


def layout(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def body(path: Path) -> int:
    """The bytes after the header."""
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[-1] = torch.nan
    return tensor


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
OTHER_NUMBERS = r"\S+ is not what the plan gives, in \d+ of \d+ entries"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "swapped shards": (swap, "index.json: says that .* restore it"),
    "swapped with the index": (swap_as_the_index, "is not the file that the plan gives; merge again with --force"),
    "a tensor replaced": (rewrite(torch.ones_like, NORM), f"{NORM} is damaged; merge again with --force"),
    "NaN": (rewrite(nan, NORM), f"{NORM} is damaged; merge again with --force"),
    "a missing shard": (
        lambda folder: shards(folder)[2].unlink(),
        "missing, but model.safetensors.index.json names it",
    ),
    "a tensor of another dtype": (
        lambda folder: save_file(
            {name: tensor.float() for name, tensor in load_file(shards(folder)[1]).items()}, shards(folder)[1]
        ),
        "is not the file that the plan gives",
    ),
    "no record": (lambda folder: (folder / "merge.json").unlink(), "merge.json: missing; the folder is incomplete"),
    "a record that is none": (lambda folder: (folder / "merge.json").write_text("[]"), "merge.json: has no checksums"),
    "checksums that are none": (
        lambda folder: (folder / "merge.json").write_text('{"tensors": [1]}'),
        "merge.json: has no checksums of tensors; merge again with --force",
    ),
    "no folder": (shutil.rmtree, "merge.json: missing; the folder is incomplete"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_found(check: Callable[..., Verification], made: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(made)
    refuse(check, made, message)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (EMBEDDING, lambda tensor: tensor + 0.1, f"{EMBEDDING} is not what the plan gives, in 2048 of 2048 entries"),
        (NORM, lambda tensor: tensor + 0.1, f"{NORM} is not what the plan gives, in 32 of 32 entries"),
        (EMBEDDING, nan, f"{EMBEDDING} holds what is no number; use a wider dtype"),
    ],
)
def test_wrong_numbers_with_right_checksums_are_found_by_float64(
    check: Callable[..., Verification],
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensor: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    rewrite(change, tensor)(made)
    record = json.loads((made / "merge.json").read_text())
    monkeypatch.setattr(verifying, "digest_of", lambda descriptor, place, threads: record["tensors"][place.spec.name])
    refuse(check, made, message)


def test_in_float32_a_thousandth_is_much(
    check: Callable[..., Verification], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    check(out, merge_first=True, dtype="float32")
    rewrite(lambda tensor: tensor * 1.001, EMBEDDING)(out)
    record = json.loads((out / "merge.json").read_text())
    monkeypatch.setattr(verifying, "digest_of", lambda descriptor, place, threads: record["tensors"][place.spec.name])
    refuse(check, out, rf"{EMBEDDING} is not what the plan gives, in \d{{3,4}} of 2048 entries", dtype="float32")


@pytest.mark.parametrize(
    ("text", "top", "message"),
    [
        (
            LINEAR.replace('"a", "b"', '"a", { model = "b", weight = 2 }'),
            {},
            OTHER_NUMBERS,
        ),
        (plan_of("karcher"), {}, OTHER_NUMBERS),
        (LINEAR, {"dtype": "float16"}, "is torch.bfloat16 .* not as the plan says|is not the file that the plan"),
        (LINEAR, {"shard_size": "1GB"}, "is not the file that the plan gives"),
        (
            '[merges.m]\nmethod = "linear"\nsources = ["a", "b", "c"]\n',
            {},
            OTHER_NUMBERS,
        ),
    ],
)
def test_the_record_of_another_plan(
    check: Callable[..., Verification], made: Path, text: str, top: dict[str, Any], message: str
) -> None:
    refuse(check, made, message, text, **top)


def test_another_seed_is_another_merge(check: Callable[..., Verification], tmp_path: Path) -> None:
    check(tmp_path / "merged", plan_of("dare_linear"), merge_first=True)
    refuse(
        check,
        tmp_path / "merged",
        OTHER_NUMBERS,
        plan_of("dare_linear"),
        seed=1,
    )


def test_sources_that_moved_still_verify(
    check: Callable[..., Verification], made: Path, llama: Callable[..., Path], plan_file: Callable[..., Path]
) -> None:
    moved = {name: shutil.copytree(llama(seed, dtype=dtype), made.parent / name) for name, seed, dtype in MOVED}
    with Threads(1) as threads:
        assert verify(read_plan(plan_file(moved, LINEAR, shard_size="20KB")), made, threads).beyond == 0


MOVED = [("a", 1, "bfloat16"), ("b", 2, "float16")]
