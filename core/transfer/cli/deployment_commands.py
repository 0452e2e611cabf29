"""Commands of the package deployment: serve, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transfer.cli.arguments import RunFolder
from transfer.errors import UserError


def serve(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run directories. NAME=RUN sets the name of a model.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on. The default accepts only this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 selects a free one.")] = 8000,
    device: Annotated[
        str, typer.Option(help="Device: auto (CUDA, then MPS, then the CPU), cpu, cuda, cuda:N or mps.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of requests in a batch.")] = 32,
    wait_milliseconds: Annotated[
        float, typer.Option(min=0, max=1000, help="Time that the first request of a batch waits for others.")
    ] = 2.0,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="Maximum size of a request, in MiB.")] = 10.0,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="Time within which a request must arrive.")] = 10.0,
) -> None:
    """Serve the models of runs over HTTP, with a demo page and a JSON API."""
    from transfer.registry.requirements import CORE_DISTRIBUTION, unmet

    if problem := unmet(CORE_DISTRIBUTION, ("serve",)):
        raise UserError(f"the server needs an extra: {problem.message}", fix=problem.fix)
    from transfer.deployment.serving.batching import Batching
    from transfer.deployment.serving.reading import MEBIBYTE, Limits
    from transfer.deployment.serving.server import serve as serve_models
    from transfer.system.signals import Interrupted

    limits = Limits(body_bytes=int(max_megabytes * MEBIBYTE), seconds=timeout_seconds)
    batching = Batching(max_size=batch_size, wait_seconds=wait_milliseconds / 1000)
    try:
        serve_models(
            runs,
            host=host,
            port=port,
            device=device,
            limits=limits,
            batching=batching,
            started=lambda address, names: _print_addresses(host, address, names),
        )
    except Interrupted as interruption:
        raise typer.Exit(interruption.exit_status) from interruption


def _print_addresses(host: str, address: str, names: list[str]) -> None:
    """Print the addresses of a server that has started, and warn if other machines can reach it."""
    from rich.console import Console

    from transfer.deployment.serving.server import is_loopback

    console = Console()
    if not is_loopback(host):
        warning = f"other machines can reach {host}: the server has no password and no encryption"
        console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
    for name in names:
        console.print(f"{address}/models/{name}/predict", highlight=False, soft_wrap=True)
    console.print(f"page: {address}   API: {address}/openapi.json   stop: Ctrl-C", highlight=False, soft_wrap=True)


def export(
    run: RunFolder,
    format: Annotated[
        str,
        typer.Option(
            "--format", help="Format: safetensors, torch_export, onnx, or a format of the backbone such as torchvision."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder or file to write. Default: RUN/export/FORMAT.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without writing them.")] = False,
) -> None:
    """Export the model of a run with a model card, and verify the export in a fresh process."""
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
