"""Commands of the package deployment: serve, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfer.cli.arguments import RunFolder
from transfer.errors import UserError


def serve(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories; NAME=RUN gives a model a name of its own.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; by default only this machine is answered.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    device: Annotated[
        str, typer.Option(help="auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that go through a model together.")] = 32,
    wait_milliseconds: Annotated[
        float, typer.Option(min=0, max=1000, help="How long the first of a batch waits for others.")
    ] = 2.0,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="The largest request.")] = 10.0,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="In which a request must have arrived.")] = 10.0,
) -> None:
    """Answer requests over HTTP with the models of runs: a page to try them on, and a JSON API."""
    from transfer.registry.requirements import CORE_DISTRIBUTION, unmet

    if problem := unmet(CORE_DISTRIBUTION, ("serve",)):
        raise UserError(f"a server is an extra: {problem.message}", fix=problem.fix)
    from rich.console import Console

    from transfer.deployment.serving.app import Batching
    from transfer.deployment.serving.reading import MEBIBYTE, Limits
    from transfer.deployment.serving.server import is_loopback
    from transfer.deployment.serving.server import serve as serve_models
    from transfer.system.signals import Interrupted

    console = Console()

    def started(address: str, names: list[str]) -> None:
        if not is_loopback(host):
            warning = f"{host} can be reached from other machines: there is no password and no encryption"
            console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
        for name in names:
            console.print(f"{address}/models/{name}/predict", highlight=False, soft_wrap=True)
        console.print(f"page: {address}   API: {address}/openapi.json   Ctrl-C ends", highlight=False, soft_wrap=True)

    limits = Limits(body_bytes=int(max_megabytes * MEBIBYTE), seconds=timeout_seconds)
    batching = Batching(max_size=batch_size, wait_seconds=wait_milliseconds / 1000)
    try:
        serve_models(runs, host=host, port=port, device=device, limits=limits, batching=batching, started=started)
    except Interrupted as interruption:
        raise typer.Exit(interruption.exit_status) from interruption


def export(
    run: RunFolder,
    format: Annotated[
        str, typer.Option("--format", help="safetensors, torch_export, onnx, or the backbone's own: torchvision.")
    ],
    output: Annotated[Path | None, typer.Option(help="A folder, or a file; by default RUN/export/FORMAT.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier export wrote.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Write a run's model in another format, checked in a fresh process, with a model card."""
    from transfer.cli.tables import facts_table
    from transfer.deployment.export import export as export_run
    from transfer.system.terminal import Console

    exported = export_run(run, format, output, force=force, dry_run=dry_run)
    facts: dict[str, object] = {"would write" if dry_run else "written": str(exported.path)}
    facts["files"] = list(exported.files)
    if not dry_run:
        facts["compared"] = f"{exported.outputs:,} outputs for {exported.examples}, in a fresh process"
        facts["largest deviation"] = exported.deviation
    Console().print(facts_table(facts))
