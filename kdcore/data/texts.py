"""When two texts are the same."""

from __future__ import annotations

import unicodedata

__all__ = ["normalised"]


def normalised(text: str) -> str:
    """The text without what makes no other text of it: case, white space, compatibility forms (NFKC).

    Duplicates, leaks into evaluation and rows that have to stay together are all told by it.
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())
