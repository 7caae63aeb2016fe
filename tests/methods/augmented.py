"""A joiner of soft_labels.py: words are left out at random in every epoch, and the teacher reads what is left."""

from __future__ import annotations

import random

import attrs
from attrs import frozen

from kdcore import hookimpl, option


@frozen(kw_only=True)
class Augmented:
    """Leave out words at random, anew in every epoch."""

    share: float = option(0.3, "of the words that are left out", between=(0, 1))

    @hookimpl(wrapper=True)
    def recipe(self, run):
        recipe = yield
        [stage] = recipe.stages
        item = stage.data.item

        def thinned(example):
            read = item(example)
            kept = [word for word in read["words"] if random.random() >= self.share]
            return {**read, "words": kept or read["words"]}

        data = attrs.evolve(stage.data, item=thinned, views="fresh")
        teachers = {name: attrs.evolve(teacher, store=None) for name, teacher in stage.teachers.items()}
        return attrs.evolve(recipe, stages=[attrs.evolve(stage, data=data, teachers=teachers)])
