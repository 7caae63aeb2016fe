"""A saved student as one module of named tensors: what an exporter traces and what its files are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from attrs import frozen
from safetensors import SafetensorError
from torch import Tensor, nn

from kdcore.errors import InputError
from kdcore.files import read_json

__all__ = ["Student", "open_student"]

SUPPORTED = (
    "students that transformers or sentence-transformers load: encoders and classifiers of texts, classifiers of "
    "images, SentenceTransformers"
)
MAIN_INPUTS = ("input_ids", "pixel_values")
LONGEST = 512  # tokens of a text; longer inputs tell no more about an export


@frozen(eq=False)
class Student:
    """A student in eval mode on the CPU, in float32.

    :param name: the class of the model, for readers.
    :param library: ``"transformers"`` or ``"sentence-transformers"``, which load the folder.
    :param module: ``module(**inputs)`` gives output name to tensor, example on axis 0; the first output is what the
        student is for.
    :param transformer: the transformers model inside.
    :param tokenize: texts to the inputs of one padded batch; None where the folder has no tokenizer.
    """

    name: str
    library: str
    module: nn.Module
    transformer: Any
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]] | None

    @property
    def main_input(self) -> str:
        """``"input_ids"`` or ``"pixel_values"``."""
        return str(self.transformer.main_input_name)

    def select(self, fields: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors that the model's forward takes, by name, without labels."""
        return _inputs_of(self.transformer, fields)


class _Transformer(nn.Module):
    """The tensors among a transformers model's outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = self.model(**inputs, return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


class _SentenceTransformer(nn.Module):
    """The pooled vector of each text, and its tokens' vectors under the name that other loaders look for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        features = self.model(dict(inputs))
        return {
            "sentence_embedding": features["sentence_embedding"],
            "last_hidden_state": features["token_embeddings"],
        }


def open_student(folder: Path) -> Student:
    """Load a student folder; nothing in it is unpickled and none of its code is run.

    :raises InputError: it is none of those that can be exported, or its files do not fit together.
    """
    transformers.utils.logging.disable_progress_bar()
    if (folder / "modules.json").is_file():
        return _open_sentence_transformer(folder)
    if (folder / "config.json").is_file():
        return _open_transformer(folder)
    raise InputError(f"{folder}: neither config.json nor modules.json is in it; kdcore export writes {SUPPORTED}")


def _open_transformer(folder: Path) -> Student:
    kind = _architecture(folder)
    stray = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("model"))
    if stray:
        raise InputError(f"{folder / stray[0]}: weights that no {kind.__name__} has; kdcore export writes {SUPPORTED}")
    with _readable(folder):
        model, loaded = kind.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    wrong = sorted(str(key) for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loaded[keys])
    if wrong:
        raise InputError(f"{folder}: its weights are not those of a {kind.__name__} ({wrong[0]}); save it whole")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    tokenize = None
    if (folder / "tokenizer_config.json").is_file() and kind.main_input_name == "input_ids":
        with _readable(folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.pad_token is None:
            raise InputError(f"{folder}: its tokenizer has no padding token; set one and save it again")
        length = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", LONGEST), LONGEST)

        def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
            encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
            return _inputs_of(model, encoded)

    return Student(kind.__name__, "transformers", _Transformer(model).eval(), model, tokenize)


def _architecture(folder: Path) -> Any:
    """The model's class, which ``config.json`` names.

    :raises InputError: it is no class of transformers, decodes text, or reads neither texts nor images.
    """
    with _readable(folder):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    name = next(iter(config.architectures or ()), "")
    found = getattr(transformers, name, None) if name else None
    if not inspect.isclass(found) or not issubclass(found, transformers.PreTrainedModel):
        said = f"architectures = [{name!r}], which transformers does not have" if name else "no architectures"
        raise InputError(f"{folder / 'config.json'}: {said}; kdcore export writes {SUPPORTED}")
    kind: Any = found
    if config.is_encoder_decoder or kind.can_generate():
        raise InputError(
            f"{folder}: a {name} decodes text, for which an export needs a cache of keys and values that is not "
            f"written here; kdcore export writes {SUPPORTED}"
        )
    if kind.main_input_name not in MAIN_INPUTS:
        raise InputError(f"{folder}: a {name} reads {kind.main_input_name}; kdcore export writes {SUPPORTED}")
    return kind


def _open_sentence_transformer(folder: Path) -> Student:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise InputError(f"{folder} needs sentence-transformers: pip install sentence-transformers") from None
    settings = folder / "config_sentence_transformers.json"
    with _readable(folder):
        modules = [str(module["type"]) for module in read_json(folder / "modules.json")]
        kind = (read_json(settings) if settings.is_file() else {}).get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise InputError(f"{folder}: a {kind} is not exported; kdcore export writes {SUPPORTED}")
    foreign = [module for module in modules if not module.startswith("sentence_transformers.")]
    if foreign:
        raise InputError(f"{folder / 'modules.json'}: {foreign[0]} is no part of sentence-transformers")
    with _readable(folder):
        model = SentenceTransformer(
            str(folder),
            device="cpu",
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    found = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    if not found:
        raise InputError(f"{folder}: no transformer is in it; kdcore export writes {SUPPORTED}")

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        return _inputs_of(found[0], model.preprocess(list(texts)))

    return Student(kind, "sentence-transformers", _SentenceTransformer(model).eval(), found[0], tokenize)


def _inputs_of(transformer: Any, fields: Mapping[str, Any]) -> dict[str, Tensor]:
    taken = inspect.signature(transformer.forward).parameters
    return {
        name: value
        for name, value in fields.items()
        if name in taken and "label" not in name and isinstance(value, Tensor)
    }


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What transformers says of a damaged folder, as one line."""
    try:
        yield
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{folder}: cannot be loaded ({reason}); save the student again") from error
