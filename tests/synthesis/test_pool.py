import pytest

from kdcore import Example, InputError
from kdcore.errors import PluginError
from kdcore.recipe import Synth
from kdcore.synthesis.pool import draw, pool_of, read_sealed, seal


def stream(names, closed, teacher=""):
    try:
        for name in names:
            yield Example({"text": name}, id=name, teacher=teacher)
    finally:
        closed.append("".join(names))


def test_streams_are_chained_drawn_lazily_and_closed():
    closed = []
    streams = [("p", stream("abc", closed)), ("q", stream("defg", closed)), ("r", stream("xyz", closed))]
    assert [e.id for e in draw(streams, take=5, control=False)] == list("abcde")
    assert closed == ["abc", "defg"]


def test_the_control_draws_on_past_what_carries_a_teacher():
    streams = [("p", stream("abc", [], teacher="llm")), ("q", stream("de", []))]
    assert [e.id for e in draw(streams, take=1, control=True)] == ["d"]


def test_bad_streams_name_their_plugin():
    with pytest.raises(
        PluginError, match="data_synth of plugin mine gave the id 'a', which is empty or already in the pool"
    ):
        list(draw([("mine", stream("aba", []))], take=None, control=False))
    with pytest.raises(PluginError, match="data_synth of plugin mine gave a str"):
        list(draw([("mine", iter(["text"]))], take=None, control=False))


def test_rounds_are_sealed_and_windowed(tmp_path):
    paths = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for path, names in zip(paths, ("ab", "cd", "ef")):
        seal(path, stream(names, []))
    split = [Example({}, id="s")]
    assert [e.id for e in pool_of(split, paths, Synth(rounds=3))] == list("sabcdef")
    assert [e.id for e in pool_of(None, paths, Synth(rounds=3, window=1))] == list("ef")
    assert pool_of(split, [], None) is split


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "0.jsonl"
    path.write_text('{"id": "a", "data": {}}\n{"id": \n')
    with pytest.raises(InputError, match=r"0\.jsonl:2: no sealed example"):
        read_sealed(path)


def test_any_text_of_a_teacher_is_sealed(tmp_path):
    texts = ["é", "lone \ud800", "\udc00\0", "\U0001f600"]
    seal(tmp_path / "0.jsonl", [Example({"text": text}, id=str(n)) for n, text in enumerate(texts)])
    assert [example["text"] for example in read_sealed(tmp_path / "0.jsonl")] == texts
    assert '"é"' in (tmp_path / "0.jsonl").read_text("utf-8")
