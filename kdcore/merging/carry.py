"""What a merged model has beside its weights: configuration, tokenizer, model card, and where it comes from."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdcore import __version__
from kdcore.files import write_json, write_text
from kdcore.merging.checkpoint import OTHERS, WEIGHTS
from kdcore.merging.graph import Graph
from kdcore.merging.plan import Plan
from kdcore.merging.registry import METHODS
from kdcore.merging.stream import Job
from kdcore.model_source import is_path

__all__ = ["RECORD", "carry"]

RECORD = "merge.json"
LEFT = ("config.json", "trainer_state.json", "adapter_config.json", RECORD)
TEMPLATES = Path(__file__).parent / "templates"


def carry(graph: Graph, job: Job, folder: Path, digests: Mapping[str, str], name: str) -> None:
    """Write everything but the weights.

    All files that are no weights (tokenizer, chat template, generation configuration, ...) come from one model: that of
    the plan's ``tokenizer``, else the base of the merge that is written, else its first source. Its configuration is
    changed where the merge makes it untrue. Folders of other models in there, such as a trainer's checkpoints, stay,
    and so does all that lies beside a file of weights alone.

    :param digests: of the tensors, by name.
    :param name: of the merged model, for its card.
    """
    checkpoint = graph.leaves[graph.plan.carrier()].checkpoint
    source = checkpoint.folder
    strangers = {path.parent.name for path in source.glob(f"*/*{WEIGHTS}")} - graph.stems().keys()
    for path in [] if checkpoint.alone else sorted([*source.glob("*"), *source.glob("*/*")]):
        relative = path.relative_to(source)
        if relative.parent.as_posix() in strangers or relative.as_posix() in LEFT:
            continue
        if path.is_file() and path.suffix in OTHERS and _is_kept(relative):
            target = folder / relative
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if config := graph.config():
        write_json(folder / "config.json", {**config, **_dtype(job, config)})
    plan = public(graph.plan)
    record = {"kdcore": __version__, "plan": plan, "fingerprint": job.fingerprint, "tensors": dict(digests)}
    write_json(folder / RECORD, record)
    write_text(folder / "README.md", _card(graph, job, plan, name))


def public(plan: Plan) -> dict[str, Any]:
    """A plan as data, without folders of this machine: of a path only the last part stays."""
    facts: dict[str, Any] = attrs.asdict(plan)
    for model in facts["models"].values():
        model["path"] = _last(model["path"])
        model["adapter"] = _last(model["adapter"])
    return facts


def _last(source: str) -> str:
    return Path(source).resolve().name if source and (is_path(source) or Path(source).exists()) else source


def _is_kept(relative: Path) -> bool:
    return not relative.name.endswith(".index.json") and not any(part.startswith(".") for part in relative.parts)


def _dtype(job: Job, config: Mapping[str, Any]) -> dict[str, str]:
    """The dtype of most floating weights, under the key that the configuration has for it."""
    sizes: Counter[str] = Counter()
    for output in job.outputs:
        if output.dtype.is_floating_point:
            sizes[str(output.dtype).removeprefix("torch.")] += output.spec.size
    key = next((key for key in ("dtype", "torch_dtype") if key in config), None)
    return {key: sizes.most_common(1)[0][0]} if key and sizes else {}


def _card(graph: Graph, job: Job, plan: Mapping[str, Any], name: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "yaml": lambda value: json.dumps(value, ensure_ascii=False),
        "cell": lambda value: re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;"),
    }
    merges = [(key, graph.plan.merges[key]) for key in graph.plan.order()]
    carrier = graph.leaves[graph.plan.carrier()].checkpoint.folder
    return environment.get_template("card.md.j2").render(
        name=name,
        plan=json.dumps(plan, indent=1, ensure_ascii=False).replace("```", ""),
        hub=[path for model in plan["models"].values() if "/" in (path := model["path"])],
        merges=[(key, merge, METHODS[merge.method].about) for key, merge in merges],
        models={key: plan["models"][key] for key in graph.leaves},
        carrier=graph.plan.carrier(),
        size=f"{job.layout.size / 1e9:.2f} GB",
        tensors=len(job.outputs),
        version=__version__,
        library="sentence-transformers" if (carrier / "modules.json").is_file() else "transformers",
    )
