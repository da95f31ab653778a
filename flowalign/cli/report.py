"""`flowalign report`: write the pages of runs and comparisons again."""

from pathlib import Path
from typing import Annotated

import typer

from flowalign.cli.console import console


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders or comparison folders")],
) -> None:
    """Write the report.html of runs and the comparison.html of comparisons again, from the files on disk."""
    from flowalign.evaluate.report.comparison import rewrite_comparison_page
    from flowalign.evaluate.report.report import write_report

    for folder in runs:
        compared = (folder / "comparison.json").is_file()
        written = rewrite_comparison_page(folder) if compared else write_report(folder)
        console.print(f"wrote {written}", soft_wrap=True)
