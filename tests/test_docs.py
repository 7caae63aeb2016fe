"""The documentation is what the code prints, its links lead somewhere, and its tutorial runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "plugins").glob("*/README.md")])
PAGES += sorted((ROOT / "plugins").glob("*/*/README.md"))
TUTORIAL = DOCS / "tutorial" / "first-plugin.md"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["hooks.md", "command-line.md"])
def test_generated_pages_are_up_to_date(generator, name):
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == generator.PAGES[name](), (
        "run: python docs/generate_reference.py"
    )


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_on_the_map():
    linked = set(re.findall(r"\]\(([^)#\s]+)", (DOCS / "index.md").read_text(encoding="utf-8")))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"index.md"}
    assert pages <= linked


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    path = tmp_path / "soft_labels.py"
    path.write_text(blocks(TUTORIAL, "python")[0], encoding="utf-8")
    return path


def test_the_method_of_the_tutorial_has_at_most_60_lines(tutorial):
    assert len(tutorial.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_tutorial_runs(tutorial, kdcore, tmp_path):
    [command] = [line for line in blocks(TUTORIAL, "console")[0].splitlines() if line.startswith("$ kdcore run")]
    arguments = command.removeprefix("$ kdcore ").split()
    done = kdcore(*arguments, "--max-steps", "4", "--seeds", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "first" / "result.json").read_text(encoding="utf-8"))
    assert {(row["arm"], row["subject"]) for row in result["rows"]} >= {
        ("distill", "student"),
        ("control", "student"),
        (None, "large"),
    }
    [entry] = result["comparison"]
    assert entry["equal"] == {"initial_weights": True, "order": True, "steps": True}


def test_the_packaging_of_the_tutorial_is_an_entry_point(tmp_path):
    import tomllib

    [project] = [tomllib.loads(block)["project"] for block in blocks(TUTORIAL, "toml")]
    assert project["entry-points"]["kdcore.plugins"] == {"soft-labels": "kd_plugin_soft_labels:SoftLabels"}
    assert any(keyword.startswith("domain:") for keyword in project["keywords"])
    assert any(keyword.startswith("arXiv:") for keyword in project["keywords"])
