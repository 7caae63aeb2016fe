"""What package metadata says; more of it in ``test_plugins.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.discovery import installed, restriction


def test_a_distribution_may_hold_several_plugins(install: Callable[..., None], tmp_path: Path) -> None:
    install("pair")
    entry_points = tmp_path / "site" / "kd_plugin_pair-0.1.0.dist-info" / "entry_points.txt"
    entry_points.write_text(
        "[kdcore.plugins]\none = kd_plugin_pair:One\ntwo = kd_plugin_pair:Two\n[console_scripts]\nthree = a:b\n"
    )
    found = [info for info in installed() if info.distribution == "kd-plugin-pair"]
    assert [(info.name, info.entry_point) for info in found] == [
        ("one", "kd_plugin_pair:One"),
        ("two", "kd_plugin_pair:Two"),
    ]
    assert str(found[0]) == "plugin 'one' (kd-plugin-pair 0.1.0)"


@pytest.mark.parametrize(("value", "names"), [("", set()), (" , ", set()), ("a, b,,a ", {"a", "b"})])
def test_blanks_in_the_restriction_do_not_count(monkeypatch: pytest.MonkeyPatch, value: str, names: set[str]) -> None:
    monkeypatch.setenv("KDCORE_PLUGINS", value)
    assert restriction() == names
