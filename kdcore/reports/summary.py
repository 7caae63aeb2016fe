"""What a run found, in plain words and one table: shared by the terminal, the model card and the HTML report."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from attrs import frozen

from kdcore.reports.folder import Evaluated, RunFolder, open_run
from kdcore.reports.result import result_of, verdict

__all__ = [
    "Line",
    "Summary",
    "commands",
    "compared_pairs",
    "comparison_line",
    "difference_line",
    "fairness",
    "number",
    "p_value",
    "size",
    "summarise",
]

FAIR = {"initial_weights": "initial weights", "order": "order", "steps": "steps"}


@frozen
class Figure:
    """A mean over seeds, with its standard deviation (None for one seed)."""

    mean: float
    spread: float | None = None

    def __str__(self) -> str:
        return number(self.mean) if self.spread is None else f"{number(self.mean)} ± {number(self.spread)}"


@frozen
class Line:
    """One line of the teacher/control/student table.

    :param kind: what the subject is.
    :param seeds: how many seeds are averaged; 0 for a teacher or a yardstick.
    :param latency_ms: mean over seeds, in milliseconds.
    :param examples: how many the headline was measured on; 0 where it has no values by example.
    :param smaller: the teacher's bytes on disk divided by this one's.
    :param faster: the teacher's latency divided by this one's.
    """

    kind: Literal["yardstick", "teacher", "control", "student"]
    label: str
    arm: str | None
    subject: str
    seeds: int
    metrics: dict[str, Figure]
    parameters: int | None
    bytes: int | None
    latency_ms: float | None
    examples: int = 0
    smaller: float | None = None
    faster: float | None = None


@frozen(eq=False)
class Summary:
    """A run folder, its result and its table.

    :param lines: yardsticks, teachers, controls, students; all on ``split``.
    :param metrics: metric name to ``"higher"`` or ``"lower"``, the headline first.
    :param headline: the entries of the comparison that decide: the method's arm, the headline metric.
    """

    run: RunFolder
    result: dict[str, Any]
    split: str
    lines: list[Line]
    metrics: dict[str, str]
    headline: list[dict[str, Any]]

    @property
    def timed(self) -> bool:
        """Whether any latency was measured."""
        return any(line.latency_ms is not None for line in self.lines)

    @property
    def status(self) -> Literal["holds", "fails", "unclear", "untested", "none"]:
        """Whether distillation beats its control: the weakest verdict of the headline's entries."""
        found = {verdict(entry) for entry in self.headline}
        if not found:
            return "none"
        if "worse" in found:
            return "fails"
        if "unclear" in found:
            return "unclear"
        return "untested" if "untested" in found else "holds"

    @property
    def title(self) -> str:
        """The finding in one short sentence."""
        return {
            "holds": "Distillation helped",
            "fails": "The claim does not hold here: distillation made the student worse",
            "unclear": "The claim does not hold here: the difference may be chance",
            "untested": "A difference without a test",
            "none": "No comparison: this run does not show whether distillation helped",
        }[self.status]

    @property
    def sentences(self) -> list[str]:
        """The finding in plain words, with figures."""
        words = [sentence for entry in self.headline for sentence in self._finding(entry)]
        if not self.headline:
            words += self._without_comparison()
        if self.run.missing:
            words.append(f"The run is not finished; not evaluated yet: {', '.join(self.run.missing)}.")
        return words

    def line(self, arm: str | None, subject: str) -> Line | None:
        return next((line for line in self.lines if (line.arm, line.subject) == (arm, subject)), None)

    def _finding(self, entry: dict[str, Any]) -> list[str]:
        name = entry["metric"]
        student, control = self.line(entry["arm"], entry["subject"]), self.line(entry["against"], entry["subject"])
        if student is None or control is None or entry["difference"] is None:
            return [f"{name} is not finite in {entry['arm']} or {entry['against']}, so they cannot be compared."]
        other = "the same student trained without distillation (the control)"
        if entry["against"] != "control":
            other = f"its control “{entry['against']}”"
        goal = "" if entry["better"] == "higher" else " (lower is better)"
        words = [
            f"With distillation, {_the(entry['subject'])} reaches {name} {number(student.metrics[name].mean)}{goal}; "
            f"{other} reaches {number(control.metrics[name].mean)}. {_difference_in_words(entry)}"
        ]
        if verdict(entry) == "unclear":
            same = "Both arms gave the same values." if entry["ci95"] == [0, 0] else ""
            words.append(same or "A difference of this size is to be expected by chance alone, in either direction.")
        words += self._against_teacher(student, control, name, entry["better"])
        if entry["seeds"] == 1:
            words.append("One seed only: how much the randomness of training matters is unknown; try --seeds 3.")
        unequal = [words for key, words in FAIR.items() if entry["equal"][key] is False]
        if unequal:
            reason = entry["because"] or "no reason is declared, so do not read it as an effect of distillation"
            words.append(f"Not the same in both arms: {', '.join(unequal)} ({reason}).")
        return words

    def _against_teacher(self, student: Line, control: Line, name: str, better: str) -> list[str]:
        words = []
        for teacher in self.lines:
            if teacher.kind != "teacher" or name not in teacher.metrics:
                continue
            top, ours, theirs = (line.metrics[name].mean for line in (teacher, student, control))
            sign = 1 if better == "higher" else -1
            sentence = f"The teacher {teacher.label} reaches {number(top)}"
            if 0 < teacher.examples < student.examples:
                sentence += f" on {teacher.examples} of {student.examples} examples"
            if sign * (ours - top) >= 0:
                sentence += ", no better than its student"
            elif sign * (top - theirs) > 0 and sign * (ours - theirs) > 0:
                sentence += f": distillation closes {(ours - theirs) / (top - theirs):.0%} of the control's gap to it"
            compared = [ratio(student.smaller, "smaller", "larger") + " on disk"] if student.smaller else []
            compared += [ratio(student.faster, "faster", "slower")] if student.faster else []
            if compared:
                sentence += f". The student is {' and '.join(compared)}"
            words.append(sentence + ".")
            break
        return words

    def _without_comparison(self) -> list[str]:
        words = []
        name = self.run.headline
        for line in self.lines:
            if line.kind != "control" and name in line.metrics:
                who = "The student of arm" if line.kind == "student" else f"The {line.kind}"
                words.append(f"{who} {line.label} reaches {name} {line.metrics[name]}.")
        if self.run.controls:
            words.append("Neither arm pairs with a finished control yet.")
        else:
            words.append("There is no control (the same student trained without distillation) to compare with.")
        return words


def summarise(folder: Path) -> Summary:
    """Read a run folder and work out its result, table and findings.

    :raises InputError: when it is no run folder, or a file in it is not valid.
    """
    run = open_run(folder)
    result = result_of(run)
    splits = [row.split for row in run.rows]
    split = "test" if "test" in splits or not splits else splits[0]
    rows = [row for row in run.rows if row.split == split]
    metrics: dict[str, str] = {name: metric.better for row in rows for name, metric in row.quality.items()}
    ordered = {name: metrics[name] for name in sorted(metrics, key=lambda name: name != run.headline)}
    method = next((arm for arm in run.arms if arm not in run.controls), None)
    headline = [
        entry
        for entry in result["comparison"]
        if (entry["arm"], entry["metric"], entry["split"]) == (method, run.headline, split)
    ]
    return Summary(run, result, split, _lines(run, rows), ordered, headline)


def comparison_line(entry: dict[str, Any]) -> str:
    """One entry of ``comparison`` as a line: `difference_line` and `fairness`."""
    return f"{difference_line(entry)}; {fairness(entry)}"


def difference_line(entry: dict[str, Any]) -> str:
    """One entry of ``comparison`` as a line: difference, interval, p and seeds."""
    subject = "" if entry["subject"] == "student" else f" [{entry['subject']}]"
    head = f"{entry['arm']} - {entry['against']}{subject}: {entry['tested']}"
    if entry["difference"] is None:
        return f"{head} not finite, not compared"
    interval = ""
    if entry["ci95"] is not None:
        low, high = entry["ci95"]
        interval = f" [{number(low)}, {number(high)}], {p_value(entry['p_value'])}"
    elif entry["spread"] is not None:
        interval = f" ± {number(entry['spread'])} over seeds, no values by example to test"
    difference, seeds = number(entry["difference"], sign=True), _count(entry["seeds"], "seed")
    return f"{head} {difference}{interval}, {seeds}"


def compared_pairs(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first entry of each pair of arms and subject: what `fairness` tells is the same for all their metrics."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in entries:
        found.setdefault((entry["arm"], entry["against"], entry["subject"]), entry)
    return list(found.values())


def fairness(entry: dict[str, Any]) -> str:
    """What is the same in both arms, with hashes: ``same initial weights (ab12…), order (cd34…), steps (300)``."""
    parts: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for key, words in FAIR.items():
        equal = entry["equal"][key]
        values = [pair[key] for pair in entry["hashes"]]
        if equal is None:
            parts[None].append(words)
        elif equal:
            parts[True].append(f"{words} ({', '.join(dict.fromkeys(short(ours) for ours, _ in values))})")
        else:
            pairs = dict.fromkeys(f"{short(ours)} / {short(theirs)}" for ours, theirs in values)
            parts[False].append(f"{words} ({', '.join(pairs)})")
    said = []
    if parts[True]:
        said.append(f"same {', '.join(parts[True])}")
    if parts[False]:
        said.append(f"DIFFERENT {', '.join(parts[False])}")
    if parts[None]:
        said.append(f"not recorded: {', '.join(parts[None])}")
    if entry["because"]:
        said.append(f"because {entry['because']}")
    return "; ".join(said)


def commands(run: RunFolder) -> dict[str, str]:
    """The commands that resume, reproduce, compare or report the run, from the folder that contains it.

    ``config.toml`` names the plugins, arms and seeds, too.
    """
    name = shlex.quote(run.name)
    start = f"kdcore run --config {shlex.quote(run.name + '/config.toml')}"
    found = {}
    if run.missing:
        found["Continue this run"] = f"kdcore run --resume {name}"
    found["Run it again"] = f"{start} --out {shlex.quote(run.name + '-again')}"
    if not run.controls:
        found["Compare with a control"] = f"{start} --compare --seeds 3 --out {shlex.quote(run.name + '-compared')}"
    found["Rebuild this report"] = f"kdcore report {name}"
    return found


def number(value: float | None, *, sign: bool = False) -> str:
    """Three decimals below 10, fewer above, two significant digits where three decimals would show nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    plus = "+" if sign else ""
    if value == 0:
        return "0.000"
    if 0.001 <= abs(value) < 10:
        return f"{value:{plus}.3f}"
    if abs(value) < 0.001:
        return f"{value:{plus}.2g}"
    return f"{value:{plus}.1f}" if abs(value) < 1000 else f"{value:{plus},.0f}"


def p_value(value: float) -> str:
    return f"p = {value:.4f}" if value < 0.01 else f"p = {value:.3f}"


def size(count: float | None) -> str:
    """A number of bytes in decimal units."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def parameters(count: int | None) -> str:
    """A number of parameters, in thousands or millions."""
    if count is None:
        return "–"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k" if count >= 1e3 else str(count)


def ratio(value: float, more: str, less: str) -> str:
    """``"4.0x smaller"`` or ``"2.0x larger"``."""
    return f"{value:.1f}x {more}" if value >= 1 else f"{1 / value:.1f}x {less}"


def short(value: Any) -> str:
    """The first eight characters of a hash; a number as it is."""
    return f"{value[:8]}…" if isinstance(value, str) and len(value) > 8 else str(value)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _the(subject: str) -> str:
    return "the student" if subject == "student" else f"the student “{subject}”"


def _difference_in_words(entry: dict[str, Any]) -> str:
    what = "difference" if entry["tested"] == entry["metric"] else f"difference of {entry['tested']}"
    said = f"The {what} is {number(entry['difference'], sign=True)}"
    if entry["ci95"] is None:
        spread = f", ± {number(entry['spread'])} over {entry['seeds']} seeds" if entry["spread"] is not None else ""
        return f"{said}{spread}; the metric has no values by example, so it cannot be tested."
    low, high = entry["ci95"]
    return (
        f"{said} (95% interval {number(low, sign=True)} to {number(high, sign=True)}, {p_value(entry['p_value'])}, "
        f"{_count(entry['seeds'], 'seed')}, {entry['examples']} {entry['split']} examples)."
    )


def _lines(run: RunFolder, rows: list[Evaluated]) -> list[Line]:
    groups: dict[tuple[str | None, str], list[Evaluated]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.subject), []).append(row)
    reference = next((row for row in rows if row.kind == "teacher"), None)
    many = len({row.subject for row in rows if row.arm is not None}) > 1
    lines = [_line(run, group, reference, many) for group in groups.values()]
    order = {"yardstick": 0, "teacher": 1, "control": 2, "student": 3}
    return sorted(lines, key=lambda line: order[line.kind])


def _line(run: RunFolder, rows: list[Evaluated], reference: Evaluated | None, many: bool) -> Line:
    first = rows[0]
    kind: Literal["yardstick", "teacher", "control", "student"]
    if first.kind != "student":
        kind, label = first.kind, first.subject
    else:
        kind = "control" if first.arm in run.controls else "student"
        label = f"{first.arm}: {first.subject}" if many else str(first.arm)
    names = dict.fromkeys(name for row in rows for name in row.quality)
    latency = _mean(row.latency_ms for row in rows)
    measured = reference is not None and first.arm is not None
    return Line(
        kind=kind,
        label=label,
        arm=first.arm,
        subject=first.subject,
        seeds=0 if first.arm is None else len(rows),
        metrics={name: _figure([row.metrics[name].value for row in rows if name in row.metrics]) for name in names},
        parameters=first.parameters,
        bytes=first.bytes,
        latency_ms=latency,
        examples=len(first.metrics[run.headline].samples or ()) if run.headline in first.metrics else 0,
        smaller=_ratio(reference.bytes, first.bytes) if measured and reference else None,
        faster=_ratio(reference.latency_ms, latency) if measured and reference else None,
    )


def _figure(values: list[float]) -> Figure:
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return Figure(math.nan)
    return Figure(fmean(finite), stdev(finite) if len(finite) > 1 else None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None


def _ratio(teacher: float | None, student: float | None) -> float | None:
    return teacher / student if teacher and student else None
