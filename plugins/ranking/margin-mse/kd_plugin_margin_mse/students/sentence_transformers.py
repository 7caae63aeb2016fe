"""The files that make a saved encoder a sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcore.files import write_json

__all__ = ["write_sentence_transformer"]


def write_sentence_transformer(
    folder: Path,
    model_type: str,
    similarity: str,
    modules: Sequence[tuple[str, str, dict[str, Any]]],
    query_length: int,
    passage_length: int,
) -> None:
    """Write ``modules.json`` and the configurations beside a saved encoder and tokenizer.

    :param model_type: ``"SentenceTransformer"`` or ``"MultiVectorEncoder"``.
    :param similarity: its ``similarity_fn_name``.
    :param modules: what follows the transformer: (folder, class, configuration).
    :param query_length: where ``encode_query`` cuts; ``encode_document`` and ``encode`` cut at ``passage_length``.
    """
    chain = [("", "sentence_transformers.base.modules.transformer.Transformer"), *((m[0], m[1]) for m in modules)]
    write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(chain)],
    )
    for path, _, configuration in modules:
        write_json(folder / path / "config.json", configuration)
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
            "query_length": query_length,
            "document_length": passage_length,
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": model_type,
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": similarity,
        },
    )
