"""Every hook is documented with its exact signature, and has tests of its own."""

import ast
import importlib.util
from pathlib import Path

import pytest

from kdcore import hookspecs
from kdcore.plugins import HOOKS

ROOT = Path(__file__).parents[1]


def source_signature(name: str) -> str:
    """The signature as hookspecs.py writes it, on one line, without white space."""
    tree = ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8"))
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert function.returns is not None
    return f"{name}({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}"


def bare(text: str) -> str:
    return "".join(text.split()).replace(",)", ")")


def test_the_hooks_are_those_that_are_public():
    assert sorted([*HOOKS, "hookimpl"]) == sorted(hookspecs.__all__)
    assert len(HOOKS) == 6


@pytest.mark.parametrize("name", HOOKS)
def test_the_exact_signature_stands_in_the_docs(name):
    page = (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")
    section = page.split(f"### {name}\n", 1)[1].split("### ", 1)[0]
    block = section.split("```python\n", 1)[1].split("```", 1)[0]
    assert bare(block) == bare(source_signature(name))


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_and_argument_is_described(name):
    function = getattr(hookspecs, name)
    text = function.__doc__ or ""
    assert text.splitlines()[0].rstrip().endswith((".", ":"))
    elsewhere = {"run", "stage", "models", "batch"}  # the same in every hook: described by their classes
    arguments = set(function.__annotations__) - {"return"} - elsewhere
    assert {argument for argument in arguments if f":param {argument}:" not in text} == set()


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test_of_its_own(name):
    path = ROOT / "tests" / "hooks" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert any(test.startswith(f"test_hook_{name}") and callable(getattr(module, test)) for test in vars(module))
