"""All tables of what `benchmarks/gpu.sh` measured: `python -m benchmarks.summary FOLDER`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from langchain_latentmas.benchmark.targets import Target
from langchain_latentmas.commands.bench import picture


def main(
    folder: Annotated[Path, typer.Argument(help="With the JSON of `latentmas bench` and of the overhead.")],
) -> None:
    """What was measured of each model, then every target, what was reached, and on which machine."""
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("model")
    table.add_column("figure")
    for name in ("reached", "wanted", ""):
        table.add_column(name, justify="right")
    about = ""
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if "targets" not in document:
            continue
        console.print(picture(document), "")
        machine, model = document["machine"], document["model"]
        packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers"))
        about = (
            f"{machine['device']}, {document['bandwidth_gb_s']:,.0f} GB/s copied; {machine['processor']}, "
            f"{machine['cores']} cores; {packages}"
        )
        for target in document["targets"]:
            table.add_row(f"{model['name']}, {model['dtype']}", target["name"], *Target.of(target).cells())
    overhead = folder / "overhead.json"
    if overhead.exists():
        for row in json.loads(overhead.read_text())["rows"]:
            ms = row["together_us"]["median"] / 1000
            met = "[green]met[/]" if ms < 1 else "[red]missed[/]"
            table.add_row("bundled", f"ms besides the model: {row['node']}", f"{ms:.2f}", "< 1", met)
    console.print(about)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
