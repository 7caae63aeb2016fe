"""Where the row of each key lies, over all parts of a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcore.teachers.fingerprint import KEY_BYTES, Key
from kdcore.teachers.part import Part


class Table:
    """Sorted arrays of all finished rows (some 70 bytes each), and a dictionary of those appended since.

    :param dtype: of the parts' records.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.parts: list[Part] = []
        self._records = np.empty(0, dtype)
        self._owners = np.empty(0, np.int32)
        self._order = np.empty(0, np.int64)
        self._keys = np.empty(0, f"S{KEY_BYTES}")
        self._appended: dict[Key, tuple[np.void, int]] = {}

    def __len__(self) -> int:
        return len(self._keys) + len(self._appended)

    def keys(self) -> list[Key]:
        """The keys of all rows, in the order in which the rows lie in the parts."""
        found = self._records["key"][np.sort(self._order)].tolist()
        return [key.ljust(KEY_BYTES, b"\0") for key in found] + [*self._appended]

    def rebuild(self, parts: Sequence[Part]) -> None:
        """Sort the rows of parts by key; of several rows of one key, the first part's counts."""
        self.parts = list(parts)
        counts = [len(part.records) for part in parts]
        self._records = np.concatenate([part.records for part in parts])
        for part, records in zip(parts, np.split(self._records, np.cumsum(counts)[:-1])):
            part.records = records
        self._owners = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        keys = np.ascontiguousarray(self._records["key"])
        order = np.argsort(keys, kind="stable")
        first = np.ones(len(keys), bool)
        first[1:] = keys[order[1:]] != keys[order[:-1]]
        self._order = order[first]
        self._keys = keys[self._order]
        self._appended.clear()

    def add(self, keys: Sequence[Key], records: np.ndarray, part: Part) -> None:
        """Take in new rows of a part, to be found without sorting."""
        if part not in self.parts:
            self.parts.append(part)
        owner = self.parts.index(part)
        self._appended.update((key, (record, owner)) for key, record in zip(keys, records))

    def find(self, keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Look keys up.

        :return: whether each has a row, its record, and the position of its part in ``parts``; each ``(keys,)``.
        """
        if len(self._keys):
            wanted = np.frombuffer(b"".join(keys), self._keys.dtype)
            at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
            found, at = self._keys[at] == wanted, self._order[at]
            records, owners = self._records[at], self._owners[at]
        else:
            found, records = np.zeros(len(keys), bool), np.zeros(len(keys), self._records.dtype)
            owners = np.zeros(len(keys), np.int32)
        if self._appended:
            for position in np.flatnonzero(~found).tolist():
                if keys[position] in self._appended:
                    found[position] = True
                    records[position], owners[position] = self._appended[keys[position]]
        return found, records, owners
