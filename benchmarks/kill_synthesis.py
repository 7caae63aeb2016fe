"""Kill a run that lets a language model write its examples, resume it, and count what was paid twice.

The method is the small classifier of ``tests/methods`` with the joiner ``rewritten.py``: before each of three rounds a
language model writes examples in a chain of two calls, four chains at once. The model is the server
`kdcore.testing.language_server` on loopback, whose answers are functions of the questions. Three attempts in ten it
answers with 429, 500, silence, a connection closed early, half a JSON document or nothing. At each place the process
sends itself SIGKILL; the run is resumed once. Then its pools must equal, byte for byte, and its weights, bit for bit,
those of a run never killed with a server that never fails, and the server may have answered no more questions twice
than were in flight. Exit code 1 where one does not hold.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kill_and_resume
import recording
from kill_and_resume import METHODS, PACKAGES, Place

from kdcore.testing.language_server import LanguageServer

FAULTS = 0.3
IN_FLIGHT = 4
ROUNDS = 3
DRAW = "kdcore.engine.rounds:Rounds._draw"
PLACES = [
    Place("journal", "kdcore.synthesis.journal:Journal.open", 1, after=True),
    Place("asking", "kdcore.teachers.asking:TextTeachers._from_teacher", 1),
    Place("asking", "kdcore.teachers.asking:TextTeachers._from_teacher", 1, after=True),
    Place("journal", "kdcore.synthesis.journal_writer:Writer._transact", 3),
    Place("journal", "kdcore.synthesis.journal_writer:Writer._transact", 5, after=True),
    Place("rejecting", "kdcore.synthesis.journal:Journal.reject", 1),
    Place("rejecting", "kdcore.synthesis.journal:Journal.reject", 2, after=True),
    Place("asking", "kdcore.teachers.asking:TextTeachers.ask", 17),
    Place("drawing, round 1", "kdcore.engine.drawing:Drawing.facts", 1),
    Place("sealing, round 1", "kdcore.engine.rounds:write_json", 1, after=True),
    Place("sealing, round 1", "kdcore.engine.rounds:seal", 1, after=True),
    Place("training, round 1", "kdcore.engine.training:Training._step", 3),
    Place("remembering, round 2", "kdcore.run:Run.remember", 2),
    Place("remembering, round 2", "kdcore.run:Run.remember", 2, after=True),
    Place("drawing, round 2", DRAW, 2),
    Place("asking, round 2", "kdcore.teachers.asking:TextTeachers._from_teacher", 35, after=True),
    Place("sealing, round 2", "kdcore.engine.rounds:seal", 2),
    Place("checkpoint, round 2", "kdcore.engine.checkpoint:Checkpoints.save", 3, after=True),
    Place("training, round 2", "kdcore.engine.training:Training._step", 9, after=True),
    Place("drawing, round 3", DRAW, 3),
    Place("asking, round 3", "kdcore.teachers.asking:TextTeachers._from_teacher", 58),
    Place("sealing, round 3", "kdcore.engine.rounds:seal", 3, after=True),
    Place("training, round 3", "kdcore.engine.training:Training._step", 14),
    Place("evaluation", "kdcore.engine.checks:Checks.check", 3),
    Place("report", "kdcore.reports:write_all", 1),
]


def options(address: str) -> list[str]:
    """The command line of the run."""
    settings = {
        "steps": 6, "evaluate_every": "unset", "checkpoints": 3, "batch_size": 8,
        "rewritten.model.endpoint": address, "rewritten.model.timeout": 0.5, "rewritten.model.in_flight": IN_FLIGHT,
        "rewritten.rounds": ROUNDS,
    }  # fmt: skip
    plugins = [word for name in ("soft_labels", "rewritten") for word in ("--plugin", str(METHODS / f"{name}.py"))]
    values = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["run", *plugins, *values, "--device", "cpu", "--no-compare", "--set", "run.trackers=[]"]


def outcome(folder: Path) -> dict[str, Any]:
    """The bytes of every pool, and all that training made of them."""
    stage = folder / "arms" / "distill" / "seed-0" / "distil"
    done = json.loads((stage / "done.json").read_text(encoding="utf-8"))
    pools = [(stage / "rounds" / f"{number}.jsonl").read_bytes() for number in range(ROUNDS)]
    return {"pools": pools, **{key: value for key, value in done.items() if key != "seconds"}}


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return kill_and_resume.child(sys.argv[2:])
    results = recording.parser(__doc__).parse_args().results
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as work:
        whole = Path(work) / "whole"
        with LanguageServer() as server:
            if kill_and_resume.kdcore([*options(server.address), "--out", str(whole)]) != 0:
                sys.exit("the run that is not killed failed")
        expected = outcome(whole)
        for number, place in enumerate(PLACES):
            folder = Path(work) / f"killed-{number}"
            with LanguageServer(faults=FAULTS, seed=number, hang=2.0) as server:
                command = [*options(server.address), "--out", str(folder)]
                code = kill_and_resume.kdcore(command, place)
                if code != -signal.SIGKILL:
                    sys.exit(f"the run was not killed {place}: it ended with code {code}")
                begun = (folder / "config.toml").exists()
                again = kill_and_resume.kdcore(["run", "--resume", str(folder)] if begun else command)
                twice = sum(count - 1 for count in server.answered.values())
                failed = sum(server.received.values()) - sum(server.answered.values())
            equal = again == 0 and outcome(folder) == expected
            row = {"phase": place.phase, "place": str(place), "equal": equal, "twice": twice, "failed": failed}
            rows.append({**row, "holds": equal and twice <= IN_FLIGHT})
            print(row, flush=True)
    header = ("killed in", "place", "pools and weights", "answered twice", "attempts that failed")
    lines = [
        (row["phase"], f"`{row['place']}`", "equal" if row["equal"] else "differ", row["twice"], row["failed"])
        for row in rows
    ]
    text = (
        f"{sum(row['holds'] for row in rows)} of {len(rows)}: pools byte-equal, weights bit-equal, at most {IN_FLIGHT} "
        f"questions (as many as are in flight) answered twice.\n\n{recording.table(header, lines)}"
    )
    result = {"environment": recording.environment(*PACKAGES), "rows": rows, "seconds": round(time.monotonic() - began)}
    recording.write(results, "kill_synthesis", "Synthesis killed and resumed", result, text)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
