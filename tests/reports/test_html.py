from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from kdcore.errors import InputError
from kdcore.reports import write_all
from kdcore.reports.html import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects attributes and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def images(found):
    return [attributes for tag, attributes in found.tags if tag == "img"]


def test_the_page_asks_nothing_of_the_network(run_folder):
    found = page(run_folder)
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert name not in attributes or attributes[name].startswith("data:image/svg+xml;base64,")


def test_plots_are_images_with_words_that_follow_the_theme(run_folder):
    found = images(page(run_folder))
    assert len(found) == 6
    for attributes in found:
        assert attributes["alt"]
        svg = base64.b64decode(attributes["src"].partition(",")[2]).decode()
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme:dark" in svg
        assert "currentColor" in svg
        assert "http" not in svg.replace("http://www.w3.org", "")
    losses = next(a["alt"] for a in found if a["alt"].startswith("soft-labels/ce"))
    assert re.match(r"soft-labels/ce: distill [\d.]+ to [\d.]+, control [\d.]+ to [\d.]+$", losses)


def test_the_page_tells_finding_table_and_fairness(run_folder):
    words = page(run_folder).words
    for part in (
        "Distillation helped",
        "14.2x smaller",
        "same initial weights",
        "better",
        "Leaks between splits: none",
    ):
        assert part in words
    assert "kdcore run --config mine/config.toml --out mine-again" in words


def test_text_of_others_is_escaped(run_folder):
    (run_folder / "data.json").write_text(json.dumps({"leaks": ["<i>t</i> <img src=x onerror=y>"]}))
    (run_folder / "config.toml").write_text("a = '</pre><script>alert(1)</script>'\n")
    plan = json.loads((run_folder / "plan.json").read_text())
    plan["arms"][0]["because"] = "<b>why</b>"
    (run_folder / "plan.json").write_text(json.dumps(plan))
    found = page(run_folder)
    assert not {"script", "i", "b"} & {tag for tag, _ in found.tags}
    assert "<img src=x onerror=y>" in found.words


def test_a_dollar_in_a_name_is_no_formula(run_folder):
    for path in run_folder.glob("arms/*/*/*/metrics.jsonl"):
        path.write_text(path.read_text().replace("soft-labels/ce", "cost in $ & <$x"))
    assert any(a["alt"].startswith("cost in $ & <$x") for a in images(page(run_folder)))


@pytest.mark.parametrize("distils", [True, False])
def test_the_title_follows_the_figures(make, tmp_path, distils):
    words = page(make(tmp_path / "run", distils=distils)).words
    assert ("Distillation helped" in words) is distils
    assert ("The claim does not hold here" in words) is not distils


def test_a_run_without_control_shows_the_command(make, tmp_path):
    found = page(make(tmp_path / "alone", seeds=(0,), compare=False))
    assert "No comparison" in found.words
    assert "--compare --seeds 3 --out alone-compared" in found.words
    assert "Is it more than chance?" not in found.words


def test_a_run_that_has_only_begun(run_folder):
    for path in [*run_folder.glob("arms/*/*/*.json"), *run_folder.glob("teachers/*/*"), *run_folder.glob("*.toml")]:
        path.unlink()
    for name in ("environment.json", "data.json"):
        (run_folder / name).unlink()
    for path in run_folder.glob("arms/*/*/*/*"):
        if path.name == "done.json":
            path.unlink()
        elif path.name == "metrics.jsonl":
            path.write_text(path.read_text()[:600])
    found = page(run_folder)
    assert "kdcore run --resume mine" in found.words
    assert images(found)


def test_stages_that_arms_share_are_drawn_once(run_folder):
    plan = json.loads((run_folder / "plan.json").read_text())
    (run_folder / "plan.json").write_text(json.dumps(plan | {"stages": ["warm-up", "distil"]}))
    for seed in range(3):
        place = run_folder / "shared" / f"seed-{seed}" / "warm-up"
        place.mkdir(parents=True)
        (place / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    alts = [a["alt"] for a in images(page(run_folder))]
    assert alts.count("loss: shared 2.000 to 1.000") == 1


def test_all_files_are_written_and_the_same_again(run_folder):
    paths = write_all(run_folder)
    assert [paths[0].name, paths[-1].name, len(paths)] == ["result.json", "report.html", 8]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_all(run_folder)] == first


def test_a_broken_line_of_metrics_is_named(run_folder):
    path = run_folder / "arms/distill/seed-0/distil/metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(InputError, match=r"metrics\.jsonl:1"):
        write_report(run_folder)
