"""What a stored teacher costs: seconds a step with no teacher, with a stored and with a live one.

A small Llama learns to continue real texts, taught by one that is twice as deep; both begin with random weights, on
which no speed depends. By default it has about as many parameters for each token of its vocabulary as SmolLM2-135M. The
data, batches, steps and task loss are the same. With a teacher the forward KL of every position is added: of all logits
where the teacher is live, of the stored top k otherwise.

Each block is one run of each kind through the whole engine, in an order that turns from block to block. Times are the
engine's own (the examples per second in metrics.jsonl), from the warm-up's last step to the last. The store is filled
before the first block.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recording
from attrs import evolve
from store_method import LIVE, NONE, STORED, LanguageModelling, tokenized

from kdcore.config import Configuration, RunOptions
from kdcore.engine.experiment import execute
from kdcore.teachers.inventory import facts_of, stores_in

PACKAGES = ("kdcore", "torch", "transformers", "tokenizers", "accelerate")
KINDS = (NONE, STORED, LIVE)
TARGET = 1.05
STAGE = "arms/distill/seed-0/distil"


def train(method: LanguageModelling, work: Path, warmup: int, *, device: str = "cpu") -> float:
    """Run the method once; seconds of a step after the warm-up."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        options = RunOptions(
            store=str(work / "store"), compare=False, device=device, out=folder, log_every=warmup, trackers=()
        )
        with contextlib.redirect_stdout(io.StringIO()):
            execute(Configuration(references=("method",), plugins={"method": method}, run=options))
        lines = map(json.loads, (Path(folder) / STAGE / "metrics.jsonl").read_text().splitlines())
        ends = {line["step"]: (line["step"] - 1) * method.batch_size / line["examples_per_second"]
                for line in lines if line.get("examples_per_second")}  # fmt: skip
    return (ends[method.steps] - ends[warmup]) / (method.steps - warmup)


def measure(
    method: LanguageModelling, work: Path, warmup: int, blocks: int, device: str
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a step of each kind in each block, and the seconds that steps with a stored teacher waited for it."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    reading: list[float] = []
    train(evolve(method, teaching=STORED), work, warmup, device=device)
    for block in range(blocks):
        for kind in (*KINDS[block % 3 :], *KINDS[: block % 3]):
            LanguageModelling.waited.clear()
            seconds[kind].append(train(evolve(method, teaching=kind), work, warmup, device=device))
            if kind == STORED:
                reading += LanguageModelling.waited[warmup:]
            print(f"block {block + 1}/{blocks}: {kind} {seconds[kind][-1] * 1000:.1f} ms a step", flush=True)
    return seconds, reading


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest over the blocks."""
    return {name: round(of(values), 5) for name, of in (("median", statistics.median), ("least", min), ("most", max))}


def summarise(seconds: dict[str, list[float]], reading: Sequence[float], stored: dict[str, Any]) -> dict[str, Any]:
    """Speeds, and ratios between the runs of one block."""
    ratios = {
        f"{kind} / {NONE}": spread([one / none for one, none in zip(seconds[kind], seconds[NONE])])
        for kind in (STORED, LIVE)
    }
    wait = statistics.median(reading)
    return {
        "seconds_a_step": {kind: spread(seconds[kind]) for kind in KINDS},
        "ratios": ratios,
        "target": {f"{STORED} / {NONE}": TARGET},
        "reading": {"seconds_a_step": round(wait, 6), "share": round(wait / statistics.median(seconds[STORED]), 4)},
        "store": stored,
    }


def markdown(figures: dict[str, Any], method: LanguageModelling, settings: dict[str, Any]) -> str:
    """The table, the claim, and what was measured."""
    rows = []
    for kind in KINDS:
        each = {name: f"{1000 * value:.1f}" for name, value in figures["seconds_a_step"][kind].items()}
        ratio = figures["ratios"].get(f"{kind} / {NONE}")
        compared = f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})" if ratio else "1"
        rows.append((kind, each["median"], each["least"], each["most"], compared))
    header = ("run", "ms a step (median)", "least", "most", "times no teacher")
    ratio = figures["ratios"][f"{STORED} / {NONE}"]["median"]
    reading, stored = figures["reading"], figures["store"]
    return "\n".join(
        [
            recording.table(header, rows),
            "",
            f"- A stored teacher costs {ratio:.3f} times a step without one; at most {TARGET} "
            f"{'holds' if ratio <= TARGET else 'does not hold'}. Reading its rows takes "
            f"{1000 * reading['seconds_a_step']:.2f} ms of a step ({reading['share']:.1%}); the divergence itself is "
            "in the rest.",
            f"- The store: {stored['rows']:,} rows, {stored['bytes'] / 1e6:.1f} MB; {stored['outputs']}.",
            "",
            f"{settings['blocks']} blocks of {method.steps} steps, {settings['warmup']} of them warm-up, of "
            f"{method.batch_size} examples of at most {settings['length']} tokens; {settings['examples']:,} examples; "
            f"a student of {method.layers} layers of width {method.width}, vocabulary {method.vocabulary:,}.",
        ]
    )


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="text files below a folder (default: Python's help)"
    )
    parser.add_argument("--examples", type=int, default=240, help="in the pool (default: %(default)s)")
    parser.add_argument("--length", type=int, default=96, help="tokens of an example at most (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="of the student (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="of the student (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=6, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    given = parser.parse_args()
    epoch = given.examples // given.batch_size
    steps = given.warmup * max(2, 1 + epoch // given.warmup)
    LanguageModelling.examples = tokenized(given.data, given.vocabulary, given.length, given.examples)
    method = LanguageModelling(
        vocabulary=given.vocabulary,
        width=given.width,
        layers=given.layers,
        steps=steps,
        batch_size=given.batch_size,
    )
    with tempfile.TemporaryDirectory() as work:
        seconds, reading = measure(method, Path(work), given.warmup, given.blocks, given.device)
        facts = facts_of(stores_in(Path(work, "store"))[0])
        assert facts is not None
    stored = {"rows": facts.rows, "bytes": facts.bytes, "outputs": "; ".join(facts.outputs)}
    settings = {
        name: getattr(given, name)
        for name in ("examples", "length", "vocabulary", "width", "layers", "batch_size", "warmup", "blocks", "device")
    }
    name = given.data.resolve().name if given.data else "python-help"
    file = f"store-{name}" if given.device == "cpu" else f"store-{name}-{given.device}"
    figures = summarise(seconds, reading, stored)
    result = {
        "environment": recording.environment(*PACKAGES),
        "data": name,
        "settings": {**settings, "steps": steps, "topk": method.topk},
        **figures,
    }
    title = f"A step with a stored teacher: {name}"
    recording.write(given.results, file, title, result, markdown(figures, method, settings))
    return 0 if figures["ratios"][f"{STORED} / {NONE}"]["median"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
