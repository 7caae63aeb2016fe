"""How data is written into the slots of a prompt: as literals that it cannot end, by a sandboxed jinja2."""

from __future__ import annotations

import json
import math
import numbers
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import BaseLoader, StrictUndefined, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["SlotEnvironment", "literal", "plain"]

GLOBALS = ("dict", "namespace", "range")
WITHOUT = ("e", "escape", "forceescape", "pprint", "random", "safe", "tojson", "urlize", "xmlattr")
REFUSED: dict[type[nodes.Node], str] = {
    nodes.AssignBlock: "{% set %} of a block",
    nodes.FilterBlock: "{% filter %}",
    nodes.ScopedEvalContextModifier: "{% autoescape %}",
}

BARE = re.compile(r"[\w .,/&()'-]{1,100}")
UNSAFE = re.compile(
    r"<"  # <|im_start|>, </s>, <<SYS>>
    r"|\[(?=/?[A-Za-z]\w{0,40}\])"  # [INST], [/INST], [SEP]
    r"|`{3,}"
    "|[\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # controls, line separators, halves of surrogate pairs
    "|[\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"  # unseen
)


class Written(str):
    """Text in which every slot is a literal already: what a macro, block or recursive loop made, and bare strings.

    Whatever an expression makes of it is a plain string again, and so written as a literal.
    """

    __slots__ = ()


def literal(text: str) -> str:
    """A JSON string literal of one line, from which ``json.loads`` gives the text back.

    Beside what JSON escapes, so are ``<``, the bracket that opens ``[INST]`` and its like, fences of backticks,
    controls, line separators, halves of surrogate pairs and characters that cannot be seen.
    """
    return UNSAFE.sub(_escaped, json.dumps(text, ensure_ascii=False))


def _escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(rf"\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def plain(value: Any, place: str) -> Any:
    """A copy of a value in the types of JSON, which holds no code that a template could call.

    :param place: what the value is, for the message of an error.
    :raises TypeError: it is, or holds, what JSON cannot, such as NaN or an object.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise TypeError(f"{place} is {value}: give a finite number, or None")
        return float(value)
    if isinstance(value, Mapping):
        keys = {str(key) if isinstance(key, numbers.Integral) else key: key for key in value}
        if wrong := [key for key in keys if not isinstance(key, str)]:
            raise TypeError(f"{place} has the key {wrong[0]!r}: use strings or integers as keys")
        return {str.__str__(name): plain(value[key], f"{place}.{name}") for name, key in keys.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return [plain(each, f"{place}[{index}]") for index, each in enumerate(value)]
    raise TypeError(f"{place} is a {type(value).__name__}: give text, numbers, lists or mappings")


def _json(value: Any) -> str:
    """JSON of plain data, every string in it a `literal`."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(name)}: {_json(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return json.dumps(value)


def _write(value: Any) -> str:
    """What is put in the place of ``{{ ... }}``."""
    if isinstance(value, Undefined):
        return str(value)  # raises, but for that of an {{ ... if ... }} without else
    return value if isinstance(value, Written) else _json(plain(value, "the value"))


def _bare(value: Any) -> Written:
    """The filter ``bare``: a short string of harmless characters, without quotes.

    :raises ValueError: it is no such string.
    """
    if isinstance(value, Undefined):
        str(value)  # raises
    if not isinstance(value, str) or not BARE.fullmatch(value):
        allowed = "1 to 100 letters, digits, spaces and _-.,/&()'"
        raise ValueError(f"{reprlib.repr(value)} cannot be written by |bare, which takes {allowed}: leave |bare away")
    return Written(value)


class SlotEnvironment(ImmutableSandboxedEnvironment):
    """jinja2 as prompts need it: the value of ``{{ ... }}`` is JSON, unless a macro or ``|bare`` wrote it.

    Blanks around blocks are trimmed, and what is undefined is an error. Nothing in a template marks data as safe.
    """

    def __init__(self, loader: BaseLoader) -> None:
        super().__init__(
            loader=loader,
            undefined=StrictUndefined,
            finalize=_write,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
            cache_size=-1,
        )
        self.filters = {name: each for name, each in self.filters.items() if name not in WITHOUT} | {"bare": _bare}
        self.globals = {name: self.globals[name] for name in GLOBALS}

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what renders a part of a template, whose text is `Written`, or a method of a value."""
        if isinstance(__obj, Macro | LoopContext | BlockReference):
            return Written(super().call(__context, __obj, *args, **kwargs))
        if "caller" in kwargs and not isinstance(__obj, Undefined):  # {% call %} writes what it gets as it is
            raise SecurityError("{% call %} takes a macro of the template")
        return super().call(__context, __obj, *args, **kwargs)

    def check(self, source: str, name: str, filename: str) -> None:
        """Parse a template and refuse the blocks whose text could be changed after its slots were written.

        :raises TemplateSyntaxError: with the line.
        """
        for node in self.parse(source, name, filename).find_all(tuple(REFUSED)):
            words = f"{REFUSED[type(node)]} is not for prompts: write a macro"
            raise TemplateSyntaxError(words, node.lineno, name, filename)
