"""A joiner of soft_labels.py: before each round a language model writes further examples, in a chain of two calls."""

from __future__ import annotations

import itertools

import attrs
from attrs import frozen

from kdcore import Example, Synth, Teacher, TextModel, hookimpl, option

PARAGRAPH = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "label": {"type": "integer", "minimum": 0, "maximum": 5}},
    "required": ["text", "label"],
}


@frozen(kw_only=True)
class Rewritten:
    """Ask for a title, then for a paragraph under it."""

    model: TextModel = option(TextModel(model="words", in_flight=4, retries=30, max_tokens=50), "the writer")
    rounds: int = option(3, "of synthesis", least=1)
    take: int = option(8, "examples a round", least=1)

    @hookimpl(wrapper=True)
    def recipe(self, run):
        recipe = yield
        [stage] = recipe.stages
        synth = Synth(rounds=self.rounds, take=self.take, near=0.9, calls=2, tokens=(100, 20), label="label")
        data = attrs.evolve(stage.data, synth=synth)
        teachers = {**stage.teachers, "writer": Teacher(text=self.model)}
        return attrs.evolve(recipe, stages=[attrs.evolve(stage, data=data, teachers=teachers)])

    @hookimpl
    def data_synth(self, run, report):
        accuracy = run.remember("accuracy", lambda: report["accuracy"].value)
        chosen = run.rng("examples").permutation(len(run.data["train"]))

        def write(question):
            number, index = question
            example = run.data["train"][int(index)]
            title = run.ask("writer", f"At accuracy {accuracy:.6f}, a title for {example['text']!r}", check=of_words)
            body = run.ask("writer", f"A paragraph under {title.value!r}", schema=PARAGRAPH, temperature=0.5)
            return Example(
                {"text": f"{title.value} {body.value['text']} {example['text'][:40]}", "label": body.value["label"]},
                id=f"{run.round}/{number}",
                teacher="writer",
                parents=(example.id,),
                answers=(title.key, body.key),
                origin="rewritten",
            )

        yield from run.map(write, zip(itertools.count(), itertools.cycle(chosen)))


def of_words(text):
    if "kettle" in text:
        raise ValueError(f"boils water: {text!r}")
    return text
