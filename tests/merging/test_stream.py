"""Streams of merged tensors: the bytes that a merge in memory gives, whatever stopped them, each computed once."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kdcore.errors import InputError
from kdcore.merging import merge as merging
from kdcore.merging import stream as streaming
from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.graph import Graph
from kdcore.merging.merge import merge
from kdcore.merging.merged import merge_tensors
from kdcore.merging.plan_file import read_plan

KILLING = Path(__file__).with_name("killing.py")
LOG = "progress.jsonl"
BASED = '[merges.m]\nmethod = "{}"\nbase = "c"\nsources = ["a", "b"]\n'
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ('[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n', {}),
    "slerp": ('[merges.m]\nmethod = "slerp"\nsources = ["a", "b"]\nt = 0.3\n', {"t": 0.3}),
    "ties": (BASED.format("ties") + "density = 0.4\n", {"density": 0.4}),
    "dare_linear": (BASED.format("dare_linear") + "density = 0.4\n", {"density": 0.4}),
    "della": (BASED.format("della") + "density = 0.4\nepsilon = 0.1\n", {"density": 0.4, "epsilon": 0.1}),
    "model_stock": (BASED.format("model_stock"), {}),
}


@pytest.fixture
def models(llama: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """Three models; of the first a copy, to change."""
    copy = Path(shutil.copytree(llama(1, dtype="bfloat16"), tmp_path / "models" / "a"))
    return {"a": copy, "b": llama(2, dtype="float32"), "c": llama(3, dtype="bfloat16")}


@pytest.mark.parametrize("method", METHODS)
def test_as_merged_in_memory_and_cast_once(
    models: dict[str, Path], merged: Callable[..., Checkpoint], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcore.merging import lazy

    monkeypatch.setattr(lazy, "CHUNK", 500)
    text, parameters = METHODS[method]
    found = merged(models, text, seed=5)
    a, b, c = (Checkpoint(folder) for folder in models.values())
    for name, tensor in found.items():
        base = c[name] if "base" in text else None
        wide = [each.float() for each in (a[name], b[name])]
        expected = merge_tensors(
            method, wide, None if base is None else base.float(), seed=5, name=f"m/{name}", **parameters
        )
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name


@pytest.mark.parametrize("method", ["linear", "dare_linear", "ties"])
def test_the_same_bytes_by_any_number_of_threads(
    models: dict[str, Path],
    plan_file: Callable[..., Path],
    files_of: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kdcore.merging import lazy

    monkeypatch.setattr(lazy, "CHUNK", 500)
    plan = read_plan(plan_file(models, METHODS[method][0], shard_size="20KB"))
    found = [files_of(merge(plan, tmp_path / str(count) / "merged", threads=count)) for count in (1, 2, 7)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 8


def test_it_loads_with_its_shards(models: dict[str, Path], merged: Callable[..., Checkpoint]) -> None:
    from transformers import AutoModelForCausalLM

    found = merged(models, METHODS["linear"][0], shard_size="12KB")
    model, notes = AutoModelForCausalLM.from_pretrained(found.folder, output_loading_info=True, dtype="auto")
    assert not any(notes.values())
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in found.items())
    index = json.loads((found.folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {path.name for path in found.folder.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert (found.folder / "generation_config.json").exists()
    assert not [path for path in found.folder.rglob("*") if path.name in (LOG, ".lock") or path.suffix == ".part"]


def test_scalars_empty_and_odd_tensors(tmp_path: Path, merged: Callable[..., Checkpoint]) -> None:
    models = {}
    for value, name in enumerate("ab"):
        tensors = {
            "scalar": torch.tensor(float(value)),
            "empty": torch.zeros(0, 3),
            "none": torch.zeros(2, 0),
            "odd": torch.full((3, 5), float(value), dtype=torch.bfloat16),
            "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
            "half": torch.full((7,), float(value), dtype=torch.float16),
            "last": torch.full((1,), float(value), dtype=torch.float64),
        }
        models[name] = tmp_path / name
        models[name].mkdir()
        save_file(tensors, models[name] / "model.safetensors")
    found = merged(models, METHODS["linear"][0])
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    assert all((found[name] == 0.5).all() for name in ("scalar", "odd", "half", "last"))
    assert found["bytes"].tolist() == [1, 2, 3]


# Stopped and gone on with


def test_killed_at_any_moment_and_gone_on_with(
    models: dict[str, Path],
    plan_file: Callable[..., Path],
    files_of: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """Before the space is reserved, at writes of weights, at lines of the log, at names, at other files, at the end."""
    plan = plan_file(models, METHODS["dare_linear"][0], shard_size="20KB")
    command = [sys.executable, str(KILLING), str(plan), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    assert count > 80
    moments = {1, count, *range(count - 16, count, 4), *random.Random(7).sample(range(2, count), 12)}
    shutil.rmtree(tmp_path / "out")
    done = subprocess.run([*command, *map(str, sorted(moments))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = files_of(tmp_path / "out" / "whole")
    for moment in moments:
        assert files_of(tmp_path / "out" / str(moment)) == whole, moment


@pytest.fixture
def stopped(
    models: dict[str, Path], plan_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[str], dict[str, bytes]]]:
    """A merge that was stopped when all weights were written; ``stopped(damage, **top)`` goes on with it and returns
    the tensors that were computed anew, and all files."""
    text = METHODS["linear"][0]
    plan = read_plan(plan_file(models, text, shard_size="20KB"))
    with monkeypatch.context() as patch:
        patch.setattr(merging, "carry", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(plan, tmp_path / "out" / "merged", threads=2)
    unfinished = tmp_path / "out" / "merged.unfinished"
    assert len([*unfinished.glob("*.part")]) > 2
    written: list[str] = []
    plain = streaming._write

    def write(output: Any, *arguments: Any) -> bytes:
        written.append(output.name)
        return plain(output, *arguments)

    monkeypatch.setattr(streaming, "_write", write)

    def call(damage: Callable[[Path], object], **top: Any) -> tuple[list[str], dict[str, bytes]]:
        damage(unfinished)
        again = read_plan(plan_file(models, text, **{"shard_size": "20KB", **top}))
        written.clear()
        out = merge(again, tmp_path / "out" / "merged", threads=2)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
        return [*dict.fromkeys(written)], {path.name: path.read_bytes() for path in out.iterdir()}

    return call


@pytest.fixture
def whole(models: dict[str, Path], plan_file: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """The files of the same merge, never stopped."""

    def call(**top: Any) -> dict[str, bytes]:
        text = METHODS["linear"][0]
        plan = read_plan(plan_file(models, text, **{"shard_size": "20KB", **top}))
        out = merge(plan, tmp_path / "whole" / "merged", threads=2)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    return call


def log_of(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def replace_line(number: int, line: bytes) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        lines = log_of(folder)
        lines[number] = line
        (folder / LOG).write_bytes(b"".join(lines))

    return damage


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda folder: None, 0),
        (lambda folder: (folder / LOG).write_bytes(b"".join(log_of(folder))[:-9]), 1),
        (lambda folder: flip(next(folder.glob("*.part")), -1), 1),
        (lambda folder: [flip(path, -1) for path in folder.glob("*00[13]-of*.part")], 2),
        (replace_line(5, b"{\n"), 1),
        (replace_line(5, b"\xff\xfe\n"), 1),
        (replace_line(5, b"[1]\n"), 1),
        (replace_line(5, b'{"tensor": "lm_head.weight"}\n'), 1),
        (replace_line(5, b'{"tensor": [], "digest": 3}\n'), 1),
        (replace_line(0, b"{\n"), -1),
        (replace_line(0, b'{"merge": "another"}\n'), -1),
        (lambda folder: (folder / LOG).unlink(), -1),
        (lambda folder: (folder / LOG).write_bytes(b""), -1),
        (lambda folder: [path.unlink() for path in folder.glob("*.part")], -1),
        (lambda folder: [path.write_bytes(path.read_bytes()[:99]) for path in folder.glob("*.part")], -1),
    ],
)
def test_what_was_damaged_meanwhile_is_redone_and_nothing_else(
    stopped: Callable[..., Any], whole: Callable[..., Any], damage: Callable[[Path], object], again: int
) -> None:
    written, files = stopped(damage)
    expected = whole()
    assert files == expected
    tensors = len(json.loads(expected["merge.json"])["tensors"])
    assert len(written) == (tensors if again < 0 else again)


@pytest.mark.parametrize("top", [{"shard_size": "1GB"}, {"shard_size": "15KB"}, {"dtype": "float32"}, {"seed": 1}])
def test_a_merge_of_another_plan_is_not_gone_on_with(
    stopped: Callable[..., Any], whole: Callable[..., Any], top: dict[str, Any]
) -> None:
    """And nothing of it stays."""
    written, files = stopped(lambda folder: (folder / "chat_template.jinja").write_text("of another"), **top)
    assert files == whole(**top)
    assert len(written) == len(json.loads(files["merge.json"])["tensors"])


def test_a_source_that_changed_is_read_again(
    stopped: Callable[..., Any], whole: Callable[..., Any], models: dict[str, Path]
) -> None:
    """One of the same name and size."""
    path = models["a"] / "model-00001-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    written, files = stopped(lambda folder: path.write_bytes(content))
    assert files == whole()
    assert len(written) == len(json.loads(files["merge.json"])["tensors"])


def test_when_interrupted_no_thread_writes_any_more(
    models: dict[str, Path], plan_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor that is closed may be another file's by then."""
    plan = read_plan(plan_file(models, METHODS["linear"][0]))
    begun: list[object] = []
    times: list[float] = []
    plain = streaming.write_rows

    def slowly(*arguments: Any) -> memoryview:
        begun.append(arguments)
        time.sleep(0.01)
        content = plain(*arguments)
        times.append(time.monotonic())
        return content

    monkeypatch.setattr(streaming, "write_rows", slowly)
    closed: list[float] = []
    plain_close = streaming.os.close
    monkeypatch.setattr("kdcore.merging.shards.os.close", lambda fd: (closed.append(time.monotonic()), plain_close(fd)))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    job = streaming.Job.of(Graph(plan))
    (tmp_path / "folder").mkdir()
    with streaming.Threads(3) as threads, pytest.raises(KeyboardInterrupt):
        streaming.stream(job, tmp_path / "folder", threads, interrupt)
    assert times
    assert len(times) == len(begun)
    assert max(times) < min(closed)


def test_a_folder_of_that_name_that_is_no_merge_is_left_alone(
    models: dict[str, Path], plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    notes = tmp_path / "out.unfinished" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(InputError, match=r"out\.unfinished: holds what is of no merge \(notes\.txt\); move it away"):
        merge(read_plan(plan_file(models, METHODS["linear"][0])), tmp_path / "out")
    assert notes.read_text() == "mine"
