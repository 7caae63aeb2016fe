"""Plans in TOML, and in the YAML of mergekit."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcore.errors import InputError
from kdcore.files import read_written
from kdcore.merging.plan import DTYPES, Merge, Model, Plan, Source
from kdcore.names import RULE, is_name
from kdcore.structure import MismatchError, converter, show

__all__ = ["parse_size", "read_plan"]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TOP = {"models", "merges", "out", "dtype", "shard_size", "tokenizer", "missing", "seed"}
MODEL = {"path", "adapter"}
MERGE = {"method", "base", "sources", "slices"}
SOURCE = {"model", "layers"}


def read_plan(path: Path) -> Plan:
    """Read a plan: ``*.yaml`` and ``*.yml`` as mergekit's configuration, anything else as TOML.

    :raises InputError: it cannot be read, or is no plan; the message names the key and the fix.
    """
    text = read_written(path, "'kdcore merge --help' shows a plan")
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            from kdcore.merging.mergekit import plan_of_yaml

            return plan_of_yaml(text)
        return _plan(_toml(text))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except RecursionError:  # an anchor in YAML may hold itself
        raise InputError(f"{path}: its lists and tables are nested too deeply; write them out") from None


def parse_size(text: str) -> int:
    """Bytes of ``"5GB"`` or ``"200 MiB"``.

    :raises InputError: it is no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = float(found[1]) * UNITS.get(found[2].upper(), 0) if found else 0
    if not 1 <= size < math.inf:
        raise InputError(f"shard_size = {text}: must be a size such as 5GB or 500MB")
    return int(size)


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # besides its own: a number of 5000 digits, 5000 brackets
        raise InputError(f"no valid TOML: {error}") from None


def _plan(table: dict[str, Any]) -> Plan:
    _known(table, TOP, "")
    models = {name: _model(value, f"models.{name}") for name, value in _named(table, "models")}
    merges = {name: _merge(value, f"merges.{name}") for name, value in _named(table, "merges")}
    if twice := sorted(models.keys() & merges.keys()):
        raise InputError(f"merges.{twice[0]}: a model is called so too; rename one of them")
    needed = {name for merge in merges.values() for name in merge.inputs}
    last = [name for name in merges if name not in needed]
    out = _of(table, "out", str, (last or [*merges])[0])  # without a last one they go round in a circle
    if "out" not in table and len(last) > 1:
        raise InputError(f'no merge uses {" nor ".join(last)}; say which is written with out = "{last[-1]}"')
    if out not in merges:
        raise InputError(f"out = {out}: no such merge; there are: {', '.join(merges)}")
    size = table.get("shard_size", "5GB")
    return Plan(
        models=models,
        merges=merges,
        out=out,
        dtype=_of(table, "dtype", str, "", choices=DTYPES),
        shard_size=parse_size(size) if isinstance(size, str) else _of(table, "shard_size", int, 0, least=1),
        tokenizer=_of(table, "tokenizer", str, ""),
        missing=_of(table, "missing", str, "refuse", choices=("refuse", "keep")),
        seed=_of(table, "seed", int, 0, least=0),
    )


def _named(table: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    named = table.get(key)
    if not isinstance(named, dict) or not named:
        what = 'NAME = "FOLDER" for each model' if key == "models" else "a table [merges.NAME] for each merge"
        raise InputError(f"has no [{key}]; write {what}")
    for name in named:
        if not is_name(name):
            raise InputError(f"{key}.{name}: a name is {RULE}")
    return [*named.items()]


def _model(value: Any, place: str) -> Model:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict):
        raise InputError(f"{place} = {show(value)} must be a path, or a table with path and adapter")
    _known(value, MODEL, place)
    if value.get("path", "") == "":
        raise InputError(f"{place}: has no path")
    return Model(_of(value, "path", str, "", place), _of(value, "adapter", str, "", place))


def _merge(value: Any, place: str) -> Merge:
    if not isinstance(value, dict):
        raise InputError(f"{place} = {show(value)} must be a table [{place}]")
    if "method" not in value:
        raise InputError(f"{place}: has no method")
    if ("sources" in value) == ("slices" in value):
        raise InputError(f"{place}: needs exactly one of sources and slices")
    given = value.get("slices", [{"sources": value.get("sources")}])
    if not isinstance(given, list):
        raise InputError(f"{place}.slices must be tables [[{place}.slices]]")
    slices = []
    for number, found in enumerate(given):
        at = f"{place}.slices[{number}]" if "slices" in value else place
        if not isinstance(found, dict) or not isinstance(found.get("sources"), list):
            raise InputError(f"{at}: needs sources = [...], a list of names or of tables with model")
        _known(found, {"sources"}, at)
        slices.append([_source(each, f"{at}.sources[{place_}]") for place_, each in enumerate(found["sources"])])
    parameters = {name: inner for name, inner in value.items() if name not in MERGE}
    return Merge(_of(value, "method", str, "", place), slices, _of(value, "base", str, "", place), parameters)


def _source(value: Any, place: str) -> Source:
    if isinstance(value, str):
        return Source(value)
    if not isinstance(value, dict) or "model" not in value:
        raise InputError(f"{place} = {show(value)} must be a name, or a table with model")
    layers = None
    if "layers" in value:
        layers = _of(value, "layers", tuple[int, int], (0, 0), place)
    parameters = {name: inner for name, inner in value.items() if name not in SOURCE}
    return Source(_of(value, "model", str, "", place), layers, parameters)


def _known(table: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(table.keys() - known):
        key = f"{place}.{unknown[0]}" if place else unknown[0]
        raise InputError(f"{key}: no such key; there are: {', '.join(sorted(known))}")


def _of(
    table: Mapping[str, Any],
    key: str,
    kind: Any,
    default: Any,
    place: str = "",
    *,
    choices: tuple[str, ...] = (),
    least: int | None = None,
) -> Any:
    """A key's value, of its type."""
    if key not in table:
        return default
    where = f"{place}.{key}" if place else key
    try:
        value = converter.structure(table[key], kind)
    except MismatchError as error:
        raise InputError(f"{where} = {show(table[key])} must be {error.words}") from None
    except Exception:
        raise InputError(f"{where} = {show(table[key])} must be two integers") from None
    if choices and value not in choices:
        raise InputError(f"{where} = {value}: must be one of {', '.join(choices)}")
    if least is not None and value < least:
        raise InputError(f"{where} = {value} must be at least {least}")
    return value
