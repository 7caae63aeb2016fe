from __future__ import annotations

import subprocess
import sys

import pytest

from kdcore.errors import InputError
from kdcore.teachers.llm import EndpointClient, client_of
from kdcore.text_model import TextModel


def test_a_url_is_an_endpoint():
    assert isinstance(client_of(TextModel(model="m", endpoint="http://localhost:1/v1")), EndpointClient)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "model: is empty"),
        ({"model": "m", "endpoint": "ollama"}, "endpoint: 'ollama' is no URL"),
        ({"model": "./none.gguf", "endpoint": "llama.cpp"}, r"\./none\.gguf: no such file; name a GGUF file"),
        ({"model": "gemma", "endpoint": "llama.cpp"}, "model: gemma is no GGUF file"),
        ({"model": "./nowhere"}, r"model: \./nowhere cannot be loaded: .+; check its name"),
    ],
)
def test_a_wrong_model_is_named_on_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        client_of(TextModel(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["openai", "tenacity", "httpx2"])
def test_a_missing_package_is_named_with_its_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf'needs {missing}: pip install "kdcore\[llm\]"'):
        client_of(TextModel(model="m", endpoint="http://localhost:1/v1"))


def test_importing_the_clients_imports_nothing_heavy():
    code = (
        "import sys, kdcore.teachers.llm; print(sorted({'torch', 'openai', 'httpx2', 'jsonschema'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
