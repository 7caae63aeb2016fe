from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

import kdcore
from kdcore import hookimpl, option
from kdcore.errors import InputError, PluginError
from kdcore.plugins import Plugins, installed, load, try_all

Install = Callable[..., None]

EXITS = "import os\nos._exit(0)\n"
HEAD = "from attrs import define, frozen\nfrom kdcore import hookimpl, option\n"

BROKEN = {
    "import-error": ("import surely_not_there\n", "No module named 'surely_not_there' ("),
    "syntax-error": ("def broken(:\n", "SyntaxError: invalid syntax (kd_plugin_syntax_error.py, line 1)"),
    "system-exit": ("raise SystemExit('bye')\n", "SystemExit: bye"),
    "no-such-class": ("Other = 1\n", "has no attribute 'Method'"),
    "misspelt-hook": (
        HEAD + "@frozen\nclass Method:\n    @hookimpl\n    def student_los(self): ...\n",
        "unknown hook 'student_los' in plugin misspelt-hook",
    ),
    "misspelt-argument": (
        HEAD + "@frozen\nclass Method:\n    @hookimpl\n    def student_loss(self, batchh): ...\n",
        "'batchh'",
    ),
    "not-attrs": (HEAD + "class Method:\n    @hookimpl\n    def recipe(self): ...\n", "must be a frozen attrs class"),
    "not-frozen": (
        HEAD + "@define\nclass Method:\n    @hookimpl\n    def recipe(self): ...\n",
        "Method must be frozen",
    ),
    "not-frozen-dict": (
        HEAD + "@define(slots=False)\nclass Method:\n    @hookimpl\n    def recipe(self): ...\n",
        "Method must be frozen",
    ),
    "no-hooks": (HEAD + "@frozen\nclass Method: ...\n", "has no @hookimpl method"),
    "bad-default": (
        HEAD + "@frozen\nclass Method:\n    steps: int = option(0, '', least=1)\n"
        "    @hookimpl\n    def recipe(self): ...\n",
        "steps = 0 must be at least 1",
    ),
    "bad-annotation": (
        HEAD
        + "@frozen\nclass Method:\n    steps: 'Missing' = option(0, '')\n    @hookimpl\n    def recipe(self): ...\n",
        "name 'Missing' is not defined",
    ),
}


def named(name: str) -> Any:
    [info] = [info for info in installed() if info.name == name]
    return info


def test_metadata_alone_describes_a_plugin(install: Install) -> None:
    install("fog", "raise RuntimeError('imported')")
    info = named("fog")
    assert (info.domain, info.paper, info.version) == ("toy", "2010.02666", "0.1.0")
    assert (info.distribution, info.summary) == ("kd-plugin-fog", "about fog")
    assert (info.entry_point, info.broken) == ("kd_plugin_fog:Method", "")


@pytest.mark.parametrize(
    "keywords", ["domain:toy,arXiv:1.2", "distillation, domain:toy, arXiv:1.2", "arXiv:1.2 domain:toy"]
)
def test_keywords_of_any_build_tool_are_read(install: Install, keywords: str) -> None:
    install("fog", keywords=keywords)
    assert (named("fog").domain, named("fog").paper) == ("toy", "1.2")


def test_a_damaged_distribution_does_not_hide_the_others(install: Install, tmp_path: Path) -> None:
    install("fog")
    for name, content in (("bytes", b"[kdcore.plugins]\nx = \xff\xfe"), ("lines", b"[kdcore.plugins]\nno equals sign")):
        (tmp_path / "site" / f"{name}-1.dist-info").mkdir()
        (tmp_path / "site" / f"{name}-1.dist-info" / "entry_points.txt").write_bytes(content)
    assert named("fog").broken == ""
    assert named("unnamed").broken == "its entry_points.txt is malformed: install it again"


def test_a_name_claimed_twice_is_broken_for_both_and_never_picked(install: Install) -> None:
    install("fog")
    install("other", plugin="fog")
    both = [info for info in installed() if info.name == "fog"]
    assert [info.distribution for info in both] == ["kd-plugin-fog", "kd-plugin-other"]
    assert all("claimed by kd-plugin-fog and kd-plugin-other" in info.broken for info in both)
    with pytest.raises(PluginError, match="claimed by kd-plugin-fog and kd-plugin-other"):
        load("fog")


def test_the_first_of_two_versions_on_the_path_counts(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("fog")
    second = tmp_path / "second" / "kd_plugin_fog-0.2.0.dist-info"
    second.mkdir(parents=True)
    (second / "METADATA").write_text("Metadata-Version: 2.4\nName: kd-plugin-fog\nVersion: 0.2.0\n")
    (second / "entry_points.txt").write_text("[kdcore.plugins]\nfog = kd_plugin_fog:Method\n")
    monkeypatch.syspath_prepend(second.parent)
    assert (named("fog").version, named("fog").broken) == ("0.2.0", "")


def test_kdcore_plugins_restricts_what_is_seen(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fog")
    install("rain")
    monkeypatch.setenv("KDCORE_PLUGINS", " rain,")
    assert [info.name for info in installed()] == ["rain"]
    with pytest.raises(InputError, match="KDCORE_PLUGINS"):
        load("fog")


def test_load_by_name_and_by_domain(install: Install) -> None:
    install("fog")
    loaded = load("fog")
    assert (loaded.info.name, loaded.reference, loaded.cls.__name__) == ("fog", "fog", "Method")
    assert load("toy") == loaded


def test_a_domain_of_several_plugins_lists_them(install: Install) -> None:
    install("fog")
    install("rain")
    with pytest.raises(InputError, match="'toy': choose one of fog, rain"):
        load("toy")


def test_an_unknown_name_suggests(install: Install) -> None:
    install("heavy-fog")
    with pytest.raises(InputError, match=r"did you mean heavy-fog\?.*pip install kd-plugin-heavy-fogg"):
        load("heavy-fogg")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_names_itself_its_distribution_and_the_reason(install: Install, name: str) -> None:
    source, reason = BROKEN[name]
    install(name, source)
    with pytest.raises(PluginError) as raised:
        load(name)
    message = str(raised.value)
    assert message.startswith(f"plugin '{name}' (kd-plugin-{name} 0.1.0): ")
    assert reason in message
    assert "\n" not in message


def test_try_all_survives_every_broken_plugin(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fog", GOOD + "print('noise')\n")
    install("exits", EXITS)
    install("hangs", "import time\ntime.sleep(600)\n")
    install("raises", BROKEN["system-exit"][0])
    monkeypatch.setenv("KDCORE_PLUGINS", "fog,exits,raises")
    broken = {info.name: info.broken for info in try_all()}
    assert broken["fog"] == ""
    assert "ended the process (exit code 0)" in broken["exits"]
    assert broken["raises"].startswith("cannot be imported: SystemExit: bye")
    monkeypatch.setenv("KDCORE_PLUGINS", "hangs")
    assert [info.broken for info in try_all(timeout=1)] == ["not loaded within 1 seconds"]


GOOD = """
from attrs import frozen
from kdcore import hookimpl

@frozen
class Method:
    @hookimpl
    def recipe(self): ...
"""


def test_a_single_file_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_method.py").write_text("from __future__ import annotations\n" + GOOD)
    monkeypatch.chdir(tmp_path)
    loaded = load("./my_method.py")
    assert loaded.info.name == "my-method"
    assert loaded.reference == str(tmp_path / "my_method.py")
    before = loaded.info.version
    (tmp_path / "my_method.py").write_text(GOOD + "# changed\n")
    assert load("./my_method.py").info.version != before


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (GOOD + GOOD.replace("Method", "Second"), "this one: Method, Second"),
        ("x = 1\n", "this one: none"),
        ("import surely_not_there\n", r"No module named 'surely_not_there' \(.*mine\.py:1\)"),
    ],
)
def test_a_file_that_is_no_plugin(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(PluginError, match=reason):
        load(str(tmp_path / "mine.py"))


@pytest.mark.parametrize("path", ["./missing.py", "./folder/", "./text.txt"])
def test_a_path_that_is_no_python_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(InputError, match="no such Python file"):
        load(path)


ARGUMENTS: dict[str, Any] = {"run": 1, "stage": 2, "model": 3, "subject": "student", "split": "test"}


@frozen
class Owner:
    scale: float = option(1.0, "")

    @hookimpl
    def evaluate(self, subject: str) -> list[str]:
        return [f"owner measured {subject} at {self.scale}"]

    @hookimpl
    def recipe(self, run: Any) -> str:
        return "owner"


@frozen
class Joiner:
    layers: tuple[int, ...] = ()
    unhashable: Any = option([], "")

    @hookimpl
    def evaluate(self, stage: Any, split: str) -> list[str]:
        return [f"joiner {stage} {split}"]

    @hookimpl(wrapper=True, specname="evaluate")
    def shout(self, model: Any) -> Iterator[None]:
        result = yield
        return [text.upper() for text in result]  # type: ignore[return-value]


@frozen
class Wrapper:
    fail: bool = False

    @hookimpl(wrapper=True)
    def evaluate(self) -> Iterator[None]:
        result = yield
        if self.fail:
            raise ValueError("wrapper")
        return [f"<{text}>" for text in result]  # type: ignore[return-value]


@frozen
class Failing:
    @hookimpl
    def evaluate(self) -> None:
        raise ValueError("plain")


def test_one_plugin_is_asked_and_the_others_wrappers_stay() -> None:
    plugins = Plugins({"owner": Owner(2.0), "joiner": Joiner(), "wrapper": Wrapper()})
    assert plugins.ask("owner", "evaluate", **ARGUMENTS) == ["<OWNER MEASURED STUDENT AT 2.0>"]
    assert plugins.ask("joiner", "evaluate", **ARGUMENTS) == ["<JOINER 2 TEST>"]
    assert plugins.ask("owner", "recipe", run=1) == "owner"


def test_order_of_asking() -> None:
    plugins = Plugins({"owner": Owner(), "wrapper": Wrapper(), "joiner": Joiner()})
    assert (plugins.owner, plugins.names) == ("owner", ["owner", "wrapper", "joiner"])
    assert plugins.implementers("evaluate") == ["owner", "joiner"]
    assert plugins.newest_first("evaluate") == ["joiner", "owner"]
    assert plugins.implementers("merge_weights") == []


def test_equal_instances_are_told_apart() -> None:
    plugins = Plugins({"first": Owner(), "second": Owner()})
    assert plugins.ask("second", "recipe", run=1) == "owner"
    assert plugins.implementers("recipe") == ["first", "second"]


def test_asking_for_a_missing_hook_is_refused() -> None:
    plugins = Plugins({"wrapper": Wrapper(), "owner": Owner()})
    with pytest.raises(PluginError, match="plugin 'wrapper' has no hook 'recipe'"):
        plugins.ask("wrapper", "recipe", run=1)


@pytest.mark.parametrize(
    ("instances", "asked", "author"),
    [
        ({"owner": Owner(), "failing": Failing(), "wrapper": Wrapper()}, "failing", "failing"),
        ({"owner": Owner(), "wrapper": Wrapper(fail=True)}, "owner", "wrapper"),
    ],
)
def test_an_exception_names_hook_and_author(instances: dict[str, Any], asked: str, author: str) -> None:
    with pytest.raises(ValueError) as raised:
        Plugins(instances).ask(asked, "evaluate", **ARGUMENTS)
    assert raised.value.__notes__ == [f"in hook evaluate of plugin {author}"]


def test_trace_prints_every_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KDCORE_TRACE", "1")
    plugins = Plugins({"owner": Owner(), "wrapper": Wrapper()})
    plugins.ask("owner", "evaluate", **ARGUMENTS)
    plugins.ask("owner", "recipe", run=1)
    assert capsys.readouterr().err.splitlines() == [
        "kdcore trace: evaluate of owner (wrapped by wrapper)",
        "kdcore trace: recipe of owner",
    ]


def test_everything_exported_is_listed_once() -> None:
    from kdcore import recipe

    assert set(recipe.__all__) <= set(kdcore.__all__)
    assert kdcore.Stage is recipe.Stage
    assert set(kdcore.__all__) <= set(dir(kdcore))
    with pytest.raises(AttributeError):
        kdcore.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", ["kdcore", "kdcore.cli", "kdcore.plugins", "kdcore.config", "kdcore.recipe"])
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'rich', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
