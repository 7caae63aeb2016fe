"""One round of synthesis: what is left out of it and why, its progress, and the facts that reports show."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore.data.splits import RESERVED
from kdcore.engine.progress import Bar
from kdcore.errors import PluginError
from kdcore.files import read_json, write_json
from kdcore.recipe import Example
from kdcore.synthesis.pool import line_of

if TYPE_CHECKING:
    from kdcore.engine.stages import StageJob
    from kdcore.synthesis.quality import Duplicates

SAMPLES = 5
SYNTHESIS = "synthesis.json"


class Refusals:
    """Why a drawn example is left out: it equals, or nearly equals, one of the pool or one that is evaluated on."""

    def __init__(self, job: StageJob) -> None:
        assert job.stage.data is not None
        assert job.stage.data.synth is not None
        self.job, near = job, job.stage.data.synth.near
        self._pool: Duplicates | None = None
        self._evaluated: Duplicates | None = None
        if near is not None:
            from kdcore.synthesis.quality import Duplicates

            if not job.recipe.identity:
                raise PluginError(f"stage {job.stage.name!r}: Synth(near=...) needs the recipe's identity, its text")
            self._pool, self._evaluated = (Duplicates(near, job.recipe.identity) for _ in range(2))
            with job.run.data.unsealed():
                for split in RESERVED[1:]:
                    for example in job.run.data.get(split, ()):
                        self._evaluated.add(example)

    def know(self, examples: Iterable[Example]) -> None:
        """Examples of the pool, now or in an earlier round."""
        if self._pool is not None:
            for example in examples:
                self._pool.add(example)

    def __call__(self, example: Example) -> str:
        """The reason, or ""; what stands before its colon names the kind."""
        split = self.job.run.data.evaluated_as(example, self.job.recipe.identity)
        if split:
            return f"leak: equals an example of {split}"
        if self._evaluated is not None and self._evaluated.find(example):
            return "leak: nearly equals an example that is evaluated on"
        if self._pool is not None and (other := self._pool.find(example)):
            return f"near duplicate: of {other}"
        return ""


class Drawing:
    """The drawing of one round.

    :param bar: shows its progress.
    :param refusals: why examples are left out.
    :param real: the given examples, with which reports compare.
    """

    def __init__(self, job: StageJob, number: int, bar: Bar, refusals: Refusals, real: Sequence[Example] = ()) -> None:
        self.job, self.number, self._bar, self._refusals, self._real = job, number, bar, refusals, real
        assert job.stage.data is not None
        assert job.stage.data.synth is not None
        self.synth = job.stage.data.synth
        self.examples: list[Example] = []
        self.dropped: Counter[str] = Counter()
        self._samples: list[dict[str, Any]] = []
        self._began = time.monotonic()
        if job.teachers.texts is not None:
            job.teachers.texts.reset_counts()

    def refusal(self, example: Example) -> str:
        """As `Refusals`, counted and kept for the report."""
        reason = self._refusals(example)
        if reason:
            self.job.run.log(f"data_synth: left out {example.id!r}: {reason}")
            self.dropped[reason.partition(":")[0]] += 1
            if len(self._samples) < SAMPLES:
                text = str(example.data.get(self.synth.text, ""))
                self._samples.append({"round": self.number, "reason": reason, "text": text, "prompt": ""})
            self._bar.advance(0, self._text())
        return reason

    def take(self, examples: Iterator[Example]) -> list[Example]:
        """All of the stream, with progress."""
        for example in examples:
            self.examples.append(example)
            self._refusals.know([example])
            self._bar.advance(1, self._text())
        return self.examples

    def _asked(self) -> dict[str, dict[str, Any]]:
        texts = self.job.teachers.texts
        return texts.counts() if texts is not None else {}

    def _text(self) -> str:
        """Rejected by reason, requests a second, tokens, price so far and expected at the end."""
        tallies = self._asked().values()
        rejected: Counter[str] = Counter(self.dropped)
        for tally in tallies:
            rejected.update(tally["rejected"])
        parts = [f"{count} {reason}" for reason, count in rejected.most_common(3)]
        if tallies:
            paid = sum(tally["paid"] for tally in tallies)
            tokens = sum(tally["prompt_tokens"] + tally["answer_tokens"] for tally in tallies)
            seconds = max(1e-9, time.monotonic() - self._began)
            parts += [f"{paid / seconds:.1f} requests/s", f"{tokens:,} tokens"]
            price = sum(tally["price"] for tally in tallies)
            if price and self.examples and self.synth.take:
                all_rounds = price / len(self.examples) * self.synth.take * self.synth.rounds
                parts.append(f"price {price:.4g}, about {all_rounds:.4g} in all rounds")
        return "  ".join(parts)

    def facts(self) -> dict[str, Any]:
        """What ``rounds/N.json`` holds, beside the examples themselves."""
        from kdcore.synthesis.quality import quality_of

        texts = self.job.teachers.texts
        rejected = [{"round": self.number, **sample} for sample in (texts.rejected_samples if texts else [])]
        accepted = []
        if any(self.synth.text in example.data for example in self.examples):
            quality = quality_of(
                self.examples,
                text_field=self.synth.text,
                label_field=self.synth.label or None,
                embedder=self.synth.embedder,
                device=str(self.job.run.device),
                real=self._real,
            )
        else:
            quality = {}
        for example in _spread(self.examples, SAMPLES):
            stored = json.loads(line_of(example))
            accepted.append({"round": self.number, **{key: stored.get(key, "") for key in ("id", "data", "origin")}})
        return {
            "round": {
                "round": self.number,
                "accepted": len(self.examples),
                "dropped": dict(self.dropped),
                "seconds": round(time.monotonic() - self._began, 3),
                "price": sum(tally["price"] for tally in self._asked().values()),
                **({"quality": quality} if quality else {}),
            },
            "teachers": self._asked(),
            "samples": {"accepted": accepted, "rejected": [*_spread(rejected, SAMPLES), *self._samples]},
        }


def write_synthesis(folder: Path) -> None:
    """Put the facts of all rounds of a stage together, for reports."""
    paths = sorted((folder / "rounds").glob("*.json"), key=lambda path: int(path.stem))
    found = [read_json(path) for path in paths]
    teachers: dict[str, dict[str, Any]] = {}
    for facts in found:
        for name, tally in facts["teachers"].items():
            total = teachers.setdefault(name, {"model": tally["model"], "rejected": Counter()})
            total["rejected"].update(tally["rejected"])
            for key in tally.keys() - {"model", "rejected"}:
                total[key] = total.get(key, 0) + tally[key]
    samples = {kind: [s for facts in found for s in facts["samples"][kind]] for kind in ("accepted", "rejected")}
    write_json(
        folder / SYNTHESIS,
        {"teachers": teachers, "rounds": [facts["round"] for facts in found], "samples": samples},
    )


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of the items, evenly spaced."""
    step = max(1, len(items) // count)
    return list(items[::step][:count])
