"""Kill a run at twenty and more places, resume it, and compare every bit of what it trained with a run never killed.

Each place is the n-th call of a function of kdcore, of torch or of the system, in which the process sends itself
SIGKILL: no handler runs, nothing is flushed. The places lie in the filling of the store, in training, in the writing of
checkpoints and best weights, in validation and test, and in the writing of reports. Then the run is resumed, once, and
its weights, order of examples, steps, test figures and files of the students are compared with those of the run that
was never killed, in the method's arm and in its control. The second set of places does the same with dropout, random
augmentation in every epoch and two data workers. Exit code 1 where a bit differs.

The method is the small classifier of ``tests/methods/soft_labels.py`` on paragraphs of Python's own help.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import recording
from attrs import frozen

METHODS = Path(__file__).parents[1] / "tests" / "methods"
PACKAGES = ("kdcore", "torch", "accelerate", "safetensors")
RUN = ["run", "--plugin", str(METHODS / "soft_labels.py"), "--compare", "--device", "cpu"]
AUGMENTED = ["--plugin", str(METHODS / "augmented.py"), "--workers", "2"]
ARMS = ("distill", "control")


@frozen
class Place:
    """The n-th call of a function, before or after it has done its work.

    :param phase: for the table.
    :param function: ``module:attribute``.
    """

    phase: str
    function: str
    call: int = 1
    after: bool = False

    def __str__(self) -> str:
        when = "after" if self.after else "before"
        return f"{when} call {self.call} of {self.function.removeprefix('kdcore.').replace(':', '.')}"


PLACES = [
    Place("store", "kdcore.teachers.store:write_sealed", 1),
    Place("store", "kdcore.teachers.store:write_sealed", 1, after=True),
    Place("store", "kdcore.teachers.part:_write", 1),
    Place("store", "kdcore.teachers.part:_write", 40),
    Place("store", "kdcore.teachers.part:Writer.append", 2, after=True),
    Place("training", "kdcore.engine.training:Training._step", 1),
    Place("training", "kdcore.engine.training:Training._passes", 12),
    Place("training", "kdcore.engine.training:Training._clip", 20, after=True),
    Place("training", "kdcore.engine.training:Training._step", 45, after=True),
    Place("checkpoint", "kdcore.engine.checkpoint:save_weights", 1),
    Place("checkpoint", "kdcore.engine.checkpoint:save_weights", 2, after=True),
    Place("checkpoint", "torch:save", 3, after=True),
    Place("checkpoint", "kdcore.engine.checkpoint:write_json", 2, after=True),
    Place("checkpoint", "kdcore.engine.checkpoint:shutil.rmtree", 2),
    Place("checkpoint", "kdcore.engine.checkpoint:Checkpoints.save", 7, after=True),
    Place("best weights", "kdcore.engine.checks:save_weights", 1, after=True),
    Place("evaluation", "kdcore.engine.checks:Checks.measure", 2),
    Place("evaluation", "kdcore.engine.checks:Checks.check", 3, after=True),
    Place("evaluation", "kdcore.engine.checks:Checks.keep", 1),
    Place("the student", "kdcore.engine.stages:save_subject", 1, after=True),
    Place("the student", "kdcore.engine.stages:StageJob.finish", 2, after=True),
    Place("evaluation", "kdcore.engine.experiment:evaluate_subject", 1),
    Place("evaluation", "kdcore.engine.experiment:evaluate_subject", 2, after=True),
    Place("report", "kdcore.reports:write_all", 1),
    Place("report", "kdcore.reports.result:save_result", 1, after=True),
    Place("report", "kdcore.reports.html:report_of", 1),
    Place("report", "kdcore.reports:write_all", 1, after=True),
]
AUGMENTED_PLACES = [
    Place("training", "kdcore.engine.training:Training._step", 9),
    Place("training", "kdcore.engine.training:Training._passes", 34),
    Place("checkpoint", "torch:save", 2),
    Place("evaluation", "kdcore.engine.checks:Checks.measure", 3, after=True),
    Place("report", "kdcore.reports:write_all", 1),
]


def armed(place: Place) -> None:
    """Let this process kill itself at the place."""
    module, _, path = place.function.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for attribute in outer:
        owner = getattr(owner, attribute)
    original, calls = getattr(owner, name), itertools.count(1)

    def counting(*arguments: Any, **options: Any) -> Any:
        here = next(calls) == place.call  # also where several threads call
        if here and not place.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counting)


def child(arguments: list[str]) -> int:
    """``PHASE FUNCTION CALL AFTER ARGUMENT ...``: the command line, killed at the place."""
    from kdcore.cli import main as command_line

    phase, function, call, after, *rest = arguments
    armed(Place(phase, function, int(call), after == "True"))
    return command_line(rest)


def kdcore(arguments: list[str], place: Place | None = None) -> int:
    """Run the command line in a process of its own; its exit code, negative where a signal ended it."""
    command = [sys.executable, "-m", "kdcore", *arguments]
    if place is not None:
        given = [place.phase, place.function, str(place.call), str(place.after)]
        command = [sys.executable, __file__, "--child", *given, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    ).returncode


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on a kill: hashes of weights and order, steps, the test's figures, the saved student."""
    from kdcore.files import read_json

    found: dict[str, Any] = {}
    for arm in ARMS:
        done = read_json(folder / "arms" / arm / "seed-0" / "distil" / "done.json")
        found[arm] = {
            **{key: value for key, value in done.items() if key != "seconds"},
            "test": read_json(folder / "arms" / arm / "seed-0" / "evaluation.json")["rows"],
            "student": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (folder / "arms" / arm / "seed-0" / "student").iterdir()
                if path.name != "README.md"
            },
        }
    return found


def compare(options: list[str], places: list[Place], work: Path) -> list[dict[str, Any]]:
    """Kill and resume at every place; what became of each."""
    whole = work / "whole"
    if kdcore([*options, "--out", str(whole)]) != 0:
        sys.exit("the run that is not killed failed")
    expected = outcome(whole)
    rows = []
    for place in places:
        folder = work / "killed"
        code = kdcore([*options, "--out", str(folder)], place)
        if code != -signal.SIGKILL:
            sys.exit(f"the run was not killed {place}: it ended with code {code}")
        begun = (folder / "config.toml").exists()
        again = kdcore(["run", "--resume", str(folder)] if begun else [*options, "--out", str(folder)])
        equal = again == 0 and outcome(folder) == expected and (folder / "report.html").exists()
        print(f"{place.phase}: {place}: {'bit-equal' if equal else f'DIFFERS (exit code {again})'}", flush=True)
        rows.append({"phase": place.phase, "place": str(place), "equal": equal})
        shutil.rmtree(folder)
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = recording.parser(__doc__)
    results = parser.parse_args().results
    began = time.monotonic()
    sets = {}
    for name, options, places in (
        ("stored teacher, dropout", [], PLACES),
        ("dropout, augmentation, two data workers", AUGMENTED, AUGMENTED_PLACES),
    ):
        with tempfile.TemporaryDirectory() as work:
            sets[name] = compare([*RUN, *options], places, Path(work))
    header = ("killed in", "place", "after one resumption")
    parts = []
    for name, rows in sets.items():
        lines = [(row["phase"], f"`{row['place']}`", "bit-equal" if row["equal"] else "differs") for row in rows]
        equal = sum(row["equal"] for row in rows)
        parts.append(f"## {name}: {equal} of {len(rows)} bit-equal\n\n{recording.table(header, lines)}")
    result = {"environment": recording.environment(*PACKAGES), "sets": sets, "seconds": round(time.monotonic() - began)}
    recording.write(results, "kill_and_resume", "Killed and resumed", result, "\n\n".join(parts))
    return 0 if all(row["equal"] for rows in sets.values() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
