"""Plugin-based knowledge distillation.

Everything that a plugin needs is importable from here and loaded at first use, so that ``import kdcore`` costs
next to nothing and imports no torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes longer to import than all the rest
if TYPE_CHECKING:
    from kdcore.data.batch import Batch
    from kdcore.data.splits import Splits
    from kdcore.engine.optimizers import adamw
    from kdcore.engine.schedules import constant, cosine, eden, linear, plateau
    from kdcore.errors import InputError
    from kdcore.hookspecs import hookimpl
    from kdcore.recipe import (
        Arm,
        Data,
        Example,
        LossTerm,
        Metric,
        Recipe,
        Row,
        Stage,
        Synth,
        Target,
        Teacher,
        Turn,
        option,
    )
    from kdcore.run import Run
    from kdcore.synthesis.prompts import prompt
    from kdcore.taps import tapped
    from kdcore.text_model import TextModel

__version__ = "0.1.0"

__all__ = [
    "Arm",
    "Batch",
    "Data",
    "Example",
    "InputError",
    "LossTerm",
    "Metric",
    "Recipe",
    "Row",
    "Run",
    "Splits",
    "Stage",
    "Synth",
    "Target",
    "Teacher",
    "TextModel",
    "Turn",
    "adamw",
    "constant",
    "cosine",
    "eden",
    "hookimpl",
    "linear",
    "option",
    "plateau",
    "prompt",
    "tapped",
]

_ELSEWHERE = {
    "Batch": "kdcore.data.batch",
    "InputError": "kdcore.errors",
    "Run": "kdcore.run",
    "Splits": "kdcore.data.splits",
    "adamw": "kdcore.engine.optimizers",
    "constant": "kdcore.engine.schedules",
    "cosine": "kdcore.engine.schedules",
    "eden": "kdcore.engine.schedules",
    "hookimpl": "kdcore.hookspecs",
    "linear": "kdcore.engine.schedules",
    "plateau": "kdcore.engine.schedules",
    "prompt": "kdcore.synthesis.prompts",
    "tapped": "kdcore.taps",
    "TextModel": "kdcore.text_model",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE.get(name, "kdcore.recipe")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
