"""How time and memory grow: ``python -m benchmarks.growth [PART…]``.

- ``prompts``: a run of 10² to 10⁴ prompts through the real harness, with a generator and a scorer that cost nothing:
  first drawn, then gone through again (a finished run is read and checked, not drawn).
- ``report``: the report of a run of 10² to 10⁴ pictures, with the size of its page.
- ``adapters``: one to eight adapters on the miniature's backbone, all of them in one batch of eight rows; each row must
  be what its adapter draws alone.
- ``processes``: a run in one process and in two shards; the joined lines must be the same bytes.

Each size runs in a process of its own, so that the most memory held is its own. The exponent is the slope of log time
over log size among the largest three: 1 is linear; :data:`LINEAR` is the bound up to which a growth is called so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks import measure
from flowopd_eval.errors import WorkError
from flowopd_eval.harness import BenchRun, run_bench
from flowopd_eval.records import Prompt, Score
from flowopd_eval.report import write_report
from flowopd_eval.store import BenchFolder

LINEAR = 1.1
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class Flat:
    """Pictures of one colour each, decided by the seed."""

    def identity(self) -> Mapping[str, Any]:
        """A name."""
        return {"model": "flat", "sampling": {"steps": 1}}

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """8x8 pixels."""
        return [Image.new("RGB", (8, 8), (seed & 255, seed >> 8 & 255, seed >> 16 & 255)) for seed in seeds]


class ByColour:
    """1 where a picture's red is even, else 0, with a reason and a box."""

    def identity(self) -> Mapping[str, Any]:
        """A name."""
        return {"name": "by colour"}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """A score each."""
        reds = [image.getpixel((0, 0))[0] for image in images]  # type: ignore[index]
        detail = {"boxes": {"thing": [[1.0, 1.0, 7.0, 7.0, 0.9]]}}
        return [Score(float(red % 2 == 0), "" if red % 2 == 0 else f"red is {red}", detail) for red in reds]


def run_of(count: int) -> BenchRun:
    """A bench of ``count`` prompts, one picture each."""
    prompts = tuple(Prompt(f"p{n}", f"a photo of {n} things", TASKS[n % len(TASKS)]) for n in range(count))
    return BenchRun("flat", "flat", 1, prompts, ByColour(), samples=1, batch_size=16)


# --- one size, in a process of its own -------------------------------------------------------------------------------
def prompts(count: int, folder: Path) -> dict[str, float]:
    """Seconds of a run and of going through it again.

    Raises:
        WorkError: a prompt without its line, or other bytes the second time.
    """
    run, lines = run_of(count), BenchFolder.of(folder, "flat", "flat").samples
    drawn, _ = measure.timed(lambda: run_bench(run, Flat(), folder))
    first = lines.read_bytes()
    again, _ = measure.timed(lambda: run_bench(run, Flat(), folder))
    left = len(first.splitlines())
    if first != lines.read_bytes() or left != count:
        raise WorkError(f"{count} prompts left {left} lines, or other ones the second time.")
    return {"run": drawn, "read again": again}


def report(count: int, folder: Path) -> dict[str, float]:
    """Seconds of a report, and its size in MB.

    Raises:
        WorkError: a picture is not on the page.
    """
    run_bench(run_of(count), Flat(), folder)
    seconds, _ = measure.timed(lambda: write_report(folder))
    page = (folder / "report.html").read_text()
    if (found := page.count("samples/")) < count:
        raise WorkError(f"The report of {count} pictures shows {found}.")
    return {"report": seconds, "page MB": len(page) / 1e6}


def adapters(count: int, folder: Path) -> dict[str, float]:
    """Seconds of a forward of eight rows over ``count`` adapters, and MB of their factors.

    Raises:
        WorkError: a row is not what its adapter computes alone.
    """
    import torch
    from diffusers import SD3Transformer2DModel

    from benchmarks.full_size import random_adapters
    from flowopd_eval.adapters import AdapterBank
    from flowopd_eval.models import fetch_base

    transformer = SD3Transformer2DModel.from_pretrained(fetch_base("builtin:tiny"), subfolder="transformer").eval()
    names = [f"a{n}" for n in range(count)]
    bank = AdapterBank(transformer, random_adapters(transformer, names, 16))
    generator, c = torch.Generator().manual_seed(0), transformer.config
    side = c.sample_size
    batch = {
        "hidden_states": torch.randn(8, c.in_channels, side, side, generator=generator),
        "encoder_hidden_states": torch.randn(8, 24, c.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(8, c.pooled_projection_dim, generator=generator),
        "timestep": torch.full((8,), 500.0),
    }
    rows = [names[n % count] for n in range(8)]

    def forward(chosen: Any, part: slice = slice(None)) -> torch.Tensor:
        with torch.inference_mode(), bank.use(chosen):
            return transformer(**{name: value[part] for name, value in batch.items()}, return_dict=False)[0]

    together = forward(rows)
    for n in (0, count - 1, 7):
        measure.same(f"Row {n} together and alone", together[n], forward(rows[n], slice(n, n + 1))[0], 1e-3)
    timing = measure.take_turns({"forward": lambda: forward(rows)}, repetitions=9, warm_up=2)["forward"]
    return {"forward": timing.median, "factors MB": measure.bytes_of(bank.buffers()) / 1e6}


def processes(count: int, folder: Path) -> dict[str, float]:
    """Seconds of a run of the miniature in ``count`` shards at once, a thread each; then joined.

    Raises:
        WorkError: a shard failed, or the joined lines are not those of one process.
    """
    words = [sys.executable, "-m", "flowopd_eval", "--bench", "geneval", "--model", "tiny:base"]
    words += ["--samples", "1", "--steps", "4", "--limit", "4", "--batch-size", "4"]
    one_thread = {"OMP_NUM_THREADS": "1"}
    shards = [[*words, "--out", str(folder / "run"), "--shard", f"{n}/{count}"] for n in range(count)]

    def all_at_once() -> None:
        import os

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": measure.ROOT}
        started = [subprocess.Popen(shard, env={**os.environ, **one_thread}, **quiet) for shard in shards]  # type: ignore[call-overload]
        if any([process.wait() for process in started]):
            raise WorkError(f"One of {count} shards failed.")

    seconds, _ = measure.timed(all_at_once)
    measure.child([sys.executable, "-m", "flowopd_eval", "report", str(folder / "run")], one_thread)
    measure.child([*words, "--out", str(folder / "whole")], one_thread)
    joined, whole = ((folder / name).glob("*/geneval/samples.jsonl") for name in ("run", "whole"))
    if [path.read_bytes() for path in joined] != [path.read_bytes() for path in whole]:
        raise WorkError(f"{count} shards joined are not the bytes of one process.")
    return {"shards at once": seconds}


# --- growth ----------------------------------------------------------------------------------------------------------
PARTS: Mapping[str, tuple[Callable[[int, Path], dict[str, float]], Sequence[int], Sequence[int]]] = {
    "prompts": (prompts, (100, 300, 1000, 3000, 10_000), (20, 40)),
    "report": (report, (100, 300, 1000, 3000, 10_000), (20, 40)),
    "adapters": (adapters, (1, 2, 4, 8), (1, 2)),
    "processes": (processes, (1, 2), (1,)),
}


def one(part: str, size: int) -> None:
    """Measure one size and say it as JSON on the last line."""
    with TemporaryDirectory() as folder:
        found = PARTS[part][0](size, Path(folder))
    print(json.dumps(found))


def grow(part: str, sizes: Sequence[int]) -> dict[str, Any]:
    """All sizes of a part, each in a new process, and the exponents of what they took."""
    rows = []
    for size in sizes:
        _, held, said = measure.child([sys.executable, "-m", "benchmarks.growth", "--one", part, str(size)])
        rows.append({"size": size, **json.loads(said.splitlines()[-1]), "memory MB": held / 1e6})
    for row in rows:  # without what the smallest size and the interpreter take
        row["memory MB beyond the smallest"] = max(0.0, row["memory MB"] - rows[0]["memory MB"])
    measured = [name for name in rows[0] if name != "size"]
    exponents = {}
    if len(sizes) > 2:
        exponents = {
            name: measure.exponent(sizes, [row[name] for row in rows]) for name in measured if name != "memory MB"
        }
    measure.show(f"By {part}", rows)
    for name, value in exponents.items():
        print(f"{name}: exponent {value:.2f}, {'linear or better' if value <= LINEAR else 'more than linear'}")
    return {"rows": rows, "exponents": exponents, "linear_or_better": {n: e <= LINEAR for n, e in exponents.items()}}


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], int(sys.argv[3]))
        return 0
    options = measure.parser("benchmarks.growth", str(__doc__), repetitions=1)
    options.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    asked = options.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        options.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    try:
        for part in asked.parts or PARTS:
            _, sizes, few = PARTS[part]
            measure.keep(f"growth-{part}", grow(part, few if asked.smoke else sizes), asked.smoke)
    except WorkError as error:
        print(f"benchmarks.growth: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
