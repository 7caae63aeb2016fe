"""``kdcore store``: stores are listed, checked, pruned and exported without the plugins that filled them."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcore.cli import main
from kdcore.losses.topk import top_k
from kdcore.recipe import Row
from kdcore.teachers.export import INDEX, export
from kdcore.teachers.header import HEADER
from kdcore.teachers.inventory import REMOVED, cut_unfinished, remove
from kdcore.teachers.store import Store, row_key
from kdcore.teachers.topk_rows import condense, restore

DAY = 86400
Fail = Callable[..., str]
Said = Callable[..., str]

TOP = {"logits": Row(lengths="ids", topk=4, temperature=2.0, dtype="float16"), "state": Row(dtype="bfloat16")}


def key(number: int) -> bytes:
    return row_key({"id": str(number)})


def logits(number: int) -> torch.Tensor:
    return torch.randn(number % 5, 40, generator=torch.Generator().manual_seed(number))


def row(number: int) -> dict[str, torch.Tensor]:
    return condense({"logits": logits(number), "state": torch.arange(3.0) + number}, TOP)


def make(root: Path, fingerprint: str = "one", count: int = 12, days: float = 0.0, name: str = "large") -> Path:
    """A store of ``count`` rows that was last used some days ago."""
    with Store.open(root, name=name, fingerprint=fingerprint, schema=TOP) as store:
        for start in range(0, count, 4):
            numbers = range(start, min(count, start + 4))
            store.append([key(number) for number in numbers], [row(number) for number in numbers])
        moment = time.time() - days * DAY
        os.utime(store.folder / HEADER, (moment, moment))
        return store.folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """``said(*arguments)`` runs ``kdcore store``, which ends well, and returns what it printed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["store", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


def table(text: str) -> list[list[str]]:
    return [[cell for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


# ls


def test_ls_of_a_run_of_a_store_folder_and_of_one_store(said: Said, execute: Callable[..., Path]) -> None:
    run = execute("steps=2")
    [folder] = (run / "store").iterdir()
    texts = [said("ls", where) for where in (run, run / "store", folder)]
    assert texts[0] == texts[1] == texts[2]
    header, line = table(texts[0])
    assert [cell.strip() for cell in header] == [
        "store",
        "rows",
        "outputs",
        "size",
        "a row",
        "teacher",
        "kdcore",
        "last used",
    ]
    cells = [cell.strip() for cell in line]
    assert cells[:3] == [folder.name, "32", "logits float32 (6)"]
    assert len(cells[5]) == 12
    assert cells[7] == "just now"


def test_ls_says_what_is_stored_how_large_and_how_old(said: Said, tmp_path: Path) -> None:
    folder, other = make(tmp_path, days=3.5), make(tmp_path, "two", count=0)
    lines = {cells[0].strip(): [cell.strip() for cell in cells] for cells in table(said("ls", tmp_path))}
    cells = lines[folder.name]
    assert cells[2] == "logits top 4 at temperature 2, float16 (length); state bfloat16 (3)"
    assert cells[7] == "3 d ago"
    assert lines[other.name][1:3] == ["0", "logits top 4 at temperature 2, float16; state bfloat16"]
    assert lines[other.name][5] != cells[5]
    found = {entry["folder"]: entry for entry in json.loads(said("ls", tmp_path, "--json"))}
    entry = found[str(folder)]
    assert entry["rows"] == 12
    assert entry["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert entry["outputs"] == ["logits top 4 at temperature 2, float16 (length)", "state bfloat16 (3)"]
    assert entry["problem"] == ""


def test_ls_shows_a_damaged_store_among_others(said: Said, tmp_path: Path) -> None:
    make(tmp_path)
    header = make(tmp_path, "two") / HEADER
    header.write_bytes(header.read_bytes()[:-3])
    text = said("ls", tmp_path)
    assert text.count("DAMAGED") == 1
    assert f"{header}: damaged" in text


def test_folders_without_stores(fail: Fail, said: Said, tmp_path: Path, execute: Callable[..., Path]) -> None:
    assert "no such folder; name a run folder" in fail("store", "ls", tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    assert said("ls", tmp_path / "notes") == f"{tmp_path / 'notes'}: no stores\n"
    (tmp_path / "notes" / "thesis.tex").touch()
    assert "holds no stores; name a run folder" in fail("store", "ls", tmp_path / "notes")
    run = execute("steps=2", store=str(tmp_path / "shared"))
    assert "if it was started with --store, name that folder" in fail("store", "ls", run)


# verify


def test_verify_of_sound_stores(said: Said, tmp_path: Path) -> None:
    folders = sorted([make(tmp_path), make(tmp_path, "two", count=0)])
    lines = said("verify", tmp_path).splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(folder) for folder in folders]
    assert sorted(line.partition(": ")[2] for line in lines) == ["sound, 0 rows", "sound, 12 rows"]


def test_verify_prints_each_problem_with_its_fix(
    tmp_path: Path, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, broken = make(tmp_path), make(tmp_path, "two")
    data, index = broken / "rows-00000-000.data", broken / "rows-00000-000.index"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    content[-1] ^= 1
    data.write_bytes(content)
    capsys.readouterr()
    assert main(["store", "verify", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    problems = [line for line in out.splitlines() if line.startswith(str(data))]
    assert len(problems) == 2
    assert all(line.endswith("delete rows-00000-000.data and rows-00000-000.index there and their rows are "
                             "computed again") for line in problems)  # fmt: skip
    assert f"{sound}: sound" in out
    assert error == f"kdcore: error: {tmp_path}: 1 store is not sound; see the lines above\n"
    data.unlink()
    index.unlink()
    assert "sound, 0 rows" in said("verify", broken)


def test_verify_while_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path)
    with Store.open(tmp_path, name="large", fingerprint="one", schema=TOP) as store:
        store.append([key(99)], [row(99)])
        with (folder / "rows-00000-000.data").open("ab") as file:
            file.write(b"half a row")
        assert main(["store", "verify", str(folder)]) == 2
    assert "another process is writing here; verify it again when that is done" in capsys.readouterr().out


# prune


def test_prune_cuts_off_what_interrupted_writes_left_and_nothing_else(said: Said, tmp_path: Path) -> None:
    folder = make(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / f".{HEADER}.0123456789abcdef").write_bytes(b"ten bytes.")
    for name in ("rows-00000-000.data", "rows-00000-000.index"):
        with (folder / name).open("ab") as file:
            file.write(b"seven..")
    dry = said("prune", tmp_path, "--dry-run")
    assert dry == f"{folder}: would cut off 24 B of interrupted writes\n"
    assert said("prune", tmp_path) == f"{folder}: 24 B of interrupted writes cut off\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert said("prune", tmp_path) == ""


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--older-than", "30d"], {"a-old", "b-old"}),
        (["--older-than", "2w"], {"a-old", "b-old", "a-new"}),
        (["--older-than", "24h", "--keep", "b"], {"a-old", "a-new"}),
        (["--superseded"], {"a-old", "a-new", "b-old"}),
        (["--superseded", "--older-than", "30d"], {"a-old", "b-old"}),
        (["--superseded", "--keep", "a"], {"b-old"}),
        ([], set()),
    ],
)
def test_prune_removes_what_fits_every_criterion(
    said: Said, tmp_path: Path, options: list[str], gone: set[str]
) -> None:
    folders = {
        "a-old": make(tmp_path, "1", days=100, name="a"),
        "a-new": make(tmp_path, "2", days=20, name="a"),
        "a-now": make(tmp_path, "3", days=0, name="a"),
        "b-old": make(tmp_path, "4", days=50, name="b"),
        "b-new": make(tmp_path, "5", days=2, name="b"),
    }
    if options == ["--older-than", "24h", "--keep", "b"]:
        assert folders["b-new"].exists()
    said("prune", tmp_path, *options, "--dry-run")
    assert all(folder.exists() for folder in folders.values())
    text = said("prune", tmp_path, *options, "--yes")
    assert {name for name, folder in folders.items() if not folder.exists()} == gone
    assert text.count("remove ") == len(gone)
    assert not list(tmp_path.glob(".*"))


def test_prune_asks(fail: Fail, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, days=3)
    assert "here is no terminal; add --yes" in fail("store", "prune", tmp_path, "--older-than", "1d")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: "n")
    assert main(["store", "prune", str(tmp_path), "--older-than", "1d"]) == 130
    assert folder.exists()
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: "y")
    said("prune", tmp_path, "--older-than", "1d")
    assert not folder.exists()


def test_prune_never_touches_a_store_in_use(said: Said, tmp_path: Path) -> None:
    folder = make(tmp_path, days=3)
    with (folder / "rows-00000-000.data").open("ab") as file:
        file.write(b"being written")
    size = (folder / "rows-00000-000.data").stat().st_size
    with Store.open(tmp_path, name="large", fingerprint="one", schema=TOP):
        text = said("prune", tmp_path, "--older-than", "1d", "--yes")
        assert f"{folder}: left alone, another process uses it or has just used it" in text
        said("prune", tmp_path)
        assert (folder / "rows-00000-000.data").stat().st_size == size
    said("prune", tmp_path, "--older-than", "1d", "--yes")
    assert not folder.exists()


def test_prune_leaves_damage_to_verify_and_finishes_a_removal(said: Said, tmp_path: Path) -> None:
    folder = make(tmp_path)
    shutil.copytree(folder, tmp_path / f"{REMOVED}{folder.name}-01234567")
    os.truncate(folder / "rows-00000-000.data", 3)
    assert said("prune", tmp_path).startswith(f"left alone: {folder / 'rows-00000-000.data'}: has 3 bytes")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_prune_finishes_the_removal_of_the_last_store(said: Said, tmp_path: Path) -> None:
    folder = make(tmp_path / "stores")
    folder.rename(folder.with_name(f"{REMOVED}{folder.name}-01234567"))
    (tmp_path / "stores" / f"{REMOVED}draft").mkdir()
    assert "no stores" in said("ls", tmp_path / "stores")
    said("prune", tmp_path / "stores", "--dry-run")
    assert len(list((tmp_path / "stores").iterdir())) == 2
    assert said("prune", tmp_path / "stores") == ""
    assert [path.name for path in (tmp_path / "stores").iterdir()] == [f"{REMOVED}draft"]


def test_two_prunes_finish_one_removal(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / f"{REMOVED}large-0123456789abcdef-01234567"
    gone.mkdir()
    real = shutil.rmtree

    def rmtree(path: Path) -> None:
        real(path)
        real(path)  # what the other one's deletion looks like to this one

    monkeypatch.setattr("kdcore.teachers.inventory.shutil.rmtree", rmtree)
    said("prune", tmp_path)
    assert not gone.exists()


def test_nothing_supersedes_a_store_of_other_outputs_or_a_damaged_one(said: Said, tmp_path: Path) -> None:
    make(tmp_path)
    with Store.open(tmp_path, name="large", fingerprint="one", schema={"hidden": Row()}) as store:
        store.append([key(0)], [{"hidden": np.float32([1])}])
    damaged = make(tmp_path, "two", days=9) / HEADER
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert "remove" not in said("prune", tmp_path, "--superseded", "--yes")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_store_used_while_prune_asks_stays(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, days=3)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: os.utime(folder / HEADER) or "y")
    assert "left alone" in said("prune", tmp_path, "--older-than", "1d")
    assert folder.exists()


def test_a_store_removed_by_another_prune_is_not_listed(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gone = make(tmp_path), tmp_path / "gone-0123456789abcdef"
    monkeypatch.setattr("kdcore.teachers.inventory.stores_in", lambda path: [gone, kept])
    assert [entry["folder"] for entry in json.loads(said("ls", tmp_path, "--json"))] == [str(kept)]
    assert said("verify", tmp_path) == f"{kept}: sound, 12 rows\n"
    assert said("prune", tmp_path, "--older-than", "1d", "--yes") == ""
    assert not gone.exists()
    assert not remove(gone, 0.0)
    assert cut_unfinished(gone) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--older-than", "soon"], "'soon' is no age; write 12h, 30d or 8w"),
        (["--keep", "lagre"], "--keep lagre: no such store or teacher here"),
    ],
)
def test_prune_with_bad_options(fail: Fail, tmp_path: Path, options: list[str], message: str) -> None:
    make(tmp_path)
    assert message in fail("store", "prune", tmp_path, *options)


# export


def test_exported_rows_are_found_by_their_keys_without_kdcore(said: Said, tmp_path: Path) -> None:
    folder = make(tmp_path / "stores")
    text = said("export", tmp_path / "stores", tmp_path / "out")
    assert text.splitlines()[-1] == f"12 rows in 1 file: {tmp_path / 'out'}"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["files"] == [{"file": "rows-00000.safetensors", "rows": 12}]
    assert index["schema"]["logits"] == {"dtype": "float16", "lengths": "ids", "topk": 4, "temperature": 2.0}
    tensors = load_file(tmp_path / "out" / "rows-00000.safetensors")
    place = {bytes(one): number for number, one in enumerate(tensors["key"].numpy())}
    offsets = tensors["logits.offsets"]
    for number in range(12):
        i = place[key(number)]
        expected = top_k(logits(number), 4, 2.0)
        own = slice(offsets[i], offsets[i + 1])
        assert torch.equal(tensors["logits.indices"][own].long(), expected.indices)
        assert torch.equal(tensors["logits.log_probabilities"][own], expected.log_probabilities.half())
        assert torch.equal(tensors["logits.log_rest"][own], expected.log_rest)
        assert torch.equal(tensors["state"][i], (torch.arange(3.0) + number).bfloat16())
    assert folder.is_dir()


def test_an_export_is_cut_into_files(tmp_path: Path) -> None:
    advanced: list[int] = []
    with Store.at(make(tmp_path / "stores")) as store:
        files = export(store, tmp_path / "out", shard_bytes=150, advance=advanced.append)
        assert len(files) > 2
        keys = [bytes(one) for file in files for one in load_file(file)["key"].numpy()]
        assert keys == store.keys()
        states = torch.cat([load_file(file)["state"] for file in files])
        assert torch.equal(states, restore(store.read_padded(keys), TOP)["state"])
    assert sum(advanced) == 12


def test_export_refuses(fail: Fail, tmp_path: Path) -> None:
    folder = make(tmp_path / "stores")
    (tmp_path / "there").mkdir()
    assert "exists, and nothing is overwritten; name a new folder" in fail(
        "store", "export", folder, tmp_path / "there"
    )
    make(tmp_path / "stores", "two")
    assert "export needs one store, found large-" in fail("store", "export", tmp_path / "stores", tmp_path / "out")
    data = folder / "rows-00000-000.data"
    content = bytearray(data.read_bytes())
    content[40] ^= 4
    data.write_bytes(content)
    assert "at byte 40, is damaged; delete" in fail("store", "export", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_the_guide_finds_the_row_of_an_example(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said("export", make(tmp_path / "stores"), tmp_path / "exported")
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "teacher-outputs.md").read_text(encoding="utf-8")
    program = re.findall(r"^```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)[-1]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(program, "teacher-outputs.md", "exec"), {})
    assert capsys.readouterr().out.strip() == str(top_k(logits(7), 4, 2.0).indices.int())
