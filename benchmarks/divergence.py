"""Peak memory and time of chunked_divergence beside the divergence of whole logits, forward and backward.

whole logits   both models' logits by a linear layer, then the function of kdcore.losses.divergences, then backward
chunked        kdcore.losses.chunked.chunked_divergence, then backward
liger-kernel   its LigerFusedLinearJSD, on a GPU and where it is installed; forward KL is its beta 0

Student and teacher have random hidden states and output matrices of the same width. The gradients are those of the
student's hidden states and matrix. The ways take turns, on a CPU in a process of its own for each measurement. Memory
is the peak above the inputs: on a CPU of resident memory after a small call has loaded what is loaded once, on a GPU of
allocated memory. The matrix's gradient is part of it. Ways whose values differ by more than a thousandth end the
benchmark.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import recording
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.chunked import chunked_divergence
from kdcore.losses.divergences import (
    Divergence,
    alpha_divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    total_variation,
)

MEMORY, TIME, VALUE = 1 / 4, 1.1, 1e-3
WHOLE, CHUNKED, LIGER = "whole logits", "chunked", "liger-kernel"
DIVERGENCES: dict[str, Divergence] = {
    "forward KL": forward_kl,
    "reverse KL": reverse_kl,
    "JSD": jensen_shannon,
    "skewed forward KL": skewed_forward_kl,
    "alpha -1, clipped": partial(alpha_divergence, alpha=-1.0),
    "total variation": total_variation,
}
LIGER_BETA = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}


class Case(NamedTuple):
    """What one process measures."""

    way: str
    divergence: str
    vocabulary: int
    tokens: int
    hidden: int
    dtype: str
    device: str
    repetitions: int


def computation(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The loss of (student's hidden states and matrix, teacher's hidden states and matrix)."""
    divergence = DIVERGENCES[case.divergence]
    if case.way == CHUNKED:
        return partial(chunked_divergence, divergence)
    if case.way == WHOLE:
        return lambda hidden, weight, of_teacher, teacher_weight: divergence(
            F.linear(hidden, weight), F.linear(of_teacher, teacher_weight)
        )
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD  # type: ignore[import-untyped]

    jsd = LigerFusedLinearJSD(jsd_beta=LIGER_BETA[case.divergence])
    return lambda hidden, weight, of_teacher, teacher_weight: jsd(hidden, weight, of_teacher, teacher_weight, None)


def inputs(case: Case, tokens: int) -> list[Tensor]:
    """Random hidden states of length sqrt(width), as after a norm, and matrices of 1 / sqrt(width): logits about 1."""
    generator = torch.Generator(case.device).manual_seed(0)
    made = []
    for model in ("student", "teacher"):
        for rows, scale in ((tokens, 1.0), (case.vocabulary, case.hidden**-0.5)):
            values = torch.randn(rows, case.hidden, generator=generator, device=case.device) * scale
            made.append(values.to(getattr(torch, case.dtype)).requires_grad_(model == "student"))
    return made


def step(loss: Callable[..., Tensor], tensors: list[Tensor]) -> float:
    """One loss with its gradients, which are then let go."""
    value = loss(*tensors)
    value.backward()
    for tensor in tensors:
        tensor.grad = None
    return value.item()


def measure(case: Case) -> dict[str, Any]:
    """Peak bytes above the inputs of one step, and the seconds of later ones."""
    loss, memory = computation(case), Memory(case.device)
    step(loss, inputs(case, 1))
    tensors = inputs(case, case.tokens)
    gc.collect()
    memory.reset()
    value = step(loss, tensors)
    peak, seconds = memory.peak(), []
    for _ in range(case.repetitions):
        start = time.perf_counter()
        step(loss, tensors)
        seconds.append(time.perf_counter() - start)
    return {"peak_bytes": peak, "seconds": [round(value, 4) for value in seconds], "value": value}


class Memory:
    """The peak of memory above what was held at `reset`."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = 0

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = _status("VmRSS")

    def peak(self) -> int:
        """In bytes."""
        return (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(kilobytes)


def isolated(case: Case) -> dict[str, Any]:
    """`measure`, on a CPU in a process of its own, whose memory is not that of cases before."""
    if case.device == "cuda":
        return measure(case)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, case).result()


def compare(divergence: str, vocabulary: int, options: Any) -> dict[str, Any]:
    """All ways of one divergence and vocabulary, taking turns."""
    ways = [WHOLE, CHUNKED]
    if options.device == "cuda" and divergence in LIGER_BETA and _has_liger():
        ways.append(LIGER)
    measured: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(options.turns):
        for way in ways:
            case = Case(
                way, divergence, vocabulary, options.tokens, options.hidden, options.dtype, options.device,
                options.repetitions,
            )  # fmt: skip
            measured[way].append(isolated(case))
            print(case, measured[way][-1], flush=True)
    figures = {
        way: {
            "peak_mebibytes": round(max(turn["peak_bytes"] for turn in turns) / 2**20, 1),
            "seconds": statistics.median(second for turn in turns for second in turn["seconds"]),
            "value": turns[0]["value"],
        }
        for way, turns in measured.items()
    }
    whole = figures[WHOLE]
    for way, figure in figures.items():
        figure["memory_of_whole"] = round(figure["peak_mebibytes"] / whole["peak_mebibytes"], 4)
        figure["time_of_whole"] = round(figure["seconds"] / whole["seconds"], 4)
        if not abs(figure["value"] - whole["value"]) <= VALUE * abs(whole["value"]):
            sys.exit(
                f"{divergence}: {way} has the value {figure['value']} and whole logits {whole['value']}: a comparison "
                "would be void"
            )
    return {"divergence": divergence, "vocabulary": vocabulary, "ways": figures}


def _has_liger() -> bool:
    try:
        import liger_kernel  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return False
    return True


def markdown(results: list[dict[str, Any]], options: Any) -> str:
    """The table and what was measured."""
    rows = [
        [
            f"{result['divergence']}, {way}",
            f"{result['vocabulary']:,}",
            f"{figure['peak_mebibytes']:,.0f}",
            f"{figure['memory_of_whole']:.3f}",
            f"{figure['seconds']:.3f}",
            f"{figure['time_of_whole']:.3f}",
        ]
        for result in results
        for way, figure in result["ways"].items()
    ]
    header = ["divergence", "vocabulary", "peak MiB", "of whole logits", "seconds", "of whole logits"]
    memory = max(result["ways"][CHUNKED]["memory_of_whole"] for result in results)
    duration = max(result["ways"][CHUNKED]["time_of_whole"] for result in results)
    return "\n".join(
        [
            recording.table(header, rows),
            "",
            f"Chunked takes at most {memory:.3f} of the memory of whole logits (at most {MEMORY} is wanted) and at "
            f"most {duration:.3f} of their time (at most {TIME} is wanted).",
            "",
            f"{options.tokens:,} tokens, hidden size {options.hidden:,} of both models, {options.dtype}, "
            f"{options.device}; {options.turns} turns of each, {options.repetitions} timed repetitions in each; "
            "medians of time, the greatest peak.",
        ]
    )


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_768, 131_072], help="default: %(default)s")
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES), metavar="NAME")
    parser.add_argument("--tokens", type=int, default=1024, help="positions (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="of both models (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=2, help="measurements of each way (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="timed, of each measurement (default: %(default)s)")
    options = parser.parse_args()
    results = [compare(name, size, options) for size in options.vocabularies for name in options.divergences]
    packages = ("kdcore", "torch", *(("liger-kernel",) if options.device == "cuda" and _has_liger() else ()))
    shared = ("tokens", "hidden", "dtype", "device", "turns", "repetitions")
    result = {
        "environment": recording.environment(*packages),
        "settings": {name: getattr(options, name) for name in shared},
        "targets": {"memory": MEMORY, "time": TIME},
        "results": results,
    }
    name = "divergence" if options.device == "cpu" else f"divergence-{options.device}"
    recording.write(options.results, name, "Divergences of large vocabularies", result, markdown(results, options))
    chunked = [result["ways"][CHUNKED] for result in results]
    met = all(figure["memory_of_whole"] <= MEMORY and figure["time_of_whole"] <= TIME for figure in chunked)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
