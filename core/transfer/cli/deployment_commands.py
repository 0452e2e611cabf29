"""Commands of the package deployment: serve, export."""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Literal

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
    deadline_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time within which a request that has arrived must be answered.")
    ] = 30.0,
    drain_seconds: Annotated[
        float, typer.Option(min=1, help="Time to answer the requests in progress when the server is stopped.")
    ] = 30.0,
    allowed_host: Annotated[
        list[str],
        typer.Option(help="Host name of the server behind a proxy, or *.example.com. Repeatable.", show_default=False),
    ] = [],  # noqa: B006  # typer copies it
    root_path: Annotated[
        str, typer.Option(help="Path under which a proxy publishes the server, such as /ants.", show_default=False)
    ] = "",
    uds: Annotated[
        Path | None, typer.Option(help="Unix domain socket to listen on instead of an address.", show_default=False)
    ] = None,
    trusted_proxy: Annotated[
        list[str],
        typer.Option(
            help="Address or network of a proxy whose X-Forwarded headers are used. Repeatable.", show_default=False
        ),
    ] = [],  # noqa: B006  # typer copies it
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the bearer tokens of clients, one per line. Default: $TRANSFER_SERVE_TOKENS, or no token.",
            show_default=False,
        ),
    ] = None,
    access_log: Annotated[
        Literal["off", "text", "json"], typer.Option(help="Format of a line per request on standard error.")
    ] = "off",
) -> None:
    """Serve the models of runs over HTTP, with a demo page and a JSON API."""
    from transfer.registry.requirements import CORE_DISTRIBUTION, unmet

    if problem := unmet(CORE_DISTRIBUTION, ("serve",)):
        raise UserError(f"the server needs an extra: {problem.message}", fix=problem.fix)
    from transfer.deployment.serving.batching import Batching
    from transfer.deployment.serving.reading import MEBIBYTE, Limits
    from transfer.deployment.serving.server import Publication, serve as serve_models
    from transfer.system.signals import Interrupted

    numbers = {
        "--max-megabytes": max_megabytes,
        "--timeout-seconds": timeout_seconds,
        "--deadline-seconds": deadline_seconds,
        "--drain-seconds": drain_seconds,
        "--wait-milliseconds": wait_milliseconds,
    }
    for option, number in numbers.items():
        if not math.isfinite(number):
            raise UserError(f"{option} is not a finite number: expected a limit, got {number}", where=option)
    limits = Limits(body_bytes=int(max_megabytes * MEBIBYTE), seconds=timeout_seconds, answer_seconds=deadline_seconds)
    publication = Publication(
        allowed_hosts=allowed_host,
        root_path=root_path.rstrip("/"),
        uds=None if uds is None else str(uds),
        trusted_proxies=trusted_proxy,
        token_file=token_file,
        access_log=access_log,
        drain_seconds=drain_seconds,
    )
    batching = Batching(max_size=batch_size, wait_seconds=wait_milliseconds / 1000)
    try:
        serve_models(
            runs,
            host=host,
            port=port,
            device=device,
            limits=limits,
            batching=batching,
            publication=publication,
            started=lambda address, names: _print_addresses("localhost" if uds else host, address, names),
        )
    except Interrupted as interruption:
        # A thread may still compute for a request that was given up. The interpreter would wait for it at its end.
        sys.stdout.flush()
        for thread in threading.enumerate():
            if thread.name.startswith(("batches", "decoders")):
                thread.join(1)
                if thread.is_alive():
                    os._exit(interruption.exit_status)
        raise typer.Exit(interruption.exit_status) from interruption


def _print_addresses(host: str, address: str, names: list[str]) -> None:
    """Print the addresses of a server that has started, and warn if other machines can reach it."""
    from rich.console import Console

    from transfer.deployment.serving.server import is_loopback

    console = Console()
    if not is_loopback(host):
        warning = f"other machines can reach {host}: the server has no encryption, and no password without --token-file"
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
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Smaller numbers in an ONNX graph: int8 or fp16. The loss of accuracy is measured.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without writing them.")] = False,
) -> None:
    """Export the model of a run with a model card, and verify the export in a fresh process."""
    from transfer.cli.tables import facts_table
    from transfer.deployment.export import export as export_run
    from transfer.system.terminal import Console

    exported = export_run(run, format, output, quantize=quantize, force=force, dry_run=dry_run)
    facts: dict[str, object] = {"would write" if dry_run else "written": str(exported.path)}
    facts["files"] = list(exported.files)
    if not dry_run:
        facts["compared"] = f"{exported.outputs:,} outputs for {exported.examples}, in a fresh process"
        facts["largest deviation"] = exported.deviation
        if exported.quantization_loss is not None:
            facts["quantized"] = str(exported.quantization_loss)
    Console().print(facts_table(facts))


def push(
    run: RunFolder,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the Hugging Face Hub.")],
    format: Annotated[str, typer.Option("--format", help="Format of the export.")] = "safetensors",
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Existing branch. Default: the default branch.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without uploading them.")] = False,
) -> None:
    """Upload the export of a run with its model card to the Hugging Face Hub."""
    from transfer.cli.tables import facts_table
    from transfer.deployment.push import push as push_run
    from transfer.system.terminal import Console

    pushed = push_run(run, repository, format=format, private=private, revision=revision, dry_run=dry_run)
    facts: dict[str, object] = {"would upload to" if dry_run else "uploaded to": pushed.repository}
    facts["files"] = [f"{name} ({pushed.files[name]:,} bytes)" if pushed.files else name for name in pushed.names]
    if pushed.url:
        facts["commit"] = pushed.url
    Console().print(facts_table(facts))
