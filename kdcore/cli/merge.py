"""``kdcore merge``: the weights of several models made into one, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdcore.cli import HELP_OPTION, debug_option
from kdcore.errors import InputError

if TYPE_CHECKING:
    from kdcore.merging.merge import Estimate
    from kdcore.merging.plan import Plan


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
A plan (merge.toml):
  [models]
  pretrained = "models/pretrained"
  instruct = "models/instruct"
  reasoning = "models/reasoning"

\b
  [merges.middle]
  method = "linear"
  sources = ["instruct", "reasoning"]

\b
  [merges.balanced]
  method = "linear"
  sources = [{ model = "middle", weight = 0.6 }, { model = "pretrained", weight = 0.4 }]

\b
Examples:
  kdcore merge merge.toml --dry-run
  kdcore merge merge.toml --out merged
  kdcore merge merge.toml --out merged --verify
  kdcore merge mergekit.yaml --out merged""",
)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The folder to write.")
@click.option("--dry-run", is_flag=True, help="Show what would be merged, its size and time, and write nothing.")
@click.option("--verify", is_flag=True, help="Check the merged model in DIR; it is merged first where it is not there.")
@click.option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1; by default a GPU if there is one.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="By default one a processor.")
@click.option("--force", is_flag=True, help="Replace an earlier merge in DIR.")
@debug_option
def merge(
    plan: Path, out: Path | None, dry_run: bool, verify: bool, device: str | None, threads: int | None, force: bool
) -> None:
    """Merge models as PLAN says, a TOML file or mergekit's YAML.

    Sources are folders of safetensors, names on the Hub, or other merges of the plan. Weights are streamed: memory is
    a few pieces of a tensor, whatever the models' size. An interrupted merge goes on with the same command.
    """
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'; with --dry-run nothing is written")
    from kdcore.merging.plan_file import read_plan

    read = read_plan(plan)
    import torch

    from kdcore.engine.progress import Progress
    from kdcore.merging import merge as merging

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=where).cpu()
    except Exception:  # of many kinds
        raise InputError(f"--device {where}: torch sees no such device here; use --device cpu") from None
    if dry_run:
        _show(read, merging.estimate(read, device=where, threads=threads))
        return
    assert out is not None
    progress = Progress()
    if not verify or force or not out.is_dir() or not any(out.iterdir()):
        merging.merge(read, out, device=where, threads=threads, force=force, progress=progress)
        click.echo(f"merged    {out}")
    if verify:
        _verify(read, out, where, threads)


def _verify(plan: Plan, out: Path, device: str, threads: int | None) -> None:
    from kdcore.engine.progress import Progress
    from kdcore.merging.stream import Threads
    from kdcore.merging.verify import verify

    total = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    with (
        Progress().bar("verifying", total, is_bytes=True) as bar,
        Threads(threads) as pool,
    ):
        found = verify(plan, out, pool, device=device, advance=bar.advance)
    beyond = f"{found.beyond} of {found.compared} entries are further from float64 than rounding explains"
    click.echo(f"verified  {found.tensors} tensors, checksums right; {beyond}")


def _show(plan: Plan, found: Estimate) -> None:
    """Print what a merge would do."""
    from kdcore.merging.merge import readable
    from kdcore.merging.registry import METHODS

    for name, leaf in found.graph.leaves.items():
        adapter = f" with adapter {plan.models[name].adapter}" if leaf.adapter else ""
        size = readable(sum(path.stat().st_size for path in leaf.checkpoint.files))
        click.echo(f"model     {name}: {plan.models[name].path}{adapter}, {len(leaf.checkpoint)} tensors, {size}")
    for name in plan.order():
        merge = plan.merges[name]
        base = f" against {merge.base}" if merge.base else ""
        sources = ", ".join(source for source in merge.inputs if source != merge.base)
        click.echo(f"merge     {name}: {merge.method} of {sources}{base} ({METHODS[merge.method].about})")
    for change, count in found.dtype_changes().items():
        click.echo(f"dtype     {change} of {count} tensors")
    shards = [shard.file for shard in found.job.layout.shards]
    click.echo(f"files     {', '.join(shards[:3])}{f' and {len(shards) - 3} more' if len(shards) > 3 else ''}")
    click.echo(f"others    configuration, tokenizer and all else of {plan.carrier()}")
    click.echo(f"size      {readable(found.read)} to read, {readable(found.written)} to write")
    click.echo(f"memory    about {readable(found.memory)} beside mapped files")
    click.echo(f"time      about {found.seconds:.0f} s to compute; more where the disk is slower")
