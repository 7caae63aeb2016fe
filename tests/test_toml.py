from __future__ import annotations

import tomllib
from pathlib import Path

import attrs
import pytest

from kdcore.config import RunOptions, configure
from kdcore.plugins import load
from kdcore.toml import to_toml

SOFT_LABELS = str(Path(__file__).parent / "methods" / "soft_labels.py")


@pytest.mark.parametrize("documented", [False, True])
def test_what_is_written_is_read_back(tmp_path, documented):
    loaded = load(SOFT_LABELS)
    configuration = configure([loaded], None, ["temperature=1e-7", "run.trackers=[]", "patience=3"])
    file = tmp_path / "run.toml"
    file.write_text(to_toml(configuration, documented), encoding="utf-8")
    assert configure([loaded], file) == configuration


def test_every_field_is_a_key_or_a_comment_and_documented():
    loaded = load(SOFT_LABELS)
    text = to_toml(configure([loaded]), documented=True)
    table = tomllib.loads(text)
    for cls, values in ((loaded.cls, table), (RunOptions, table["run"])):
        for field in attrs.fields(cls):
            assert f"# {field.metadata['help']}\n" in text
            assert field.name in values or f'\n# {field.name} = "unset"\n' in text
