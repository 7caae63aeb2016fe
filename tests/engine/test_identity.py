"""A run goes on only under the conditions it was begun under; the refusal says what has changed."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from attrs import frozen

from kdcore import Example, InputError, Splits, hookimpl, option
from kdcore.config import configure
from kdcore.engine import identity
from kdcore.engine.identity import Sources, check_identity, environment
from kdcore.plugins import LoadedPlugin, PluginInfo


@frozen(kw_only=True)
class Method:
    steps: int = option(10, "optimiser steps")
    labels: tuple[str, ...] = option(("no", "yes"), "class names")

    @hookimpl
    def recipe(self): ...


def configured(*settings, version="1.0"):
    info = PluginInfo("method", "toy", "", version, "kd-plugin-method", "", "module:Method")
    return configure([LoadedPlugin(info, Method, "method")], None, settings)


def check(folder, *settings, text="a", version="1.0", processes=1, way="NO", main=True):
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device("cpu"), is_main_process=main)
    accelerator.distributed_type = DistributedType(way)
    splits = Splits({"train": [Example({"text": text}, id="1")]})
    check_identity(folder, configured(*settings, version=version), splits, accelerator)


def test_an_unchanged_run_may_go_on_as_often_as_it_likes(tmp_path):
    check(tmp_path)
    before = (tmp_path / "identity.json").read_bytes()
    check(tmp_path)
    check(tmp_path, "run.log_every=1", "run.workers=2")  # change no result
    assert (tmp_path / "identity.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "b"}, "the data changed;"),
        ({"version": "1.1"}, "version of method was 1.0, is 1.1;"),
        ({"processes": 2}, "number of processes was 1, is 2;"),
        ({"way": "FSDP"}, "way of several processes was NO, is FSDP;"),
    ],
)
def test_what_the_weights_depend_on_is_named_with_both_values(tmp_path, changes, words):
    check(tmp_path)
    with pytest.raises(InputError) as raised:
        check(tmp_path, **changes)
    assert f"{tmp_path}: cannot be resumed to the same result: {words}" in str(raised.value)
    check(tmp_path)


def test_another_number_of_threads_is_another_run(tmp_path, monkeypatch):
    check(tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(InputError, match=f"number of threads was {threads}, is {threads + 1};"):
        check(tmp_path)


def test_all_changes_are_told_at_once(tmp_path):
    check(tmp_path)
    with pytest.raises(InputError, match=r"steps was 10, is 20; labels was \['no', 'yes'\], is \['maybe'\]; undo that"):
        check(tmp_path, "steps=20", "labels=['maybe']")


def test_another_torch_is_another_run(tmp_path, monkeypatch):
    check(tmp_path)
    monkeypatch.setattr(identity, "_version", lambda package: "0.0.1" if package == "torch" else "1")
    with pytest.raises(InputError, match=r"version of torch was .*, is 0\.0\.1"):
        check(tmp_path)


def test_only_the_first_process_writes(tmp_path):
    check(tmp_path, main=False)
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_written_by_one_process_and_compared_by_all(tmp_path):
    teacher = tmp_path / "teacher.bin"
    teacher.write_bytes(b"before")
    run = tmp_path / "run"
    run.mkdir()
    other = Sources(run, writes=False)
    assert other.hash(str(teacher)) == Sources(tmp_path).hash(str(teacher))
    assert list(run.iterdir()) == []
    Sources(run).hash(str(teacher))
    teacher.write_bytes(b"after")
    with pytest.raises(InputError, match="has changed since the run began"):
        other.hash(str(teacher))


def test_the_environment_tells_versions_even_of_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(identity, "PACKAGES", ("torch", "no-such-package-anywhere"))
    found = environment(configured(version="2.5"))
    assert found["versions"]["no-such-package-anywhere"] == "not installed"
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["plugins"] == {"method": "2.5"}
