"""The errors that kdcore shows as one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcore.teachers.text import Completion


class KDCoreError(Exception):
    """An error whose text is one clear line; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(KDCoreError):
    """The user's input is wrong: the message names the file, key or row, and the fix (exit code 2)."""

    exit_code = 2


class PluginError(InputError):
    """A plugin cannot be used: the message names the plugin, its distribution and the reason (exit code 2)."""


class TeacherRefusedError(PluginError):
    """The control arm has no teacher; whatever asked for one has to do without."""


class RunError(KDCoreError):
    """A run failed while running; everything paid for is kept and the run can be resumed (exit code 1)."""


class RejectedError(RunError):
    """A teacher's answer and its one repair are not what was asked for; both are kept in the journal with the reason.

    ``Run.map`` leaves out the item whose function raises this.

    :ivar completions: those that were refused.
    """

    def __init__(self, reason: str, completions: Sequence[Completion] = ()) -> None:
        super().__init__(reason)
        self.completions = tuple(completions)


class BudgetError(RunError):
    """What the run may ask of its teachers is spent; everything paid for is kept and the run can be resumed."""


@contextmanager
def blaming(place: str) -> Iterator[None]:
    """Note on an error that is none of the above in whose code it was raised, unless that is known already.

    :param place: ``"in hook student_loss of plugin NAME"``, shown at the end of the error's one line.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, KDCoreError) and not getattr(error, "__notes__", ()):
            error.add_note(place)
        raise
