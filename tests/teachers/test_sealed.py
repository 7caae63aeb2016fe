import os

import pytest

from kdcore import InputError
from kdcore.teachers.sealed import read_sealed, write_sealed

CONTENT = {"teacher": "large – é", "schema": {"logits": [2, 3]}, "none": None}


def test_a_document_comes_back_and_its_absence_is_none(tmp_path):
    path = tmp_path / "header.json"
    assert read_sealed(path) is None
    write_sealed(path, CONTENT)
    assert read_sealed(path) == CONTENT


def test_the_first_writer_wins_and_leaves_no_second_file(tmp_path):
    path = tmp_path / "header.json"
    write_sealed(path, CONTENT)
    write_sealed(path, {"teacher": "another"})
    assert read_sealed(path) == CONTENT
    assert list(tmp_path.iterdir()) == [path]


def test_every_changed_byte_is_refused_with_the_fix(tmp_path):
    path = tmp_path / "header.json"
    write_sealed(path, CONTENT)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"header\.json: damaged .*; delete .* and its rows are computed"):
            read_sealed(path)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_sealed(tmp_path / "header.json", CONTENT)
    assert list(tmp_path.iterdir()) == []
