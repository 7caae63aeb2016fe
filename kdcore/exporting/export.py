"""Export one student: write the files, compare them with the student, time them, and leave a record beside them."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import onnxruntime
import torch
from attrs import frozen

from kdcore.engine.progress import Progress
from kdcore.errors import InputError, RunError
from kdcore.exporting.graph import OnnxModel, quantize, size_of, write_graph
from kdcore.exporting.inputs import Inputs, inputs_of_file, inputs_of_run
from kdcore.exporting.measure import BATCH, Agreement, Model, Speed, TorchModel, compare, time_alternately
from kdcore.exporting.reopen import Reopened, measure_with, reopen
from kdcore.exporting.student import Student, open_student
from kdcore.files import locked, making, write_json
from kdcore.reports.exports import EXPORT_FILE, EXPORT_FOLDER
from kdcore.reports.folder import RunFolder, open_run, students
from kdcore.reports.summary import number

__all__ = ["TOLERANCE", "Source", "export", "find_student"]

TOLERANCE = 1e-3
COMPARED = (1, 8, BATCH)
TORCH, MODEL, INT8 = "torch", "model.onnx", "model_int8.onnx"
OURS = {MODEL, f"{MODEL}.data", INT8, EXPORT_FILE}


@frozen(eq=False)
class Source:
    """The student to export.

    :param folder: its folder.
    :param run: the run it is of; None for a student elsewhere.
    :param arm: its arm in the run; and its seed and subject name there.
    """

    folder: Path
    run: RunFolder | None = None
    arm: str = ""
    seed: int = 0
    subject: str = ""


def find_student(path: Path, arm: str | None = None, seed: int | None = None, subject: str | None = None) -> Source:
    """The student that ``path`` names: of a run folder the one asked for, else its first; or a student folder.

    :raises InputError: there is none, or none of that arm, seed and subject.
    """
    if (path / "plan.json").is_file():
        return _student_of(open_run(path), arm, seed, subject)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; name a run folder or a student's folder")
    given = [f"--{name}" for name, value in (("arm", arm), ("seed", seed), ("subject", subject)) if value is not None]
    if given:
        raise InputError(f"{path} is no run folder, so {given[0]} chooses nothing; leave it away, or name a run folder")
    for parent in path.resolve().parents:
        if (parent / "plan.json").is_file():
            run = open_run(parent)
            found = students(run).get(path.resolve().relative_to(parent).as_posix())
            if found:
                return Source(path, run, *found)
    return Source(path)


def _student_of(run: RunFolder, arm: str | None, seed: int | None, subject: str | None) -> Source:
    asked = (arm or run.arms[0], run.seeds[0] if seed is None else seed, subject)
    found = students(run)
    for relative, (its_arm, its_seed, its_subject) in found.items():
        if (its_arm, its_seed) == asked[:2] and subject in (None, its_subject):
            return Source(run.path / relative, run, its_arm, its_seed, its_subject)
    there = "; ".join(f"--arm {a} --seed {s} --subject {name}" for a, s, name in itertools.islice(found.values(), 8))
    wanted = f"arm {asked[0]}, seed {asked[1]}" + (f", subject {subject}" if subject else "")
    raise InputError(f"{run.path}: no finished student of {wanted}; there are: {there or 'none yet'}")


def export(
    source: Source,
    *,
    int8: bool = False,
    evaluate: bool = False,
    texts: Path | None = None,
    out: Path | None = None,
    force: bool = False,
) -> Path:
    """Write ``model.onnx``, with ``int8`` also ``model_int8.onnx``, and ``export.json``, all or nothing.

    :param evaluate: measure the headline metric on the run's test with each file.
    :param texts: a file of texts to compare and time with; by default those of the run.
    :param out: the folder to write; by default ``onnx`` in the student's.
    :param force: replace an earlier export.
    :returns: the folder written.
    :raises InputError: the student cannot be exported, there is nothing to compare with, or something is in the way.
    :raises RunError: torch cannot trace it, or the outputs differ by more than `TOLERANCE`.
    """
    target = out or source.folder / EXPORT_FOLDER
    refuse_occupied(target, force)
    outdated = (target / INT8).exists()
    if source.run is None and texts is None:
        raise InputError(f"{source.folder} is in no run, so its data are unknown; name texts with --texts FILE")
    if source.run is None and evaluate:
        raise InputError(f"{source.folder} is in no run, so it has no test; leave --evaluate away")
    progress = Progress()
    with locked(source.run.path) if source.run else nullcontext():
        student = open_student(source.folder)
        progress.line(f"student   {source.folder} ({student.name})")
        needed = source.run if texts is None or evaluate else None
        reopened = reopen(needed.path, source.arm, source.seed) if needed else None
        if texts is not None:
            inputs = inputs_of_file(student, texts)
        else:
            assert reopened is not None
            inputs = inputs_of_run(student, reopened)
        progress.line(f"inputs    {inputs.source}")
        with making(target, OURS if force else ()) as folder:
            record = _write(student, source, inputs, int8, folder, progress)
            if evaluate:
                assert reopened is not None
                _evaluate(record, reopened, student, source, folder, progress)
            write_json(folder / EXPORT_FILE, record)
    if outdated and not int8:
        progress.line(f"removed   the earlier {INT8}; --int8 writes it again")
    progress.line(f"written   {target}")
    return target


def refuse_occupied(target: Path, force: bool) -> None:
    """Refuse a folder that holds anything, but an earlier export that may be replaced.

    :raises InputError: it does; names what is there.
    """
    if target.is_file():
        raise InputError(f"{target}: a file is there; name another folder with --out")
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    foreign = [name for name in there if name not in OURS]
    if foreign:
        raise InputError(f"{target}: {foreign[0]} is there, which kdcore export did not write; name another --out")
    if there and not force:
        raise InputError(f"{target}: already exported ({', '.join(there)}); --force does it again")


def _write(
    student: Student, source: Source, inputs: Inputs, int8: bool, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Write the model files into ``folder``; the record of what they are, how close and how fast."""
    batches = {size: inputs.batches(size) for size in COMPARED}
    everything = list(itertools.chain(*batches.values()))
    threads = torch.get_num_threads()
    reference = TorchModel(student)
    write_graph(student, inputs.collate([0, 1 % inputs.count]), folder / MODEL)
    models: dict[str, Model] = {TORCH: reference, MODEL: OnnxModel(folder / MODEL, threads)}
    agreements = {MODEL: compare(reference, models[MODEL], everything)}
    _refuse_difference(student, agreements[MODEL])
    progress.line(f"onnx      {describe(agreements[MODEL])}")
    if int8:
        quantize(folder / MODEL, folder / INT8)
        models[INT8] = OnnxModel(folder / INT8, threads)
        agreements[INT8] = compare(reference, models[INT8], everything)
        progress.line(f"int8      {describe(agreements[INT8])}")
    speeds = time_alternately(models, batches[1], batches[BATCH])
    for name, speed in speeds.items():
        progress.line(f"speed     {name}: {speed.latency_ms:.2f} ms alone, {speed.per_second:.0f} a second")
    return {
        "model": student.name,
        "library": student.library,
        "inputs": inputs.source,
        "reads_texts": student.tokenize is not None,
        "threads": threads,
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "files": [_row(name, source, folder, speeds[name], agreements.get(name)) for name in models],
    }


def _row(
    name: str, source: Source, folder: Path, speed: Speed, agreement: dict[str, Agreement] | None
) -> dict[str, Any]:
    weights = source.folder.rglob("*.safetensors")
    return {
        "name": name,
        "bytes": sum(path.stat().st_size for path in weights) if name == TORCH else size_of(folder / name),
        **attrs.asdict(speed),
        "agreement": {key: attrs.asdict(value) for key, value in (agreement or {}).items()},
    }


def _evaluate(
    record: dict[str, Any], reopened: Reopened, student: Student, source: Source, folder: Path, progress: Progress
) -> None:
    """Add the headline metric on test to the record, measured now and here for the student and for each file."""
    assert source.run is not None
    name = record["headline"] = source.run.headline
    for row in record["files"]:
        model = None if row["name"] == TORCH else OnnxModel(folder / row["name"], record["threads"])
        metrics = measure_with(reopened, source.subject, student, model)
        if name not in metrics:
            raise InputError(f"--evaluate: {name} was not measured on test, so there is nothing to compare")
        row["headline"] = metrics[name].value
        progress.line(f"test      {row['name']}: {name} {number(row['headline'])}")


def _refuse_difference(student: Student, agreements: dict[str, Agreement]) -> None:
    for name, found in agreements.items():
        allowed = TOLERANCE * max(1.0, found.scale)
        if not found.max_abs <= allowed:
            raise RunError(
                f"the ONNX file of a {student.name} gives other {name}: up to {found.max_abs:.2g} off, where "
                f"{allowed:.2g} is allowed; nothing was written"
            )


def describe(agreements: dict[str, Agreement]) -> str:
    """The first output's agreement, in words."""
    name, found = next(iter(agreements.items()))
    parts = [f"at most {found.max_abs:.2g} off"]
    parts += [] if found.cosine is None else [f"cosine {found.cosine:.4f}"]
    parts += [] if found.argmax is None else [f"same largest logit in {found.argmax:.1%}"]
    return f"{name}: {', '.join(parts)}"
