"""Terms, passes, the memo and the denominators of a step."""

import pytest

from kdcore.errors import PluginError

LEAVES_LOGITS = {
    "def student_loss(self, models, batch, teacher):": "def student_loss(self, models, batch, teacher, memo):",
    "        weight, temperature =": '        memo["logits"] = logits\n        weight, temperature =',
}
TWO_PASSES = """
def passes(self, models, batch, memo):
    tell("first", memo["logits"].requires_grad, tuple(memo["logits"].shape))
    yield [LossTerm("first", memo["logits"].square().mean(), weight=0.01)]
    tell("second", memo["logits"].requires_grad, torch.is_grad_enabled())
    logits = models.student(batch["words"], batch.mask("words"))
    yield [LossTerm("second", (logits - memo["logits"]).square().mean(), weight=0.01)]

@hookimpl
def student_loss(self, models, batch, memo, turn):
    assert turn == "student"
    return self.passes(models, batch, memo)
"""


def test_hook_student_loss_may_be_a_generator_of_passes(execute, joiner, variant, told, terms):
    folder = execute("steps=3", plugins=joiner(TWO_PASSES, owner=variant(LEAVES_LOGITS)), log_every=1)
    lines = told()
    assert lines == ["first True (16, 6)", "second False True"] * 3  # the memo is detached after a pass
    names = {"soft-labels/cross_entropy", "soft-labels/divergence", "joiner/first", "joiner/second"}
    assert all(set(logged) == names for logged in terms(folder))
    assert all(logged["joiner/second"] > 0 for logged in terms(folder))  # dropout draws anew in the second pass


PER_WORD = """
@hookimpl(wrapper=True)
def recipe(self, run):
    recipe = yield
    return changed(recipe, counts=lambda batch: {"words": batch.mask("words").sum()})

@hookimpl
def student_loss(self, models, batch):
    vectors = models.student.embedding(batch["words"])[batch.mask("words")]
    return [LossTerm("norm", vectors.norm(dim=1).sum(), weight=0.1, per="words")]
"""


def test_hook_student_loss_divides_sums_once_by_the_steps_count(execute, joiner, terms):
    settings = ("steps=2", "dropout=0.0")
    whole = terms(execute(*settings, plugins=joiner(PER_WORD), log_every=1))
    parts = terms(execute(*settings, "accumulate=3", plugins=joiner(PER_WORD), log_every=1, out="parts"))
    for one, several in zip(whole, parts):
        assert several["joiner/norm"] == pytest.approx(one["joiner/norm"], rel=1e-4)
    assert 3 < whole[0]["joiner/norm"] < 5  # 16 standard normal values have a norm of about 3.9


def test_hook_student_loss_may_only_count_what_the_stage_counts(execute, joiner):
    with pytest.raises(PluginError, match="loss term joiner/norm is per 'letters', but the stage counts words"):
        execute("steps=2", plugins=joiner(PER_WORD.replace('per="words"', 'per="letters"')))


WEIGHTS = """
@hookimpl
def student_loss(self, models, batch):
    size = models.student.output.weight.square().mean()
    return [
        LossTerm("task", size, "task", 0.1),
        LossTerm("distill", size, "distill", 0.1),
        LossTerm("both", size, "distill", 0.1, control=0.2),
        LossTerm("method", size, "task", 0.1, control=0.0),
        LossTerm("control", size, "task", 0.0, control=0.1),
        LossTerm("never", lambda: 1 / 0, "task", 0.0),
    ]
"""


def test_hook_student_loss_has_weights_of_its_own_in_the_control(execute, joiner, terms):
    folder = execute("steps=2", plugins=joiner(WEIGHTS), compare=True)

    def names(arm):
        return {name.removeprefix("joiner/") for logged in terms(folder, arm) for name in logged if "joiner" in name}

    assert names("distill") == {"task", "distill", "both", "method"}
    assert names("control") == {"task", "both", "control"}


def test_hook_student_loss_may_not_touch_a_teacher_in_the_control(execute, variant, tmp_path):
    eager = variant({'"divergence", divergence,': '"divergence", divergence(),'})
    with pytest.raises(PluginError, match="put it into a callable"):
        execute("steps=2", plugins=(eager,), compare=True)
    assert not (tmp_path / "run" / "store").exists()  # found before the teacher was asked


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("LossTerm('a', torch.zeros(3))", "student_loss of plugin joiner gave LossTerm; return a list"),
        ("[LossTerm('a', torch.zeros(3))]", r"loss term joiner/a is \(3,\); it must be a scalar tensor"),
    ],
)
def test_hook_student_loss_must_be_a_list_of_scalar_terms(execute, joiner, value, message):
    body = f"""
    @hookimpl
    def student_loss(self):
        return {value}
    """
    with pytest.raises(PluginError, match=message):
        execute("steps=2", plugins=joiner(body))
