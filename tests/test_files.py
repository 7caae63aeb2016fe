import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from kdcore import InputError
from kdcore.files import JsonLines, locked, making, read_json, replacing, write_json, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "half")
    assert read_json(path) == {"a": 1}


def test_threads_that_replace_one_file_do_not_meet(tmp_path):
    texts = [f"{number}" * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: write_text(tmp_path / "a", text), texts * 3))
    assert (tmp_path / "a").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_replaced_when_the_block_ends_well(tmp_path):
    folder = tmp_path / "student"
    with replacing(folder) as temporary:
        (temporary / "old").write_text("1")
    with pytest.raises(RuntimeError), replacing(folder) as temporary:
        (temporary / "new").write_text("2")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_folder_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "student").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), replacing(tmp_path / "student"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "student"]


# Folders that a user named


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def make(folder, text="new", **options):
    with making(folder, **options) as unfinished:
        (unfinished / "rows").write_text(text)


def test_making_a_folder_touches_nothing_beside_it(tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "thesis").touch()
    make(tmp_path / "out")
    assert names(tmp_path) == ["out", "out.tmp", "out.tmp/thesis", "out/rows"]


def test_only_what_may_be_replaced_is(tmp_path):
    make(tmp_path / "new" / "out", "one")
    make(tmp_path / "new" / "out", "two", replaces=["rows", "index"])
    assert (tmp_path / "new" / "out" / "rows").read_text() == "two"
    with pytest.raises(InputError, match="rows came there meanwhile, and is not overwritten; name a new folder"):
        make(tmp_path / "new" / "out", "three")
    assert (tmp_path / "new" / "out" / "rows").read_text() == "two"
    assert names(tmp_path) == ["new", "new/out", "new/out/rows"]


@pytest.mark.parametrize("foreign", ["thesis", "rows/thesis"])
def test_what_came_while_a_folder_was_made_stays(tmp_path, foreign):
    def interrupted():
        with making(tmp_path / "out", ["rows"]) as unfinished:
            (unfinished / "rows").touch()
            (tmp_path / "out" / foreign).parent.mkdir(parents=True)
            (tmp_path / "out" / foreign).touch()

    with pytest.raises(InputError, match="came there meanwhile"):
        interrupted()
    assert (tmp_path / "out" / foreign).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_that_make_one_folder_do_not_meet(tmp_path):
    with pytest.raises(InputError, match="rows came there"), making(tmp_path / "out") as first:
        (first / "rows").write_text("first")
        make(tmp_path / "out", "second")
        assert (first / "rows").read_text() == "first"
    assert (tmp_path / "out" / "rows").read_text() == "second"
    assert names(tmp_path) == ["out", "out/rows"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), making(tmp_path / "out") as unfinished:
        (unfinished / "rows").touch()
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", [None, "elsewhere"])
def test_a_full_disk_is_named_where_the_system_does_not(tmp_path, place):
    with pytest.raises(OSError, match="No space") as error, making(tmp_path / "out"):
        raise OSError(28, "No space left on device", place)
    assert error.value.filename == (place or str(tmp_path / "out"))


def test_a_link_goes_on_pointing(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "elsewhere") == ["rows"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("path", "message"), [(".", "is the current folder"), ("file/x", "Not a directory"), ("file", "Not a directory")]
)
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, path, message):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        make(tmp_path / "here" if path == "." else tmp_path / path)
    assert names(tmp_path) == ["file", "here"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with making(tmp_path / "out") as unfinished:
            os.close(os.open(unfinished / "rows", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "rows").stat().st_mode & 0o777 == 0o640


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


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "missing"), ("{", "no valid JSON"), (100_000 * "[", "no valid JSON"), (5000 * "1", "no valid JSON")],
)
def test_unreadable_json_names_the_file(tmp_path, text, words):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"plan\.json(:1)?: {words}"):
        read_json(path)


def test_a_child_that_outlives_its_parent_does_not_hold_the_folder(tmp_path):
    outlived = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom kdcore.files import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n"
        "    if os.fork() == 0:\n        print(os.getpid(), flush=True)\n        os.close(1)\n        time.sleep(30)\n"
        "    time.sleep(0.5)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = int(subprocess.run([sys.executable, "-c", outlived], stdout=subprocess.PIPE, text=True, check=False).stdout)
    try:
        os.kill(child, 0)
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
