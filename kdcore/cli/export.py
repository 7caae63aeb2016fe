"""``kdcore export``: a student in another format, compared with itself and timed."""

from __future__ import annotations

from pathlib import Path

import click

from kdcore.cli import HELP_OPTION, debug_option


@click.command(
    context_settings=HELP_OPTION,
    epilog="""\b
Examples:
  kdcore export runs/mine --int8
  kdcore export runs/mine --int8 --evaluate --force
  kdcore export runs/mine --arm control --seed 1
  kdcore export runs/mine/student --texts my-texts.txt --out exported

Needs the packages of 'kdcore[onnx]'.""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format", "_format", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="The files' format."
)
@click.option("--int8", is_flag=True, help="Also write it quantised to int8: a quarter of the size, less exact.")
@click.option("--evaluate", is_flag=True, help="Also measure the headline metric on the run's test with each file.")
@click.option("--arm", metavar="NAME", help="Whose student; by default the method's.")
@click.option("--seed", type=int, metavar="N", help="Of which seed; by default the first.")
@click.option("--subject", metavar="NAME", help="Which of several merged targets; by default the first.")
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Texts to compare and time with, one a line; by default the run's own data.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="The folder to write; by default STUDENT/onnx."
)
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@debug_option
def export(
    run: Path,
    _format: str,
    int8: bool,
    evaluate: bool,
    arm: str | None,
    seed: int | None,
    subject: str | None,
    texts: Path | None,
    out: Path | None,
    force: bool,
) -> None:
    """Write the student of RUN as ONNX, for use without torch.

    RUN is a run folder or a student's folder. The file's outputs are compared with the student's on real inputs, and
    both are timed; an export whose outputs differ is not kept. Reports and the model card of the run show the figures.
    """
    from kdcore.exporting.graph import need_onnx

    need_onnx()
    from kdcore.exporting.export import export, find_student
    from kdcore.reports import write_all

    source = find_student(run, arm, seed, subject)
    export(source, int8=int8, evaluate=evaluate, texts=texts, out=out, force=force)
    if source.run is not None and out is None:
        click.echo(f"report    {write_all(source.run.path)[-1]}")
