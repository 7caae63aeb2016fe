"""How long ``kdcore list`` takes beside ``import torch``; fails above 0.35 of it.

Starts each command anew, in turn, so that a slow moment of the machine hits all alike, and compares the medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from reporting import RESULTS, facts, footnote, table, write

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=11, help="of each command (default: 11)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
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
    known = facts(threads=None, packages=("kdcore", "torch"))
    rows = [
        [f"`{name}`", f"{1000 * median:.0f}", f"{1000 * min(times[name]):.0f}", f"{median / torch:.3f}"]
        for name, median in medians.items()
    ]
    verdict = f"`kdcore list` takes {ratio:.3f} of `import torch`; at most {LIMIT} is wanted."
    markdown = table(["command", "median ms", "least ms", "of import torch"], rows)
    result = {**known, "repetitions": options.repetitions, "limit": LIMIT, "ratio": ratio, "seconds": times}
    write("list_speed", result, f"# Listing\n\n{markdown}\n\n{verdict}\n\n{footnote(known)}", options.results)
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
