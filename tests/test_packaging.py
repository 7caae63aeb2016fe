"""The distributions of this repository: their metadata, their wheels, and the files that install and test them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PAPERS = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
BUNDLES = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
DISTRIBUTIONS = [ROOT, *PAPERS, *BUNDLES]


def relative(folder: Path) -> str:
    return folder.relative_to(ROOT).as_posix()


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def requirements(folder: Path) -> dict[str, Requirement]:
    """What a distribution needs, with its development tools, by canonical name."""
    table = project(folder)
    lines = [*table["dependencies"], *table.get("optional-dependencies", {}).get("dev", [])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def is_lower_bound(requirement: Requirement) -> bool:
    return any(specifier.operator in (">=", "~=") for specifier in requirement.specifier)


OWN = {project(folder)["name"]: project(folder)["version"] for folder in DISTRIBUTIONS}
PINS = pins()


def test_every_domain_has_papers_and_a_bundle() -> None:
    assert PAPERS
    assert {folder.parent for folder in PAPERS} == set(BUNDLES)


@pytest.mark.parametrize("folder", DISTRIBUTIONS, ids=relative)
def test_licence_is_stated_and_shipped(folder: Path) -> None:
    text = (folder / "LICENSE").read_bytes()
    assert project(folder)["license"] == "Apache-2.0"
    assert text == (ROOT / "LICENSE").read_bytes()
    assert b"END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("folder", PAPERS, ids=relative)
def test_paper_names_itself_in_its_metadata(folder: Path) -> None:
    table = project(folder)
    package = f"kd_plugin_{folder.name.replace('-', '_')}"
    assert table["name"] == f"kd-plugin-{folder.name}"
    assert list(table["entry-points"]["kdcore.plugins"]) == [folder.name]
    assert re.fullmatch(rf"{package}:[A-Z]\w+", table["entry-points"]["kdcore.plugins"][folder.name])
    assert [word for word in table["keywords"] if word.startswith("domain:")] == [f"domain:{folder.parent.name}"]
    assert [word for word in table["keywords"] if re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", word)]


@pytest.mark.parametrize("folder", PAPERS, ids=relative)
def test_paper_states_the_oldest_kdcore_it_works_with(folder: Path) -> None:
    kdcore = requirements(folder)["kdcore"]
    assert is_lower_bound(kdcore)
    assert kdcore.specifier.contains(OWN["kdcore"])


@pytest.mark.parametrize("folder", BUNDLES, ids=relative)
def test_bundle_needs_every_paper_of_its_domain(folder: Path) -> None:
    needed = requirements(folder)
    assert project(folder)["name"] == f"kd-plugin-{folder.name}"
    assert f"domain:{folder.name}" in project(folder)["keywords"]
    assert "entry-points" not in project(folder)
    assert set(needed) == {project(paper)["name"] for paper in PAPERS if paper.parent == folder}
    for name, requirement in needed.items():
        assert is_lower_bound(requirement), f"{name} without a lower bound"
        assert requirement.specifier.contains(OWN[name])


@pytest.mark.parametrize("folder", DISTRIBUTIONS, ids=relative)
def test_constraints_pin_a_version_that_is_allowed(folder: Path) -> None:
    for name, requirement in requirements(folder).items():
        if name not in OWN:
            assert name in PINS, f"constraints.txt does not pin {name}"
            assert requirement.specifier.contains(PINS[name]), f"{requirement} against {PINS[name]}"


def test_constraints_pin_a_tox_that_is_new_enough() -> None:
    (oldest,) = re.findall(r"^min_version = (.+)$", (ROOT / "tox.ini").read_text("utf-8"), re.MULTILINE)
    assert PINS["tox"] >= Version(oldest)


def test_development_installs_every_distribution() -> None:
    lines = (ROOT / "requirements" / "dev.txt").read_text("utf-8").splitlines()
    editable = [line.removeprefix("-e ") for line in lines if line.startswith("-e ")]
    assert sorted(editable) == sorted([".[datasets,dev,llama,onnx]", *map(relative, PAPERS), *map(relative, BUNDLES)])


@pytest.mark.parametrize("folder", DISTRIBUTIONS, ids=relative)
def test_wheel_holds_the_whole_package_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    if folder in BUNDLES:
        assert names == metadata
        return
    package = folder / str(project(folder)["name"]).replace("-", "_")
    source = {path.relative_to(folder).as_posix() for path in package.rglob("*") if path.is_file()}
    assert names - metadata == {name for name in source if "__pycache__" not in name}
    assert f"{package.name}/py.typed" in names
    assert not any("tests" in Path(name).parts for name in names)


def test_readme_and_ci_give_the_same_commands() -> None:
    install = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt tox && .venv/bin/tox run -e "
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert install + "demo" in readme
    assert install + "test" in readme
    assert install + "test" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_no_file_names_a_folder_of_its_author() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    absolute = re.compile(r"(?<![\w.~-])/(?:work|root|home)/")
    found = []
    for name in filter(None, listed.split("\0")):
        try:
            text = (ROOT / name).read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{name}:{number}" for number, line in enumerate(text.splitlines(), 1) if absolute.search(line)]
    assert found == []
