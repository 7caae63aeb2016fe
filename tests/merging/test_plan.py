"""Plans of merges: what is read, and what is refused in one line that names the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdcore.errors import InputError
from kdcore.merging.plan import Merge, Model, Plan, Source
from kdcore.merging.plan_file import parse_size, read_plan

Read = Callable[[str], Plan]

MODELS = """
[models]
a = "models/a"
b = "hub/b"
c = { path = "models/c", adapter = "adapters/c" }
"""
LINEAR = '[merges.m]\nmethod = "linear"\nsources = ["a", "b"]\n'
BASED = '[merges.m]\nmethod = "{}"\nbase = "a"\nsources = ["b", "c"]\n'
TIES, DELLA = BASED.format("ties"), BASED.format("della")


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """``read(text)`` reads a plan of this text from a file."""

    def call(text: str) -> Plan:
        path = tmp_path / "plan.toml"
        path.write_text(text, encoding="utf-8")
        return read_plan(path)

    return call


# What is read


def test_the_shortest_plan(read: Read) -> None:
    assert read(MODELS + LINEAR) == Plan(
        models={"a": Model("models/a"), "b": Model("hub/b"), "c": Model("models/c", "adapters/c")},
        merges={"m": Merge("linear", [[Source("a"), Source("b")]])},
        out="m",
    )


def test_all_of_a_plan(read: Read) -> None:
    plan = read(
        """
        out = "actor"
        dtype = "bfloat16"
        shard_size = "2.5 GiB"
        tokenizer = "b"
        missing = "keep"
        seed = 7
        """
        + MODELS
        + """
        [merges.joint]
        method = "ties"
        base = "a"
        density = [0.2, 0.8]
        scale = 0.9
        normalize = false
        sources = ["b", { model = "c", weight = { "*.mlp.*" = 0.3, "*" = [1, 0.5] }, density = 1 }]

        [merges.actor]
        method = "slerp"
        t = 0.25
        sources = ["a", "joint"]
        """
    )
    assert (plan.out, plan.dtype, plan.shard_size) == ("actor", "bfloat16", int(2.5 * 2**30))
    assert (plan.tokenizer, plan.missing, plan.seed) == ("b", "keep", 7)
    joint = plan.merges["joint"]
    assert (joint.base, joint.inputs) == ("a", ["a", "b", "c"])
    assert joint.parameters == {"density": [0.2, 0.8], "scale": 0.9, "normalize": False}
    assert joint.slices == [[Source("b"), Source("c", None, {"weight": {"*.mlp.*": 0.3, "*": [1, 0.5]}, "density": 1})]]
    assert plan.merges["actor"].parameters == {"t": 0.25}


def test_slices_of_layers(read: Read) -> None:
    plan = read(
        MODELS
        + """
        [merges.tall]
        method = "passthrough"
        [[merges.tall.slices]]
        sources = [{ model = "a", layers = [0, 8] }]
        [[merges.tall.slices]]
        sources = [{ model = "b", layers = [4, 12], weight = 0.5 }]
        """
    )
    assert plan.merges["tall"].slices == [[Source("a", (0, 8))], [Source("b", (4, 12), {"weight": 0.5})]]
    assert plan.used() == ["a", "b"]


CHAIN = (
    MODELS
    + """
[merges.last]
method = "linear"
sources = ["first", "second"]
[merges.second]
method = "task_arithmetic"
base = "first"
sources = ["b"]
[merges.first]
method = "linear"
sources = ["a"]
[merges.aside]
method = "linear"
sources = ["c"]
"""
)


def test_a_merge_of_merges_comes_after_them(read: Read) -> None:
    plan = read('out = "last"\n' + CHAIN)
    assert plan.order() == ["first", "second", "last"]
    assert plan.used() == ["a", "b"]
    assert plan.carrier() == "a"
    assert read('out = "second"\ntokenizer = "c"\n' + CHAIN).order() == ["first", "second"]
    assert read('out = "aside"\n' + CHAIN).order() == ["aside"]


def test_the_model_that_files_are_carried_from(read: Read) -> None:
    assert read(MODELS + LINEAR).carrier() == "a"
    assert read(MODELS + TIES.replace('base = "a"', 'base = "c"').replace('"b", "c"', '"b", "a"')).carrier() == "c"
    plan = read('tokenizer = "c"\n' + MODELS + LINEAR)
    assert plan.carrier() == "c"
    assert plan.used() == ["a", "b", "c"]


def test_the_merge_that_no_other_uses_is_written(read: Read) -> None:
    assert read(CHAIN.replace('sources = ["c"]', 'sources = ["last"]')).out == "aside"


def test_many_merges_of_merges_are_ordered_at_once(read: Read) -> None:
    """Each uses the two before it: a walk of all paths would take 2^100 steps, one call inside another 1000 calls."""
    texts = ['[merges.m0]\nmethod = "linear"\nsources = ["a"]\n', '[merges.m1]\nmethod = "linear"\nsources = ["m0"]\n']
    for place in range(2, 1100):
        texts.append(f'[merges.m{place}]\nmethod = "linear"\nsources = ["m{place - 1}", "m{place - 2}"]\n')
    assert read(MODELS + "".join(texts[::-1])).order() == [f"m{place}" for place in range(1100)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1", 1), ("200 MiB", 200 * 2**20), ("1.5kb", 1500), (" 2 TB ", 2 * 10**12), ("0.1kB", 100)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_in_bytes_and_windows_lines(read: Read, tmp_path: Path) -> None:
    assert read("shard_size = 1000\n" + MODELS + LINEAR).shard_size == 1000
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (MODELS + LINEAR).replace("\n", "\r\n").encode())
    assert read_plan(path).out == "m"


@pytest.mark.parametrize("density", ["0.85", "1", "[0.5, 0.85]", '{ "*.mlp.*" = 0.2, "*" = 1.0 }', "[1, 1]"])
def test_densities_that_epsilon_leaves_alone(read: Read, density: str) -> None:
    read(MODELS + DELLA + f"density = {density}\n")


def test_the_epsilon_of_a_source_counts_before_that_of_the_merge(read: Read) -> None:
    own = '[{ model = "b", epsilon = 0.1 }, { model = "c", epsilon = 0.2, density = 0.7 }]'
    read(MODELS + DELLA.replace('["b", "c"]', own) + "density = 0.2\nepsilon = 0.9\n")


# What is refused


def replaced(old: str, new: str, text: str = MODELS + LINEAR) -> str:
    assert old in text
    return text.replace(old, new)


def extra(line: str, text: str = MODELS + LINEAR) -> str:
    return text + line + "\n"


def sources(text: str, rest: str = "") -> str:
    return MODELS + f'[merges.m]\nmethod = "linear"\nsources = {text}\n{rest}'


def slices(*texts: str) -> str:
    return MODELS + '[merges.m]\nmethod = "linear"\n' + "".join(f"[[merges.m.slices]]\n{text}\n" for text in texts)


BAD = {
    "unknown method": (
        replaced('"linear"', '"linaer"'),
        "merges.m.method = linaer: no such method; there are: linear,",
    ),
    "method no string": (replaced('"linear"', "3"), "merges.m.method = 3 must be a string"),
    "no method": (replaced('method = "linear"\n', ""), "merges.m: has no method"),
    "circle": (
        MODELS + "".join(f'[merges.{x}]\nmethod = "linear"\nsources = ["a", "{y}"]\n' for x, y in ("xy", "yz", "zx")),
        "merges.x: the merges need each other in a circle: x -> y -> z -> x",
    ),
    "circle aside": (
        'out = "m"\n' + MODELS + LINEAR + '[merges.n]\nmethod = "ties"\nbase = "n"\nsources = ["a"]\n',
        "merges.n: the merges need each other in a circle: n -> n",
    ),
    "circle of two": (
        MODELS + "".join(f'[merges.{x}]\nmethod = "linear"\nsources = ["{y}"]\n' for x, y in ("xy", "yx")),
        "merges.x: the merges need each other in a circle: x -> y -> x",
    ),
    "itself": (sources('["a", "m"]'), "merges.m: the merges need each other in a circle: m -> m"),
    "density 2": (extra("density = 2", MODELS + TIES), "merges.m: density = 2 must be between 0 and 1"),
    "density below 0": (extra("density = -0.1", MODELS + TIES), "merges.m: density = -0.1 must be between 0 and 1"),
    "density in a list": (extra("density = [0.5, 1.5]", MODELS + TIES), "merges.m: density = 1.5 must be between"),
    "density in a table": (
        extra('density = { "*" = [2] }', MODELS + TIES),
        "merges.m: density = 2 must be between 0 and 1",
    ),
    "density of a source": (
        sources('[{ model = "a", density = 0.5 }]'),
        "merges.m, source a: there is no parameter density here; there are: weight",
    ),
    "NaN": (extra("weight = nan"), "merges.m: weight = nan must be a number"),
    "infinite": (extra("weight = -inf"), "merges.m: weight = -inf must be a number"),
    "400 digits": (extra("weight = 1" + 400 * "0"), "must be a number"),
    "weight a string": (extra('weight = "1"'), 'merges.m: weight = "1" must be a number'),
    "weight true": (extra("weight = true"), "merges.m: weight = true must be a number"),
    "weight a date": (extra("weight = 2026-01-01"), "merges.m: weight = 2026-01-01 must be a number"),
    "weights in a list of lists": (extra("weight = [[1, 2]]"), "merges.m: weight = [1, 2] must be a number"),
    "weight of a source": (sources('[{ model = "b", weight = "x" }]'), 'merges.m, source b: weight = "x" must be'),
    "weights empty": (extra("weight = []"), "merges.m: weight is empty; give a number"),
    "weights of an empty table": (extra("weight = {}"), "merges.m: weight is empty"),
    "weights empty in a table": (extra('weight = { "*.mlp.*" = [], "*" = 1 }'), "merges.m: weight is empty"),
    "no choice": (extra('normalize = "true"'), 'merges.m: normalize = "true" must be one of true, false'),
    "t above 1": (extra("t = 1.1", replaced('"linear"', '"slerp"')), "merges.m: t = 1.1 must be between 0 and 1"),
    "unknown key": (
        "modles = 3\n" + MODELS + LINEAR,
        "modles: no such key; there are: dtype, merges, missing, models,",
    ),
    "unknown key of a model": (
        replaced("adapter =", "lora ="),
        "models.c.lora: no such key; there are: adapter, path",
    ),
    "unknown key of a merge": (
        extra("densty = 0.5", MODELS + TIES),
        "merges.m: there is no parameter densty here; there are: weight, density, scale, normalize, rescale",
    ),
    "unknown key of a slice": (
        slices('sources = [{ model = "a", layers = [0, 2] }]\nweight = 2'),
        "merges.m.slices[0].weight: no such key; there are: sources",
    ),
    "unknown key of a source": (
        sources('["a", { model = "b", wieght = 1 }]'),
        "merges.m, source b: there is no parameter wieght here; there are: weight",
    ),
    "parameter of the whole at a source": (
        sources('["a", { model = "b", normalize = true }]'),
        "merges.m, source b: there is no parameter normalize here",
    ),
    "sources and slices": (
        extra('slices = [{ sources = ["a"] }]'),
        "merges.m: needs exactly one of sources and slices",
    ),
    "neither": (replaced('sources = ["a", "b"]\n', ""), "merges.m: needs exactly one of sources and slices"),
    "sources empty": (sources("[]"), "merges.m: has no sources"),
    "slices empty": (replaced('sources = ["a", "b"]', "slices = []"), "merges.m: has no sources"),
    "sources a string": (sources('"a"'), "merges.m: needs sources = [...], a list of names or of tables with model"),
    "slices a string": (replaced("sources =", "slices ="), "merges.m.slices[0]: needs sources"),
    "slices no list": (replaced('sources = ["a", "b"]', "slices = 3"), "merges.m.slices must be tables [[merges.m"),
    "source a number": (sources('["a", 3]'), "merges.m.sources[1] = 3 must be a name, or a table with model"),
    "source without model": (sources("[{ weight = 1 }]"), "merges.m.sources[0] = {weight = 1} must be a name, or a"),
    "source's model a number": (sources("[{ model = 1 }]"), "merges.m.sources[0].model = 1 must be a string"),
    "base of linear": (extra('base = "a"'), "merges.m: linear takes no base: leave it away, or name it among the"),
    "no base": (replaced('base = "a"\n', "", MODELS + TIES), "merges.m: ties compares with a base: name one"),
    "base a list": (replaced('base = "a"', 'base = ["a"]', MODELS + TIES), 'merges.m.base = ["a"] must be a string'),
    "unknown base": (replaced('base = "a"', 'base = "d"', MODELS + TIES), "merges.m: there is no model or merge d;"),
    "three sources": (
        replaced('"a", "b"]', '"a", "b", "c"]', replaced('"linear"', '"slerp"')),
        "merges.m: slerp takes exactly 2 sources, not 3",
    ),
    "one source": (
        replaced('"b", "c"]', '"b"]', MODELS + BASED.format("model_stock")),
        "merges.m: model_stock takes at least 2 sources beside the base, not 1",
    ),
    "unknown model": (sources('["a", "d"]'), "merges.m: there is no model or merge d; there are: a, b, c, m"),
    "unknown tokenizer": ('tokenizer = "m"\n' + MODELS + LINEAR, "tokenizer = m: no such model; there are: a, b, c"),
    "dtype": ('dtype = "int8"\n' + MODELS + LINEAR, "dtype = int8: must be one of float32, float16, bfloat16, float64"),
    "shard size in words": ('shard_size = "x"\n' + MODELS + LINEAR, "shard_size = x: must be a size such as 5GB"),
    "shard size 0": ("shard_size = 0\n" + MODELS + LINEAR, "shard_size = 0 must be at least 1"),
    "shard size 0GB": ('shard_size = "0GB"\n' + MODELS + LINEAR, "shard_size = 0GB: must be a size such as"),
    "shard size below a byte": ('shard_size = "0.5"\n' + MODELS + LINEAR, "shard_size = 0.5: must be a size"),
    "shard size endless": (f'shard_size = "{400 * "9"}GB"\n' + MODELS + LINEAR, "must be a size such as"),
    "shard size below 0": ('shard_size = "-5GB"\n' + MODELS + LINEAR, "shard_size = -5GB: must be a size"),
    "shard size of no unit": ('shard_size = "5 apples"\n' + MODELS + LINEAR, "shard_size = 5 apples: must be a size"),
    "shard size a fraction": ("shard_size = 1.5\n" + MODELS + LINEAR, "shard_size = 1.5 must be an integer"),
    "seed below 0": ("seed = -1\n" + MODELS + LINEAR, "seed = -1 must be at least 0"),
    "missing": ('missing = "skip"\n' + MODELS + LINEAR, "missing = skip: must be one of refuse, keep"),
    "layers reversed": (sources('[{ model = "a", layers = [4, 2] }]'), "merges.m: layers are [first, last) with 0 <="),
    "layers empty": (sources('[{ model = "a", layers = [2, 2] }]'), "merges.m: layers are [first, last)"),
    "layers below 0": (sources('[{ model = "a", layers = [-1, 2] }]'), "merges.m: layers are [first, last)"),
    "layers of three": (
        sources('[{ model = "a", layers = [0, 1, 2] }]'),
        "merges.m.sources[0].layers = [0, 1, 2] must",
    ),
    "layers of words": (sources('[{ model = "a", layers = ["0", "2"] }]'), "merges.m.sources[0].layers = "),
    "layers of other lengths": (
        sources('[{ model = "a", layers = [0, 2] }, { model = "b", layers = [0, 3] }]'),
        "merges.m: the sources of a slice have different numbers of layers ([2, 3])",
    ),
    "layers of some": (
        sources('[{ model = "a", layers = [0, 2] }, "b"]'),
        "merges.m: some sources of a slice name layers and some do not",
    ),
    "slices without layers": (
        slices('sources = ["a"]', 'sources = ["b"]'),
        "merges.m: of several slices each names the layers of its sources",
    ),
    "one slice without layers": (
        slices('sources = [{ model = "a", layers = [0, 2] }]', 'sources = ["b"]'),
        "merges.m: of several slices each names the layers of its sources",
    ),
    "a bad slice of two": (
        slices('sources = [{ model = "a", layers = [0, 2] }]', 'sources = [{ model = "a", layers = [3] }]'),
        "merges.m.slices[1].sources[0].layers = [3] must be",
    ),
    "epsilon too wide": (
        extra("density = 0.1", MODELS + DELLA),
        "merges.m: density 0.1 +- epsilon 0.15 leaves 0 to 1; lower epsilon",
    ),
    "epsilon too high": (extra("density = 0.9", MODELS + DELLA), "merges.m: density 0.9 +- epsilon 0.15 leaves 0 to 1"),
    "epsilon of a source": (
        replaced('"b", "c"]', '"b", { model = "c", epsilon = 0.6 }]', MODELS + DELLA) + "density = 0.5\n",
        "merges.m: density 0.5 +- epsilon 0.6 leaves 0 to 1",
    ),
    "epsilon between layers": (
        extra("density = [0.5, 1.0]", MODELS + DELLA),
        "merges.m: density 1.0 +- epsilon 0.15 leaves 0 to 1",
    ),
    "epsilon of a pattern": (
        extra('density = 0.5\nepsilon = { "*.mlp.*" = 0.5, "*" = 0.1 }', MODELS + DELLA),
        "merges.m: density 0.5 +- epsilon 0.5 leaves 0 to 1",
    ),
    "merge name with /": (
        replaced("[merges.m]", '[merges."m/n"]'),
        "merges.m/n: a name is a name of a file: not empty",
    ),
    "model name with /": (replaced("a =", '"../a" ='), "models.../a: a name is a name of a file"),
    "name empty": (replaced("a =", '"" ='), "models.: a name is a name of a file"),
    "model and merge of one name": (
        replaced("[merges.m]", "[merges.b]"),
        "merges.b: a model is called so too; rename one of them",
    ),
    "two merges that nobody uses": (
        MODELS + LINEAR + LINEAR.replace("merges.m", "merges.n"),
        'no merge uses m nor n; say which is written with out = "n"',
    ),
    "unknown out": ('out = "a"\n' + MODELS + LINEAR, "out = a: no such merge; there are: m"),
    "no models": (LINEAR, "has no [models]"),
    "models empty": ("[models]\n" + LINEAR, 'has no [models]; write NAME = "FOLDER" for each model'),
    "models a list": ('models = ["a"]\n' + LINEAR, "has no [models]"),
    "merges empty": (MODELS + "[merges]\n", "has no [merges]; write a table [merges.NAME] for each merge"),
    "merge a string": (MODELS + '[merges]\nm = "linear"\n', 'merges.m = "linear" must be a table [merges.m]'),
    "model a number": (replaced('"hub/b"', "3"), "models.b = 3 must be a path, or a table with path and adapter"),
    "model without path": (replaced('path = "models/c", ', ""), "models.c: has no path"),
    "model of an empty path": (replaced('"hub/b"', '""'), "models.b: has no path"),
    "path a number": (replaced('path = "models/c"', "path = 3"), "models.c.path = 3 must be a string"),
    "nothing": ("", "has no [models]"),
    "no TOML": (extra("weight = "), "no valid TOML: Invalid value (at line"),
    "key twice": (extra('method = "ema"'), "no valid TOML: "),
    "5000 digits": (extra("weight = " + 5000 * "9"), "no valid TOML: "),
    "5000 brackets": (extra("weight = " + 5000 * "["), "no valid TOML: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_plan_is_refused_in_one_line_that_names_the_key(read: Read, tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    with pytest.raises(InputError) as raised:
        read(text)
    line = str(raised.value)
    assert message in line
    assert line.startswith(f"{tmp_path / 'plan.toml'}: ")
    assert len(line.splitlines()) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.toml: no such file; 'kdcore merge --help' shows a plan"):
        read_plan(tmp_path / "none.toml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_plan(tmp_path)
    (path := tmp_path / "mergekit.YAML").write_text("{merge_method: linear, models: &list [*list]}")
    with pytest.raises(InputError, match=r"mergekit\.YAML: its lists and tables are nested too deeply; write them out"):
        read_plan(path)
    (path := tmp_path / "latin.toml").write_bytes("# Bär\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.toml: not UTF-8 \(byte 3\); save it as UTF-8"):
        read_plan(path)
