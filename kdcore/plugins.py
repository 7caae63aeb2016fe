"""Plugins: which are installed, how one is loaded, and who is asked in what order.

Listing reads package metadata only. Loading imports exactly the plugin asked for, and whatever is wrong with it
becomes a `PluginError` that names the plugin, its distribution and the reason. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import attrs
import pluggy
from attrs import frozen

from kdcore import hookspecs
from kdcore.discovery import GROUP, PluginInfo, installed, restriction
from kdcore.errors import InputError, PluginError

__all__ = ["GROUP", "LoadedPlugin", "PluginInfo", "Plugins", "installed", "load", "try_all"]

_PROBE = "kdcore_probe"
HOOKS = tuple(name for name in hookspecs.__all__ if name != "hookimpl")


@frozen
class LoadedPlugin:
    """A plugin's class, imported and checked.

    :param reference: what loads it again from anywhere: its name, or the absolute path of its file.
    """

    info: PluginInfo
    cls: type[Any]
    reference: str


# --- loading one


def load(reference: str) -> LoadedPlugin:
    """Import and check one plugin. What it prints meanwhile goes to stderr: stdout is for what was asked for.

    :param reference: an installed plugin's name; a domain that exactly one installed plugin serves; or the path of
        a Python file that holds exactly one plugin class.
    :raises InputError: nothing is found under this reference, or more than one.
    :raises PluginError: it is found, but cannot be used.
    """
    with contextlib.redirect_stdout(sys.stderr):
        return _load(reference)


def _load(reference: str) -> LoadedPlugin:
    if reference.endswith(".py") or "/" in reference or os.sep in reference:
        return _load_file(reference)
    info = _find(reference)
    if info.broken:
        raise PluginError(f"{info}: {info.broken}")
    point = importlib.metadata.EntryPoint(info.name, info.entry_point, GROUP)
    try:
        cls = point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{info}: {_reason(error)}") from error
    _check(info, cls)
    return LoadedPlugin(info, cls, info.name)


def _find(reference: str) -> PluginInfo:
    plugins = installed()
    for matches in (
        [info for info in plugins if info.name == reference],
        [info for info in plugins if info.domain == reference],
    ):
        if len({info.name for info in matches}) == 1:
            return matches[0]
        if matches:
            names = ", ".join(sorted({info.name for info in matches}))
            raise InputError(f"several plugins serve the domain {reference!r}: choose one of {names}")
    known = sorted({info.name for info in plugins} | {info.domain for info in plugins if info.domain})
    near = difflib.get_close_matches(reference, known, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(near)}?" if near else ";"
    hidden = f" (KDCORE_PLUGINS={os.environ['KDCORE_PLUGINS']} hides all others)" if restriction() else ""
    raise InputError(
        f"no plugin {reference!r} is installed{hidden}{guess} to install it: pip install kd-plugin-{reference}"
    )


def _load_file(reference: str) -> LoadedPlugin:
    try:
        path = Path(reference).expanduser().absolute()
        found = path.suffix == ".py" and path.is_file()
        str(path).encode()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not UTF-8, ~nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--plugin {reference[:100]!r}: no such Python file ({reason})") from None
    if not found:
        raise InputError(f"{path}: no such Python file; --plugin takes a name, a domain or a file ./my_method.py")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    info = PluginInfo(path.stem.replace("_", "-"), "", "", digest, str(path), "", str(path))
    try:
        module = _execute(path)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{info}: {_reason(error)}") from error
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and _implementations(value)
    ]
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise PluginError(f"{info}: a plugin file holds exactly one class with @hookimpl methods, this one: {names}")
    [cls] = classes
    info = attrs.evolve(info, summary=_first_line(cls), entry_point=f"{path}:{cls.__name__}")
    _check(info, cls)
    return LoadedPlugin(info, cls, str(path))


def _execute(path: Path) -> ModuleType:
    name = f"kdcore_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # annotations and pickles of its classes are resolved through it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _first_line(cls: type[Any]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _reason(error: BaseException) -> str:
    """What happened and where, in one line."""
    words = f"cannot be imported: {type(error).__name__}: {error}"
    frames = _frames(error.__traceback__)
    places = [(code.co_filename, line) for code, line in frames if not code.co_filename.startswith("<frozen")]
    if len(places) > 1 and not isinstance(error, SyntaxError):
        words += " ({}:{})".format(*places[-1])
    return " ".join(words.split())


def _frames(traceback: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code, traceback.tb_lineno
        traceback = traceback.tb_next


def _check(info: PluginInfo, cls: Any) -> None:
    """A frozen attrs class whose defaults hold, with hooks that pluggy accepts."""
    if not inspect.isclass(cls) or not attrs.has(cls):
        raise PluginError(f"{info}: {info.entry_point} must be a frozen attrs class (@attrs.frozen)")
    if not _implementations(cls):
        raise PluginError(f"{info}: {cls.__name__} has no @hookimpl method; the hooks are {', '.join(HOOKS)}")
    try:
        attrs.resolve_types(cls)
        instance = cls()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{info}: {cls.__name__}() must work with its defaults: {reason}") from error
    try:
        setattr(instance, _PROBE, None)
    except attrs.exceptions.FrozenInstanceError:
        pass
    except AttributeError:
        raise PluginError(f"{info}: {cls.__name__} must be frozen (@attrs.frozen)") from None
    else:
        raise PluginError(f"{info}: {cls.__name__} must be frozen (@attrs.frozen)")
    try:
        Plugins({info.name: instance})
    except PluginError as error:
        raise PluginError(f"{info}: {error}") from None


# --- trying all


def try_all(timeout: float = 300) -> list[PluginInfo]:
    """Load every installed plugin in a process of its own, two at a time.

    :param timeout: seconds after which one counts as broken.
    :returns: what `installed` returns, with the reason in ``broken`` where loading failed.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda info: attrs.evolve(info, broken=_try(info, timeout)), installed()))


def _try(info: PluginInfo, timeout: float) -> str:
    if info.broken:
        return info.broken
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "kdcore.plugins", info.name],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not loaded within {timeout:g} seconds"
    try:
        return str(json.loads(child.stdout.splitlines()[-1])["kdcore broken"])
    except (IndexError, ValueError, LookupError, TypeError):
        return f"its import ended the process (exit code {child.returncode})"


def _answer(name: str) -> None:
    """The child's side of `try_all`: the last line of its output is the verdict."""
    try:
        load(name)
    except InputError as error:
        broken = str(error)
        for info in installed():
            broken = broken.removeprefix(f"{info}: ")
    else:
        broken = ""
    print("\n" + json.dumps({"kdcore broken": broken}), flush=True)


# --- asking


class _Part:
    """The plain implementations, or the wrappers, of one plugin: what pluggy sees as a plugin."""

    def __init__(self, name: str, methods: Mapping[str, Any]) -> None:
        self.__dict__.update(methods)
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _source(method: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(method))
    except (OSError, TypeError):  # no file holds it
        return f"{method.__module__}.{method.__qualname__}"


def _implementations(cls: type[Any]) -> dict[str, Mapping[str, Any]]:
    """Method name to pluggy's options of every method marked with ``hookimpl``."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        options = getattr(getattr(method, "__func__", method), "kdcore_impl", None)
        if isinstance(options, dict):
            found[name] = options
    return found


class Plugins:
    """The plugins of one run, asked one at a time so that every result has an author.

    Each plugin is registered as two objects, its plain implementations and its wrappers: asking one plugin removes
    all other plain objects and keeps everybody's wrappers. ``KDCORE_TRACE=1`` prints every call to stderr.

    :param instances: plugin name to instance, the owner of the recipe first.
    :raises PluginError: a method marked with ``hookimpl`` is no hook, or takes an argument that its hook has not.
    """

    def __init__(self, instances: Mapping[str, Any]) -> None:
        self.instances = dict(instances)
        self.names = list(self.instances)
        self.owner = self.names[0]
        self._manager = pluggy.PluginManager("kdcore")
        self._manager.add_hookspecs(hookspecs)
        self._plain: dict[str, _Part] = {}
        self._hooks: dict[str, set[str]] = {}
        self._wrapping: dict[str, list[str]] = {}
        self._methods: dict[str, list[Any]] = {}
        self._authors: dict[tuple[str, Any], str] = {}
        self._callers: dict[tuple[str, str], Any] = {}
        self._trace = os.environ.get("KDCORE_TRACE", "") not in ("", "0")
        for name, instance in self.instances.items():
            self._register(name, instance)

    def _register(self, name: str, instance: Any) -> None:
        plain: dict[str, Any] = {}
        wrappers: dict[str, Any] = {}
        self._hooks[name] = set()
        for attribute, options in _implementations(type(instance)).items():
            method = getattr(instance, attribute)
            hook = options.get("specname") or attribute
            if options.get("wrapper") or options.get("hookwrapper"):
                wrappers[attribute] = method
                self._wrapping.setdefault(hook, []).append(name)
            else:
                plain[attribute] = method
                self._hooks[name].add(hook)
            self._methods.setdefault(hook, []).append(method)
            self._authors[hook, inspect.unwrap(getattr(method, "__func__", method)).__code__] = name
        self._plain[name] = _Part(name, plain)
        try:
            self._manager.register(self._plain[name], name)
            if wrappers:
                self._manager.register(_Part(name, wrappers), f"{name}, wrappers")
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{' '.join(str(error).split())}; the hooks are {', '.join(HOOKS)}") from error

    def implementers(self, hook: str) -> list[str]:
        """The plugins with a plain implementation of the hook: the owner, then the joiners in order."""
        return [name for name in self.names if hook in self._hooks[name]]

    def source_of(self, hook: str) -> str:
        """The code of everybody's implementations and wrappers of a hook, without comments and blank lines."""
        lines = [line.rstrip() for method in self._methods.get(hook, ()) for line in _source(method).splitlines()]
        return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))

    def newest_first(self, hook: str) -> list[str]:
        """The same plugins, the newest joiner first and the owner last."""
        return self.implementers(hook)[::-1]

    def ask(self, plugin: str, hook: str, **arguments: Any) -> Any:
        """The result of one plugin's implementation, as changed by everybody's wrappers.

        :raises PluginError: the plugin does not implement the hook.
        """
        caller = self._callers.get((plugin, hook)) or self._caller(plugin, hook)
        if self._trace:
            wrapped = f" (wrapped by {', '.join(self._wrapping[hook])})" if hook in self._wrapping else ""
            print(f"kdcore trace: {hook} of {plugin}{wrapped}", file=sys.stderr, flush=True)
        try:
            return caller(**arguments)
        except Exception as error:
            error.add_note(f"in hook {hook} of plugin {self._author(error, plugin, hook)}")
            raise

    def _caller(self, plugin: str, hook: str) -> Any:
        if hook not in self._hooks[plugin]:
            advice = ": name it after the plugin that it joins" if hook == "recipe" else ""
            raise PluginError(f"plugin {plugin!r} has no hook {hook!r}{advice}")
        others = [part for name, part in self._plain.items() if name != plugin]
        caller = self._manager.subset_hook_caller(hook, others)
        self._callers[plugin, hook] = caller
        return caller

    def _author(self, error: BaseException, plugin: str, hook: str) -> str:
        """Whose code raised: the asked plugin's, or that of a wrapper."""
        for code, _ in _frames(error.__traceback__):
            plugin = self._authors.get((hook, code), plugin)
        return plugin


if __name__ == "__main__":
    _answer(sys.argv[1])
