"""BAI: does the merged actor keep RL from collapsing? Every arm of the demo's small models, over seeds.

Runs ``kdcore run --plugin bai --compare`` with 100 steps of RL and checks each claim of the paper seed by seed: lengths
(collapse ratio) and rewards (dip) in the first quarter of the steps, and that it is not merely alpha's shrinking of the
task vectors (``no-instruct`` has the same alpha). ``--learning-rate 3e-4`` is a harsher RL, under which the reward of
converged models dips. A finished run is reused and an interrupted one resumed, so the same
command goes on after any interruption. Two plots are written beside the tables.

The models have 140 thousand weights and add numbers of two digits: what they show is how the method runs and what its
figures mean, not whether it helps a model of billions.
"""

from __future__ import annotations

import base64
import json
import statistics
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import recording
import runs
import torch
from safetensors.torch import load_file

from kdcore.reports.plots import Curve, panel

ARMS = ("control", "instruct", "no-pretrained", "no-instruct", "alpha-0.4", "distill", "alpha-0.8")
WHAT = {
    "control": "reasoning model, unmerged",
    "instruct": "instruct model",
    "no-pretrained": "alpha 1: without the pretrained model",
    "no-instruct": "alpha 0.6 without the instruct model",
    "alpha-0.4": "BAI, alpha 0.4",
    "distill": "BAI, alpha 0.6",
    "alpha-0.8": "BAI, alpha 0.8",
}
FIGURES = ("first_length", "collapse_ratio", "first_reward", "reward_dip", "rl_truncated", "reward", "length")
CURVES = {"reward": "reward", "length": "response length"}
SETTINGS = {"steps": 100, "prompts": 16}
PACKAGES = ("kdcore", "kd-plugin-bai", "torch", "transformers", "trl")

Seed = Mapping[str, float]


def figures(folder: Path, arm: str, seeds: int) -> list[Seed]:
    """The figures of each seed, with the dip as a share of the first reward and the growth of the length."""
    found = []
    for seed, tested in enumerate(runs.tested(folder, arm, seeds)):
        row = {name: tested[name]["value"] for name in FIGURES}
        lengths = curve(folder, arm, seed, "response length")
        share = row["reward_dip"] / row["first_reward"] if row["first_reward"] else 0.0
        found.append({**row, "relative_dip": share, "length_growth": lengths[-1] / lengths[0]})
    return found


def curve(folder: Path, arm: str, seed: int, name: str) -> list[float]:
    """The values of a curve of the RL stage at each step."""
    path = folder / "arms" / arm / f"seed-{seed}" / "rlhf" / "metrics.jsonl"
    by_step = {line["step"]: line["terms"][name] for line in map(json.loads, path.read_text("utf-8").splitlines())}
    return [by_step[step] for step in sorted(by_step)]


def two_stage_error(folder: Path) -> float:
    """The largest difference of the actor to the three models merged at once, in any weight of the method's arm."""
    shared, arm = folder / "shared" / "seed-0", folder / "arms" / "distill" / "seed-0"
    config = tomllib.loads((folder / "config.toml").read_text("utf-8"))
    share, alpha = config["instruct_weight"], config["alpha"]
    [pretrained, instruct, reasoning] = (
        {embedding(name): tensor.double() for name, tensor in load_file(stage / "models/student.safetensors").items()}
        for stage in (shared / "pretrain", shared / "instruct", shared / "distil")
    )
    worst = 0.0
    for name, tensor in load_file(arm / "balanced" / "models" / "student.safetensors").items():
        key = embedding(name)
        exact = alpha * (share * instruct[key] + (1 - share) * reasoning[key]) + (1 - alpha) * pretrained[key]
        worst = max(worst, float((tensor.double() - exact).abs().max()))
    return worst


def embedding(name: str) -> str:
    """One name for the embedding, which is tied to the output."""
    return "lm_head.weight" if name == "model.embed_tokens.weight" else name


def claims(found: Mapping[str, Sequence[Seed]]) -> list[dict[str, Any]]:
    """Each claim with its figure for each seed; it holds in the seeds where that is above 0."""

    def against(other: str, figure: str, sign: float) -> Callable[[int], float]:
        return lambda seed: sign * (found["distill"][seed][figure] - found[other][seed][figure])

    stated: dict[str, Callable[[int], float]] = {
        "the unmerged reasoning model collapses: 0.9 - its collapse ratio": lambda seed: (
            0.9 - found["control"][seed]["collapse_ratio"]
        ),
        "the unmerged reasoning model dips: its dip - 0.1": lambda seed: found["control"][seed]["reward_dip"] - 0.1,
        "BAI collapses less: collapse ratio - control's": against("control", "collapse_ratio", 1),
        "BAI dips less: control's dip - its": against("control", "reward_dip", -1),
        "BAI dips less for what it begins with: control's relative dip - its": against("control", "relative_dip", -1),
        "and less than with alpha alone: no-instruct's relative dip - its": against("no-instruct", "relative_dip", -1),
        "BAI's length grows: last length / first - 1": lambda seed: found["distill"][seed]["length_growth"] - 1,
        "BAI ends better: reward on test - control's": against("control", "reward", 1),
    }
    seeds = range(len(found["distill"]))
    return [{"claim": claim, "by_seed": [value(seed) for seed in seeds]} for claim, value in stated.items()]


def page(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    names = [*FIGURES, "relative_dip", "length_growth"]
    rows = [
        [f"{arm}: {WHAT[arm]}", *(f"{statistics.fmean(seed[name] for seed in seeds):.3f}" for name in names)]
        for arm, seeds in result["arms"].items()
    ]
    text = recording.table(("", *names), rows)
    lines = [
        [
            entry["claim"],
            f"{statistics.fmean(entry['by_seed']):+.3f}",
            " ".join(f"{value:+.3f}" for value in entry["by_seed"]),
            f"{sum(value > 0 for value in entry['by_seed'])} of {result['seeds']}",
        ]
        for entry in result["claims"]
    ]
    text += "\n\n" + recording.table(("claim", "mean", "by seed", "holds in"), lines)
    text += "\n\n" + " ".join(f"![{title}]({file})" for title, file in result["plots"].items())
    settings = result["settings"]
    return text + (
        f"\n\nSeeds: {result['seeds']}, whose means the first table has; {settings['steps']} steps of GRPO, each on "
        f"{settings['prompts'] * settings['responses']} responses, learning rate {settings['learning_rate']:g}. "
        "`reward` and `length` are those of the most probable responses on test, all others of samples in RL. Collapse "
        "ratio and dip look at the first quarter of the steps: the lowest of so many noisy means lies below the first "
        "also where nothing changes, and an actor that begins with a small reward cannot dip far, hence the relative "
        "dip. The pretrained model has seen both ways to answer, so a merge answers in the one or the other. The merge "
        f"in two stages and that of all three at once differ by at most {result['two_stage_error']:.1e} in any weight."
    )


def draw(folder: Path, seeds: int, target: Path, prefix: str) -> dict[str, str]:
    """Write a plot of each curve over all arms, ``PREFIX-CURVE.svg``; returns title to file name."""
    target.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, title in CURVES.items():
        curves = []
        for arm in ARMS:
            values = [curve(folder, arm, seed, title) for seed in range(seeds)]
            curves.append(Curve(arm, [(range(1, len(each) + 1), each) for each in values]))
        written[title] = f"{prefix}-{name}.svg"
        image = panel(title, curves, ARMS).partition(",")[2]
        (target / written[title]).write_bytes(base64.b64decode(image))
    return written


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of RL (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the plugin")
    options = parser.parse_args()
    name = f"bai-{options.learning_rate:.0e}"
    folder = options.out / name
    command = ["--plugin", "bai", "--compare", "--seeds", str(options.seeds), "--device", "cpu"]
    settings = {**SETTINGS, "learning_rate": options.learning_rate}
    runs.run([*command, *runs.settings_arguments(settings, options.set)], folder)
    found = {arm: figures(folder, arm, options.seeds) for arm in ARMS}
    config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    torch.set_num_threads(config["run"]["threads"])
    result = {
        "environment": recording.environment(*PACKAGES),
        "seeds": options.seeds,
        "settings": {key: value for key, value in config.items() if key != "run"},
        "arms": found,
        "claims": claims(found),
        "two_stage_error": two_stage_error(folder),
        "plots": draw(folder, options.seeds, options.results, name),
    }
    recording.write(options.results, name, "BAI on small models that add", result, page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
