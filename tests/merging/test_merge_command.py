"""``kdcore merge``: what it prints, and forty bad plans and broken models that cost one line and leave nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcore.cli import main
from kdcore.merging.checkpoint import Checkpoint

LINEAR = '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n'
CHAIN = """
[merges.middle]
method = "ties"
base = "b"
sources = ["a"]
density = 0.5
[merges.last]
method = "linear"
sources = [{ model = "middle", weight = 0.6 }, { model = "b", weight = 0.4 }]
"""


@pytest.fixture
def models(llama: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """Two models, to damage: one in bfloat16, one in float32 by name ``b``."""
    places = {"a": llama(1, dtype="bfloat16"), "b": llama(2)}
    return {name: Path(shutil.copytree(place, tmp_path / "models" / name)) for name, place in places.items()}


def test_help_has_a_plan_that_merges(
    llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--dry-run", "--verify", "--device", "--threads", "--force"))
    plan = "\n".join(line.strip() for line in text[text.index("[models]") : text.index("Examples:")].splitlines())
    for seed, name in enumerate(("pretrained", "instruct", "reasoning")):
        shutil.copytree(llama(seed), tmp_path / "models" / name)
        plan = plan.replace(f'"models/{name}"', json.dumps(str(tmp_path / "models" / name)))
    (tmp_path / "merge.toml").write_text(plan)
    assert main(["merge", str(tmp_path / "merge.toml"), "--out", str(tmp_path / "merged"), "--verify"]) == 0
    one, two, three = (Checkpoint(tmp_path / "models" / name) for name in ("instruct", "reasoning", "pretrained"))
    for name, tensor in Checkpoint(tmp_path / "merged").items():
        expected = 0.6 * (one[name] + two[name]) / 2 + 0.4 * three[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_a_dry_run_shows_all_and_writes_nothing(
    models: dict[str, Path],
    plan_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files_of: Callable[[Path], dict[str, bytes]],
) -> None:
    plan = plan_file(models, CHAIN, dtype="float16", shard_size="30KB")
    before = files_of(tmp_path)
    assert main(["merge", str(plan), "--dry-run", "--out", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr()
    lines = [line.split(maxsplit=1) for line in printed.out.splitlines()]
    count, read = 39, sum(path.stat().st_size for path in (tmp_path / "models").rglob("*.safetensors"))
    assert [line[0] for line in lines] == [
        *("model", "model", "merge", "merge", "dtype", "files", "others", "size", "memory", "time")
    ]
    assert lines[1][1].startswith(f"b: {models['b']}, {count} tensors, 1")
    assert lines[2][1] == "middle: ties of a against b (largest entries of task vectors, merged by elected signs)"
    assert lines[3][1].startswith("last: linear of middle, b (weighted average")
    assert lines[4][1] == f"float32 to float16 of {count} tensors"
    assert lines[5][1] == "model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, " + (
        "model-00003-of-00003.safetensors"
    )
    assert lines[6][1] == "configuration, tokenizer and all else of b"
    assert re.fullmatch(rf"{read / 1000:.1f} KB to read, \d\d\.\d KB to write", lines[7][1])
    assert printed.err == ""
    assert files_of(tmp_path) == before
    assert main(["merge", str(plan), "--dry-run"]) == 0


def test_verify_merges_first_and_then_only_checks(
    models: dict[str, Path],
    plan_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fail: Callable[..., str],
) -> None:
    plan, out = plan_file(models, LINEAR), tmp_path / "merged"
    assert main(["merge", str(plan), "--out", str(out), "--verify", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert f"merged    {out}" in text
    verified = (
        "verified  39 tensors, checksums right; 0 of 35104 entries are further from float64 than rounding explains"
    )
    assert verified in text
    assert main(["merge", str(plan), "--out", str(out), "--verify"]) == 0
    text = capsys.readouterr().out
    assert verified in text
    assert "merged  " not in text
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert re.search(
        r"model.safetensors: .* is damaged; merge again with --force", fail("merge", plan, "--out", out, "--verify")
    )
    assert main(["merge", str(plan), "--out", str(out), "--verify", "--force"]) == 0


def test_mergekits_yaml(models: dict[str, Path], tmp_path: Path) -> None:
    text = (
        f"merge_method: task_arithmetic\nbase_model: {models['b']}\ndtype: float32\n"
        f"models:\n  - model: {models['a']}\n    parameters:\n      weight: 0.5\n"
    )
    (tmp_path / "mergekit.yaml").write_text(text)
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "mergekit.yaml"), "--out", str(out), "--verify"]) == 0
    a, b = Checkpoint(models["a"]), Checkpoint(models["b"])
    for name, tensor in Checkpoint(out).items():
        torch.testing.assert_close(tensor, b[name] + 0.5 * (a[name].float() - b[name]), rtol=0, atol=1e-6)


# Bad plans and broken models


def shard(models: dict[str, Path], number: int) -> Path:
    return sorted(models["a"].glob("*.safetensors"))[number]


def index(models: dict[str, Path], tensor: str, file: str) -> None:
    path = models["a"] / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"][tensor] = file
    path.write_text(json.dumps(content))


def reshape(models: dict[str, Path]) -> None:
    path = next(path for path in models["a"].glob("*.safetensors") if "model.norm.weight" in load_file(path))
    save_file({**load_file(path), "model.norm.weight": torch.ones(31)}, path)


def pickle_only(models: dict[str, Path]) -> None:
    for path in [*models["a"].glob("*.safetensors*")]:
        path.unlink()
    torch.save({}, models["a"] / "pytorch_model.bin")


def other_tokens(models: dict[str, Path]) -> None:
    for name, folder in models.items():
        content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"x": 0, name: 1}, "unk_token": "x"}}
        (folder / "tokenizer.json").write_text(json.dumps(content))


def quantised(models: dict[str, Path]) -> None:
    content = json.loads((models["b"] / "config.json").read_text())
    (models["b"] / "config.json").write_text(json.dumps({**content, "quantization_config": {"bits": 4}}))


def no_number(models: dict[str, Path]) -> None:
    shard(models, 1).write_bytes(shard(models, 1).read_bytes()[:500])


CIRCLE = """
[merges.one]
method = "linear"
sources = ["a", "two"]
[merges.two]
method = "linear"
sources = ["a", "one"]
"""
TIES = '[merges.m]\nmethod = "ties"\nbase = "b"\nsources = ["a"]\n'
Damage = Callable[[dict[str, Path]], object]
BROKEN: dict[str, tuple[Damage, str]] = {
    "missing shard": (
        lambda m: shard(m, 1).unlink(),
        r"a/model-00002-.*: missing, but .* names it; fetch the model again",
    ),
    "wrong index": (
        lambda m: index(m, "lm_head.weight", shard(m, 2).name),
        "says that lm_head.weight is in .*restore it",
    ),
    "index leaves": (lambda m: index(m, "x", "../../x.safetensors"), "x lies in ../../x.safetensors, which is no"),
    "tensor nowhere": (lambda m: index(m, "x", shard(m, 2).name), "lacks x, which .* puts there"),
    "shape mismatch": (reshape, r"model.norm.weight is \[31\] in a but \[32\] in b; merge models of one kind"),
    "truncated": (no_number, r"a/model-00002-.*: no valid .safetensors file .*; fetch it again"),
    "pickles": (pickle_only, r"models/a: has pickled weights only \(pytorch_model.bin\), which are never read"),
    "other tokenizers": (
        other_tokens,
        r"a and b have different tokenizers \(token 'a' is row 1 here and missing there\)",
    ),
    "quantised": (quantised, "models/b: has quantised weights, which cannot be merged; name the unquantised one"),
    "gone": (lambda m: shutil.rmtree(m["a"]), "models/a: no such folder"),
    "empty": (lambda m: [path.unlink() for path in m["a"].iterdir()], "models/a: has no .safetensors file"),
    "bad config": (lambda m: (m["b"] / "config.json").write_text("{"), "b/config.json:1: no valid JSON"),
}
PLANS: dict[str, tuple[str, str]] = {
    "cycle": (CIRCLE, "the merges need each other in a circle: "),
    "unknown method": (
        LINEAR.replace("linear", "lineal"),
        "merges.m.method = lineal: no such method; there are: linear",
    ),
    "density 2": (TIES + "density = 2\n", r"merges.m: density = 2 must be between 0 and 1"),
    "unknown key": (LINEAR + "wight = 2\n", "merges.m: there is no parameter wight here; there are: weight"),
    "unknown model": (LINEAR.replace('"b"', '"c"'), "merges.m: there is no model or merge c; there are: a, b, m"),
    "no TOML": (LINEAR + "weight = = 2\n", "no valid TOML"),
    "no base": (TIES.replace('base = "b"\n', ""), "merges.m: ties compares with a base: name one"),
    "one source too many": (
        LINEAR.replace("linear", "passthrough"),
        "merges.m: passthrough takes at most 1 source|takes exactly 1 source|not 2",
    ),
    "no sources": (LINEAR.replace('["a", "b"]', "[]"), "merges.m"),
    "weight of words": (LINEAR + 'weight = "much"\n', "merges.m: weight = .*much.* must be a number"),
    "layers that are not there": (
        '[merges.m]\nmethod = "passthrough"\n[[merges.m.slices]]\nsources = [{ model = "a", layers = [0, 9] }]\n',
        r"merges.m: layers = \[0, 9\], but a has 4 layers",
    ),
}
TOPS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "int4"}, "dtype = int4: must be one of float32"),
    "shard_size": ({"shard_size": "a lot"}, "shard_size = a lot: must be a size such as 5GB"),
    "tokenizer": ({"tokenizer": "x"}, "tokenizer = x: no such model; there are: a, b"),
    "no tokenizer": ({"tokenizer": "a"}, "tokenizer.json: missing, so rows cannot be aligned by token"),
    "out": ({"out": "x"}, "out = x: no such merge; there are: m"),
    "a key": ({"sede": 1}, "sede: no such key; there are: dtype"),
}


@pytest.fixture
def refused(
    fail: Callable[..., str], tmp_path: Path, files_of: Callable[[Path], dict[str, bytes]]
) -> Callable[..., None]:
    """``refused(plan, message)``: merging and the dry run fail with this line, and nothing was written."""

    def call(plan: Path, message: str, *flags: str) -> None:
        before = files_of(tmp_path)
        line = fail("merge", plan, "--out", tmp_path / "merged", *flags)
        assert re.search(message, line), line
        assert fail("merge", plan, "--dry-run", *flags) == line
        assert files_of(tmp_path) == before

    return call


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model(
    models: dict[str, Path], plan_file: Callable[..., Path], refused: Callable[..., None], name: str
) -> None:
    damage, message = BROKEN[name]
    damage(models)
    refused(plan_file(models, LINEAR), message)


@pytest.mark.parametrize("name", PLANS)
def test_a_bad_plan(
    models: dict[str, Path], plan_file: Callable[..., Path], refused: Callable[..., None], name: str
) -> None:
    text, message = PLANS[name]
    refused(plan_file(models, text), message)


@pytest.mark.parametrize("name", TOPS)
def test_a_bad_key(
    models: dict[str, Path], plan_file: Callable[..., Path], refused: Callable[..., None], name: str
) -> None:
    top, message = TOPS[name]
    refused(plan_file(models, LINEAR, **top), message)


def test_an_adapter_that_is_none(
    models: dict[str, Path], plan_file: Callable[..., Path], refused: Callable[..., None], tmp_path: Path
) -> None:
    refused(
        plan_file({**models, "a": (models["a"], models["b"])}, LINEAR),
        "models/b: is no adapter, it has no adapter_config",
    )


def test_a_plan_that_is_not_there(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(tmp_path / "none.toml", r"none.toml: no such file; 'kdcore merge --help' shows a plan")
    refused(tmp_path, "cannot be read: Is a directory")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there(
    models: dict[str, Path], plan_file: Callable[..., Path], refused: Callable[..., None], device: str
) -> None:
    refused(plan_file(models, LINEAR), f"--device {device}: ", "--device", device)


def test_without_out(models: dict[str, Path], plan_file: Callable[..., Path], fail: Callable[..., str]) -> None:
    assert "Missing option '--out'; with --dry-run nothing is written" in fail("merge", plan_file(models, LINEAR))
    assert "--threads" in fail("merge", plan_file(models, LINEAR), "--out", "x", "--threads", "0")
