"""The students of the paper: BERT_DOT, ColBERT, PreTT and TK, behind one interface.

A student represents queries and passages apart and scores represented pairs, so training, re-ranking and
re-ranking from stored passages are the same arithmetic::

    tokenizer = load_tokenizer(model)
    student = build_student("colbert", model, layers=2)
    queries = student.represent_queries(*tokenize(tokenizer, ["what is margin mse"], student.query_length))
    passages = student.represent_passages(*tokenize(tokenizer, texts, student.passage_length))
    scores = student.score(queries.expand(len(texts)), passages)
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kd_plugin_margin_mse.students.base import OPTIONS_FILE, RankingStudent, Represented
from kd_plugin_margin_mse.students.bert_dot import BertDot, Pooling
from kd_plugin_margin_mse.students.colbert import ColBERT
from kd_plugin_margin_mse.students.encoder import embedding_matrix, encoder_blocks, load_encoder
from kd_plugin_margin_mse.students.prett import PreTT
from kd_plugin_margin_mse.students.tk import TK
from kd_plugin_margin_mse.students.tokenizer import load_tokenizer, padded, token_rows, tokenize, word_vector_matrix
from kdcore.errors import InputError
from kdcore.files import read_json

__all__ = [
    "TK",
    "Architecture",
    "BertDot",
    "ColBERT",
    "Pooling",
    "PreTT",
    "RankingStudent",
    "Represented",
    "build_student",
    "load_student",
    "load_tokenizer",
    "padded",
    "token_rows",
    "tokenize",
]

Architecture = Literal["bert_dot", "colbert", "prett", "tk"]

STUDENTS: dict[str, type[RankingStudent]] = {kind.architecture: kind for kind in (BertDot, ColBERT, PreTT, TK)}


def build_student(
    architecture: Architecture,
    model: str,
    *,
    layers: int | None = None,
    pooling: Pooling = "cls",
    dim: int = 768,
    split: int | None = None,
    query_length: int = 30,
    passage_length: int = 200,
) -> RankingStudent:
    """Make an untrained student; what a model does not give starts from torch's global generator.

    :param model: a folder, hub name, sentence-transformers folder (its inner transformer) or ``package:MODULE``;
        a folder with ``config.json`` but no weights starts at random. For TK also a file of word vectors (GloVe);
        from a model it takes the matrix of its token embeddings.
    :param layers: BERT_DOT, ColBERT, PreTT: keep only so many evenly spaced encoder layers, None keeps all
        (see `keep_layers`). TK: its own transformer layers, None is 2.
    :param pooling: BERT_DOT: ``"cls"`` as in the paper, or ``"mean"``.
    :param dim: ColBERT: width of the token vectors.
    :param split: PreTT: layers that see query and passage apart; None is half of them.
    :param query_length: tokens of a query, special tokens included.
    :param passage_length: tokens of a passage.
    :raises InputError: an unknown architecture, no such model, or sizes that do not fit it.
    """
    if architecture not in STUDENTS:
        raise InputError(f"architecture {architecture!r}: choose {', '.join(STUDENTS)}")
    if architecture == "tk":
        special_ids = list(load_tokenizer(model).all_special_ids)
        file = Path(model)
        vectors = word_vector_matrix(file) if file.is_file() else embedding_matrix(model)
        return TK(vectors, special_ids, layers=layers or 2, query_length=query_length, passage_length=passage_length)
    encoder = load_encoder(model, layers)
    if architecture == "bert_dot":
        return BertDot(encoder, pooling=pooling, query_length=query_length, passage_length=passage_length)
    if architecture == "colbert":
        return ColBERT(encoder, dim=dim, query_length=query_length, passage_length=passage_length)
    apart = len(encoder_blocks(encoder)) // 2 if split is None else split
    return PreTT(encoder, split=apart, query_length=query_length, passage_length=passage_length)


def load_student(folder: Path) -> RankingStudent:
    """The student that `RankingStudent.save` wrote, on the CPU in eval mode.

    :raises InputError: the folder holds no student.
    """
    path = folder / OPTIONS_FILE
    if not path.is_file():
        raise InputError(f"{path}: not found; name the folder of a saved student")
    options = read_json(path)
    architecture = options.get("architecture") if isinstance(options, dict) else None
    if architecture not in STUDENTS:
        raise InputError(f"{path}: architecture {architecture!r}; expected one of {', '.join(STUDENTS)}")
    return STUDENTS[architecture].load(folder)
