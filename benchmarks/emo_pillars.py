"""Emo Pillars on GoEmotions with 100, 300 and 1,000 labels: soft synthetic pre-training against none.

Runs ``kdcore run --plugin emo-pillars --compare`` once for each number of labels, with answers shared through one
store. A finished run is reused and an interrupted one resumed, so the same command goes on after any interruption. The
teacher is a stand-in that reads only its prompt (see ``classifier_teacher.py``), made first by the same plugin: all of
all-MiniLM-L6-v2, tuned on the training texts that are not in the teacher's pool. The student keeps three of its layers.
"""

from __future__ import annotations

import json
import random
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import classifier_teacher
import ranking_tables
import recording
import runs

from kdcore.reports.comparison import compare_samples

STEPS = {100: 150, 300: 300, 1000: 600}
POOL = 10_000
VALIDATION = 500
METRICS = ("macro_f1", "micro_f1")
ARMS = ("control", "hard-labels", "distill")
ABLATED = 100
"""The number of labels for which the arm hard-labels runs too."""
COMMON = {"length": 64, "learning_rate": 6e-4, "evaluate_every": 75, "batch_size": 32}
TEACHER = {**COMMON, "examples": 0, "layers": "unset", "steps": 1000, "learning_rate": 2e-4, "evaluate_every": 500}
STUDENT = {
    **COMMON,
    "layers": 3,
    "batch_size": 16,
    "examples": 1000,
    "synthetic_epochs": 4,
    "variants": ["original"],
    "emotions": 4,
    "teacher_texts": 100,
    "near": 0.9,
    "teacher.model": "classifier",
    "teacher.max_tokens": 1024,
    "teacher.identity": "trained on GoEmotions without the pool",
}
PACKAGES = ("kdcore", "kd-plugin-emo-pillars", "torch", "transformers", "scikit-learn")

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    """The rows of a table of GoEmotions, each text once."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text, labels, _ = line.split("\t")
        rows.setdefault(" ".join(text.split()), {"labels": [int(label) for label in labels.split(",")]})
    return [{"text": text, **row} for text, row in rows.items()]


def write(folder: Path, stories: Path, **splits: Rows) -> Path:
    """A folder of tables, with the stories beside them."""
    (folder / "stories").mkdir(parents=True, exist_ok=True)
    for story in stories.glob("*.txt"):
        (folder / "stories" / story.name).write_text(story.read_text(encoding="utf-8"), encoding="utf-8")
    for split, rows in splits.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def means(folder: Path) -> dict[str, dict[str, float]]:
    """The figures on test of each arm, averaged over seeds, and of the teacher asked for labels itself."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, float | None]]] = {}
    for row in result["rows"]:
        if row["split"] == "test":
            figures = {**row["metrics"], "latency_ms": row["latency_ms"]}
            rows.setdefault(row["arm"] or row["subject"], []).append(figures)
    return {name: ranking_tables.mean_of(found) for name, found in rows.items()}


def differences(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """The method against the control and against rounded labels, by example and seed."""
    samples = {arm: runs.tested(folder, arm, seeds) for arm in ARMS if (folder / "arms" / arm).is_dir()}
    found = []
    for against in [arm for arm in ARMS[:-1] if arm in samples]:
        for metric in METRICS:
            ours, theirs = ([row[metric]["samples"] for row in samples[arm]] for arm in ("distill", against))
            compared = compare_samples(ours, theirs)
            assert compared is not None
            found.append({"against": against, "metric": metric, **attrs.asdict(compared)})
    return found


def unlabelled_share(folder: Path, arm: str, seeds: int) -> float:
    """The share of synthetic examples none of whose intensities is at least 0.5: rounded, they have no label."""
    rounds = [folder / "arms" / arm / f"seed-{seed}" / "synthetic" / "rounds" / "0.jsonl" for seed in range(seeds)]
    lines = [line for path in rounds for line in path.read_text(encoding="utf-8").splitlines()]
    strongest = [max(json.loads(line)["data"]["labels"].values(), default=0.0) for line in lines]
    return sum(value < 0.5 for value in strongest) / len(lines)


def page(found: Mapping[int, Mapping[str, Any]], classifier: Mapping[str, float], seeds: int) -> str:
    """The tables in Markdown."""
    figure = ranking_tables.figure
    quality = [
        [f"{count} labels, {arm}", *(figure(results["quality"][arm].get(m), ".3f") for m in METRICS)]
        for count, results in found.items()
        for arm in ARMS
        if arm in results["quality"]
    ]
    quality.append(["teacher's classifier", *(figure(classifier[metric], ".3f") for metric in METRICS)])
    lines = []
    for count, results in found.items():
        for entry in results["differences"]:
            low, high = entry["ci95"]
            bounds, spread = f"[{low:+.3f}, {high:+.3f}]", figure(entry["spread"], ".3f")
            tested = [figure(entry["difference"], "+.3f"), bounds, figure(entry["p_value"], ".4f"), spread]
            lines.append([f"{count} labels, distill - {entry['against']}", entry["metric"], *tested])
    unlabelled = ", ".join(
        f"{figure(results['unlabelled'], '.1%')} with {count} labels" for count, results in found.items()
    )
    header = ("", "metric", "difference", "95% interval", "p", "spread over seeds")
    about = (
        f"Means over {seeds} seeds, on all of GoEmotions' test. One draw of labelled texts; seeds vary initialisation, "
        "order and synthesis. The control is the same student, tuned on the same "
        "labelled texts with as many steps; it has no stage before. The threshold is tuned on "
        f"{VALIDATION} texts of dev in every arm. The teacher is no language model: it labels by a classifier that was "
        f"trained on GoEmotions' training labels, and gives as utterances comments of a disjoint pool of {POOL:,}, "
        "chosen by that classifier's predictions; nobody's labels of the pool are read. Its intensities are the "
        "classifier's probabilities, rescaled so that its tuned threshold is 0.5. Synthetic examples without a label "
        f"once rounded: {unlabelled}."
    )
    return f"{recording.table(('', *METRICS), quality)}\n\n{recording.table(header, lines)}\n\n{about}"


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="GoEmotions: train.tsv, dev.tsv, test.tsv, no header")
    parser.add_argument("--out", type=Path, default=Path("runs/emo-pillars"), help="folder of the runs (%(default)s)")
    parser.add_argument("--labels", type=int, nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--seeds", type=int, default=3, help="of each arm (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8378, help="of the teacher (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the students")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    from kd_plugin_emo_pillars.demo import demo_stories

    train, dev, test = (read(options.data / f"{split}.tsv") for split in ("train", "dev", "test"))
    evaluated = {row["text"].lower() for row in (*dev, *test)}
    train = [row for row in train if row["text"].lower() not in evaluated]
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(dev)
    pool, labelled, validation = train[:POOL], train[POOL:], dev[:VALIDATION]
    splits = {"validation": validation, "test": test}

    everything = write(options.out / "data-teacher", demo_stories(), train=labelled, **splits)
    plugin = ["--plugin", "emo-pillars", "--data"]
    command = [*plugin, str(everything.absolute()), "--no-compare", *runs.settings_arguments(TEACHER)]
    runs.run(command, options.out / "teacher")
    classifier = means(options.out / "teacher")["distill"]
    further = dict(setting.split("=", 1) for setting in options.set)
    found: dict[int, dict[str, Any]] = {}
    texts: Sequence[str] = [row["text"] for row in pool]
    with classifier_teacher.ClassifierTeacher(options.out / "teacher" / "student", texts, options.port) as teacher:
        for count in options.labels:
            data = write(options.out / f"data-{count}", demo_stories(), train=labelled[:count], **splits)
            sized = {"steps": STEPS[count], "ablations": str(count == ABLATED).lower()}
            settings = {**STUDENT, **sized, "teacher.endpoint": teacher.address, **further}
            shared = ["--compare", "--seeds", str(options.seeds), "--store", str((options.out / "store").absolute())]
            folder = options.out / f"labels-{count}"
            runs.run([*plugin, str(data.absolute()), *shared, *runs.settings_arguments(settings)], folder)
            found[count] = {
                "quality": means(folder),
                "differences": differences(folder, options.seeds),
                "unlabelled": unlabelled_share(folder, "distill", options.seeds),
            }

    config = tomllib.loads((options.out / f"labels-{options.labels[0]}" / "config.toml").read_text(encoding="utf-8"))
    result = {
        "environment": {**recording.environment(*PACKAGES), "threads": config["run"]["threads"]},
        "seeds": options.seeds,
        "settings": {key: value for key, value in config.items() if key != "run"},
        "steps": {count: STEPS[count] for count in options.labels},
        "classifier": classifier,
        "labels": found,
    }
    recording.write(
        options.results, "emo-pillars", "Emo Pillars on GoEmotions", result, page(found, classifier, options.seeds)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
