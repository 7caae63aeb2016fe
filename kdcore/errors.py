"""The errors that kdcore shows as one line instead of a traceback."""

from __future__ import annotations


class KDCoreError(Exception):
    """An error whose text is one clear line; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(KDCoreError):
    """The user's input is wrong: the message names the file, key or row, and the fix (exit code 2)."""

    exit_code = 2


class PluginError(InputError):
    """A plugin cannot be used: the message names the plugin, its distribution and the reason (exit code 2)."""


class RunError(KDCoreError):
    """A run failed while running; everything paid for is kept and the run can be resumed (exit code 1)."""
