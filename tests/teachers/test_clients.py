"""Which models share a client, and what happens where one cannot be started."""

from __future__ import annotations

import pytest
from attrs import evolve

from kdcore.errors import RunError
from kdcore.recipe import Teacher
from kdcore.synthesis.ordered import map_in_order
from kdcore.teachers import llm
from kdcore.teachers.asking import Budget, TextTeachers
from kdcore.teachers.llm import client_key
from kdcore.text_model import TextModel

MODEL = TextModel(model="stub", endpoint="http://127.0.0.1:9/v1", key_variable="")


@pytest.fixture
def started(monkeypatch):
    """The models for which clients were started."""
    models = []
    start = llm.client_of

    def spy(model, **options):
        models.append(model)
        return start(model, **options)

    monkeypatch.setattr(llm, "client_of", spy)
    return models


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"max_tokens": 9}, {"extra": {"top_p": 0.5}}, {"identity": "another"}]
)
def test_models_that_differ_in_sampling_share_a_client(fields):
    assert client_key(evolve(MODEL, **fields)) == client_key(MODEL)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (MODEL, {"endpoint": "http://127.0.0.1:10/v1"}),
        (MODEL, {"model": "other"}),
        (MODEL, {"key_variable": "KD_KEY"}),
        (MODEL, {"requests_per_minute": 5}),
        (MODEL, {"prompt_price": 1.0}),
        (evolve(MODEL, endpoint="llama.cpp"), {"max_tokens": 9}),
    ],
)
def test_models_that_are_asked_otherwise_have_their_own(model, fields):
    assert client_key(evolve(model, **fields)) != client_key(model)


def test_the_limits_of_a_shared_client_hold_for_both(serve, tmp_path, started):
    model = evolve(MODEL, endpoint=serve().address)
    texts = TextTeachers(tmp_path, "a", Budget())
    for temperature in (0.0, 1.0):
        assert texts.ask("llm", Teacher(text=evolve(model, temperature=temperature)), "Hello").text
    texts.close()
    assert len(started) == 1


def test_a_client_that_cannot_be_started_is_tried_once(tmp_path, monkeypatch):
    tries = []

    def fail(model, **options):
        tries.append(model)
        raise RunError("the server did not start")

    monkeypatch.setattr(llm, "client_of", fail)
    texts = TextTeachers(tmp_path, "a", Budget())
    with pytest.raises(RunError, match="did not start"):
        list(map_in_order(lambda n: texts.ask("llm", Teacher(text=MODEL), str(n)), range(20), threads=4, ahead=4))
    with pytest.raises(RunError, match="did not start"):
        texts.ask("llm", Teacher(text=MODEL), "again")
    texts.close()
    assert len(tries) == 1
