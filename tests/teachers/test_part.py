import numpy as np

from kdcore import Row
from kdcore.teachers.layout import Layout
from kdcore.teachers.part import Part, Writer

LAYOUT = Layout({"logits": Row(), "states": Row(lengths="ids")}, {"logits": [2], "states": []})
ROWS = [{"logits": [n, -n], "states": list(range(n))} for n in range(3)]
KEYS = [bytes([n]) * 16 for n in range(3)]


def append(writer, *numbers):
    encoded = [LAYOUT.encode({name: np.asarray(v, np.float32) for name, v in ROWS[n].items()}) for n in numbers]
    writer.append([KEYS[n] for n in numbers], *zip(*encoded))


def test_a_part_serves_one_writer_at_a_time(tmp_path):
    writer = Writer.acquire(tmp_path / "rows-0.index", LAYOUT)
    assert Writer.acquire(tmp_path / "rows-0.index", LAYOUT) is None
    append(writer, 0)
    writer.close()
    writer = Writer.acquire(tmp_path / "rows-0.index", LAYOUT)
    append(writer, 1)
    writer.close()
    assert Part(tmp_path / "rows-0.index", LAYOUT).verify() == []


def test_a_reader_takes_in_what_was_appended_since(tmp_path):
    writer, part = (make(tmp_path / "rows-0.index", LAYOUT) for make in (Writer.acquire, Part))
    assert not part.scan()
    for numbers in ((2, 0), (1,)):
        append(writer, *numbers)
        assert part.scan()
        assert not part.scan()
    assert part.records["key"].tolist() == [KEYS[2], KEYS[0][:0], KEYS[1]]  # numpy strips the zero bytes of key 0
    records = part.records
    raw = part.read(records["offset"].tolist(), LAYOUT.sizes(records["lengths"]).tolist(), records["crc"].tolist())
    columns = LAYOUT.decode(raw, records["lengths"].tolist())
    assert columns["logits"].tolist() == [[2, -2], [0, 0], [1, -1]]
    assert [states.tolist() for states in columns["states"]] == [[0, 1], [], [0]]
    part.close()
    writer.close()
