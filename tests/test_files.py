import os
import subprocess
import sys

import pytest

from kdcore import InputError
from kdcore.files import JsonLines, locked, read_json, replacing, write_json, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "half")
    assert read_json(path) == {"a": 1}


def test_a_folder_is_replaced_when_the_block_ends_well(tmp_path):
    folder = tmp_path / "student"
    with replacing(folder) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(RuntimeError), replacing(folder) as temporary:
        (temporary / "new").write_text("2")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_log_is_cut_back_to_its_offset(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonLines(path) as log:
        log.append({"step": 1})
        offset = log.offset()
        log.append({"step": 2})
    with JsonLines(path, offset) as log:
        log.append({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_folder_serves_one_process(tmp_path):
    code = f"from pathlib import Path; from kdcore.files import locked\nwith locked(Path({str(tmp_path)!r})): pass"
    with locked(tmp_path):
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another kdcore process is working here" in held.stderr
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("text", "words"), [(None, "missing"), ("{", "no valid JSON")])
def test_unreadable_json_names_the_file(tmp_path, text, words):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"plan\.json(:1)?: {words}"):
        read_json(path)
