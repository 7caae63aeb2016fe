"""Convert the NPL (Vaswani) collection to a BEIR folder: ``python benchmarks/npl_to_beir.py DATA/npl FOLDER``.

Reads ``doc-text``, ``query-text`` and ``rlv-ass``; each is a series of records: a number line, lines of text, a line
with ``/``. Queries are lower-cased as the documents are. There are no train queries: all judgements are test.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def records(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (number, text with single blanks) of one file.

    :raises ValueError: a record does not begin with a number.
    """
    lines: list[str] = []
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        if line.strip() != "/":
            lines.append(line)
            continue
        identifier, *text = " ".join(lines).split() or [""]
        if not re.fullmatch(r"\d+", identifier):
            raise ValueError(f"{path}:{number}: the record before this line begins with {identifier!r}, not a number")
        yield identifier, " ".join(text)
        lines = []


def convert(source: Path, target: Path) -> dict[str, int]:
    """Write ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv``; return how many rows each has."""
    documents = dict(records(source / "doc-text"))
    queries = dict(records(source / "query-text"))
    judged = [(query, document) for query, text in records(source / "rlv-ass") for document in text.split()]
    unknown = {document for _, document in judged} - documents.keys()
    if unknown:
        print(f"left out judgements of documents that {source / 'doc-text'} lacks: {', '.join(sorted(unknown))}")
        judged = [(query, document) for query, document in judged if document in documents]
    (target / "qrels").mkdir(parents=True, exist_ok=True)
    with (target / "corpus.jsonl").open("w") as file:
        for identifier, text in documents.items():
            file.write(json.dumps({"_id": identifier, "title": "", "text": text}) + "\n")
    with (target / "queries.jsonl").open("w") as file:
        for identifier, text in queries.items():
            file.write(json.dumps({"_id": identifier, "text": text.lower()}) + "\n")
    with (target / "qrels/test.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        file.writelines(f"{query}\t{document}\t1\n" for query, document in judged)
    return {"documents": len(documents), "queries": len(queries), "judgements": len(judged)}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/npl_to_beir.py DATA/npl FOLDER")
    print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
