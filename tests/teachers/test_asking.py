"""Text teachers: journal first, then the budget, then the teacher; one repair; counts."""

import json

import numpy as np
import pytest
from attrs import evolve

from kdcore import Teacher, TextModel
from kdcore.errors import BudgetError, InputError, PluginError, RejectedError
from kdcore.synthesis.journal_inventory import problems_of
from kdcore.teachers.asking import Budget, TextTeachers


class Rule:
    """Answers with a number of words, and remembers what it was asked."""

    def __init__(self, answers=None):
        self.asked, self.answers = [], answers

    def __call__(self, request):
        self.asked.append(request)
        if self.answers is None:
            return f"{len(request.messages[-1]['content'].split())} words, sample {request.sample}"
        return self.answers[len(self.asked) - 1]


@pytest.fixture
def texts(tmp_path):
    made = []

    def make(budget=Budget(), run="a"):  # noqa: B008
        made.append(TextTeachers(tmp_path, run, budget))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_an_answer_is_asked_for_once(texts):
    rule = Rule()
    teacher = Teacher(text=rule)
    first = texts().ask("llm", teacher, "how many words")
    again = texts().ask("llm", teacher, [{"role": "user", "content": "how many words"}])
    assert first.text == first.value == again.text == "3 words, sample 0"
    assert first.key == again.key
    assert len(rule.asked) == 1


@pytest.mark.parametrize(
    "change", [{"sample": 1}, {"parameters": {"temperature": 0.5}}, {"schema": {"type": "string"}}, {"identity": "b"}]
)
def test_another_question_is_asked(texts, change):
    asking, rule = texts(), Rule()
    asking.ask("llm", Teacher(text=rule), "how many words")
    options = {key: value for key, value in change.items() if key != "identity"}
    teacher = Teacher(text=rule, identity=change.get("identity", ""))
    if "schema" in change:
        with pytest.raises(RejectedError):
            asking.ask("llm", teacher, "how many words", **options)
    else:
        asking.ask("llm", teacher, "how many words", **options)
    assert len(rule.asked) >= 2


@pytest.mark.parametrize("sample", [np.int64(1), True])
def test_whatever_type_numbers_have_the_answer_is_stored_and_found(texts, tmp_path, sample):
    rule = Rule()
    first = texts().ask("llm", Teacher(text=rule), "how many", sample=sample, parameters={"seed": np.int64(3)})
    again = texts().ask("llm", Teacher(text=rule), "how many", sample=1, parameters={"seed": 3})
    assert first.key == again.key
    assert first.key.endswith("/1")
    assert len(rule.asked) == 1
    assert problems_of(tmp_path / "journal.sqlite") == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"parameters": {"stop": object()}}, "teacher llm: parameters.stop is a object: give text, numbers, lists"),
        ({"schema": {"enum": {1, float("nan")}}}, r"teacher llm: schema.enum\[\d\] is nan: give a finite number"),
        ({"sample": 0.5}, "teacher llm: sample is 0.5: give an integer"),
    ],
)
def test_what_json_cannot_hold_is_refused(texts, options, told):
    with pytest.raises(InputError, match=told):
        texts().ask("llm", Teacher(text=Rule()), "how many", **options)


def number(text):
    if not text.isdigit():
        raise ValueError(f"no number: {text!r}")
    return int(text)


def test_a_refused_answer_is_repaired_once_with_the_reason(texts):
    rule = Rule(["seven", "7"])
    asking = texts()
    answer = asking.ask("llm", Teacher(text=rule), "how many", check=number)
    assert answer.value == 7
    assert [completion.text for completion in answer.completions] == ["seven", "7"]
    question, refused, repair = rule.asked[1].messages
    assert question["content"] == "how many"
    assert refused == {"role": "assistant", "content": "seven"}
    assert json.dumps("no number: 'seven'") in repair["content"]
    tally = asking.counts()["llm"]
    assert (tally["requests"], tally["paid"], tally["rejected"]) == (2, 2, {"no number": 1})
    assert asking.journal.totals().rejected == {"no number: 'seven'": 1}


def test_a_repair_that_is_refused_too_rejects_the_answer(texts):
    asking = texts()
    with pytest.raises(RejectedError, match="no number: 'eight'") as caught:
        asking.ask("llm", Teacher(text=Rule(["seven", "eight"])), "how many", check=number)
    assert [completion.text for completion in caught.value.completions] == ["seven", "eight"]
    assert asking.counts()["llm"]["rejected"] == {"no number": 2}
    samples = asking.rejected_samples
    assert [sample["text"] for sample in samples] == ["seven", "eight"]
    assert samples[0]["prompt"] == "how many"


def test_a_check_is_run_again_on_a_stored_answer(texts):
    rule = Rule(["seven"])
    texts().ask("llm", Teacher(text=rule), "how many")
    with pytest.raises(IndexError):  # the repair, which the rule does not answer
        texts().ask("llm", Teacher(text=rule), "how many", check=number)


def test_a_looser_check_withdraws_the_rejection(texts):
    asking, rule = texts(), Rule(["seven", "7"])
    asking.ask("llm", Teacher(text=rule), "how many", check=number)
    assert asking.journal.totals().rejected
    assert asking.ask("llm", Teacher(text=rule), "how many").text == "seven"
    assert asking.journal.totals().rejected == {}


def test_the_price_is_of_what_the_run_paid_for(texts, serve):
    model = TextModel(model="stub", endpoint=serve().address, key_variable="", prompt_price=1e6, answer_price=1e6)

    def price(asking, *questions):
        for question in questions:
            asking.ask("llm", Teacher(text=model), question)
        return asking.counts()["llm"]["price"]

    first = price(texts(), "a", "b", "a")
    resumed = texts()
    assert 0 < first < price(resumed, "a", "b", "c", "c") == resumed.journal.totals().price
    another = texts(run="b")
    assert price(another, "a", "b", "c") == 0
    assert price(another, "d") == another.journal.totals(run="b").price > 0


def test_a_schema_is_checked_here(texts):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    rule = Rule(['{"n": "x"}', '```json\n{"n": 4}\n```'])
    assert texts().ask("llm", Teacher(text=rule), "how many", schema=schema).value == {"n": 4}


def test_requests_beyond_the_budget_are_refused_and_stored_answers_are_free(texts):
    rule = Rule()
    asking = texts(Budget(max_requests=2))
    for question in ("a", "b"):
        asking.ask("llm", Teacher(text=rule), question)
    with pytest.raises(BudgetError, match=r"2 of max_requests 2.*--max-requests"):
        asking.ask("llm", Teacher(text=rule), "c")
    assert asking.ask("llm", Teacher(text=rule), "a").text
    resumed = texts(Budget(max_requests=2))
    with pytest.raises(BudgetError):
        resumed.ask("llm", Teacher(text=rule), "c")
    texts(Budget(max_requests=3)).ask("llm", Teacher(text=rule), "c")
    texts(Budget(max_requests=1), run="b").ask("llm", Teacher(text=rule), "d")
    assert len(rule.asked) == 4


def test_seconds_count_from_the_first_request(texts):
    asking = texts(Budget(max_seconds=1e-9))
    with pytest.raises(BudgetError, match="max_seconds"):
        asking.ask("llm", Teacher(text=Rule()), "a")


def test_a_rule_that_gives_no_text_is_refused(texts):
    with pytest.raises(PluginError, match="gave a int; return a string"):
        texts().ask("llm", Teacher(text=lambda request: 3), "a")


def test_prices_are_per_million_tokens():
    model = TextModel(prompt_price=2.0, answer_price=8.0)
    assert model.price(500_000, 250_000) == 3.0
    assert evolve(model, prompt_price=0.0).price(10, 0) == 0.0
