"""Triples per second of three trainers of the same student with Margin-MSE.

kdcore                 the engine as a run uses it: hooks, stored teacher scores, length buckets, metrics.jsonl,
                       TensorBoard; nothing is validated or saved inside the window
sentence-transformers  its own SentenceTransformerTrainer with losses.MarginMSELoss and its default batch sampler;
                       no logging, no saving, no evaluation
bare loop              plain PyTorch over the very batches of kdcore: what hooks and engine cost

The student (two layers of all-MiniLM-L6-v2), the triples, the teacher's scores, the batch size, the limits of length,
the optimiser (fused AdamW), schedule, clipping and the number of steps are the same. The three take turns in one
process, on the CPU, in float32; each turn trains anew and its first steps are left out. Without --data the texts are
the documentation of installed packages (the plugin's demo), whose lengths vary.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recording
from datasets.utils.logging import disable_progress_bar  # type: ignore[import-untyped]
from kd_plugin_margin_mse.plugin import MarginMSE
from margin_mse_trainers import BARE, KDCORE, SENTENCE_TRANSFORMERS, TRAINERS, Clock, Setting, prepare, same_student

PACKAGES = ("kdcore", "kd-plugin-margin-mse", "torch", "sentence-transformers", "transformers", "accelerate")
SPEEDUP, OVERHEAD = 1.3, 0.03


def measure(setting: Setting, blocks: int) -> dict[str, list[Clock]]:
    """Let the trainers take turns.

    :returns: trainer to its clock of each block.
    """
    clocks: dict[str, list[Clock]] = {name: [] for name in TRAINERS}
    for block in range(blocks):
        for name, train in TRAINERS.items():
            gc.collect()
            clock = Clock(setting.warmup, setting.steps)
            train(setting, clock)
            clocks[name].append(clock)
            speed = setting.steps * setting.plugin.batch_size / clock.seconds
            print(f"block {block + 1}/{blocks}: {name} {speed:.2f} triples/s, {clock.tokens_per_step:.0f} tokens/step")
        if clocks[KDCORE][-1].tokens != clocks[BARE][-1].tokens:
            sys.exit("kdcore and the bare loop were given batches of different sizes: their comparison would be void")
    return clocks


def lengths(setting: Setting) -> dict[str, float]:
    """How long the triples' passages are in tokens, as they are cut."""
    rows = [setting.plugin.item(example) for example in setting.pool]
    cut = sorted(len(row[name]) for row in rows for name in ("positive", "negative"))
    limit = setting.plugin.passage_length
    deciles = statistics.quantiles(cut, n=10)
    return {
        "mean": round(statistics.fmean(cut), 1),
        "median": statistics.median(cut),
        "first_decile": deciles[0],
        "last_decile": deciles[-1],
        "share_at_the_limit": round(sum(length == limit for length in cut) / len(cut), 3),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest over the blocks."""
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def summarise(setting: Setting, clocks: dict[str, list[Clock]]) -> dict[str, Any]:
    """The figures: speeds per block, and ratios between the turns of one block."""
    triples = setting.steps * setting.plugin.batch_size
    seconds = {name: [clock.seconds for clock in of] for name, of in clocks.items()}
    faster = [theirs / ours for ours, theirs in zip(seconds[KDCORE], seconds[SENTENCE_TRANSFORMERS])]
    overhead = [ours / bare - 1 for ours, bare in zip(seconds[KDCORE], seconds[BARE])]
    return {
        "trainers": {
            name: {
                "triples_per_second": spread([triples / value for value in seconds[name]]),
                "padded_tokens_per_step": round(statistics.fmean(clock.tokens_per_step for clock in clocks[name]), 1),
            }
            for name in TRAINERS
        },
        "speedup_over_sentence_transformers": {**spread(faster), "target": SPEEDUP},
        "overhead_over_bare_loop": {**spread(overhead), "target": OVERHEAD},
    }


def markdown(figures: dict[str, Any], passages: dict[str, float], setting: Setting, blocks: int) -> str:
    """The table, the two claims, and what was measured."""
    rows = []
    for name, trainer in figures["trainers"].items():
        speed = trainer["triples_per_second"]
        tokens = f"{trainer['padded_tokens_per_step']:,.0f}"
        rows.append((name, f"{speed['median']:.2f}", f"{speed['least']:.2f}", f"{speed['most']:.2f}", tokens))
    header = ("trainer", "triples/s (median)", "least", "most", "padded tokens a step")
    faster, overhead = figures["speedup_over_sentence_transformers"], figures["overhead_over_bare_loop"]
    fast = "holds" if faster["median"] >= SPEEDUP else "does not hold"
    cheap = "holds" if overhead["median"] <= OVERHEAD else "does not hold"
    plugin = setting.plugin
    return "\n".join(
        [
            recording.table(header, rows),
            "",
            f"- kdcore against sentence-transformers: {faster['median']:.2f} times as fast "
            f"({faster['least']:.2f} to {faster['most']:.2f}); at least {SPEEDUP} {fast}.",
            f"- kdcore against the bare loop: {overhead['median']:+.1%} time ({overhead['least']:+.1%} to "
            f"{overhead['most']:+.1%}); at most {OVERHEAD:.0%} {cheap}.",
            "",
            f"{blocks} turns of {setting.steps} steps of {plugin.batch_size} triples each, after {setting.warmup} "
            f"steps of warm-up; {len(setting.pool):,} triples. Passages have {passages['median']:.0f} tokens in the "
            f"median ({passages['first_decile']:.0f} to {passages['last_decile']:.0f} from the first to the last "
            f"decile); {passages['share_at_the_limit']:.0%} are cut at {plugin.passage_length}.",
        ]
    )


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a BEIR folder (default: the demo's texts)")
    parser.add_argument("--passage-length", type=int, help="limit in tokens (default: 256, with --data 128)")
    parser.add_argument("--triples", type=int, default=800, help="in the pool (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="triples a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="timed steps of each turn (default: one epoch of the pool)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=6, help="turns of each trainer (default: %(default)s)")
    arguments = parser.parse_args()
    disable_progress_bar()
    steps = arguments.steps or max(1, arguments.triples // arguments.batch_size)
    plugin = MarginMSE(
        passage_length=arguments.passage_length or (128 if arguments.data else 256),
        batch_size=arguments.batch_size,
        steps=arguments.warmup + steps + 1,
    )
    with tempfile.TemporaryDirectory() as work:
        empty = Setting(plugin, arguments.data and arguments.data.absolute(), Path(work), arguments.warmup, steps)
        setting = prepare(empty, arguments.triples)
        same_student(setting)
        figures = summarise(setting, measure(setting, arguments.blocks))
        passages = lengths(setting)
    name = arguments.data.resolve().name if arguments.data else "demo"
    shared = ("layers", "pooling", "query_length", "passage_length", "batch_size", "learning_rate")
    result = {
        "environment": recording.environment(*PACKAGES),
        "data": name,
        "settings": {
            **{key: getattr(plugin, key) for key in shared},
            "triples": len(setting.pool),
            "steps": steps,
            "warmup": arguments.warmup,
        },
        "passage_tokens": passages,
        "blocks": arguments.blocks,
        **figures,
    }
    title, text = f"Training speed of Margin-MSE: {name}", markdown(figures, passages, setting, arguments.blocks)
    recording.write(arguments.results, f"throughput_margin_mse-{name}", title, result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
