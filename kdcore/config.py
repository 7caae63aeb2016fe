"""Configuration: a plugin's attrs fields, TOML files and overrides, structured strictly.

The owner's fields stand on top of the file, each joiner's in a table ``[its-name]``, the engine's in ``[run]``.
Every mistake becomes one line that names the file (or flag), the key and what is wrong. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
from attrs import frozen
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError

from kdcore.config_sources import ConfigSources, KeyPath
from kdcore.errors import InputError, PluginError
from kdcore.options import option
from kdcore.plugins import LoadedPlugin, PluginInfo, load
from kdcore.structure import MismatchError, converter, flatten, show

__all__ = ["Configuration", "RunOptions", "configure", "read_run", "settings_of"]

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["no", "bf16", "fp16"]
DEVICES: tuple[str, ...] = get_args(Device)
PRECISIONS: tuple[str, ...] = get_args(Precision)
Tracker = Literal["tensorboard", "wandb", "mlflow"]

RESERVED = ("plugins", "run")
LARGEST = 2**53  # the largest integer up to which a float, and JSON elsewhere, has them all
LONGEST = 255  # bytes of a file's name
MAY_CHANGE = ("store", "max_cost", "max_requests", "max_seconds")  # at a resumption
CHANGES_RESULTS = ("seed", "device", "precision", "compile", "gradient_checkpointing", "max_steps", "threads")


@frozen(kw_only=True)
class RunOptions:
    """The engine's own configuration: the table ``[run]``."""

    data: str = option("", "folder or file of your data; empty runs the plugin's demo")
    out: str = option("", "run folder to write; empty makes one under runs/")
    store: str = option("", "folder of teacher outputs and answers shared by several runs; empty keeps them in the run")
    seed: int = option(0, "the first seed", least=0)
    seeds: int = option(1, "how many seeds to run", least=1)
    compare: bool | None = option(
        None, "also train the control without distillation, and the declared arms; unset: in the demo, not on your data"
    )
    device: Device = option("auto", "where to train", choices=DEVICES)
    precision: Precision = option("no", "mixed precision", choices=PRECISIONS)
    compile: bool = option(False, "compile the student's submodules that the plugin names, else the whole of it")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    max_steps: int | None = option(None, "at most so many optimiser steps in each stage, for a quick try", least=1)
    workers: int = option(0, "processes that load data; 0 loads in the main process", least=0)
    trackers: tuple[Tracker, ...] = option(("tensorboard",), "where metrics are logged besides the run folder")
    threads: int | None = option(None, "CPU threads; unset lets torch decide", least=1)
    max_cost: float | None = option(None, "stop when text teachers have cost so much, in their prices", above=0)
    max_requests: int | None = option(None, "stop after so many requests to text teachers", least=1)
    max_seconds: float | None = option(None, "stop so many seconds after this start's first request", above=0)
    log_every: int = option(10, "optimiser steps between two lines of metrics", least=1)

    @property
    def compares(self) -> bool:
        """Whether the control and the declared arms are run too."""
        return not self.data if self.compare is None else self.compare


@frozen
class Configuration:
    """Everything that a run is configured with.

    :param references: what loads each plugin again: names, or absolute paths of single files; the owner first.
    :param plugins: plugin name to configured instance, the owner first.
    :param run: the engine's options.
    :param infos: plugin name to the metadata of its package.
    """

    references: tuple[str, ...]
    plugins: Mapping[str, Any]
    run: RunOptions
    infos: Mapping[str, PluginInfo] = attrs.field(factory=dict)


# --- from TOML, overrides and flags to instances


def configure(
    loaded: Sequence[LoadedPlugin],
    file: Path | None = None,
    overrides: Sequence[str] = (),
    run: Mapping[str, Any] | None = None,
) -> Configuration:
    """Combine, from lowest to highest: defaults, the TOML file, ``--set`` overrides, and flags.

    :param loaded: the plugins, the owner of the recipe first.
    :param file: a TOML file; None uses the defaults.
    :param overrides: ``a.b=value`` each; the value is TOML, and what is no TOML is a string.
    :param run: values of `RunOptions` fields; paths become absolute.
    :raises InputError: a mistake of the user, in one line.
    :raises PluginError: the plugins' names or fields collide, or a default is not of its own type.
    """
    with _readable(file or "--set"):
        return _configure(loaded, ConfigSources(file), overrides, run or {})


def _configure(
    loaded: Sequence[LoadedPlugin], sources: ConfigSources, overrides: Sequence[str], run: Mapping[str, Any]
) -> Configuration:
    if not loaded:
        raise InputError("no plugin is named: use --plugin NAME; 'kdcore list' shows what is installed")
    for override in overrides:
        sources.override(override)
    for name, value in run.items():
        sources.set(("run", name), value, "--" + name.replace("_", "-"))
    defaults = _defaults(loaded)
    sources.check_owner(loaded[0])
    joiners = {plugin.info.name: sources.pop_table(plugin.info.name) for plugin in loaded[1:]}
    options = sources.pop_table("run")
    owner = loaded[0].info.name
    keys = [".".join(path) for path in _keys(defaults, owner)]
    instances = {owner: _structure(defaults[owner], sources.table, (), sources, keys, f"plugin {owner!r}")}
    for name, table in joiners.items():
        instances[name] = _structure(defaults[name], table, (name,), sources, keys, f"plugin {name!r}")
    engine = _structure(RunOptions(), options, ("run",), sources, keys, "kdcore")
    folders = {name: _absolute(getattr(engine, name), name, sources) for name in ("data", "out", "store")}
    engine = attrs.evolve(engine, **folders)
    return Configuration(
        references=tuple(plugin.reference for plugin in loaded),
        plugins=instances,
        run=engine,
        infos={plugin.info.name: plugin.info for plugin in loaded},
    )


def read_run(folder: Path, changes: Mapping[str, Any] | None = None) -> Configuration:
    """The configuration of an earlier run, with its plugins loaded.

    :param folder: a run folder; ``run.out`` becomes this folder, wherever it was moved to.
    :param changes: values of options of ``[run]`` on which no result depends (`MAY_CHANGE`); None leaves one as it was.
    :raises InputError: the folder is no run, or its plugins or their fields have changed.
    """
    file = _run_file(folder)
    with _readable(file):
        sources = ConfigSources(file)
        references = sources.references()
        if not references:
            raise InputError(f"{file}: the key 'plugins' is missing, so this is no run folder")
        flags = {"out": str(folder)} | {name: value for name, value in (changes or {}).items() if value is not None}
        return _configure([load(reference) for reference in references], sources, (), flags)


def plugins_of(file: Path) -> tuple[str, ...]:
    """The plugins that a configuration file names in its key ``plugins``; empty when it names none."""
    with _readable(file):
        return ConfigSources(file).references()


@contextmanager
def _readable(place: Path | str) -> Iterator[None]:
    """Refuse TOML that Python cannot hold: nested beyond its stack, integers of thousands of digits."""
    try:
        yield
    except RecursionError:
        raise InputError(f"{place}: nested too deeply; no setting is") from None
    except ValueError as error:
        raise InputError(f"{place}: cannot be read: {error}") from None


def _run_file(folder: Path) -> Path:
    file = folder / "config.toml"
    try:
        found = folder.is_dir(), file.is_file(), (folder / ".lock").is_dir()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(folder)[:100]}: no such run folder ({reason})") from None
    if not found[0]:
        raise InputError(f"{folder}: no such run folder")
    if not found[1]:
        raise InputError(f"{folder}: no run folder (it has no config.toml); runs are written where --out says")
    if found[2]:
        raise InputError(f"{folder / '.lock'}: is a folder, where kdcore keeps a file; move it away")
    return file


def _absolute(path: str, name: str, sources: ConfigSources) -> str:
    """An absolute path that can be written down and exist."""
    if not path:
        return ""
    origin = sources.origin(("run", name), "kdcore")
    try:
        found = str(Path(path).expanduser().absolute())
        found.encode()
    except (RuntimeError, UnicodeEncodeError) as error:  # ~nobody; bytes that are not UTF-8
        reason = "is not UTF-8" if isinstance(error, UnicodeEncodeError) else str(error).rstrip(".")
        raise InputError(f"{origin}: run.{name} = {path!a}: {reason}; name another folder") from None
    if "\0" in found or any(len(part.encode()) > LONGEST for part in found.split("/")):
        reason = "has a NUL in it" if "\0" in found else f"has a part of more than {LONGEST} bytes"
        raise InputError(f"{origin}: run.{name} = {show(path)} {reason}; name another folder")
    return found


def _defaults(loaded: Sequence[LoadedPlugin]) -> dict[str, Any]:
    """Plugin name to its default instance; names that would collide as keys are refused."""
    defaults: dict[str, Any] = {}
    owner = loaded[0]
    taken = {*RESERVED, *(field.name for field in attrs.fields(owner.cls))}
    for reserved in RESERVED:
        if any(field.name == reserved for field in attrs.fields(owner.cls)):
            raise PluginError(f"{owner.info}: no field may be named {reserved!r}: the name is reserved")
    for plugin in loaded:
        name = plugin.info.name
        if name in defaults:
            raise InputError(f"--plugin {plugin.reference}: the plugin {name!r} is given twice")
        if name in RESERVED or (plugin is not owner and name in taken):
            raise PluginError(f"{plugin.info}: its name is taken by a key of {owner.info.name!r} or of kdcore")
        defaults[name] = plugin.cls()
    return defaults


# --- one class


def _structure(
    default: Any, table: Mapping[str, Any], prefix: KeyPath, sources: ConfigSources, keys: Sequence[str], author: str
) -> Any:
    """Structure a class from its default instance and the user's values."""
    try:
        instance = converter.structure(_complete(default, table), type(default))
    except Exception as error:
        path, mistake = next(_mistakes(error, prefix))
        given = table if path == prefix else _has(table, path[len(prefix) :])
        origin = sources.origin(path, author) if given else author
        raise InputError(f"{origin}: {_explain(path, mistake, keys)}") from error
    for path, value in _beyond(attrs.asdict(instance), attrs.asdict(default), prefix):
        least = "be finite" if isinstance(value, float) else f"be between -2**53 and 2**53 ({LARGEST})"
        raise InputError(f"{sources.origin(path, author)}: {'.'.join(path)} = {show(value)} must {least}")
    return instance


def _beyond(value: Any, default: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Numbers with which nothing can be computed, unless the plugin itself has them as defaults."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _beyond(inner, default.get(name) if isinstance(default, Mapping) else None, (*path, str(name)))
    elif isinstance(value, list | tuple) and value != default:
        for index, inner in enumerate(value):
            yield from _beyond(inner, None, (*path, str(index)))
    elif value != default and (
        (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) > LARGEST)
    ):
        yield path, value


def _complete(default: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    """The default instance as a table, with the user's values over it, also inside nested classes."""
    complete: dict[str, Any] = attrs.asdict(default)
    for name, value in table.items():
        current = getattr(default, name, None)
        nested = attrs.has(type(current)) and isinstance(value, Mapping)
        complete[name] = _complete(current, value) if nested else value
    return complete


def _has(table: Any, path: KeyPath) -> bool:
    """Whether the user gave a value at this path, or a whole value above it."""
    if not path or not isinstance(table, Mapping):
        return True
    return path[0] in table and _has(table[path[0]], path[1:])


def _mistakes(error: BaseException, path: KeyPath) -> Iterator[tuple[KeyPath, BaseException]]:
    """The single mistakes inside an exception of cattrs, each with the path of its key."""
    if isinstance(error, ClassValidationError):
        noted, others = error.group_exceptions()
        for inner, note in noted:
            yield from _mistakes(inner, (*path, note.name))
        for other in others:
            yield from _mistakes(other, path)
    elif isinstance(error, IterableValidationError):
        for inner, index in error.group_exceptions()[0]:
            yield from _mistakes(inner, (*path, str(index.index)))
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            yield (*path, key), error
    else:
        field, equals, _ = str(error).partition(" = ")  # validators say "steps = 0 must be at least 1"
        yield (*path, field) if equals and field.isidentifier() else path, error


def _explain(path: KeyPath, mistake: BaseException, keys: Sequence[str]) -> str:
    key = ".".join(path)
    if isinstance(mistake, ForbiddenExtraKeysError):
        return f"unknown key {key!r}{_nearest(path, keys)}"
    if isinstance(mistake, MismatchError):
        return f"{key} = {show(mistake.value)} must be {mistake.words}"
    if isinstance(mistake, KeyError):
        return f"{key} is missing"
    message = " ".join(str(mistake.args[0] if mistake.args else mistake).split())
    if message.startswith(f"{path[-1] if path else ''} = "):
        return key + message.removeprefix(path[-1])
    return f"{key}: {message}" if path else message


def _nearest(path: KeyPath, keys: Sequence[str]) -> str:
    """A valid key of the same name elsewhere, or of a similar name in the same table, or all keys of that table."""
    name = path[-1]
    siblings = {known.rpartition(".")[2]: known for known in keys if tuple(known.split(".")[:-1]) == path[:-1]}
    same = [known for known in keys if known.rpartition(".")[2] == name]
    near = same or [siblings[known] for known in difflib.get_close_matches(name, siblings)]
    near = near or difflib.get_close_matches(".".join(path), keys, cutoff=0.8)
    if near:
        return f"; did you mean {near[0]!r}?"
    table = f" of [{'.'.join(path[:-1])}]" if path[:-1] else ""
    return f"; the keys{table} are {', '.join(siblings)}" if siblings else ""


def _keys(defaults: Mapping[str, Any], owner: str) -> Iterator[KeyPath]:
    for name, default in {**defaults, "run": RunOptions()}.items():
        yield from _keys_of(default, () if name == owner else (name,))


def _keys_of(instance: Any, prefix: KeyPath) -> Iterator[KeyPath]:
    for field in attrs.fields(type(instance)):
        path = (*prefix, field.name)
        value = getattr(instance, field.name)
        if attrs.has(type(value)):
            yield from _keys_of(value, path)
        else:
            yield path


def settings_of(configuration: Configuration) -> dict[str, Any]:
    """What the results depend on, by key, as JSON values: each plugin's version and fields (but for operational ones),
    and the engine's options seed, device, precision, max_steps and threads. Data and teachers have fingerprints of
    their own.
    """
    settings = {f"version of {name}": info.version for name, info in configuration.infos.items()}
    owner = next(iter(configuration.plugins))
    for name, instance in configuration.plugins.items():
        fields = attrs.asdict(instance, filter=lambda field, _: not field.metadata.get("operational"))
        settings |= flatten(fields if name == owner else {name: fields})
    settings |= {f"run.{name}": getattr(configuration.run, name) for name in CHANGES_RESULTS}
    as_json: dict[str, Any] = json.loads(json.dumps(settings))
    return as_json
