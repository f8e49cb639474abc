"""What the benchmarks share: variants that take turns, medians and ratios, results with their provenance.

Nothing here is a test of time: figures are reported, and only what a variant computes is checked (:func:`same`). A
benchmark is one command; ``--smoke`` runs it at its smallest size and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import WorkError
from flowopd_eval.store import provenance

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition, and the most bytes of the device beyond what lay there before (None on a CPU)."""

    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def to_json(self, work: float = 1.0, unit: str = "calls") -> dict[str, Any]:
        """Median, extremes, and ``work`` units (pictures, samples·steps) a second."""
        values = {"median_s": self.median, "least_s": min(self.seconds), "most_s": max(self.seconds)}
        values |= {"repetitions": len(self.seconds), f"{unit}_per_second": work / self.median}
        return values | ({} if self.peak_bytes is None else {"peak_gb_beyond_weights": self.peak_bytes / 1e9})


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times as fast: the ratio of the medians, and the extremes of the repetitions' own ratios."""
    pairs = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return {"ratio": slow.median / fast.median, "low": min(pairs), "high": max(pairs)}


def cuda() -> Any | None:
    """``torch.cuda`` where PyTorch is loaded and has a device."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    repetitions: int,
    warm_up: int = 1,
    after_round: Callable[[dict[str, Timing]], object] = lambda timings: None,
) -> dict[str, Timing]:
    """Time the variants, each once a round, so that whatever else the machine does meets all of them.

    Every other round goes backwards. ``warm_up`` calls of each come first and are not counted. ``after_round`` is
    called with the timings so far.
    """
    for work in variants.values():
        for _ in range(warm_up):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int] = {}
    for number in range(repetitions):
        for name in list(variants) if number % 2 == 0 else reversed(variants):
            took, peak = timed(variants[name])
            seconds[name].append(took)
            if peak is not None:
                peaks[name] = max(peaks.get(name, 0), peak)
        timings = {name: Timing(tuple(found), peaks.get(name)) for name, found in seconds.items()}
        after_round(timings)
    return timings


def timed(work: Callable[[], object]) -> tuple[float, int | None]:
    """Seconds of one call, the device's queue emptied before and after, and its peak beyond what lay there before."""
    device = cuda()
    if device is None:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, None
    device.synchronize()
    device.reset_peak_memory_stats()
    before = device.memory_allocated()
    start = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - start, device.max_memory_allocated() - before


def free() -> None:
    """Give back what nothing refers to any more, also to the device."""
    gc.collect()
    if (device := cuda()) is not None:
        device.empty_cache()


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, storages that they share counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# A process inherits its parent's peak when it starts: this small parent has next to none.
_PARENT = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
found = [time.perf_counter() - start, os.waitstatus_to_exitcode(status), usage.ru_maxrss]
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


def child(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[float, int, str]:
    """Run a command from the checkout's root: seconds, the most bytes it held in memory, and its stdout.

    Raises:
        WorkError: it failed; the message has its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.json"
        parent = [sys.executable, "-S", "-c", _PARENT, str(said), *command]
        done = subprocess.run(parent, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(env or {})})
        seconds, code, most = json.loads(said.read_text()) if said.is_file() else (0.0, done.returncode, 0)
    if code:
        lines = "\n".join(done.stderr.splitlines()[-8:])
        raise WorkError(f"{' '.join(command)} ended with {code}:\n{lines}")
    return seconds, _bytes(most), done.stdout


def _bytes(ru_maxrss: int) -> int:
    return ru_maxrss if sys.platform == "darwin" else ru_maxrss * 1024


# --- parity ----------------------------------------------------------------------------------------------------------
def same(what: str, found: Any, expected: Any, atol: float = 0.0) -> float:
    """The largest difference of two arrays of numbers.

    Raises:
        WorkError: other shapes, or a difference beyond ``atol``: the variants do not compute the same.
    """
    import numpy as np

    a, b = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    difference = float(abs(a - b).max()) if a.shape == b.shape and a.size else float("nan")
    if not difference <= atol:
        shapes = f" (shapes {a.shape} and {b.shape})" if a.shape != b.shape else ""
        raise WorkError(f"{what} differ by {difference:.3g}, expected at most {atol:g}{shapes}; no figure is reported.")
    return difference


def alike(what: str, found: torch.Tensor, expected: torch.Tensor, least: float) -> float:
    """Cosine of two tensors.

    Raises:
        WorkError: it is below ``least``.
    """
    import torch

    cosine = float(torch.nn.functional.cosine_similarity(found.flatten().double(), expected.flatten().double(), dim=0))
    if not cosine >= least:
        raise WorkError(f"{what}: cosine {cosine:.6f}, expected at least {least}; no figure is reported.")
    return cosine


# --- growth ----------------------------------------------------------------------------------------------------------
def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value over log size among the largest three: 1 is linear growth, 2 quadratic, 0 none.

    By least squares; of the largest, because a fixed cost hides growth among the small. Zeros are left out.
    """
    import numpy as np

    pairs = [(size, value) for size, value in zip(sizes, values, strict=True) if value > 0][-3:]
    if len(pairs) < 2:
        return 0.0
    return float(np.polyfit(*np.log(pairs).T, 1)[0])


# --- commands and results --------------------------------------------------------------------------------------------
def parser(module: str, description: str, repetitions: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description.split("\n\n")[0])
    made.add_argument("--repetitions", type=int, default=repetitions, help="rounds that count (default: %(default)s)")
    made.add_argument("--smoke", action="store_true", help="smallest size, to see that it works; writes no results")
    return made


def machine() -> dict[str, Any]:
    """Versions and platform, and what computes."""
    device = cuda()
    torch = sys.modules.get("torch")
    named = {"device": device.get_device_name()} if device else {"device": "cpu"}
    return {**provenance(), **named, **({"threads": torch.get_num_threads()} if torch else {})}


def keep(name: str, results: Mapping[str, Any], smoke: bool) -> None:
    """Write ``results/NAME.json``; a smoke run's figures say nothing and are not kept."""
    if smoke:
        print("A smoke run: nothing is written.")
        return
    path = keep_so_far(name, results)
    print(f"Written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}.")


def keep_so_far(name: str, results: Mapping[str, Any]) -> Path:
    """Write ``results/NAME.json`` without a word: of what is stopped before its end, the figures that it had."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, "machine": machine()}, indent=2) + "\n")
    return path


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same columns as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_column(name, justify="left" if any(isinstance(row.get(name), str) for row in rows) else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(str(column.header))) for column in table.columns))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows_of(timings: Mapping[str, Timing], work: float, unit: str, slow: str) -> list[dict[str, Any]]:
    """The table of timings: seconds, units a second, times as fast as ``slow``."""
    rows = []
    for name, timing in timings.items():
        found = ratio(timings[slow], timing)
        row: dict[str, Any] = {"variant": name, "median s": timing.median, f"{unit}/s": work / timing.median}
        row[f"times {slow}"] = f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
        if timing.peak_bytes is not None:
            row["peak GB beyond weights"] = timing.peak_bytes / 1e9
        rows.append(row)
    return rows
