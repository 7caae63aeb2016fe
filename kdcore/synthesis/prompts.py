"""Prompts: jinja2 templates that a plugin ships and its user may replace, filled with data that cannot leave its slot.

The templates of a plugin lie in a folder ``prompts`` beside the module of its class: ``NAME.jinja`` is the user's
message, ``NAME.system.jinja`` the system's, if there is one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import attrs
from attrs import frozen
from jinja2 import FunctionLoader, TemplateError, TemplateNotFound, TemplateSyntaxError, UndefinedError

from kdcore.errors import InputError, PluginError
from kdcore.synthesis.slots import SlotEnvironment, plain

__all__ = ["PromptTemplate", "prompt", "prompt_templates", "templates"]

FOLDER = "prompts"
SUFFIX = ".jinja"


@frozen
class PromptTemplate:
    """One template of a plugin.

    :param source: its text, as it is used.
    :param own: the plugin's file.
    :param replacement: the file of the user's folder that takes its place; None where there is none.
    """

    name: str
    source: str
    own: Path
    replacement: Path | None = None

    @property
    def file(self) -> Path:
        """Where the text is from."""
        return self.replacement or self.own


def prompt(plugin: Any, name: str, /, **slots: Any) -> list[dict[str, str]]:
    """The messages of one prompt of a plugin, for `kdcore.run.Run.ask`.

    Every ``{{ ... }}`` of a template is written as JSON: a string as a literal of one line, numbers as they are. So
    no text from data or from a teacher can end its slot. Templates are read once in a process.

    :param plugin: the plugin, ``self`` in a hook. Where it has the option ``prompts``, the files of that folder take
        the place of its own.
    :param name: the template ``NAME.jinja``.
    :param slots: what the template may use: text, numbers, lists and mappings, nested as they like.
    :returns: ``{"role": "system", "content": ...}``, if there is such a template and it is not blank, and
        ``{"role": "user", "content": ...}``.
    :raises InputError: a template cannot be read or rendered; the message has its file and line.
    :raises PluginError: there is no such template, or a slot holds what JSON cannot.
    """
    library = _library_of(plugin)
    if name not in library.templates:
        raise PluginError(
            f"{type(plugin).__name__} has no prompt {name!r}: write {name}{SUFFIX} in a folder {FOLDER} beside its "
            f"module; there are: {', '.join(library.templates) or 'none'}"
        )
    try:
        data = {slot: plain(value, slot) for slot, value in slots.items()}
    except TypeError as error:
        raise PluginError(f"{type(plugin).__name__}, prompt {name!r}: the slot {error}") from None
    except RecursionError:
        raise PluginError(f"{type(plugin).__name__}, prompt {name!r}: a slot is nested too deeply") from None
    system = f"{name}.system"
    messages = [{"role": "user", "content": library.render(name, data)}]
    if system in library.templates and (content := library.render(system, data)).strip():
        messages.insert(0, {"role": "system", "content": content})
    return messages


def templates(plugin: Any) -> dict[str, str]:
    """Template name (``NAME`` or ``NAME.system``) to its text, as `prompt` uses it.

    :raises InputError: a template cannot be read or parsed.
    """
    return {template.name: template.source for template in prompt_templates(plugin)}


def prompt_templates(plugin: Any) -> list[PromptTemplate]:
    """All templates of a plugin by name, with their files; empty where it has none.

    :raises InputError: as in `templates`.
    """
    return list(_library_of(plugin).templates.values())


class _Library:
    """The templates of one plugin, parsed."""

    def __init__(self, found: Mapping[str, PromptTemplate]) -> None:
        self.templates = found
        self.environment = SlotEnvironment(FunctionLoader(self._load))
        for name, template in found.items():
            try:
                self.environment.check(template.source, name, str(template.file))
                self.environment.get_template(name)
            except TemplateSyntaxError as error:
                raise InputError(f"{template.file}:{error.lineno}: {error.message}") from error

    def _load(self, name: str) -> tuple[str, str, None] | None:
        """What jinja2 asks for: by the name in `templates`, or by that of the file, as in ``{% include %}``."""
        template = self.templates.get(name.removesuffix(SUFFIX))
        return (template.source, str(template.file), None) if template else None

    def render(self, name: str, data: Mapping[str, Any]) -> str:
        try:
            return self.environment.get_template(name).render(data)
        except Exception as error:  # of the template: the data are plain
            raise InputError(f"{self._place(error, name)}: {self._reason(error, data)}") from error

    def _place(self, error: Exception, name: str) -> str:
        """File and line of the innermost template that was being rendered."""
        files = {str(template.file) for template in self.templates.values()}
        place, traceback = str(self.templates[name].file), error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename in files:
                place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
            traceback = traceback.tb_next
        return place

    def _reason(self, error: Exception, data: Mapping[str, Any]) -> str:
        if isinstance(error, TemplateNotFound):
            return f"no template {error.name!r}; there are: {', '.join(self.templates)}"
        if isinstance(error, UndefinedError):
            return f"{error}; the slots are: {', '.join(data) or 'none'}"
        named = isinstance(error, TemplateError | TypeError | ValueError)
        return str(error) if named else f"{type(error).__name__}: {error}"


def _library_of(plugin: object) -> _Library:
    return _library(cast(Hashable, type(plugin)), _replacements(plugin))  # mypy takes no class for hashable


@lru_cache(maxsize=64)
def _library(cls: type[Any], replacements: str) -> _Library:
    """The templates of a plugin's class, and of the classes that it derives from, with a user's in their place."""
    own: dict[str, Path] = {}
    for base in reversed(cls.__mro__):
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        folder = Path(file).parent / FOLDER if file else None
        own |= {path.name.removesuffix(SUFFIX): path for path in folder.glob(f"*{SUFFIX}")} if folder else {}
    replaced = _files_of(Path(replacements), own) if replacements else {}
    chosen = {name: (path, replaced.get(name)) for name, path in sorted(own.items())}
    return _Library(
        {name: PromptTemplate(name, _read(other or path), path, other) for name, (path, other) in chosen.items()}
    )


def _replacements(plugin: Any) -> str:
    """The absolute path in the option ``prompts``; empty where there is none, or the plugin has no such option."""
    value = getattr(plugin, FOLDER, "") if FOLDER in attrs.fields_dict(type(plugin)) else ""
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) and value else ""  # noqa: PTH100, PTH111


def _files_of(folder: Path, own: Mapping[str, Path]) -> dict[str, Path]:
    """Template name to the file in a user's folder; hidden files aside, it holds nothing else."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (OSError, ValueError) as error:
        advice = "name a folder of templates; 'kdcore config NAME --prompts' prints the plugin's own"
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"prompts = {str(folder)!r}: cannot be read ({reason}): {advice}") from None
    known = [f"{name}{SUFFIX}" for name in sorted(own)]
    for path in paths:
        if path.name not in known:
            raise InputError(f"{path}: takes the place of no template; the plugin's are: {', '.join(known) or 'none'}")
    return {path.name.removesuffix(SUFFIX): path for path in paths}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check its permissions") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}): save it as UTF-8") from None
