"""Commands about the feature cache."""

from __future__ import annotations

import typer

app = typer.Typer(help="The stored features of frozen stages.", no_args_is_help=True)


@app.command("list")
def list_cache() -> None:
    """List what is stored, the entry used last first."""
    from datetime import datetime

    from rich.table import Table

    from transfer.feature_cache.store import FeatureCache
    from transfer.system.terminal import Console

    stored = FeatureCache(limit_bytes=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("key", "MiB", "examples", "view", "stages", "used"):
        table.add_column(heading)
    total = 0
    for entry in stored.entries():
        total += entry["bytes"]
        used = datetime.fromtimestamp(entry["used"]).astimezone().isoformat(sep=" ", timespec="minutes")
        view = "-" if entry["view"] is None else str(entry["view"])
        stages = " > ".join(entry["stages"])
        table.add_row(entry["key"][:12], f"{entry['bytes'] / 2**20:.1f}", f"{entry['examples']:,}", view, stages, used)
    console = Console()
    console.print(table)
    console.print(f"{total / 2**20:,.1f} MiB in {stored.folder}", highlight=False, soft_wrap=True)


@app.command("clear")
def clear_cache() -> None:
    """Drop everything that is stored; it is computed again when a run needs it."""
    from transfer.feature_cache.store import FeatureCache
    from transfer.system.terminal import Console

    stored = FeatureCache(limit_bytes=0)
    freed = stored.clear()
    Console().print(f"freed {freed / 2**20:,.1f} MiB in {stored.folder}", highlight=False, soft_wrap=True)
