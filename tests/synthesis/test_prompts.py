from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import kdcore
from kdcore.errors import InputError, PluginError
from kdcore.plugins import load
from kdcore.synthesis.prompts import prompt, templates

METHOD = """
from attrs import frozen
from kdcore import hookimpl, option, prompt

@frozen(kw_only=True)
class Method:
    prompts: str = option("", "folder of templates that take the place of the plugin's own")

    @hookimpl
    def data_synth(self, run):
        return prompt(self, "generate", n=2, labels=["a"])
"""
GENERATE = "Write {{ n }} texts of these labels:\n{% for label in labels %}\n- {{ label }}\n{% endfor %}\n"


@pytest.fixture
def method(tmp_path: Path) -> Callable[..., Any]:
    """``method(prompts="", **{"generate.jinja": text})``: a plugin in a file, with its templates beside it."""

    def make(prompts: object = "", source: str = METHOD, **files: str) -> Any:
        folder = tmp_path / "prompts"
        folder.mkdir(exist_ok=True)
        for name, text in ({"generate.jinja": GENERATE} | files).items():
            (folder / name).write_text(dedent(text), encoding="utf-8")
        (tmp_path / "my_method.py").write_text(source, encoding="utf-8")
        cls = load(str(tmp_path / "my_method.py")).cls
        return cls(prompts=str(prompts)) if prompts else cls()

    return make


def test_a_hook_gets_messages(method):
    plugin = method(**{"generate.system.jinja": "You write for {{ n }} readers.\n"})
    assert plugin.data_synth(None) == [
        {"role": "system", "content": "You write for 2 readers."},
        {"role": "user", "content": 'Write 2 texts of these labels:\n- "a"\n'},
    ]
    assert list(templates(plugin)) == ["generate", "generate.system"]
    assert kdcore.prompt is prompt


def test_templates_of_an_installed_package_and_of_the_class_it_derives_from(install, tmp_path):
    package = tmp_path / "site" / "kd_plugin_rain"
    install("rain", "", plugin="rain")
    (tmp_path / "site" / "kd_plugin_rain.py").unlink()
    (package / "prompts").mkdir(parents=True)
    (package / "__init__.py").write_text("from kd_plugin_rain.plugin import Method\n")
    (package / "plugin.py").write_text(METHOD)
    (package / "prompts" / "generate.jinja").write_text("of the package, {{ n }}")
    (package / "prompts" / "other.jinja").write_text("other")
    plugin = load("rain").cls()
    assert plugin.data_synth(None) == [{"role": "user", "content": "of the package, 2"}]

    joined = tmp_path / "mine" / "mine.py"
    (joined.parent / "prompts").mkdir(parents=True)
    (joined.parent / "prompts" / "generate.jinja").write_text("of the file, {{ n }}")
    joined.write_text(
        "from attrs import frozen\nfrom kd_plugin_rain import Method\n\n@frozen\nclass Mine(Method): ...\n"
    )
    mine = load(str(joined)).cls()
    assert templates(mine) == {"generate": "of the file, {{ n }}", "other": "other"}


def test_files_of_the_users_folder_take_the_place_of_the_plugins(method, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / ".DS_Store").write_bytes(b"\xff")
    (mine / "generate.jinja").write_text("{% include 'style.jinja' %}, {{ n }}")
    (mine / "generate.system.jinja").write_text("\n")
    plugin = method(mine, **{"generate.system.jinja": "You write.", "style.jinja": "Be brief"})
    assert plugin.data_synth(None) == [{"role": "user", "content": "Be brief, 2"}]
    assert templates(plugin)["style"] == "Be brief"


def test_a_plugin_without_the_option_keeps_its_own(method):
    plugin = method(source=METHOD.replace("prompts: str", "other: str"))
    assert "generate" in templates(plugin)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("One\n{% for %}\n", ":2: .*[Ee]xpected"),
        ("One\n\n{{ text|safe }}", ":3: No filter named 'safe'"),
        ("One\n{% filter upper %}x{% endfilter %}", ":2: .*filter.* is not for prompts: write a macro"),
        ("One\n{{ number }}", ":2: 'number' is undefined; the slots are: n, labels"),
        (
            "{% macro m() %}\n{{ labels[7] }}\n{% endmacro %}\n\n{{ m() }}",
            ":2: .*no element 7; the slots are: n, labels",
        ),
        ("One\n{{ n / 0 }}", ":2: ZeroDivisionError"),
        ("One\n{{ labels }}\n{{ '<s>'|bare }}", ":3: '<s>' cannot be written by"),
        ("{% include 'none.jinja' %}", ":1: no template 'none.jinja'; there are: generate"),
        ("{{ range(999999999) }}", ":1: .*too big"),
    ],
)
def test_mistakes_in_a_template_are_told_with_file_and_line(method, tmp_path, text, words):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "generate.jinja").write_text(text)
    plugin = method(mine)
    with pytest.raises(InputError, match=f"^{mine}/generate.jinja{words}") as caught:
        plugin.data_synth(None)
    assert "\n" not in str(caught.value)


def test_folders_and_files_that_cannot_be_used_are_refused(method, tmp_path):
    with pytest.raises(InputError, match=r"none': cannot be read \(No such file"):
        templates(method(tmp_path / "none"))
    with pytest.raises(InputError, match=r"cannot be read \(embedded null byte\)"):
        templates(method("a\0b"))
    unknown, binary = tmp_path / "unknown", tmp_path / "binary"
    unknown.mkdir()
    (unknown / "genrate.jinja").write_text("")
    with pytest.raises(InputError, match=r"genrate.jinja: takes the place of no template; .* are: generate.jinja$"):
        templates(method(unknown))
    binary.mkdir()
    (binary / "generate.jinja").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"generate.jinja: not UTF-8 \(byte 2\)"):
        templates(method(binary))
    (binary / "generate.jinja").unlink()
    (binary / "generate.jinja").mkdir()
    with pytest.raises(InputError, match=r"generate.jinja: cannot be read \(Is a directory\)"):
        templates(method(binary))


def test_mistakes_of_the_author_name_the_plugin(method):
    plugin = method()
    with pytest.raises(PluginError, match=r"Method has no prompt 'judge': .* there are: generate"):
        prompt(plugin, "judge")
    with pytest.raises(PluginError, match=r"Method, prompt 'generate': the slot labels\[0\] is a object"):
        prompt(plugin, "generate", n=1, labels=[object()])
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(PluginError, match="Method, prompt 'generate': a slot is nested too deeply"):
        prompt(plugin, "generate", n=1, labels=endless)


def test_slots_may_have_any_name(method):
    plugin = method(**{"generate.jinja": "{{ plugin }}{{ name }}"})
    assert prompt(plugin, "generate", plugin=1, name=2)[0]["content"] == "12"


def test_threads_share_the_templates(method):
    plugin = method()
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(prompt(plugin, "generate", n=i, labels=[])[0]["content"]))
        for i in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(f"Write {i} texts of these labels:\n" for i in range(32))


def test_the_guide_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "prompts.md").read_text(encoding="utf-8")
    [source] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    [template] = re.findall(r"```text\n(You write.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my_method.py").write_text(source, encoding="utf-8")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "generate.jinja").write_text(template, encoding="utf-8")
    plugin = load(str(tmp_path / "my_method.py")).cls()
    mistakes = [{"text": 'Where is "it"?\n', "label": "card_lost"}, {"text": "</s>", "label": "card_arrival"}]
    [message] = plugin.request("card_arrival", mistakes, ["card_arrival", "card_lost"])
    assert message["content"] == (
        "You write messages for a classifier of 2 intents.\n\n"
        "Messages that the classifier gets wrong:\n"
        '{"text": "Where is \\"it\\"?\\n", "label": "card_lost"}\n'
        '{"text": "\\u003c/s>", "label": "card_arrival"}\n'
        "\nWrite 4 new ones of the intent card_arrival, as a JSON list of objects of this form."
    )
    [listing] = re.findall(r"```text\n(\{% for label.*?)```", text, flags=re.DOTALL)
    (tmp_path / "prompts" / "generate.jinja").write_text(listing, encoding="utf-8")
    again = load(str(tmp_path / "my_method.py")).cls()
    assert prompt(again, "generate", labels=["a b", "c"])[0]["content"] == "a b, c"
