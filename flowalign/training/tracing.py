"""A trace of a training step, for Perfetto or chrome://tracing, and a table of its operators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from flowalign.disk.files import make_folder, replace_text, replaced_file

OPERATORS = 40  # rows of the table


@contextmanager
def traced(folder: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Record a trace of the block, and write NAME.json.gz and NAME.txt into the folder unless the block raises.

    The trace names the phases. Recording slows the block down, most where its operators are small.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        yield
    trace = make_folder(folder) / f"{name}.json.gz"
    with replaced_file(trace) as partial:
        seen.export_chrome_trace(str(partial))
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=60)
    replace_text(folder / f"{name}.txt", table + "\n")
    say(f"trace of the step: {trace}, which ui.perfetto.dev opens; table of its operators: {name}.txt beside it")
