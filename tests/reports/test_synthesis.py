"""``synthesis.json`` in the report, on the terminal and in the model card; what teachers say stays text."""

from __future__ import annotations

import io
import json
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pydoc_data.topics import topics

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from kdcore import Example, InputError
from kdcore.reports import write_all
from kdcore.reports.card import write_cards
from kdcore.reports.folder import open_run
from kdcore.reports.html import write_report
from kdcore.reports.synthesis import read_synthesis, readable, syntheses_of, synthesis_in
from kdcore.reports.terminal import print_table
from kdcore.synthesis.quality import quality_of

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [red]x[/red] \x1b[31mred\x1b[0m \x9b2J {{7*7}} {% if %} "
    "\u202egnirts\u202c \u2066 `code` | [a](javascript:b) ![i](http://x.test/i) \ud800 \x00\x07 </td></table> & \\"
)
CONTROL = {"Cc", "Cf", "Cs", "Co"}
SENTENCES = [
    " ".join(sentence.split()) for topic in ("class", "import", "with") for sentence in topics[topic].split(". ")
]


def examples(first: int, count: int) -> list[Example]:
    """Sentences of Python's own help, whose label is how they begin."""
    return [
        Example({"text": text, "label": text[0].lower()}, id=f"s{first + index}", origin="given")
        for index, text in enumerate(SENTENCES[first : first + count])
    ]


def record(rounds: int = 3) -> dict:
    """What the engine leaves after so many rounds, with figures of real texts."""
    drawn = [examples(10 * number, 8 + number) for number in range(rounds)]
    return {
        "teachers": {
            "llm": {
                "model": "gemma3-270m",
                "requests": 120,
                "paid": 118,
                "prompt_tokens": 40000,
                "answer_tokens": 9000,
                "seconds": 55.2,
                "price": 0.375,
                "rejected": {"no JSON": 3, "too long": 5},
            }
        },
        "rounds": [
            {
                "round": number,
                "accepted": len(some),
                "dropped": {"near duplicate": 2, "leak": 1, "filter": 0},
                "seconds": 20.1,
                "price": 0.125,
                "quality": quality_of(some, text_field="text", label_field="label", labels=["t", "æ"], real=some),
            }
            for number, some in enumerate(drawn)
        ],
        "samples": {
            "accepted": [
                {"round": number, "id": e.id, "data": e.data, "origin": e.origin}
                for number, some in enumerate(drawn)
                for e in some
            ],
            "rejected": [
                {"round": 0, "reason": "no JSON", "text": f"Sure! Answer {n}", "prompt": "Write a sentence."}
                for n in range(5)
            ],
        },
    }


def hostile_record() -> dict:
    made = record()
    [teacher] = made["teachers"].values()
    teacher |= {"model": HOSTILE, "rejected": {HOSTILE: 3}}
    made["teachers"] = {HOSTILE: teacher}
    for each in made["rounds"]:
        each["dropped"] = {HOSTILE: 2}
        each["quality"] |= {"labels": {HOSTILE: 2, "b": 1}, "missing": [HOSTILE]}
    for sample in made["samples"]["accepted"]:
        sample |= {"id": HOSTILE, "origin": HOSTILE, "data": {HOSTILE: HOSTILE, "list": [HOSTILE, {HOSTILE: 1}]}}
    made["samples"]["rejected"] = [{"round": 0, "reason": HOSTILE, "text": HOSTILE * 100, "prompt": HOSTILE}]
    return made


@pytest.fixture
def drawn(run_folder):
    """A run whose method's arm drew three rounds with each seed; its stage took 100 steps a round."""
    for stage in sorted(run_folder.glob("arms/distill/seed-*/distil")):
        (stage / "synthesis.json").write_text(json.dumps(record()))
        done = json.loads((stage / "done.json").read_text())
        (stage / "done.json").write_text(json.dumps(done | {"round_steps": [100, 100, 100]}))
    return run_folder


@pytest.fixture
def attacked(drawn):
    for path in drawn.glob("arms/distill/*/distil/synthesis.json"):
        path.write_text(json.dumps(hostile_record()))
    return drawn


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def page(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def printed(folder, *, width=100, terminal=True) -> str:
    stream = io.StringIO()
    print_table(folder, Console(file=stream, width=width, force_terminal=terminal, color_system=None))
    return stream.getvalue()


def controls(text: str) -> set[str]:
    return {character for character in text if unicodedata.category(character) in CONTROL} - {"\n", "\t"}


# The report


def test_the_page_shows_counts_cost_quality_and_samples(drawn):
    words = re.sub(r"\s+", " ", page(drawn).words)
    counts = "27 accepted examples in 3 rounds; left out: 6 near duplicate, 3 leak."
    assert f"distill, seed 0, stage distil: {counts}" in words
    for part in (
        "gemma3-270m",
        "118",
        "40,000",
        "0.375",
        "5 too long, 3 no JSON",
        "Sure! Answer 4",
        "Write a sentence",
    ):
        assert part in words
    assert f"text: {SENTENCES[0]}" in words
    [first, *_] = syntheses_of(open_run(drawn))
    row = first.round_rows()[0]
    assert set(row) == {
        *("round", "accepted", "left out", "labels", "label entropy", "distinct-1", "distinct-2"),
        *("words", "5% to 95%", "seconds", "price"),
    }
    assert row["labels"].endswith("; 1 missing")
    assert re.fullmatch(r"(0\.\d{3}) \(real \1\)", row["distinct-1"])


def test_rounds_are_drawn_with_the_headline_at_the_end_of_each(drawn):
    alts = [attributes["alt"] for tag, attributes in page(drawn).tags if tag == "img"]
    assert "accepted examples: distill 8.000 to 10.0" in alts
    assert "left out: distill 3.000 to 3.000" in alts
    assert "price so far: distill 0.125 to 0.375" in alts
    checks = {}
    for line in (drawn / "arms/distill/seed-0/distil/metrics.jsonl").read_text().splitlines():
        if json.loads(line).get("split") == "validation":
            checks[json.loads(line)["step"]] = json.loads(line)["metrics"]["accuracy"]
    synthesis = synthesis_in(open_run(drawn), "distill", 0)[0]
    assert synthesis.headline("accuracy") == [(0, checks[100]), (1, checks[200]), (2, checks[300])]
    assert any(alt.startswith("accuracy on validation (higher is better): distill") for alt in alts)


def test_a_single_round_and_an_unfinished_stage_are_shown_without_curves(drawn):
    for stage in drawn.glob("arms/distill/*/distil"):
        (stage / "synthesis.json").write_text(json.dumps(record(rounds=1)))
        (stage / "done.json").unlink()
    found = page(drawn)
    assert "8 accepted examples in 1 round;" in found.words
    assert not [a for tag, a in found.tags if tag == "img" and a["alt"].startswith("accepted examples")]


def test_a_run_without_synthesis_and_a_control_that_drew_nothing_say_nothing(run_folder):
    nothing = {"rounds": [{"round": 0, "accepted": 0}]}
    (run_folder / "arms/control/seed-0/distil/synthesis.json").write_text(json.dumps(nothing))
    assert "Synthetic" not in page(run_folder).words
    assert "Synthetic" not in printed(run_folder)
    assert not any("Synthetic" in path.read_text() for path in write_cards(run_folder))


def test_a_stage_that_arms_share_is_shown_once_and_is_on_all_their_cards(run_folder):
    plan = json.loads((run_folder / "plan.json").read_text())
    (run_folder / "plan.json").write_text(json.dumps(plan | {"stages": ["write", "distil"]}))
    for seed in range(3):
        stage = run_folder / "shared" / f"seed-{seed}" / "write"
        stage.mkdir(parents=True)
        (stage / "synthesis.json").write_text(json.dumps(record()))
    assert page(run_folder).words.count("stage write: 27 accepted") == 3
    assert all(
        "Stage `write`: 27 accepted examples in 3 rounds" in path.read_text() for path in write_cards(run_folder)
    )
    assert "Synthetic examples of arm distill, seed 0, stage write" in printed(run_folder)


# The terminal and the card


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_shows_three_good_and_three_rejected(drawn, terminal):
    text = printed(drawn, width=200, terminal=terminal)
    lines = text[text.index("Synthetic examples of arm distill, seed 0, stage distil") :].splitlines()
    assert lines[1] == "27 accepted examples in 3 rounds; left out: 6 near duplicate, 3 leak."
    cost = "120 requests, 118 of them paid in this run, price 0.375"
    assert lines[2] == f"teacher llm (gemma3-270m): {cost}; answers rejected: 5 too long, 3 no JSON"
    assert [line.split(":")[0] for line in lines[3:]] == ["  accepted"] * 3 + ["  rejected (no JSON)"] * 3
    assert lines[3].startswith(f"  accepted: text: {SENTENCES[0][:60]}")
    assert text.count("Synthetic examples") == 1


def test_the_card_tells_teacher_counts_price_quality_and_export(drawn):
    cards = [path.read_text() for path in write_cards(drawn)]
    text = cards[0]
    assert "Stage `distil`: 27 accepted examples in 3 rounds, 9 left out." in text
    assert "| `llm` | `gemma3-270m` | 120 | 118 | 40,000 | 9,000 | 55.2 | 0.375 | 5 `too long`, 3 `no JSON` |" in text
    assert "kdcore store export mine" in text
    assert "\n\n\n" not in text
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert sum(token.type == "table_open" for token in tokens) == 4
    assert ["Synthetic data" in card for card in cards] == [True] * 3 + [False] * 3


# What teachers say stays text


def test_hostile_text_is_inert_on_the_page(attacked):
    text = write_report(attacked).read_text(encoding="utf-8")
    assert controls(text) == set()
    found = Page(text)
    assert "script" not in {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(a["src"].startswith("data:image/svg+xml") for tag, a in found.tags if tag == "img")
    for part in ("<script>alert(1)</script>", "{{7*7}}", "{% if %}", "[red]x[/red]", "</td></table>"):
        assert part in found.words
    assert "49" not in re.findall(r"\[0m (\S+)", found.words)
    assert len(text) < 4_000_000


def test_hostile_text_is_inert_on_the_terminal(attacked):
    text = printed(attacked, width=2000)
    assert controls(text) == set()
    assert "[red]x[/red]" in text
    assert "{{7*7}}" in text
    section = text[text.index("Synthetic examples") :].splitlines()
    assert len(section) == 7
    assert max(map(len, section)) < 500


def test_hostile_text_is_inert_in_the_card(attacked):
    text = write_cards(attacked)[0].read_text(encoding="utf-8")
    assert controls(text) == set()
    section = text[text.index("## Synthetic data") : text.index("## Training")]
    tokens = MarkdownIt("commonmark").enable("table").parse(section)
    inline = [child for token in tokens for child in token.children or []]
    assert {token.type for token in [*tokens, *inline]} & {"html_block", "html_inline", "link_open", "image"} == set()
    assert any("<script>alert(1)</script>" in token.content for token in inline if token.type == "code_inline")
    rows = [row for row in section.splitlines() if row.startswith("|")]
    assert {row.count("|") for row in rows[:3]} == {10}
    assert len({row.count("|") for row in rows[3:]}) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x07", "a[31mb"),
        ("a\r\nb\tc\rd", "a\nb\tcd"),
        ("\u202eabc\u2069\ufeff\u200b", "abc"),
        ("x\u2028y\u00a0z", "x\ny z"),
        ("שלום क्‍ष", "שלום क्‍ष"),
        ("\ud83d", "\N{REPLACEMENT CHARACTER}"),
        ("abcdefghijk", "abcdefghi…"),
    ],
)
def test_what_is_left_of_a_text(text, shown):
    assert readable(text, 10 if text.startswith("abc") else 100) == shown


# Damage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"synthesis\.json:1: no valid JSON"),
        ('{"rounds": [{"round": 0, "acc', r"synthesis\.json:1: no valid JSON"),
        ("[]", r"synthesis\.json: expected a JSON object, found list"),
        ("[" * 100_000, r"synthesis\.json: no valid JSON \(nested too deeply\)"),
        ('{"teachers": []}', r"key 'teachers' is \[\], but must be an object"),
        ('{"teachers": {"llm": {"price": NaN}}}', "price has nan, which must be at least 0"),
        ('{"teachers": {"llm": {"paid": "x\\u001b[31m"}}}', r"paid. is .x\[31m., but must be an integer"),
        ('{"teachers": {"llm": {"rejected": {"no JSON": -1}}}}', "rejected has -1, which must be at least 0"),
        ('{"rounds": [{"round": 0}]}', r"key 'rounds\[0\]\.accepted' is missing"),
        ('{"rounds": [{"round": 0, "accepted": 1.5}]}', r"rounds\[0\]\.accepted' is 1.5, but must be an integer"),
        ('{"samples": {"accepted": [{"data": 3}]}}', r"samples\.accepted\[0\]\.data' is 3, but must be an object"),
        ('{"samples": {"rejected": [{"text": "x"}]}}', r"samples\.rejected\[0\]\.reason' is missing"),
    ],
)
def test_a_damaged_file_is_refused_by_its_key(drawn, text, message):
    (drawn / "arms/distill/seed-0/distil/synthesis.json").write_text(text)
    for write in (write_all, print_table):
        with pytest.raises(InputError, match=message) as error:
            write(drawn)
        assert controls(str(error.value)) == set()


def test_the_least_and_what_a_later_version_adds(drawn, tmp_path):
    stage = drawn / "arms/distill/seed-0/distil"
    (stage / "synthesis.json").write_text('{"later": 1, "rounds": [{"round": 0, "accepted": 2, "later": {}}]}')
    assert read_synthesis(stage).rounds[0].accepted == 2
    assert "2 accepted examples in 1 round." in page(drawn).words
    (stage / "synthesis.json").write_text("{}")
    assert "seed 0" not in page(drawn).words
    shutil.rmtree(stage)
    assert read_synthesis(stage) is None
