"""Rounds of synthesis by a language model: nothing lost, nothing paid twice, and nothing of it in the control."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from kdcore.cli import main
from kdcore.config import configure, read_run
from kdcore.engine.dry_run import dry_run
from kdcore.engine.experiment import execute as run
from kdcore.errors import BudgetError, RunError
from kdcore.files import read_json
from kdcore.plugins import load
from kdcore.reports.summary import fairness, summarise
from kdcore.teachers.asking import TextTeachers
from kdcore.testing.language_server import LanguageServer

TESTS = Path(__file__).parents[1]
METHOD = (TESTS / "methods" / "soft_labels.py", TESTS / "methods" / "rewritten.py")
FAST = ("steps=4", "evaluate_every=unset", "checkpoints=3", "batch_size=8")
STAGE = Path("arms", "distill", "seed-0", "distil")


@pytest.fixture
def server(serve):
    return serve()


def at(server, **options):
    given = {"model.endpoint": server.address, **options}
    return [*FAST, *(f"rewritten.{name}={json.dumps(value)}" for name, value in given.items())]


def pools(folder, arm="distill"):
    return [
        path.read_bytes() for path in sorted((folder / "arms" / arm / "seed-0" / "distil" / "rounds").glob("*.jsonl"))
    ]


def bits(folder, arm="distill"):
    done = read_json(folder / "arms" / arm / "seed-0" / "distil" / "done.json")
    return {key: value for key, value in done.items() if key != "seconds"}


def test_every_round_has_its_number_from_a_server_that_fails(execute, server):
    whole = execute(*at(server), plugins=METHOD)
    with LanguageServer(faults=0.3, seed=3, hang=1.5) as faulty:
        folder = execute(*at(faulty, **{"model.timeout": 0.5}), plugins=METHOD, out="faulty")
        assert sum(faulty.received.values()) > sum(faulty.answered.values())
    assert set(faulty.answered.values()) == {1}
    assert pools(folder) == pools(whole)
    assert bits(folder) == bits(whole)
    assert [pool.count(b"\n") for pool in pools(folder)] == [8, 8, 8]


def test_examples_lead_back_to_their_answers(execute, server):
    folder = execute(*at(server), plugins=METHOD)
    [example, *_] = map(json.loads, pools(folder)[1].splitlines())
    assert (example["id"], example["teacher"], example["origin"]) == ("1/0", "writer", "rewritten")
    with sqlite3.connect(folder / "store" / "journal.sqlite") as journal:
        assert journal.execute("select count(*) from answers").fetchone()[0] == len(server.answered)
    assert len(example["answers"]) == 2
    facts = read_json(folder / STAGE / "synthesis.json")
    assert [each["accepted"] for each in facts["rounds"]] == [8, 8, 8]
    tally = facts["teachers"]["writer"]
    assert tally["requests"] >= 48
    assert tally["paid"] == len(server.answered)
    assert tally["rejected"].keys() == {"boils water"}
    assert sum(facts["rounds"][0]["quality"]["labels"].values()) == 8
    assert "rewritten" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_control_asks_nobody(execute, server, monkeypatch):
    folder = execute(*at(server), plugins=METHOD, compare=True)
    assert not any(pools(folder, "control"))
    asked = []

    def raising(self, name, *rest, **options):
        asked.append(name)
        raise AssertionError("the teacher was asked")

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="the teacher was asked"):
        patch.setattr(TextTeachers, "ask", raising)
        execute(*at(server), plugins=METHOD, compare=True, out="mute")
    assert set(asked) == {"writer"}  # by the method; the control was traced before, and asked nobody
    answered = sum(server.answered.values())
    with monkeypatch.context() as patch:
        patch.setattr(TextTeachers, "_from_teacher", raising)  # the method finds its answers in the journal
        again = execute(*at(server), plugins=METHOD, compare=True, out="again", store=str(folder / "store"))
    assert sum(server.answered.values()) == answered
    assert bits(again, "control") == bits(folder, "control")
    assert bits(again) == bits(folder)


def test_the_controls_other_order_has_its_reason(execute, server):
    folder = execute(*at(server, rounds=1, take=2), "steps=1", plugins=METHOD, compare=True)
    summary = summarise(folder)
    [entry] = summary.headline
    assert entry["equal"] == {"initial_weights": True, "order": False, "steps": True}
    reason = "the control's order has only the examples that no teacher made"
    assert fairness(entry).endswith(f"; because {reason}")
    assert summary.sentences[-1] == f"Not the same in both arms: order ({reason})."


def test_a_budget_stops_the_run_and_a_larger_one_goes_on(execute, server, tmp_path, capsys):
    whole = execute(*at(server), plugins=METHOD)
    needed = sum(server.answered.values())
    with pytest.raises(BudgetError, match="20 of max_requests 20"):
        execute(*at(server), plugins=METHOD, out="poor", max_requests=20)
    poor = tmp_path / "poor"
    assert sum(server.answered.values()) == needed + 20
    assert main(["run", "--resume", str(poor), "--max-requests", "30"]) == 1
    assert "kdcore: error: the budget is spent" in capsys.readouterr().err
    assert main(["run", "--resume", str(poor), "--max-requests", "1000"]) == 0
    assert pools(poor) == pools(whole)
    assert bits(poor) == bits(whole)
    assert max(server.answered.values()) == 2  # once by each of the two runs
    assert main(["run", "--resume", str(poor), "--seeds", "2"]) == 2


def test_an_address_may_change_before_a_resumption_and_the_model_may_not(execute, server, tmp_path, fail):
    with pytest.raises(BudgetError):
        execute(*at(server), plugins=METHOD, max_requests=20)
    config = tmp_path / "run" / "config.toml"
    text = config.read_text(encoding="utf-8").replace("max_requests = 20", "max_requests = 1000")
    config.write_text(text.replace('model = "words"', 'model = "others"'), encoding="utf-8")
    assert "rewritten.model.model was words, is others" in fail("run", "--resume", config.parent)
    with LanguageServer() as moved:
        config.write_text(text.replace(server.address, moved.address), encoding="utf-8")
        run(read_run(config.parent), resume=config.parent)
        assert moved.answered


def test_an_endpoint_that_is_gone_leaves_a_run_to_resume(execute, server, tmp_path):
    address = server.address.replace("127.0.0.1", "127.0.0.2")
    settings = [*at(server), f'rewritten.model.endpoint="{address}"', "rewritten.model.retries=0"]
    with pytest.raises(RunError) as error:
        execute(*settings, plugins=METHOD)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "config.toml").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["store/journal.sqlite", "arms/*/*/distil/rounds/2.json", "arms/*/*/distil/rounds/1.jsonl"]
)
def test_a_killed_synthesis_resumes_to_the_same_bits_and_pays_at_most_what_was_in_flight(
    start, killed_at, tmp_path, moment
):
    with LanguageServer(delay=0.02) as server:
        settings = [argument for setting in at(server) for argument in ("--set", setting)]
        command = ["run", *(word for path in METHOD for word in ("--plugin", str(path))), *settings]
        command += ["--device", "cpu", "--no-compare"]
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert start([*command, "--out", str(whole)]).wait() == 0
        for _ in range(5):
            server.answered.clear()
            if killed_at(command, killed, moment):
                break
            shutil.rmtree(killed)
        assert start(["run", "--resume", str(killed)]).wait() == 0
        assert sum(count - 1 for count in server.answered.values()) <= 4  # as many as are in flight
    assert pools(killed) == pools(whole)
    assert bits(killed) == bits(whole)


def test_a_dry_run_says_what_is_asked_and_what_it_costs(server, capsys):
    settings = [*at(server), "rewritten.model.prompt_price=10", "rewritten.model.answer_price=50"]
    options = {"device": "cpu", "compare": True, "seeds": 2}
    dry_run(configure([load(str(path)) for path in METHOD], None, settings, options))
    printed = capsys.readouterr().out
    assert f"teacher   writer: words, {server.address}; every answer kept in the journal" in printed
    assert "about 96 requests, 9,600 prompt and 1,920 answer tokens: about 0.19 at its prices" in printed
    assert not server.received
