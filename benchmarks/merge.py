"""Merging beside mergekit: wall time, processor time and memory of both, and which of the results is right.

Three sharded bfloat16 models of the shapes of Gemma 3 270M (or larger) with random weights are made once, and
mergekit is installed into a virtual environment of its own, both below the work folder. Then ``kdcore merge`` and
``mergekit-yaml`` merge them by the same YAML in turns, each as a process of its own, with the sources in the page
cache. Memory is sampled every 10 ms; anonymous pages count above those of a process that only does ``import torch``,
pages of mapped files are told apart. At last both results are compared with each other and with float64.

Example::

    python benchmarks/merge.py --work /tmp/merge --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from measured import Measured, measure
from merge_models import ARCHITECTURES, METHODS, configuration, make_models
from merge_reference import RANDOM, compare

PACKAGES = ("kdcore", "torch", "safetensors")
VERSION = "0.1.5"
TARGETS = {"linear": ("wall", 0.5), "ties": ("wall", 0.2)}
MEMORY = 0.3
SIDES = ("kdcore", "mergekit")
BARE = Path(__file__).with_name("merge_bare.py")
WITHOUT_HUB: dict[str, str | None] = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": None}


class Mergekit:
    """mergekit in an environment of its own.

    :param folder: of the environment; it is made where it is not there.
    :param constraints: a file for pip.
    """

    def __init__(self, folder: Path, constraints: Path | None) -> None:
        self.python = folder / "bin" / "python"
        self.command = folder / "bin" / "mergekit-yaml"
        if not self.command.exists():
            print(f"installing mergekit {VERSION} into {folder}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            limits = ["--constraint", str(constraints.resolve())] if constraints else []
            pinned = [f"torch=={torch.__version__.partition('+')[0]}", f"mergekit=={VERSION}"]
            clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            subprocess.run([self.python, "-m", "pip", "install", "--quiet", *limits, *pinned], check=True, env=clean)

    def versions(self) -> dict[str, str]:
        """Of what matters there."""
        code = (
            "import importlib.metadata as m, json; "
            "print(json.dumps({n: m.version(n) for n in ('mergekit', 'torch', 'safetensors', 'transformers')}))"
        )
        found: dict[str, str] = json.loads(subprocess.check_output([self.python, "-c", code], text=True))
        return found


class Bench:
    """The models, the configurations, and a process for each side.

    :param work: folder of everything.
    """

    def __init__(self, work: Path, models: Sequence[Path], mergekit: Mergekit) -> None:
        self.models, self.work = models, work
        self._mergekit = mergekit

    def command(self, side: str, method: str) -> list[str]:
        """What merges, as one side."""
        plan, out = str(self.work / f"{method}.yaml"), str(self.out(side))
        if side == "kdcore":
            return [sys.executable, "-m", "kdcore", "merge", plan, "--out", out]
        if side == "mergekit":
            return [str(self._mergekit.command), plan, out]
        return [sys.executable, str(BARE), out, *map(str, self.models)]

    def out(self, side: str) -> Path:
        """Where a side writes."""
        return self.work / f"out-{side}"

    def run(self, side: str, method: str) -> Measured:
        """Merge once, into an empty folder, with the sources in memory and nothing left to write."""
        shutil.rmtree(self.out(side), ignore_errors=True)
        (self.work / f"{method}.yaml").write_text(configuration(method, self.models), encoding="utf-8")
        for path in (path for folder in self.models for path in folder.glob("*.safetensors")):
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
        os.sync()
        extra = {} if side == "kdcore" else {"PYTHONPATH": None}
        measured = measure(self.command(side, method), environment={**WITHOUT_HUB, **extra})
        if measured.code:
            raise SystemExit(f"{side} {method} ended with {measured.code}:\n{measured.output[-2000:]}")
        return measured

    def idle(self, side: str) -> int:
        """Peak of anonymous memory of a process that only imports torch: the median of three."""
        python = str(self._mergekit.python) if side == "mergekit" else sys.executable
        extra = {} if side == "kdcore" else {"PYTHONPATH": None}
        command, variables = [python, "-c", "import torch, time; time.sleep(0.05)"], {**WITHOUT_HUB, **extra}
        return statistics.median(measure(command, environment=variables).anonymous for _ in range(3))


def in_turns(bench: Bench, method: str, rounds: int) -> dict[str, list[Measured]]:
    """Runs of both sides; who is first changes from round to round."""
    found: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            found[side].append(bench.run(side, method))
            print(f"{method} {number + 1}/{rounds}: {side} {found[side][-1].seconds:.2f} s", flush=True)
    return found


def summary(runs: Sequence[Measured], idle: int) -> dict[str, Any]:
    """Medians, least and greatest of one side."""
    figures: dict[str, Callable[[Measured], float]] = {
        "wall": lambda run: run.seconds,
        "cpu": lambda run: run.cpu,
        "anonymous": lambda run: run.anonymous - idle,
        "mapped": lambda run: run.mapped,
    }
    return {
        name: {
            "median": round(statistics.median(map(of, runs)), 3),
            "least": round(min(map(of, runs)), 3),
            "most": round(max(map(of, runs)), 3),
        }
        for name, of in figures.items()
    }


def ratio(found: dict[str, list[Measured]], idle: dict[str, int], kind: str) -> float:
    """Median over the rounds of kdcore's figure by mergekit's."""

    def value(side: str, run: Measured) -> float:
        return run.seconds if kind == "wall" else run.anonymous - idle[side]

    pairs = zip(found["kdcore"], found["mergekit"], strict=True)
    return round(statistics.median(value("kdcore", ours) / value("mergekit", theirs) for ours, theirs in pairs), 4)


def measured(bench: Bench, methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """All figures of all methods."""
    idle = {side: bench.idle(side) for side in SIDES}
    results: dict[str, Any] = {}
    for method in methods:
        found = in_turns(bench, method, rounds)
        results[method] = {
            **{side: summary(found[side], idle[side]) for side in SIDES},
            "ratios": {kind: ratio(found, idle, kind) for kind in ("wall", "anonymous")},
        }
        print(f"{method}: comparing with float64", flush=True)
        results[method]["outputs"] = compare(method, bench.models, *(bench.out(side) for side in SIDES))
        for side in SIDES:
            shutil.rmtree(bench.out(side))
    bare = [bench.run("bare", "linear") for _ in range(rounds)]
    shutil.rmtree(bench.out("bare"))
    return {
        "methods": results,
        "bare": summary(bare, idle["kdcore"]),
        "import torch": {side: idle[side] for side in SIDES},
    }


def verdicts(methods: dict[str, Any]) -> dict[str, bool]:
    """Each target in words, and whether it holds."""
    found = {}
    for method, result in methods.items():
        if method in TARGETS:
            target, value = TARGETS[method][1], result["ratios"]["wall"]
            found[f"{method}: {value:.3f} of mergekit's wall time, at most {target}"] = value <= target
            value = result["ratios"]["anonymous"]
            found[f"{method}: {value:.3f} of mergekit's anonymous memory, at most {MEMORY}"] = value <= MEMORY
    return found


def markdown(figures: dict[str, Any], facts: str) -> str:
    """Tables of costs and of results, and the targets."""
    rows = []
    for method, result in figures["methods"].items():
        for side in SIDES:
            rows.append((f"{method}, {side}", *_cells(result[side])))
    rows.append(("linear, bare loop", *_cells(figures["bare"])))
    header = ("merge", "wall s (median)", "least to most", "CPU s", "anonymous MiB above import torch", "mapped MiB")
    held = [f"- {words} {'holds' if right else 'does not hold'}." for words, right in figures["targets"].items()]
    return "\n".join(
        [
            recording.table(header, rows),
            "",
            *held,
            "",
            "The same entries, compared with each other and with float64. Apart: in steps of bfloat16 at the largest "
            "of the sources' entries. Rounded right: the bfloat16 number nearest to float64's. Either way: float64's "
            "lies in the middle of two, or TIES cuts between entries of one magnitude or elects between signs of one "
            "weight; these are left out. Random entries are drawn otherwise in both.",
            "",
            recording.table(OUTPUTS, [_compared(name, found) for name, found in figures["methods"].items()]),
            "",
            facts,
        ]
    )


OUTPUTS = (
    "merge",
    "equal bits",
    "either way",
    "most steps apart",
    "rounded right: kdcore",
    "mergekit",
    "mean error: kdcore",
    "mergekit",
    "most error: kdcore",
    "mergekit",
)


def _cells(side: dict[str, dict[str, float]]) -> list[str]:
    wall = side["wall"]
    mib = [f"{side[kind]['median'] / 2**20:.0f}" for kind in ("anonymous", "mapped")]
    return [f"{wall['median']:.2f}", f"{wall['least']:.2f} to {wall['most']:.2f}", f"{side['cpu']['median']:.2f}", *mib]


def _compared(method: str, result: dict[str, Any]) -> list[str]:
    found = result["outputs"]
    equal = f"{found['equal']:.4%}"
    if method in RANDOM:
        return [method, equal, *["random"] * (len(OUTPUTS) - 2)]
    shares = [f"{found[f'{side} rounded right']:.4%}" for side in SIDES]
    means = [f"{found[f'{side} error']:.2e}" for side in SIDES]
    most = [f"{found[f'most {side} error']:.2e}" for side in SIDES]
    return [method, equal, f"{found['either way']:.3%}", f"{found['most steps apart']:.2f}", *shares, *means, *most]


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for models, results, mergekit")
    parser.add_argument("--mergekit", type=Path, metavar="FOLDER", help="its environment (default: below the former)")
    parser.add_argument("--constraints", type=Path, metavar="FILE", help="for pip, when mergekit is installed")
    parser.add_argument("--parameters", default="270M", choices=[*ARCHITECTURES], help="size (default: %(default)s)")
    parser.add_argument("--models", type=int, default=3, help="base included (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=4, help="files of each model, about (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS], help="(default: all)")
    given = parser.parse_args()
    work = given.work.resolve()
    mergekit = Mergekit((given.mergekit or work / "mergekit").resolve(), given.constraints)
    models = make_models(work / given.parameters, given.parameters, given.models, given.shards)
    figures = measured(Bench(work, models, mergekit), given.methods, given.rounds)
    return write(figures, given, models, mergekit.versions())


def write(figures: dict[str, Any], given: argparse.Namespace, models: Sequence[Path], theirs: dict[str, str]) -> int:
    """The results; the exit code."""
    figures["targets"] = verdicts(figures["methods"])
    size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    facts = (
        f"{len(models)} models of {size / 1e6:.0f} MB in bfloat16 ({given.parameters}), about {given.shards} files "
        f"each; {given.rounds} rounds, each side first in turn; sources read just before, as far as the page cache "
        f"holds them, earlier results on the disk before each run. mergekit with its defaults: "
        f"{', '.join(f'{name} {version}' for name, version in theirs.items())}."
    )
    result = {
        "environment": recording.environment(*PACKAGES),
        "mergekit": theirs,
        "settings": {name: getattr(given, name) for name in ("parameters", "models", "shards", "rounds", "methods")},
        "bytes of a model": size,
        **figures,
    }
    title = f"Merging beside mergekit: {len(models)} models of {given.parameters}"
    recording.write(given.results, f"merge-{given.parameters.lower()}", title, result, markdown(figures, facts))
    return 0 if all(figures["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
