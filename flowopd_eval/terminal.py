"""What a command shows while it works, and of a run when it is done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from flowopd_eval.harness import Progress

_PIPE = 400  # characters of a line that no terminal folds


@contextmanager
def status(text: str) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr that follows the harness."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def table_console() -> Console:
    """The terminal; a file or a pipe takes tables of any width unfolded, unless COLUMNS says how wide it is."""
    from rich.console import Console

    piped = not Console().is_terminal and "COLUMNS" not in os.environ
    return Console(width=_PIPE if piped else None)


def conclude(out: Path) -> None:
    """Table, report, and where everything is."""
    from flowopd_eval import report as reporting
    from flowopd_eval import store
    from flowopd_eval.benches import BENCHES
    from flowopd_eval.models import REAL_MODEL_HELP

    page = reporting.write_report(out, {bench.key: reporting.metrics_of(bench) for bench in BENCHES})
    summary = json.loads((out / "summary.json").read_bytes())  # as the report has just written it
    run = store.read_run(out)
    order = dict.fromkeys(entry["request"]["model"] for entry in run["runs"].values())  # as asked for
    models = {name: summary["models"][name] for name in order if name in summary["models"]}
    table_console().print(reporting.terminal_table(models, summary["unavailable"]))
    note = run["note"]
    lines = [
        note,
        REAL_MODEL_HELP if "miniature" in note else "",
        f"Pictures: {', '.join(str(folder.path / 'samples') for folder in store.bench_folders(out))}",
        f"Per-picture log: {', '.join(str(path) for f in store.bench_folders(out) for path in f.journals())}",
        f"Report: {page}",
    ]
    for line in filter(None, lines):
        print(line)
