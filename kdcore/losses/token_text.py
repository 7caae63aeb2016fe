"""The texts that the tokens of a vocabulary stand for, so that vocabularies with different markers can be compared.

| kind | marker | example | its text |
|---|---|---|---|
| byte-level (GPT-2, Llama 3, Qwen) | ``Ġ`` is a space; every character is a byte | ``ĠcafÃ©`` | `` café`` |
| sentencepiece (Llama 2, T5, Gemma) | ``▁`` is a space | ``▁café`` | `` café`` |
| wordpiece (BERT) | ``##`` continues a word | ``café``, ``##s`` | `` café``, ``s`` |

A vocabulary is of the kind whose marker begins most of its tokens, never judged by one token: ``##`` is a heading in
GPT-2's. Not certain, and left out, are the byte tokens of sentencepiece (``<0x0A>``, used only where no other token
fits), byte-level tokens that are no whole characters, and what wordpiece separates without a trace of the spaces:
punctuation, symbols and Chinese characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["kind", "texts"]

_MARKERS = {"byte-level": "Ġ", "sentencepiece": "▁", "wordpiece": "##"}
_LEAST_SHARE = 0.02
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


def texts(student: Any, teacher: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Text to id of two tokenizers; the tokens themselves where both are of one kind. Special tokens begin with NUL.

    :param student: has ``get_vocab()``, and so has the teacher.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    alike = kind(ours) == kind(theirs)
    return _unambiguous(student, ours, alike), _unambiguous(teacher, theirs, alike)


def kind(vocabulary: Mapping[str, int]) -> str:
    """The name of a vocabulary's kind; empty where no marker begins at least a fiftieth of its tokens."""
    counts = {name: sum(token.startswith(marker) for token in vocabulary) for name, marker in _MARKERS.items()}
    name = max(counts, key=lambda name: counts[name])
    return name if counts[name] >= _LEAST_SHARE * len(vocabulary) else ""


def _unambiguous(tokenizer: Any, vocabulary: Mapping[str, int], literal: bool) -> dict[str, int]:
    special, text_of = _special(tokenizer), (lambda token: token) if literal else _TEXTS[kind(vocabulary)]
    found: dict[str, int] = {}
    twice = set()
    for token, index in vocabulary.items():
        text = f"\0{token}" if token in special else text_of(token)
        if text in found:
            twice.add(text)
        elif text:
            found[text] = index
    return {text: index for text, index in found.items() if text not in twice}


def _special(tokenizer: Any) -> set[str]:
    """The tokens that stand for no text, of a tokenizer of transformers or tokenizers."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None and hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    return {token.content for token in (added or {}).values() if token.special}


def _bytes_of_characters() -> dict[str, int]:
    """The characters by which GPT-2 writes bytes: printable Latin-1 for itself, all others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


def _of_byte_level(token: str) -> str | None:
    try:
        return bytes(_BYTES[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def _of_sentencepiece(token: str) -> str | None:
    return None if _BYTE_TOKEN.fullmatch(token) else token.replace("▁", " ")


def _of_wordpiece(token: str) -> str | None:
    word = token.removeprefix("##")
    if not word.isalnum() or _CHINESE.search(word):
        return None
    return word if token.startswith("##") else f" {word}"


_TEXTS: dict[str, Callable[[str], str | None]] = {
    "byte-level": _of_byte_level,
    "sentencepiece": _of_sentencepiece,
    "wordpiece": _of_wordpiece,
    "": lambda token: None,
}
