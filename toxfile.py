"""Lets the environments of tox.ini share one installation, so that torch is installed once.

tox recreates an environment whose folder was last used under another name. Those of tox.ini have one folder,
the same dependencies and the same Python, so their names need not be told apart; every other check of tox
(changed dependencies, constraints, Python version, ``--recreate``) still holds.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.info import Info
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner
from tox.tox_env.register import ToxEnvRegister


class NamelessInfo(Info):
    """What tox remembers of an environment's last use, without the name it was used under."""

    @contextmanager
    def compare(
        self, value: Any, section: str, sub_section: str | None = None
    ) -> Generator[tuple[bool, Any | None], None, None]:
        if section == ToxEnv.__name__:
            value = {**value, "name": "shared"}
        with super().compare(value, section, sub_section) as equal_and_old:
            yield equal_and_old


class SharedRunner(VirtualEnvRunner):
    """A virtual environment that several tox environments use in turn (``runner = shared``)."""

    @staticmethod
    def id() -> str:
        return "shared"

    @property
    def cache(self) -> Info:
        return NamelessInfo(self.env_dir)


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    register.add_run_env(SharedRunner)
