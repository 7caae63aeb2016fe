"""A joiner of at most 15 lines drops examples, and each round still keeps its number."""

from __future__ import annotations

import json
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_a_filter_joins(run, server, tmp_path: Path) -> None:
    [block] = re.findall(r"```python\n(from attrs.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(block.splitlines()) <= 15
    joiner = tmp_path / "my_filter.py"
    joiner.write_text(block, encoding="utf-8")

    def texts(folder: Path) -> list[list[str]]:
        rounds = folder / "arms" / "distill" / "seed-0" / "guided" / "rounds"
        return [
            [json.loads(line)["data"]["text"] for line in (rounds / f"{n}.jsonl").read_text("utf-8").splitlines()]
            for n in (0, 1)
        ]

    alone = texts(run(server.address, out="alone"))
    joined = texts(run(server.address, joiner, out="joined", settings=('my-filter.word="amber"',)))
    assert [len(each) for each in alone] == [len(each) for each in joined] == [6, 6]
    assert any("amber" in text for each in alone for text in each)
    assert not any("amber" in text for each in joined for text in each)
