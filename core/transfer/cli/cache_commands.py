"""Commands for the feature cache."""

from __future__ import annotations

import typer

app = typer.Typer(help="List or clear the cached features of frozen stages.", no_args_is_help=True)


@app.command("list")
def list_cache() -> None:
    """List the entries of the feature cache, the most recently used first."""
    from datetime import datetime

    from rich.table import Table

    from transfer.feature_cache.store import FeatureCache
    from transfer.system.terminal import Console

    cache = FeatureCache(limit_bytes=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("key", "MiB", "examples", "view", "stages", "last used"):
        table.add_column(heading)
    total = 0
    for entry in cache.entries():
        total += entry["bytes"]
        used = datetime.fromtimestamp(entry["used"]).astimezone().isoformat(sep=" ", timespec="minutes")
        view = "-" if entry["view"] is None else str(entry["view"])
        stages = " > ".join(entry["stages"])
        table.add_row(entry["key"][:12], f"{entry['bytes'] / 2**20:.1f}", f"{entry['examples']:,}", view, stages, used)
    console = Console()
    console.print(table)
    console.print(f"{total / 2**20:,.1f} MiB in {cache.folder}", markup=False, highlight=False, soft_wrap=True)


@app.command("clear")
def clear_cache() -> None:
    """Delete all cached features. A run that needs them computes them again."""
    from transfer.feature_cache.store import FeatureCache
    from transfer.system.terminal import Console

    cache = FeatureCache(limit_bytes=0)
    freed = cache.clear()
    Console().print(f"freed {freed / 2**20:,.1f} MiB in {cache.folder}", markup=False, highlight=False, soft_wrap=True)
