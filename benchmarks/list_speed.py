"""How long ``kdcore list`` takes beside ``import torch``; fails above 0.35 of it.

Starts each command anew, in turn, so that a slow moment of the machine hits all alike, and compares the medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import recording

LIMIT = 0.35


def commands() -> dict[str, list[str]]:
    """What is timed: the installed console script, as users call it, and torch's import."""
    script = Path(sysconfig.get_path("scripts")) / "kdcore"
    if not script.exists():
        sys.exit("kdcore is not installed in this environment: pip install -e .")
    return {
        "kdcore list": [str(script), "list"],
        "kdcore --help": [str(script), "--help"],
        'python -c "import torch"': [sys.executable, "-c", "import torch"],
    }


def seconds(command: list[str]) -> float:
    """Wall time of one process, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=11, help="of each command (default: 11)")
    options = parser.parse_args()

    timed = commands()
    for command in timed.values():
        seconds(command)  # the first reads the files from disk
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.repetitions):
        for name, command in timed.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    torch = medians['python -c "import torch"']
    ratio = medians["kdcore list"] / torch
    rows = [
        [f"`{name}`", f"{1000 * median:.0f}", f"{1000 * min(times[name]):.0f}", f"{median / torch:.3f}"]
        for name, median in medians.items()
    ]
    verdict = f"`kdcore list` takes {ratio:.3f} of `import torch`; at most {LIMIT} is wanted."
    figures = recording.table(["command", "median ms", "least ms", "of import torch"], rows)
    result = {
        "environment": recording.environment("kdcore", "torch"),
        "repetitions": options.repetitions,
        "limit": LIMIT,
        "ratio": round(ratio, 4),
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
    }
    recording.write(options.results, "list_speed", "Listing", result, f"{figures}\n\n{verdict}")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
