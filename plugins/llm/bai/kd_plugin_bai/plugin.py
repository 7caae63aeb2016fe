"""The plugin: two merges make the actor, trl's GRPO trains it; in the demo three stages build the models before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import frozen

from kd_plugin_bai.answers import as_prompt, measure
from kd_plugin_bai.demo import MARKER, demo_splits
from kd_plugin_bai.language_models import Family, demo_family, named_family
from kd_plugin_bai.merging import merged
from kd_plugin_bai.search import best, try_ratios
from kd_plugin_bai.supervised import encode, learned, next_token_loss
from kd_plugin_bai.tasks import read_tasks
from kdcore.data.batch import Batch
from kdcore.engine.merge import first_names, source_tensors
from kdcore.engine.models import Models
from kdcore.engine.optimizers import adamw
from kdcore.engine.schedules import linear
from kdcore.errors import InputError
from kdcore.hookspecs import hookimpl
from kdcore.recipe import Arm, Data, Example, LossTerm, Metric, Recipe, Stage, Target, Turn, option
from kdcore.run import Run

ROLES = ("pretrained", "instruct", "reasoning")
CONTROL = "the same RL from the reasoning model as it is: only the first actor differs"
OTHER_ACTOR = "the same RL: only the first actor differs"
# Steps and peak learning rates of the demo's three models, which are too small for other uses.
PRETRAIN, INSTRUCT, DISTIL = (800, 4e-3), (300, 5e-4), (300, 5e-4)
USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("38+27=", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=48)[0], skip_special_tokens=True))
```
"""


@frozen(kw_only=True)
class BAI:
    """Merge a pretrained, an instruction-tuned and a reasoning model into the actor that RLHF begins with (2025)."""

    pretrained: str = option("", "the pretrained model: folder or hub name; with the next two empty the demo's own")
    instruct: str = option("", "the instruction-tuned model, of the same architecture and vocabulary")
    reasoning: str = option("", "the model distilled on reasoning traces; its tokenizer and settings are kept")
    instruct_weight: float = option(
        0.5, "share of the instruction-tuned model in the first merge, the rest is the reasoning model", between=(0, 1)
    )
    alpha: float = option(
        0.6, "share of the first merge in the second, the rest is the pretrained model", between=(0, 1)
    )
    search: tuple[float, ...] = option(
        (), "ratios to try for both merges by the reward on validation before RL; empty: the two above are taken"
    )
    ablations: bool = option(True, "with --compare also the arms instruct, no-pretrained, no-instruct and the next")
    alphas: tuple[float, ...] = option((0.4, 0.8), "further values of alpha, each an arm")

    prompt_column: str = option("prompt", "column of the prompts")
    answer_column: str = option("answer", "column of the right answers")
    marker: str = option(MARKER, "a response's answer stands behind the last of these; without one it is all answer")
    chat: bool = option(False, "give prompts as messages of a user in the reasoning model's chat template")

    steps: int = option(20, "updates of RL", least=1)
    prompts: int = option(8, "prompts of an update", least=1)
    responses: int = option(8, "responses to each prompt, whose rewards are compared", least=2)
    accumulate: int = option(1, "parts of an update that are computed one after the other", least=1)
    longest: int = option(48, "tokens of the longest response; what is longer is cut", least=1)
    learning_rate: float = option(
        1e-4, "of RL; the demo's: for models of billions of weights the paper has 1e-6", above=0
    )
    temperature: float = option(1.0, "of the responses in RL; those of the test are the most probable", above=0)
    save_every: int = option(10, "updates between checkpoints of RL", least=1, operational=True)

    # Recipe

    @hookimpl
    def recipe(self, run: Run) -> Recipe:
        self._refuse_unequal_parts(run.world)
        if not all(0 <= ratio <= 1 for ratio in self.search):
            raise InputError(f"search = {list(self.search)}: a ratio is a number from 0 to 1")
        if not self.marker:
            raise InputError(f"marker is empty: name what stands before an answer, such as {MARKER.strip()!r}")
        family = self._family(run)
        small = [] if self._named else self._small_models(family)
        merges = [
            self._merge(
                family, "middle", ("instruct", "reasoning"), self.instruct_weight, [each.name for each in small]
            ),
            self._merge(family, "balanced", ("middle", "pretrained"), self.alpha, ["middle"]),
        ]
        rlhf = Stage(
            name="rlhf",
            needs=["balanced"],
            build=lambda run: {"student": run.load(family.build(), "balanced/student")},
            loop=self.loop,
            steps=self.steps,
            save=self.save,
            usage=USAGE,
        )
        return Recipe(
            stages=[*small, *merges, rlhf],
            data=self.splits,
            headline="reward",
            identity=("prompt",),
            arms=self._arms(),
        )

    def _arms(self) -> list[Arm]:
        def arm(name: str, instruct_weight: float, alpha: float, control: bool = False) -> Arm:
            ratios = {"instruct_weight": instruct_weight, "alpha": alpha, "search": ()}
            return Arm(name, set=ratios, control=control, because=CONTROL if control else OTHER_ACTOR)

        arms = [arm("control", 0.0, 1.0, control=True)]
        if self.ablations:
            arms += [
                arm("instruct", 1.0, 1.0),
                arm("no-pretrained", self.instruct_weight, 1.0),
                arm("no-instruct", 0.0, self.alpha),
            ]
            arms += [
                arm(f"alpha-{alpha:g}", self.instruct_weight, alpha) for alpha in self.alphas if alpha != self.alpha
            ]
        return arms

    def _refuse_unequal_parts(self, processes: int) -> None:
        responses = self.prompts * self.responses
        if responses % (self.accumulate * processes):
            raise InputError(
                f"prompts x responses = {responses} responses an update cannot be cut into {self.accumulate} x "
                f"{processes} equal parts (accumulate x processes): change one of them"
            )

    @property
    def _named(self) -> bool:
        named = [role for role in ROLES if getattr(self, role)]
        if named and len(named) < len(ROLES):
            missing = next(role for role in ROLES if role not in named)
            raise InputError(f"{missing} is empty: name all three models, or none for the demo's own")
        return bool(named)

    def _family(self, run: Run) -> Family:
        if not self._named:
            if self.chat:
                raise InputError("chat = true: the demo's models know no messages; name models that do")
            if not run.demo:
                raise InputError("--data needs models: set pretrained, instruct and reasoning")
            return demo_family()
        names = {role: getattr(self, role) for role in ROLES}
        if "family" not in run.memo:
            run.memo["family"] = named_family(names)
        family: Family = run.memo["family"]
        if self.chat:
            self._refuse_template(family.tokenizer())
        return family

    def _refuse_template(self, tokenizer: Any) -> None:
        """Refuse a chat template that takes no message of a user alone."""
        if not tokenizer.chat_template:
            raise InputError(f"chat = true: the tokenizer of reasoning {self.reasoning!r} has no chat_template")
        try:
            tokenizer.apply_chat_template([as_prompt("1", chat=True)], add_generation_prompt=True)
        except Exception as error:  # of jinja, or whatever a template calls
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            taken = f"the chat_template of reasoning {self.reasoning!r} takes no message of a user"
            raise InputError(f"chat = true: {taken} ({reason}): mend it") from error

    def _small_models(self, family: Family) -> list[Stage]:
        """The demo's three models: on texts, then from there on short answers and on worked answers."""
        tokenizer = family.tokenizer()

        def stage(name: str, response: str, split: str, plan: tuple[int, float], needs: Sequence[str] = ()) -> Stage:
            def build(run: Run) -> dict[str, torch.nn.Module]:
                model = family.build()
                return {"student": run.load(model, f"{needs[0]}/student") if needs else model}

            steps, rate = plan
            return Stage(
                name=name,
                needs=needs,
                shared="arms",
                build=build,
                data=Data(
                    split=split, item=partial(encode, tokenizer, response=response), length=lambda e: len(e[response])
                ),
                counts=lambda batch: {"tokens": learned(batch).sum().item()},
                turns={"student": Turn(["student.*"], adamw(rate, betas=(0.9, 0.95)), linear(0.1), clip_norm=1.0)},
                steps=steps,
                keep="last",
            )

        return [
            stage("pretrain", "text", "corpus", PRETRAIN),
            stage("instruct", "answer", "train", INSTRUCT, ["pretrain"]),
            stage("distil", "working", "train", DISTIL, ["pretrain"]),
        ]

    # Merging

    def _merge(self, family: Family, name: str, roles: tuple[str, str], ratio: float, needs: Sequence[str]) -> Stage:
        """A stage that merges two models: ``ratio`` of the first, the rest of the second."""
        sources = [family.sources.get(role, f"{role}/student") for role in roles]

        def target(ratio: float) -> Target:
            return Target("student", sources, lambda run: family.build(), {"weights": [ratio, 1 - ratio]})

        def searched(run: Run, models: Models) -> list[Target]:
            def search() -> list[tuple[float, float]]:
                tensors = [source_tensors(run, source) for source in sources]
                return try_ratios(models.student, tensors, self.search, partial(self._validation_reward, run, family))

            return [target(best(run.remember("reward of each ratio", search)))]

        return Stage(
            name=name,
            needs=needs,
            build=lambda run: {"student": family.build()},
            targets=searched if self.search else [target(ratio)],
        )

    def _validation_reward(self, run: Run, family: Family, model: Any) -> float:
        return self._measure(run, family, model, "validation")[0].value

    @hookimpl
    def merge_weights(
        self, run: Run, target: Target, sources: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        with torch.device("meta"):
            tied = first_names(target.skeleton(run))
        return merged([sources[name] for name in target.sources], target.options["weights"], tied)

    # Data, loss, RL and measuring

    def splits(self, run: Run) -> Mapping[str, Sequence[Example]]:
        """The tasks of each split; in the demo sums, and texts to pretrain on."""
        if run.source_path is None:
            return demo_splits()
        tasks = read_tasks(run.source_path, self.prompt_column, self.answer_column)
        if len(tasks["train"]) < self.prompts:
            raise InputError(
                f"{run.source_path}: train has {len(tasks['train'])} tasks, an update needs prompts = {self.prompts}: "
                "add tasks, or set fewer prompts"
            )
        return tasks

    @hookimpl
    def student_loss(self, stage: Stage, models: Models, batch: Batch) -> list[LossTerm]:
        kind: Literal["task", "distill"] = "distill" if stage.name == "distil" else "task"
        return [LossTerm("ce", next_token_loss(models.student, batch), kind, per="tokens")]

    def loop(self, run: Run, stage: Stage, models: Models, folder: Path) -> list[Metric]:
        """GRPO on the train split; see `kd_plugin_bai.rlhf.train`."""
        from kd_plugin_bai.rlhf import Settings, train

        settings = Settings(
            steps=self.steps,
            prompts=self.prompts,
            responses=self.responses,
            accumulate=self.accumulate,
            longest=self.longest,
            learning_rate=self.learning_rate,
            temperature=self.temperature,
            save_every=self.save_every,
            marker=self.marker,
            chat=self.chat,
        )
        tokenizer = self._family(run).tokenizer()
        return train(run, models.student, tokenizer, run.data["train"], folder / "checkpoints", settings)

    @hookimpl
    def evaluate(self, run: Run, model: Any, split: str) -> list[Metric]:
        return self._measure(run, self._family(run), model, split)

    def _measure(self, run: Run, family: Family, model: Any, split: str) -> list[Metric]:
        return measure(run, model, split, family.tokenizer(), marker=self.marker, longest=self.longest, chat=self.chat)

    def save(self, run: Run, models: Models, folder: Path) -> None:
        """Write the student with its tokenizer."""
        models.student.save_pretrained(folder)
        self._family(run).tokenizer().save_pretrained(folder)
