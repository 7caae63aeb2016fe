"""What a run's teachers wrote, what became of it and what it cost: ``synthesis.json`` of its stages, for all reports.

Text of teachers is data: `readable` makes it harmless for a terminal and of bounded length as it is read; the HTML
report escapes it, the model card puts it in code spans.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from kdcore.reports.curves import Panels, Plot, add_curve, images, seeds_in_words
from kdcore.reports.folder import RunFolder, read_done, read_metrics
from kdcore.reports.records import QualityRecord, RejectedSample, SynthesisRecord, read_object, structured
from kdcore.reports.summary import number

__all__ = [
    "FILE",
    "Synthesis",
    "code",
    "one_line",
    "plain_samples",
    "read_synthesis",
    "readable",
    "shown_in",
    "syntheses_of",
    "synthesis_in",
]

FILE = "synthesis.json"
NONE = "–"
LONGEST = 2000
SAMPLES = 50
KEPT_FORMATS = "\u200c\u200d"  # joiners that change how letters of a word and emoji are drawn, and nothing else


def readable(text: str, longest: int = LONGEST) -> str:
    """A text without what a terminal or a page would obey: control and format characters (escapes, direction marks).

    Line ends and tabs stay, other white space becomes a blank, lone surrogates a replacement character. A text of more
    than ``longest`` characters is cut, with an ellipsis.
    """
    text = text[: 4 * longest].replace("\r\n", "\n")
    kept = "".join(map(_kept, text))
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def _kept(character: str) -> str:
    if character in "\n\t" or character in KEPT_FORMATS:
        return character
    category = unicodedata.category(character)
    if category in ("Zl", "Zp"):
        return "\n"
    if category == "Zs":
        return " "
    return "\N{REPLACEMENT CHARACTER}" if category == "Cs" else "" if category in ("Cc", "Cf") else character


def _readable(value: Any) -> Any:
    """`readable` of all strings of a JSON value, its keys included."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return {readable(key): _readable(item) for key, item in value.items()} if isinstance(value, dict) else value


def one_line(text: str, longest: int) -> str:
    """A text on one line, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def code(text: str) -> str:
    """A text as a code span of a Markdown table, in which nothing is obeyed."""
    line = one_line(text, 80).replace("`", "'").replace("|", "¦")
    return f"`{line}`" if line else NONE


@frozen(eq=False)
class Synthesis:
    """What one stage drew.

    :param arm: ``"shared"`` where arms share the stage.
    """

    stage: str
    arm: str
    seed: int
    folder: Path
    record: SynthesisRecord

    @property
    def accepted(self) -> int:
        """How many examples, over all rounds."""
        return sum(each.accepted for each in self.record.rounds)

    @property
    def dropped(self) -> Counter[str]:
        """How many examples were left out by reason, over all rounds."""
        return sum((Counter(each.dropped) for each in self.record.rounds), Counter())

    @property
    def worked(self) -> bool:
        """Whether anything was drawn or asked (a control draws nothing of a teacher)."""
        asked = any(teacher.requests for teacher in self.record.teachers.values())
        return asked or bool(self.accepted or self.dropped.total())

    def sentence(self) -> str:
        """``"96 accepted examples in 3 rounds; left out: 6 near duplicate, 3 leak."``"""
        rounds = len(self.record.rounds)
        left_out = counted(self.dropped)
        said = f"{self.accepted:,} accepted example{'s' * (self.accepted != 1)} in {rounds} round{'s' * (rounds != 1)}"
        return f"{said}; left out: {left_out}." if left_out else f"{said}."

    def teacher_rows(self, quote: Callable[[str], str] = str) -> list[dict[str, str]]:
        """A row a teacher, column to cell.

        :param quote: makes a teacher's own words harmless where the cells go.
        """
        return [
            {
                "teacher": quote(name),
                "model": quote(teacher.model),
                "requests": f"{teacher.requests:,}",
                "paid": f"{teacher.paid:,}",
                "prompt tokens": f"{teacher.prompt_tokens:,}",
                "answer tokens": f"{teacher.answer_tokens:,}",
                "seconds": number(teacher.seconds),
                "price": in_money(teacher.price),
                "rejected": counted(teacher.rejected, quote) or NONE,
            }
            for name, teacher in self.record.teachers.items()
        ]

    def round_rows(self, quote: Callable[[str], str] = str) -> list[dict[str, str]]:
        """A row a round, column to cell; a column that has no figure in any round is left out.

        :param quote: as of `teacher_rows`.
        """
        rows = [
            {
                "round": str(each.round),
                "accepted": f"{each.accepted:,}",
                "left out": counted(each.dropped, quote) or NONE,
                **_quality_cells(each.quality, quote),
                "seconds": number(each.seconds),
                "price": NONE if each.price is None else in_money(each.price),
            }
            for each in self.record.rounds
        ]
        return [
            {name: cell for name, cell in row.items() if any(other[name] != NONE for other in rows)} for row in rows
        ]

    def accepted_samples(self) -> list[tuple[int, str, str]]:
        """(round, the example's fields, its origin) of the first samples."""
        samples = self.record.samples.accepted[:SAMPLES]
        return [(sample.round, _fields(sample.data), sample.origin) for sample in samples]

    def rejected_samples(self) -> list[RejectedSample]:
        """The first samples of rejected answers."""
        return self.record.samples.rejected[:SAMPLES]

    def headline(self, metric: str) -> list[tuple[int, float | None]]:
        """(round, the validation metric at its end) of a finished stage; empty of another."""
        done = read_done(self.folder)
        ends = list(itertools.accumulate(done["round_steps"])) if done else []
        checks = [
            record for record in read_metrics(self.folder / "metrics.jsonl") if record.get("split") == "validation"
        ]
        found = []
        for index, (start, end) in enumerate(zip([0, *ends], ends)):
            within = [check.get("metrics", {}).get(metric) for check in checks if start < check["step"] <= end]
            found += [(index, within[-1])] if within else []
        return found


def counted(counts: Mapping[str, int], quote: Callable[[str], str] = str) -> str:
    """``"6 near duplicate, 3 leak"``, the most frequent first, without what never happened."""
    return ", ".join(f"{count:,} {quote(one_line(name, 80))}" for name, count in Counter(counts).most_common() if count)


def in_money(price: float) -> str:
    """Two decimals; below 1 three significant digits."""
    return f"{price:,.2f}" if price >= 1 else f"{price:.3g}"


def _quality_cells(quality: QualityRecord, quote: Callable[[str], str]) -> dict[str, str]:
    def beside(value: float | None, other: float | None) -> str:
        return number(value) if other is None else f"{number(value)} (real {number(other)})"

    words, real = quality.words, quality.real
    return {
        "labels": _labels(quality, quote),
        "label entropy": number(quality.entropy),
        "distinct-1": beside(quality.distinct_1, real.distinct_1),
        "distinct-2": beside(quality.distinct_2, real.distinct_2),
        "similarity": beside(quality.similarity, real.similarity),
        "similarity to real texts": number(real.similarity_across),
        "words": beside(words.mean, real.words.mean),
        "5% to 95%": f"{words.p5:.1f} to {words.p95:.1f}" if words.p5 is not None and words.p95 is not None else NONE,
    }


def _labels(quality: QualityRecord, quote: Callable[[str], str]) -> str:
    if not quality.labels:
        return NONE
    [(most, largest), *_] = ordered = Counter(quality.labels).most_common()
    least, smallest = ordered[-1]
    said = f"{len(ordered)}: {quote(least)} {smallest:,.4g} to {quote(most)} {largest:,.4g}"
    return f"{said}; {len(quality.missing)} missing" if quality.missing else said


def _fields(data: Mapping[str, Any]) -> str:
    lines = []
    for name, value in data.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{name}: {readable(text)}")
    return "\n".join(lines)


def read_synthesis(folder: Path) -> SynthesisRecord | None:
    """A stage folder's ``synthesis.json``, all its strings made `readable`; None when it is absent.

    :raises InputError: it is not valid; names the file and the key.
    """
    path = folder / FILE
    return structured(_readable(read_object(path)), SynthesisRecord, path) if path.is_file() else None


def syntheses_of(run: RunFolder) -> list[Synthesis]:
    """All of a run in which anything was drawn or asked, by stage, arm and seed.

    :raises InputError: a ``synthesis.json`` is not valid.
    """
    return _worked(run.stage_folders())


def synthesis_in(run: RunFolder, arm: str, seed: int) -> list[Synthesis]:
    """Those whose examples the student of an arm and seed learned from.

    :raises InputError: a ``synthesis.json`` is not valid.
    """
    folders = ((stage, run.stage_folder(arm, seed, stage)) for stage in run.stages)
    return _worked((stage, arm, seed, folder) for stage, folder in folders if folder is not None)


def _worked(folders: Iterable[tuple[str, str, int, Path]]) -> list[Synthesis]:
    found = [
        Synthesis(stage, arm, seed, folder, record)
        for stage, arm, seed, folder in folders
        if (record := read_synthesis(folder)) is not None
    ]
    return [synthesis for synthesis in found if synthesis.worked]


def shown_in(run: RunFolder) -> dict[str, Any]:
    """What the HTML report shows: ``parts`` (all syntheses of the run) and ``plots`` over their rounds."""
    parts = syntheses_of(run)
    by_stage = {stage: [part for part in parts if part.stage == stage] for stage in run.stages}
    plots = [plot for stage, some in by_stage.items() for plot in _plots(run, stage, some)]
    return {"parts": parts, "plots": plots}


def _plots(run: RunFolder, stage: str, parts: list[Synthesis]) -> Iterable[Plot]:
    """The curves of a stage that has several rounds."""
    if max((len(part.record.rounds) for part in parts), default=0) < 2:
        return
    arms: dict[str, list[Synthesis]] = {}
    for part in parts:
        arms.setdefault(part.arm, []).append(part)
    panels: Panels = {}
    for arm, some in arms.items():
        rounds = [part.record.rounds for part in some]
        add_curve(panels, "accepted examples", arm, [[(r.round, r.accepted) for r in rows] for rows in rounds])
        add_curve(panels, "left out", arm, [[(r.round, sum(r.dropped.values())) for r in rows] for rows in rounds])
        headline = [part.headline(run.headline) for part in some]
        add_curve(panels, f"{run.headline} on validation ({run.better} is better)", arm, headline)
        if any(r.price for rows in rounds for r in rows):
            prices = [list(itertools.accumulate(r.price or 0.0 for r in rows)) for rows in rounds]
            spent = [[(r.round, price) for r, price in zip(*pair)] for pair in zip(rounds, prices)]
            add_curve(panels, "price so far", arm, spent)
    caption = f"Rounds of synthesis in stage “{stage}”. {seeds_in_words(arms)}"
    yield Plot(images(run, panels, "round"), caption.strip())


def plain_samples(synthesis: Synthesis, count: int, longest: int) -> list[str]:
    """A line for each of the first accepted and the first rejected samples."""
    lines = [f"accepted: {one_line(text, longest)}" for _, text, _ in synthesis.accepted_samples()[:count]]
    for sample in synthesis.rejected_samples()[:count]:
        lines.append(f"rejected ({one_line(sample.reason, 60)}): {one_line(sample.text, longest) or NONE}")
    return lines
