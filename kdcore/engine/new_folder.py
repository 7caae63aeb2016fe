"""The folder of a new run: which one, whether it may be used, and whether there is something in it to save."""

from __future__ import annotations

import shlex
import time
import tomllib
from contextlib import closing
from pathlib import Path

from kdcore.config import Configuration
from kdcore.errors import InputError, KDCoreError
from kdcore.files import read_json
from kdcore.synthesis.journal_file import JOURNAL, explained, open_existing
from kdcore.synthesis.journal_totals import totals_of

BEFORE_THE_START = {".lock", "events.log", "data.json", "identity.json"}


def new_folder(configuration: Configuration) -> Path:
    """The folder that ``--out`` names, which must be new or empty, or a new one under ``runs/``."""
    owner = next(iter(configuration.plugins))
    if not configuration.run.out:
        return Path("runs") / f"{owner}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(configuration.run.out)
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: is a file; name a folder")
        inside = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be read ({error.strerror}); name another folder") from None
    if any(path.name not in BEFORE_THE_START or path.is_dir() for path in inside):
        resumable = (folder / "config.toml").is_file()
        resume = f"go on with: kdcore run --resume {shlex.quote(str(folder))}, or " if resumable else ""
        raise InputError(f"--out {folder}: is not empty; {resume}name a new folder")
    return folder


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror}); name a folder that can") from None
    return folder


def has_results(folder: Path) -> bool:
    """Whether a resumption would save something: stored teacher outputs, paid answers, a checkpoint, a done stage."""
    patterns = ("store/*/rows-*.index", "**/checkpoints/step-*", "**/done.json")
    return any(True for pattern in patterns for _ in folder.glob(pattern)) or _has_paid_answers(folder)


def _has_paid_answers(folder: Path) -> bool:
    """Whether the run's journal, its own or that of ``--store``, holds an answer that it paid for, or is damaged."""
    file = folder / "config.toml"
    options = tomllib.loads(file.read_text(encoding="utf-8")).get("run", {}) if file.is_file() else {}
    journal = Path(options.get("store") or folder / "store") / JOURNAL
    if not journal.is_file():
        return False
    try:
        with closing(open_existing(journal)) as connection, explained(journal):
            return totals_of(connection, run=read_json(folder / "plan.json")["id"]).requests > 0
    except KDCoreError:
        return True
