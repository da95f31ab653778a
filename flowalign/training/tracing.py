"""A trace of a training step, for Perfetto or chrome://tracing, and a table of its operators."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from flowalign.disk.files import replace_text

OPERATORS = 40  # rows of the table


@contextmanager
def traced(folder: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Record the block, and write NAME.json.gz and NAME.txt into the folder when it has ended well.

    Phases are in the trace by their names. Recording makes the block slower, most where operators are small.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name}.json.gz"
    with TemporaryDirectory(dir=folder, prefix=".partial_") as partial:  # nothing is left of it on a full disk
        plain, packed = Path(partial) / "trace.json", Path(partial) / "trace.json.gz"
        seen.export_chrome_trace(str(plain))
        packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=3))
        packed.rename(trace)
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=60)
    replace_text(folder / f"{name}.txt", table + "\n")
    say(f"trace of the step: {trace}, to be opened in ui.perfetto.dev; its operators: {name}.txt beside it")
