import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kdcore import Example, InputError, Run, Splits
from kdcore.data.splits import example_from_json, example_to_json, inspect_splits
from kdcore.errors import RunError


def examples(prefix, texts, group=""):
    return [Example({"text": text}, id=f"{prefix}{i}", group=group) for i, text in enumerate(texts)]


def test_a_sealed_split_cannot_be_read_and_opens_again():
    splits = Splits({"train": examples("a", "xy"), "test": examples("b", "z")})
    with splits.sealed("test", when="in training"):
        assert len(splits["train"]) == 2
        with pytest.raises(RunError, match="the test split was read in training"):
            splits["test"]
        with splits.unsealed():
            assert len(splits["test"]) == 1
        with pytest.raises(RunError):
            splits["test"]
    assert len(splits["test"]) == 1


def test_a_seal_is_lifted_for_one_thread_only():
    splits = Splits({"test": examples("b", "z")})
    lifted = threading.Barrier(2, timeout=10)

    def validate():
        with splits.unsealed():
            lifted.wait()
            lifted.wait()
            return len(splits["test"])

    with ThreadPoolExecutor() as threads, splits.sealed("test", when="in training"):
        validation = threads.submit(validate)
        lifted.wait()
        with pytest.raises(RunError, match="the test split was read in training"):
            splits["test"]
        lifted.wait()
        assert validation.result() == 1


def test_blocks_of_several_threads_that_overlap_leave_the_right_seals():
    splits = Splits({"train": examples("a", "y"), "test": examples("b", "z")})
    training = splits.sealed("test", when="in training")
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second, training:
        one, other = splits.unsealed(), splits.unsealed()
        reading = splits.sealed("train", when="while it is counted")
        for thread, step in (
            (first, one.__enter__), (second, other.__enter__), (second, reading.__enter__),
            (first, lambda: one.__exit__(None, None, None)), (second, lambda: other.__exit__(None, None, None)),
        ):  # fmt: skip
            thread.submit(step).result()
        for thread in (first, second):
            with pytest.raises(RunError, match="the test split was read in training"):
                thread.submit(splits.__getitem__, "test").result()
        with pytest.raises(RunError, match="the train split was read while it is counted"):
            splits["train"]
        second.submit(reading.__exit__, None, None, None).result()
        assert len(splits["train"]) == 1
    assert len(splits["test"]) == 1


def test_threads_of_map_see_the_seals_of_who_called_it(tmp_path):
    run = Run(folder=tmp_path)
    run.data = Splits({"test": examples("b", "z")})
    with run.data.sealed("test", when="in training"):
        refused = run.map(lambda name: len(run.data[name]), ["test"])
        with run.data.unsealed():
            assert list(run.map(lambda name: len(run.data[name]), ["test"])) == [1]
            with pytest.raises(RunError, match="the test split was read in training"):
                list(refused)


def test_leaks_and_duplicates_are_found_case_and_blanks_aside():
    splits = Splits(
        {
            "train": examples("a", ["one  two", "three", "Three"]),
            "test": examples("b", ["One two", "four", "five", "six"]),
        }
    )
    found = inspect_splits(splits, ("text",))
    assert found.leaks == ("train a0 = test b0",)
    assert found.duplicates == {"train": 1, "test": 0}


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train": examples("a", "xyz"), "test": examples("b", "xyz")}, "3 of 3 test examples are also in train"),
        ({"train": [Example({}, id="1")] * 2}, "ids twice, first '1'"),
        ({"train": examples("a", "x", "story"), "test": examples("b", "y", "story")}, "groups are in both"),
    ],
)
def test_what_makes_figures_worthless_is_refused(splits, words):
    with pytest.raises(InputError, match=words):
        inspect_splits(Splits(splits), ("text",))


def test_the_fingerprint_changes_with_any_example():
    base = {"train": examples("a", "xyz"), "corpus": examples("c", "pq")}
    before = Splits(base).fingerprint()
    assert Splits(dict(reversed(base.items()))).fingerprint() == before
    for changed in ({**base, "corpus": examples("c", "pr")}, {**base, "train": examples("b", "xyz")}, {"train": []}):
        assert Splits(changed).fingerprint() != before


def test_examples_survive_json():
    example = Example({"a": 1}, id="i", group="g", teacher="t", parents=("p",), answers=("q",), origin="o")
    assert example_to_json(example_from_json(json.loads(json.dumps(example_to_json(example))))) == example_to_json(
        example
    )
