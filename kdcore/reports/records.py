"""What the files of a run folder hold, structured strictly: a file that says something else is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import cattrs
from attrs import field, frozen

from kdcore.errors import InputError
from kdcore.files import read_json
from kdcore.names import RULE, is_name
from kdcore.structure import UNSET, MismatchError, converter, show

__all__ = [
    "DataRecord",
    "DoneRecord",
    "Evaluation",
    "ExportRecord",
    "LogRecord",
    "PlanRecord",
    "QualityRecord",
    "RejectedSample",
    "SynthesisRecord",
    "read_object",
    "structured",
    "structured_line",
]

DEEPEST = 32
LARGEST = 2**63
INVALID = "is not valid: "

T = TypeVar("T")
Better = Literal["higher", "lower"]


def _counts(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for number in values:
        if number is not None and not 0 <= number < LARGEST:
            raise ValueError(f"{attribute.name} has {show(number)}, which must be at least 0 and less than 2**63")


def _some(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not value:
        raise ValueError(f"{attribute.name} must not be empty")


def _names(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    for name in [value] if isinstance(value, str) else value:
        if not is_name(name):
            raise ValueError(f"{attribute.name} has {name!r}, which must be {RULE}")


def _values_by_example(_: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{attribute.name} = {show(value)} must be an object of numbers")
    for key, number in value.items():
        if type(number) not in (int, float, type(None)) or (type(number) is int and abs(number) > LARGEST):
            raise ValueError(f"{attribute.name} has {show(number)} for {key!r}, which must be a number or null")


@frozen
class _Headline:
    name: str
    better: Better = "higher"


@frozen
class _Arm:
    name: str = field(validator=_names)
    control: bool = False
    because: str = ""
    set: dict[str, Any] = field(factory=dict)


@frozen
class _Plugin:
    name: str
    version: str = ""
    distribution: str = ""
    paper: str = ""
    summary: str = ""


@frozen
class _Teacher:
    source: str = ""
    stored: bool = False


@frozen
class PlanRecord:
    """``plan.json``."""

    plugin: str
    headline: _Headline
    arms: list[_Arm] = field(validator=_some)
    seeds: list[int] = field(validator=[_some, _counts])
    plugins: list[_Plugin] = field(factory=list)
    subject: str = "student"
    usage: str = ""
    teachers: dict[str, _Teacher] = field(factory=dict, validator=_names)
    yardsticks: list[str] = field(factory=list, validator=_names)
    stages: list[str] = field(factory=list, validator=_names)
    data: dict[str, int] = field(factory=dict, validator=_counts)
    started: str = ""


@frozen
class _Metric:
    value: float | None
    better: Better = "higher"
    samples: Any = field(default=None, validator=_values_by_example)


@frozen
class _Row:
    subject: str
    split: str
    metrics: dict[str, _Metric]
    parameters: int | None = field(default=None, validator=_counts)
    bytes: int | None = field(default=None, validator=_counts)
    path: str | None = None


@frozen
class Evaluation:
    """``evaluation.json``."""

    rows: list[_Row]


@frozen
class DoneRecord:
    """``done.json`` of a stage."""

    steps: int | None = field(default=None, validator=_counts)
    round_steps: list[int] = field(factory=list, validator=_counts)
    best_step: int | None = field(default=None, validator=_counts)
    initial_hash: str | None = None
    order_hash: str | None = None
    weights_hash: str | None = None


@frozen
class LogRecord:
    """A line of ``metrics.jsonl``."""

    step: int = field(validator=_counts)
    split: str = "train"
    loss: float | None = None
    terms: dict[str, float | None] = field(factory=dict)
    metrics: dict[str, float | None] = field(factory=dict)
    better: dict[str, Better] = field(factory=dict)


@frozen
class DataRecord:
    """``data.json``."""

    duplicates: int | None = field(default=None, validator=_counts)
    leaks: list[str] = field(factory=list)


@frozen
class _Words:
    mean: float | None = None
    p5: float | None = None
    p95: float | None = None


@frozen
class _RealQuality:
    distinct_1: float | None = None
    distinct_2: float | None = None
    similarity: float | None = None
    similarity_across: float | None = None
    words: _Words = _Words()


@frozen
class QualityRecord:
    """What `kdcore.synthesis.quality.quality_of` tells of a round."""

    labels: dict[str, float] = field(factory=dict, validator=_counts)
    missing: list[str] = field(factory=list)
    entropy: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    similarity: float | None = None
    words: _Words = _Words()
    real: _RealQuality = _RealQuality()


@frozen
class _TextTeacher:
    model: str = ""
    requests: int = field(default=0, validator=_counts)
    paid: int = field(default=0, validator=_counts)
    prompt_tokens: int = field(default=0, validator=_counts)
    answer_tokens: int = field(default=0, validator=_counts)
    seconds: float = field(default=0.0, validator=_counts)
    price: float = field(default=0.0, validator=_counts)
    rejected: dict[str, int] = field(factory=dict, validator=_counts)


@frozen
class _SynthesisRound:
    round: int = field(validator=_counts)
    accepted: int = field(validator=_counts)
    dropped: dict[str, int] = field(factory=dict, validator=_counts)
    seconds: float | None = field(default=None, validator=_counts)
    price: float | None = field(default=None, validator=_counts)
    quality: QualityRecord = QualityRecord()


@frozen
class _AcceptedSample:
    data: dict[str, Any]
    round: int = field(default=0, validator=_counts)
    id: str = ""
    origin: str = ""


@frozen
class RejectedSample:
    reason: str
    round: int = field(default=0, validator=_counts)
    text: str = ""
    prompt: str = ""


@frozen
class _SynthesisSamples:
    accepted: list[_AcceptedSample] = field(factory=list)
    rejected: list[RejectedSample] = field(factory=list)


@frozen
class SynthesisRecord:
    """``synthesis.json`` of a stage that draws `data_synth`."""

    teachers: dict[str, _TextTeacher] = field(factory=dict)
    rounds: list[_SynthesisRound] = field(factory=list)
    samples: _SynthesisSamples = _SynthesisSamples()


@frozen
class _Agreement:
    max_abs: float
    mean_abs: float
    cosine: float | None = None
    argmax: float | None = None
    scale: float = 1.0


@frozen
class _ExportedFile:
    name: str = field(validator=_names)
    bytes: int = field(validator=_counts)
    latency_ms: float
    per_second: float
    agreement: dict[str, _Agreement] = field(factory=dict)
    headline: float | None = None


@frozen
class ExportRecord:
    """``export.json`` beside a student's exported files; the first of ``files`` is the student itself.

    ``headline`` names the metric that was measured with each file; "" where none was.
    """

    model: str
    library: str
    inputs: str
    threads: int = field(validator=_counts)
    files: list[_ExportedFile] = field(validator=_some)
    reads_texts: bool = False
    headline: str = ""
    versions: dict[str, str] = field(factory=dict)


def read_object(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    :raises InputError: when the file cannot be read, is not JSON, is no object, or is nested too deeply.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    _refuse_depth(value, path)
    return value


def _refuse_depth(value: Any, place: Path | str) -> None:
    """Refuse what is nested deeper than any file of a run.

    :raises InputError: it is; names the place.
    """
    level = [value]
    for _ in range(DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return
    raise InputError(f"{place}: nested more than {DEEPEST} levels deep; restore or delete the file")


def structured(value: Any, kind: type[T], place: Path | str) -> T:
    """A JSON value as an instance of an attrs class; keys that the class does not have are left out.

    :raises InputError: a key is missing or its value has another type; names the place and the key.
    """
    try:
        return converter.structure(_known(value, kind), kind)
    except Exception as error:
        mistake, _, key = cattrs.transform_error(error, path="", format_exception=_words)[0].rpartition(" @ ")
        said = f"key {key.lstrip('.')!r} {mistake}" if key else mistake.removeprefix(INVALID)
        raise InputError(f"{place}: {said}; is this file from `kdcore run`?") from None


def structured_line(line: bytes, place: str) -> tuple[dict[str, Any], LogRecord]:
    """A line of ``metrics.jsonl``, as it is and structured.

    :raises InputError: it is no JSON object with a step, or has a value of another type; names the line.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or "step" not in record:
        raise InputError(f"{place}: not a JSON object with a step; remove the line")
    _refuse_depth(record, place)
    return record, structured(record, LogRecord, place)


def _known(value: Any, kind: Any) -> Any:
    """The value without the keys that its class has not, also inside lists and tables."""
    origin, arguments = get_origin(kind), get_args(kind)
    if attrs.has(kind) and isinstance(value, Mapping):
        attrs.resolve_types(kind)
        return {f.name: _known(value[f.name], f.type) for f in attrs.fields(kind) if f.name in value}
    if origin is list and isinstance(value, list):
        return [_known(item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {key: _known(item, arguments[1]) for key, item in value.items()}
    return value


def _words(error: BaseException, _: Any) -> str:
    if isinstance(error, MismatchError):
        expected = error.words.replace("a table", "an object").replace(f'"{UNSET}"', "null")
        return f"is {show(error.value)}, but must be {expected}"
    if isinstance(error, KeyError):
        return "is missing"
    return INVALID + " ".join(str(error).split())
