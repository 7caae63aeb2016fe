"""The demo's data: sizes, labels, no overlap, its attribution; its stories."""

from __future__ import annotations

from kd_plugin_emo_pillars.demo import demo_folder, demo_stories
from kd_plugin_emo_pillars.labelled import Columns, read_labelled
from kd_plugin_emo_pillars.narratives import read_stories
from kd_plugin_emo_pillars.taxonomy import GOEMOTIONS, read_taxonomy

TAXONOMY = read_taxonomy(GOEMOTIONS)
SPLITS = read_labelled(
    demo_folder(), Columns(), TAXONOMY, needs=("train", "validation", "test"), validation_share=0.2, seed=0
)


def test_sizes_are_those_that_its_readme_states() -> None:
    readme = (demo_folder() / "README.md").read_text("utf-8")
    sizes = [len(SPLITS[split]) for split in ("train", "validation", "test")]
    assert "{}, {} and {} short comments".format(*sizes) in readme
    assert "CC BY 4.0" in readme
    assert "Demszky et al. 2020" in readme
    assert sum(path.stat().st_size for path in demo_folder().glob("*.jsonl")) < 100_000


def test_every_label_occurs_in_every_split_and_no_text_in_two() -> None:
    texts: set[str] = set()
    for examples in SPLITS.values():
        assert {label for example in examples for label in example["labels"]} == set(TAXONOMY.labels)
        assert not texts & {example["text"].lower() for example in examples}
        texts |= {example["text"].lower() for example in examples}
    assert len(texts) == sum(map(len, SPLITS.values()))


def test_stories() -> None:
    stories = read_stories(demo_stories())
    assert len(stories) == 10
    assert all(100 <= len(text.split()) <= 200 for text in stories.values())
    assert "retold in our own words" in (demo_folder() / "README.md").read_text("utf-8")
