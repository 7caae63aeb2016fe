"""A merge stage: each target's tensors come from `merge_weights`, are checked and written."""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from kdcore.engine.models import UnbuiltModels
from kdcore.engine.seeds import derive, seed_everything
from kdcore.errors import InputError, PluginError, blaming
from kdcore.merging.checkpoint import Checkpoint
from kdcore.merging.shards import TensorSpec, writing
from kdcore.names import RULE, is_name
from kdcore.recipe import Stage, Target

if TYPE_CHECKING:
    from kdcore.engine.stages import StageJob
    from kdcore.run import Run


NamedTensor = tuple[str, torch.Tensor]


def source_tensors(run: Run, reference: str) -> Checkpoint:
    """The tensors of ``"stage/module"`` or of a folder of safetensors, mapped into memory.

    :raises InputError: neither a finished stage's module nor a folder with safetensors.
    """
    if reference.partition("/")[0] in run.stage_folders:
        path = run.source(reference)
        if not path.exists():
            raise InputError(f"{reference}: the stage has no such module; it has {', '.join(_modules_beside(path))}")
        return Checkpoint(path)
    if not Path(reference).exists():
        raise InputError(f"{reference}: neither a finished stage's module nor a folder with safetensors")
    return Checkpoint(Path(reference))


def _modules_beside(path: Path) -> list[str]:
    return sorted(found.stem for found in path.parent.glob("*.safetensors"))


def targets_of(run: Run, stage: Stage) -> list[Target]:
    """The targets of a merge stage: those of its recipe, or those that its own search found.

    :raises PluginError: another call found other targets.
    """
    if not callable(stage.targets):
        return list(stage.targets or ())

    def build() -> Mapping[str, torch.nn.Module]:
        seed_everything(derive(run.seed, stage.name, "build"))
        modules = stage.build(run) if stage.build else {}
        return {name: module.to(run.device).eval() for name, module in modules.items()}

    seed_everything(derive(run.seed, stage.name, "targets"))
    targets = list(stage.targets(run, UnbuiltModels(build)))
    names = [getattr(target, "name", None) for target in targets]
    if not all(isinstance(target, Target) and is_name(target.name) for target in targets) or len({*names}) < len(names):
        raise PluginError(
            f"stage {stage.name!r}: its search found {names}; return Targets of different names, each {RULE}"
        )
    facts = [{"name": t.name, "sources": [*t.sources], "options": dict(t.options)} for t in targets]
    if not facts or run.remember("targets", lambda: facts) != json.loads(json.dumps(facts)):
        found = "none" if not facts else "others than before: keep what the search finds with run.remember(key, fn)"
        raise PluginError(f"stage {stage.name!r}: its search for targets found {found}")
    return targets


def merge(job: StageJob) -> None:
    """Write every target of the stage to ``models/NAME.safetensors``."""
    began = time.monotonic()
    with job.written(job.folder / "models") as folder:
        for target in targets_of(job.run, job.stage):
            _write(job, target, folder / f"{target.name}.safetensors")
    job.save_targets()
    facts = {"steps": 0, "round_steps": [], "initial_hash": "", "order_hash": "", "weights_hash": "", "best_step": 0}
    job.finish({**facts, "seconds": round(time.monotonic() - began, 3)})


def first_names(module: torch.nn.Module) -> dict[str, str]:
    """Each name in a module's state to the first that names the same tensor: of tied ones one."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()}


def _checked(
    stream: Iterable[NamedTensor], plugin: str, target: Target, expected: Mapping[str, torch.Tensor]
) -> Iterator[NamedTensor]:
    """The stream, as long as each item is a tensor of the skeleton that has not been given before."""
    given: set[str] = set()

    def refuse(what: str) -> NoReturn:
        raise PluginError(f"merge_weights of plugin {plugin} gave {what}")

    for pair in _blamed(stream, plugin):
        match pair:
            case (str() as name, torch.Tensor() as tensor):
                pass
            case _:
                refuse(f"{reprlib.repr(pair)} for target {target.name!r}: give pairs of a name and a tensor")
        if name not in expected or tensor.shape != expected[name].shape:
            shape = tuple(expected[name].shape) if name in expected else "no such tensor"
            refuse(f"{name} of shape {tuple(tensor.shape)} for target {target.name!r}, whose skeleton has {shape}")
        if name in given:
            refuse(f"{name} twice for target {target.name!r}: give each tensor once")
        if tensor.isnan().any():
            refuse(f"NaN in {name} for target {target.name!r}: look for NaN in its sources, or for a division by zero")
        given.add(name)
        yield name, tensor


def _blamed(stream: Iterable[NamedTensor], plugin: str) -> Iterator[NamedTensor]:
    with blaming(f"in hook merge_weights of plugin {plugin}"):
        yield from stream


def _write(job: StageJob, target: Target, path: Path) -> None:
    """Write the target's tensors one by one as they come, in the skeleton's dtypes; of tied ones, which are the same
    tensor of the skeleton, the first name only.
    """
    sources = {reference: source_tensors(job.run, reference) for reference in target.sources}
    with torch.device("meta"):
        skeleton = target.skeleton(job.run)
    expected, tied_to = skeleton.state_dict(), first_names(skeleton)
    missing = dict.fromkeys(tied_to.values())
    specs = [TensorSpec(name, expected[name].dtype, tuple(expected[name].shape)) for name in missing]
    plugin, stream = _stream(job, target, sources)
    with writing(path, specs) as write:
        for name, tensor in _checked(stream, plugin, target, expected):
            if tied_to[name] in missing:
                del missing[tied_to[name]]
                write(tied_to[name], tensor)
    if missing:
        raise PluginError(
            f"merge_weights of plugin {plugin} left out {len(missing)} tensors of target {target.name!r}, "
            f"first {min(missing)}"
        )


def _stream(
    job: StageJob, target: Target, sources: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[str, Iterable[NamedTensor]]:
    """The newest plugin that merges the target, and its stream."""
    for plugin in job.plugins.newest_first("merge_weights"):
        stream = job.plugins.ask(plugin, "merge_weights", run=job.run, stage=job.stage, target=target, sources=sources)
        if stream is not None:
            return plugin, stream
    raise PluginError(f"no plugin answers merge_weights for target {target.name!r} of stage {job.stage.name!r}")
