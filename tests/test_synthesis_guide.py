"""The plugins of the guide to synthesis run as they stand there."""

import json
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "how-to" / "synthesize.md"
SOFT_LABELS = Path(__file__).parent / "methods" / "soft_labels.py"


@pytest.fixture
def plugins(tmp_path):
    """The joiners of the guide, in files."""
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    files = [tmp_path / name for name in ("writer.py", "no_shouting.py")]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block, encoding="utf-8")
    return files


def settings(server, *more):
    return ["steps=2", "evaluate_every=unset", "batch_size=8", f'writer.model.endpoint="{server.address}"', *more]


def texts(folder, number):
    path = folder / "arms" / "distill" / "seed-0" / "distil" / "rounds" / f"{number}.jsonl"
    return [json.loads(line)["data"]["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def sometimes_shouting(body, key):
    text = f"words of {key[:12]} and more"
    return json.dumps({"text": text.upper() if int(key[0], 16) % 2 else text})


def test_a_language_model_writes_for_another_method(execute, serve, plugins):
    folder = execute(*settings(serve()), plugins=(SOFT_LABELS, plugins[0]))
    assert [len(texts(folder, number)) for number in (0, 1)] == [16, 16]


def test_a_joiner_drops_examples_and_each_round_keeps_its_number(execute, serve, plugins):
    assert len(plugins[1].read_text(encoding="utf-8").splitlines()) <= 15
    server = serve(answer=sometimes_shouting)
    folder = execute(*settings(server, "writer.take=12"), plugins=(SOFT_LABELS, *plugins))
    for number in (0, 1):
        assert len(texts(folder, number)) == 12
        assert not any(text.isupper() for text in texts(folder, number))
    shouted = execute(*settings(server, "writer.take=12"), plugins=(SOFT_LABELS, plugins[0]), out="shouted")
    assert any(text.isupper() for text in texts(shouted, 0))
