"""``kdcore store`` on journals: shown, checked, exported, and removed only when that is asked for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore import Example
from kdcore.cli import main
from kdcore.recipe import Row
from kdcore.synthesis.journal import Journal
from kdcore.synthesis.pool import seal
from kdcore.teachers.store import Store
from kdcore.teachers.text import Completion, Request

Fail = Callable[..., str]
Said = Callable[..., str]
DAY = 86400


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """``said(*arguments)`` runs ``kdcore store``, which ends well, and returns what it printed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["store", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


def request(number: int, model: str = "oracle") -> Request:
    return Request(model=model, messages=[{"role": "user", "content": str(number)}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder whose store holds a journal of 30 answers and a store of teacher outputs."""
    run = tmp_path / "run"
    with Journal.open(run / "store" / "journal.sqlite") as journal:
        for number in range(30):
            answer = Completion(text="x", prompt_tokens=100, answer_tokens=20, seconds=0.5, price=0.01)
            asked = request(number, "oracle" if number else "judge")
            journal.obtain(asked, lambda answer=answer: answer, teacher="large", run="a")
            if number % 10 == 3:
                journal.reject(asked.key(), 0, "no JSON" if number != 13 else "[red]too\nshort[/red] " + "y" * 50)
    with Store.open(run / "store", name="large", fingerprint="one", schema={"logits": Row()}):
        pass
    (run / "config.toml").write_text("")
    return run


def test_ls(said: Said, folder: Path) -> None:
    texts = [said("ls", where) for where in (folder, folder / "store")]
    assert texts[0] == texts[1]
    stores, journals = texts[0].split("\n\n")
    assert "large-" in stores
    header, line = journals.splitlines()
    assert " ".join(header.split()) == (
        "journal answers rejected tokens in tokens out seconds price models size last used"
    )
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[:2] == ["journal.sqlite", "30"]
    assert cells[2] == f"3 (2 no JSON, 1 [red]too short[/red] {'y' * 18}…)"
    assert cells[3:8] == ["3,000", "600", "15", "0.3000", "29 oracle, 1 judge"]
    alone = said("ls", folder / "store" / "journal.sqlite")
    assert alone == journals


def test_ls_as_json(said: Said, folder: Path) -> None:
    store, journal = json.loads(said("ls", folder, "--json"))
    assert "folder" in store
    assert journal["file"] == str(folder / "store" / "journal.sqlite")
    assert journal["rejected"]["no JSON"] == 2
    assert journal["models"] == {"oracle": 29, "judge": 1}
    assert {name: journal[name] for name in ("requests", "prompt_tokens", "answer_tokens", "seconds", "problem")} == {
        "requests": 30,
        "prompt_tokens": 3000,
        "answer_tokens": 600,
        "seconds": 15.0,
        "problem": "",
    }
    assert journal["price"] == pytest.approx(0.3)


def test_a_folder_with_nothing_but_a_journal(said: Said, tmp_path: Path) -> None:
    Journal.open(tmp_path / "journal.sqlite").close()
    _, line = said("ls", tmp_path).splitlines()
    assert line.split()[:4] == ["journal.sqlite", "0", "0", "0"]
    assert said("verify", tmp_path) == f"{tmp_path / 'journal.sqlite'}: sound, 0 answers\n"


def test_a_damaged_journal_is_shown_and_named(
    said: Said, fail: Fail, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "store" / "journal.sqlite"
    assert said("verify", folder).splitlines()[0] == f"{file}: sound, 30 answers"
    content = file.read_bytes()
    file.write_bytes(content.replace(request(7).canonical(), request(8).canonical()))
    assert main(["store", "verify", str(folder)]) == 2
    printed = capsys.readouterr()
    assert f"{file}: the answer {request(7).key()}/0 is damaged (its checksum differs)" in printed.out
    assert "1 journal is not sound" in printed.err
    assert "an answer is damaged" in fail("store", "export", file, folder / "answers.jsonl")
    file.write_bytes(b"no database" * 1000)
    assert "DAMAGED" in said("ls", folder)
    assert "is no journal" in said("ls", folder)


def test_prune_leaves_what_was_paid_for(said: Said, fail: Fail, folder: Path, tmp_path: Path) -> None:
    file = folder / "store" / "journal.sqlite"
    for path in (folder / "store").iterdir():
        for inner in [path, *path.glob("*")]:
            os.utime(inner, (time.time() - 40 * DAY,) * 2)
    said("prune", folder, "--older-than", "30d", "--superseded", "--yes")
    said("prune", folder, "--older-than", "30d", "--yes")
    assert [path.name for path in (folder / "store").glob("[!.]*")] == ["journal.sqlite"]
    line = fail("store", "prune", file, "--yes")
    assert line.endswith("its answers were paid for; to remove it nevertheless add --journals")
    assert said("prune", folder, "--journals", "--older-than", "8w", "--yes") == ""
    dry = said("prune", folder, "--journals", "--older-than", "30d", "--dry-run")
    assert dry.startswith(f"would remove {file}: 30 answers for 0.30, ")
    assert "here is no terminal; add --yes" in fail("store", "prune", folder, "--journals")
    with Journal.open(file):
        assert f"{file}: left alone, another process uses it" in said("prune", folder, "--journals", "--yes")
    assert file.exists()
    said("prune", file, "--journals", "--yes")
    assert list((folder / "store").iterdir()) == []


def test_export(said: Said, fail: Fail, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "store" / "journal.sqlite"
    assert said("export", file, tmp_path / "answers.jsonl").endswith(f"30 answers: {tmp_path / 'answers.jsonl'}\n")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 30
    example = Example({"text": "x"}, id="1", answers=(f"{request(7).key()}/0", "0" * 64 + "/0"))
    seal(folder / "arms" / "distill" / "seed-0" / "fit" / "rounds" / "0.jsonl", [example])
    out = tmp_path / "examples.jsonl"
    assert main(["store", "export", str(folder), str(out), "--format", "jsonl"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith(f"1 examples: {out}\n")
    assert "1 of their answers are in no journal; name the file with --journal" in printed.err
    [first, second] = json.loads(out.read_text())["answers"]
    assert (first["text"], second["text"]) == ("x", None)
    other = ("--format", "jsonl", "--journal", tmp_path / "none.sqlite")
    assert "no such file; name a journal" in fail("store", "export", folder, tmp_path / "more.jsonl", *other)
    assert "name the run's folder" in fail("store", "export", file, tmp_path / "x", "--format", "datasets")
    assert "--journal goes with --format" in fail("store", "export", folder, tmp_path / "x", "--journal", file)
