from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from attrs import frozen

from kdcore import hookimpl, option
from kdcore.config import Configuration, RunOptions, configure, read_run, settings_of
from kdcore.errors import InputError, PluginError
from kdcore.plugins import LoadedPlugin, PluginInfo
from kdcore.toml import to_toml


@frozen(kw_only=True)
class Student:
    model: str = option("bert-tiny", "folder or hub name")
    layers: int = option(2, "how many", between=(1, 12))
    width: int | None = option(None, "how wide")


@frozen(kw_only=True)
class Source:
    path: str
    weight: float = option(1.0, "its share", above=0)


@frozen(kw_only=True)
class Method:
    temperature: float = option(2.0, "softens both distributions", above=0)
    steps: int = option(1000, "optimiser steps", least=1)
    shuffle: bool = option(True, "whether to shuffle")
    labels: tuple[str, ...] = option(("no", "yes"), "class names")
    window: tuple[int, float] = option((1, 0.5), "two numbers")
    loss: Literal["kl", "mse"] = option("kl", "which loss")
    limit: int | None = option(None, "at most so many", least=1)
    rate: float | str = option("auto", "a number or auto")
    shares: Mapping[str, float] = option({"a.b": 1.0}, "share of each")
    sources: tuple[Source, ...] = option((), "where from")
    student: Student = option(Student(layers=4, width=8), "the student")
    depth: int | None = option(3, "how deep; unset decides by itself")
    critic: Student | None = option(None, "the critic")

    @hookimpl
    def recipe(self) -> None: ...


@frozen(kw_only=True)
class Joiner:
    weight: float = option(1, "weight of the term")

    @hookimpl
    def student_loss(self) -> None: ...


def loaded(cls: type[Any], name: str) -> LoadedPlugin:
    info = PluginInfo(name, "toy", "1.2", "0.1.0", f"kd-plugin-{name}", "A summary.", f"module:{cls.__name__}")
    return LoadedPlugin(info, cls, name)


METHOD, JOINER = loaded(Method, "method"), loaded(Joiner, "my-joiner")


def configured(*overrides: str, file: Path | None = None, **run: Any) -> Configuration:
    return configure([METHOD, JOINER], file, overrides, run)


def method(*overrides: str) -> Any:
    return configured(*overrides).plugins["method"]


def refused(tmp_path: Path, text: str, *overrides: str, **run: Any) -> str:
    """The message about a file of this text, without the file's name."""
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as raised:
        configured(*overrides, file=file, **run)
    message = str(raised.value)
    assert "\n" not in message
    return message.replace(f"{file}: ", "FILE: ")


def test_defaults() -> None:
    configuration = configure([METHOD])
    assert configuration == Configuration(("method",), {"method": Method()}, RunOptions(), {"method": METHOD.info})


def test_file_then_overrides_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 5\ntemperature = 3\n[my-joiner]\nweight = 0.5\n[run]\nseed = 1\nseeds = 2\nworkers = 3\n")
    configuration = configured("steps=6", "my-joiner.weight=2", "run.seeds=4", file=file, seed=7)
    owner, joiner = configuration.plugins.values()
    assert (owner.steps, owner.temperature, joiner.weight) == (6, 3.0, 2.0)
    assert isinstance(owner.temperature, float)
    assert isinstance(configured().plugins["my-joiner"].weight, float)
    assert (configuration.run.seed, configuration.run.seeds, configuration.run.workers) == (7, 4, 3)


def test_values_of_set_are_toml_and_the_rest_is_text() -> None:
    assert method("student.model=prajjwal1/bert-mini").student == Student(
        model="prajjwal1/bert-mini", layers=4, width=8
    )
    assert method("labels=['a', 'b']").labels == ("a", "b")
    assert method('student.model="7"').student.model == "7"
    assert method("student.model=").student.model == ""
    assert method("student.model=7\nsteps = 3").student.model == "7\nsteps = 3"
    assert method("rate=0.1").rate == 0.1
    assert method("limit=3").limit == 3
    assert method("shares.'x.y'=3").shares == {"x.y": 3.0}
    assert (
        method("depth=unset").depth,
        method("depth='unset'").depth,
        method("student.width=unset").student.width,
    ) == (
        None,
        None,
        None,
    )
    assert method("critic.layers=3").critic == Student(layers=3)
    assert method("sources=[{path='a'}]").sources == (Source(path="a"),)
    assert method("student={layers=3}", "student.model=x").student == Student(model="x", layers=3, width=8)


def test_a_partial_table_keeps_the_default_instance(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[student]\nmodel = 'other'\n")
    assert configured(file=file).plugins["method"].student == Student(model="other", layers=4, width=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('steps = "7"', 'FILE: steps = "7" must be an integer'),
        ("steps = 7.9", "FILE: steps = 7.9 must be an integer"),
        ("steps = true", "FILE: steps = true must be an integer"),
        ("steps = 0", "FILE: steps = 0 must be at least 1"),
        ("temperature = true", "FILE: temperature = true must be a number"),
        ("temperature = 0", "FILE: temperature = 0.0 must be above 0"),
        ('shuffle = "false"', 'FILE: shuffle = "false" must be true or false'),
        ("shuffle = 1", "FILE: shuffle = 1 must be true or false"),
        ('labels = "ab"', 'FILE: labels = "ab" must be a list of strings'),
        ('labels = ["a", 1]', 'FILE: labels.1 = 1 must be a string (write "1" with its quotes)'),
        ("window = [1]", "FILE: window = [1] must be a list of 2: an integer, a number"),
        ("window = [1.5, 1]", "FILE: window.0 = 1.5 must be an integer"),
        ('loss = "mae"', 'FILE: loss = "mae" must be one of kl, mse'),
        ('limit = "x"', 'FILE: limit = "x" must be an integer or "unset"'),
        ("limit = 0", "FILE: limit = 0 must be at least 1"),
        ("rate = true", "FILE: rate = true must be a number or a string"),
        ("shares = 1", "FILE: shares = 1 must be a table"),
        ("shares.a = 'x'", 'FILE: shares.a = "x" must be a number'),
        ("student = 'x'", 'FILE: student = "x" must be a table'),
        ("[student]\nmodel = 3", 'FILE: student.model = 3 must be a string (write "3" with its quotes)'),
        ("[student]\nmodel = 2024-01-01", "FILE: student.model = 2024-01-01 must be a string"),
        ("[student]\nlayers = 13", "FILE: student.layers = 13 must be at most 12"),
        ("[student]\nmodell = 'x'", "FILE: unknown key 'student.modell'; did you mean 'student.model'?"),
        ("[[sources]]\nweight = 1", "FILE: sources.0.path is missing"),
        ("[[sources]]\npath = 'x'\nweight = -1", "FILE: sources.0.weight = -1.0 must be above 0"),
        ("tempreture = 3", "FILE: unknown key 'tempreture'; did you mean 'temperature'?"),
        ("seed = 3", "FILE: unknown key 'seed'; did you mean 'run.seed'?"),
        ("[my-joiner]\nwight = 3", "FILE: unknown key 'my-joiner.wight'; did you mean 'my-joiner.weight'?"),
        ("[my-joiner]\nqqq = 3", "FILE: unknown key 'my-joiner.qqq'; the keys of [my-joiner] are weight"),
        ("my-joiner = 3", "FILE: my-joiner = 3 must be a table [my-joiner]"),
        ("[run]\nseeds = 0", "FILE: run.seeds = 0 must be at least 1"),
        ("[run]\ndevice = 'gpu'", 'FILE: run.device = "gpu" must be one of auto, cpu, cuda, mps'),
        ("[run]\ntrackers = ['wandb', 'x']", 'FILE: run.trackers.1 = "x" must be one of tensorboard, wandb, mlflow'),
        ("[run]\nmax-steps = 3", "FILE: unknown key 'run.max-steps'; did you mean 'run.max_steps'?"),
        ("plugins = 'x'", 'FILE: plugins = "x" must be a list of strings'),
        ("plugins = ['x']", "FILE: written for the plugin 'x', not for 'method'"),
        ("steps = 1\nx = = 2", "FILE: no valid TOML: Invalid value (at line 2, column 5)"),
    ],
)
def test_every_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=x", '--set: steps = "x" must be an integer'),
        ("steps=0", "--set: steps = 0 must be at least 1"),
        ("student.layers=0", "--set: student.layers = 0 must be at least 1"),
        ("steps.x=1", "--set: steps = {x = 1} must be an integer"),
        ("stepz=1", "--set: unknown key 'stepz'; did you mean 'steps'?"),
        ("steps", "--set steps: must be key=value, for example --set run.seed=1"),
        ("=1", "--set =1: must be key=value, for example --set run.seed=1"),
        ("a b=1", "--set a b=1: must be key=value, for example --set run.seed=1"),
        ("plugins=['x']", "--set plugins=['x']: name plugins with --plugin"),
    ],
)
def test_a_mistake_in_set_is_attributed_to_it(tmp_path: Path, override: str, message: str) -> None:
    assert refused(tmp_path, "temperature = 1", override) == message


def test_a_mistake_in_a_flag_is_attributed_to_it(tmp_path: Path) -> None:
    assert refused(tmp_path, "[run]\nseed = 1", max_steps=0) == "--max-steps: run.max_steps = 0 must be at least 1"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, message in (("missing.toml", "no such file"), (".", "cannot be read")):
        with pytest.raises(InputError, match=message):
            configured(file=tmp_path / name)
    (tmp_path / "latin.toml").write_bytes("steps = 1 # é".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.toml: not UTF-8 \(byte 12\)"):
        configured(file=tmp_path / "latin.toml")
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbfsteps = 1\r\n")
    assert configured(file=tmp_path / "windows.toml").plugins["method"].steps == 1


def test_a_wrong_default_is_the_plugins_fault() -> None:
    @frozen
    class Wrong:
        steps: int = option("7", "")

    with pytest.raises(InputError, match=r"^plugin 'wrong': steps = \"7\" must be an integer$"):
        configure([loaded(Wrong, "wrong")])


def test_colliding_names_are_refused() -> None:
    @frozen
    class Reserved:
        run: int = 1

    @frozen
    class Taken:
        joiner: int = 1

    with pytest.raises(PluginError, match="no field may be named 'run'"):
        configure([loaded(Reserved, "reserved")])
    with pytest.raises(PluginError, match="name is taken"):
        configure([loaded(Taken, "taken"), loaded(Joiner, "joiner")])
    with pytest.raises(PluginError, match="name is taken"):
        configure([METHOD, loaded(Joiner, "run")])
    with pytest.raises(InputError, match="given twice"):
        configure([METHOD, METHOD])
    with pytest.raises(InputError, match="no plugin is named"):
        configure([])


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("limit=3", "run.max_steps=5", "run.threads=2", "run.compare=true", "run.trackers=[]"),
        ("rate=0.001", "temperature=1e-7", "temperature=1e300", "labels=[]", "window=[3, 4]"),
        ("student.model=\"quote \\\" backslash \\\\ newline \\n tab \\t é ☃ # ''' \\u0000\"", "critic={model='x'}"),
        ("sources=[{path='a', weight=2}, {path='b'}]", "shares={'x y' = 1, 'a.b' = 2, plain = 3}"),
        ("run.data=some/folder", "run.out=~/x"),
        ("depth=unset", "limit=unset", "student.width=unset", "critic.model=x"),
    ],
)
def test_toml_round_trip(tmp_path: Path, overrides: tuple[str, ...], documented: bool) -> None:
    configuration = configured(*overrides)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(configuration, documented), encoding="utf-8")
    again = configured(file=file)
    assert again == configuration
    assert settings_of(again) == settings_of(configuration)


def test_documented_toml_tells_help_bounds_and_choices() -> None:
    text = to_toml(configured(), documented=True)
    assert text.startswith("# method 0.1.0 (arXiv:1.2): A summary.\n")
    assert "\n# softens both distributions\n# a number; above 0\ntemperature = 2.0\n" in text
    assert '\n# at most so many\n# an integer or "unset"; at least 1\n# limit = "unset"\n' in text
    assert '\n# where to train\n# one of auto, cpu, cuda, mps\ndevice = "auto"\n' in text
    assert "\n# the student\n[student]\n# folder or hub name\n" in text
    for cls in (Method, Student, Joiner, RunOptions):
        for field in attrs.fields(cls):
            assert f"# {field.metadata['help']}\n" in text


def test_settings_follow_what_changes_results() -> None:
    base = settings_of(configured())
    for override in ("steps=3", "student.layers=1", "my-joiner.weight=3", "run.seed=1", "run.precision=bf16",
                     "run.max_steps=1", "run.device=cpu", "run.threads=1"):  # fmt: skip
        assert settings_of(configured(override)) != base, override
    for override in ("run.out=x", "run.store=x", "run.seeds=3", "run.compare=true", "run.log_every=1",
                     "run.trackers=[]", "run.workers=2", "run.data=x"):  # fmt: skip
        assert settings_of(configured(override)) == base, override
    newer = attrs.evolve(METHOD, info=attrs.evolve(METHOD.info, version="0.2.0"))
    assert settings_of(configure([newer, JOINER])) != base


FILE_PLUGIN = """
from attrs import frozen
from kdcore import hookimpl, option

@frozen
class Mine:
    steps: int = option(3, "optimiser steps")

    @hookimpl
    def recipe(self): ...
"""


def test_a_run_folder_is_read_back_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcore.plugins import load

    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE_PLUGIN)
    configuration = configure([load("./mine.py")], None, ["steps=5"], {"out": "made", "data": "corpus"})
    assert configuration.references == (str(tmp_path / "mine.py"),)
    assert configuration.run.data == str(tmp_path / "corpus")
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.toml").write_text(to_toml(configuration))
    monkeypatch.chdir("/")
    again = read_run(moved)
    assert again.plugins["mine"].steps == 5
    assert again.run == attrs.evolve(configuration.run, out=str(moved))
    assert settings_of(again) == settings_of(configuration)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(InputError, match="no run folder"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("steps = 3\n")
    with pytest.raises(InputError, match="the key 'plugins' is missing"):
        read_run(tmp_path)
