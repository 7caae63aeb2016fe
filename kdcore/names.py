"""What a name must be to name a file or folder: arms, stages, modules, teachers, targets and yardsticks do."""

from __future__ import annotations

from typing import Any

__all__ = ["LONGEST", "RULE", "is_name"]

LONGEST = 100  # bytes: room for the hashes, numbers and suffixes that files add to a name; 255 is usual for the whole
RULE = f"a name of a file: not empty, no '/', no '\\', no control characters, not '.' or '..', at most {LONGEST} bytes"


def is_name(name: Any) -> bool:
    """Whether it can name one file or folder, and reaches no other."""
    if not isinstance(name, str) or name in ("", ".", "..") or not {"/", "\\"}.isdisjoint(name):
        return False
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return False
    try:
        return len(name.encode()) <= LONGEST
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
