"""ONNX files: written from torch, quantised to int8, and run."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcore.errors import InputError, RunError
from kdcore.exporting.student import Student

__all__ = ["OnnxModel", "need_onnx", "quantize", "size_of", "write_graph"]

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LARGEST_FILE = 1_900_000_000  # a protobuf ends at 2 GiB; larger weights go to a file beside it
QUANTIZED = ("MatMul", "Gather")
WORTHWHILE = 0.75


def need_onnx() -> None:
    """Refuse to go on without the packages of the extra.

    :raises InputError: one of them is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"kdcore export needs {', '.join(missing)}: pip install 'kdcore[onnx]'")


def write_graph(student: Student, sample: Mapping[str, Tensor], path: Path) -> None:
    """Write a student as ONNX, with free batch and sequence axes.

    Attention is traced in its eager form, which onnxruntime fuses better than what torch makes of its own fused
    kernels. The file holds no trace of the Python code.

    :param sample: one batch of at least two inputs.
    :raises InputError: the model needs other inputs.
    :raises RunError: torch cannot trace the model.
    """
    before = student.transformer.config._attn_implementation
    axes = {name: {0: "batch", 1: "sequence"} if value.ndim == 2 else {0: "batch"} for name, value in sample.items()}
    with quiet(), torch.no_grad():
        names = _outputs_of(student, sample)
        student.transformer.set_attn_implementation("eager")
        try:
            program = torch.onnx.export(
                student.module,
                kwargs=dict(sample),
                dynamo=True,
                input_names=list(sample),
                output_names=names,
                dynamic_shapes={"inputs": axes},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "")
            raise RunError(f"torch cannot trace a {student.name} for ONNX ({reason})") from error
        finally:
            student.transformer.set_attn_implementation(before)
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        program.save(path, external_data=_bytes_of(student) > LARGEST_FILE)


def quantize(source: Path, target: Path) -> None:
    """Write the int8 form of an ONNX file (dynamic quantisation: activations are quantised as they come).

    Weights of matrix products and embeddings become int8, one scale an output channel, within 7 bits: the 8-bit
    products of x86 processors without VNNI would saturate, and the figures would differ from one machine to another.

    :raises InputError: the model has hardly any such weights.
    :raises OSError: the disk is full.
    """
    from google.protobuf.message import DecodeError
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        with quiet():
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=list(QUANTIZED),
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
    except DecodeError as error:  # of a copy beside the source, which onnx writes without a look at what became of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    if size_of(target) > WORTHWHILE * size_of(source):
        raise InputError(
            "int8 makes this model hardly smaller: only its matrix products and embeddings can be quantised, not its "
            "convolutions; leave --int8 away"
        )


def size_of(path: Path) -> int:
    """Bytes of an ONNX file, with those of the weights beside it."""
    return sum(part.stat().st_size for part in (path, path.with_name(f"{path.name}.data")) if part.exists())


class OnnxModel:
    """An ONNX file on the CPU: named tensors to named arrays.

    :param threads: as many as torch uses, so that the two can be compared.
    :ivar inputs: their names.
    :ivar outputs: their names.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads would slow torch's down
        self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        given = {name: inputs[name].numpy() for name in self.inputs}
        return dict(zip(self.outputs, self._session.run(self.outputs, given)))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of exporters, which no reader can act on, away from the terminal."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


def _outputs_of(student: Student, sample: Mapping[str, Tensor]) -> list[str]:
    try:
        return list(student.module(**sample))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise InputError(f"a {student.name} computes nothing from {', '.join(sample)} alone ({reason})") from error


def _bytes_of(student: Student) -> int:
    return sum(weight.numel() * weight.element_size() for weight in student.module.parameters())
