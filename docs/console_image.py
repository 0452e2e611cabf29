"""Draw docs/console.svg: the console output of a quickstart run. Run: python docs/console_image.py."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from rich.table import Table
from rich.text import Text

import transfer
from transfer.cli.progress import RunConsole
from transfer.system.terminal import Console

ROOT = Path(__file__).parents[1]
SENTENCES = ("a warm, funny film that I would gladly watch again", "two hours of my life that I will never get back")

console = Console(record=True, width=150, file=io.StringIO(), force_terminal=True, color_system="truecolor")
observe = RunConsole(console)
observe.live, observe.progress.disable = False, True  # an image cannot show moving progress bars
console.print(Text("$ transfer run configs/quickstart_text.yaml", style="bold"))
with tempfile.TemporaryDirectory() as folder:
    run = transfer.run(ROOT / "configs/quickstart_text.yaml", output=Path(folder) / "runs", observe=observe)
    console.print(Text("$ transfer predict RUN " + " ".join(f'"{s}"' for s in SENTENCES), style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("input", "label", "probability"):
        table.add_column(name)
    for answer in transfer.predict(run.folder, SENTENCES):
        table.add_row(answer["input"], answer["label"], f"{answer['probability']:.4f}")
    console.print(table)
# Remove the temporary folder from the paths that the run printed.
text = console.export_svg(title="transfer").replace(folder, "")
(ROOT / "docs/console.svg").write_text(text, encoding="utf-8")
