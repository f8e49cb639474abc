"""A GenEval run from prompts to scores, against its drawing alone: ``python -m benchmarks.end_to_end``.

The harness judges a batch while the next one is drawn; how much judging adds is what this says. On a GPU: SD3.5
Medium's architecture with random weights at 40 steps, and GenEval's detector with random weights of the real size;
``--pictures 2212`` is the whole bench, fewer (the default) its first prompts. Without a GPU: the miniature with its own
suite and detector, and the README's first command, whole. The pictures of both runs must be the same files.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks import measure
from flowopd_eval.benches import find_bench
from flowopd_eval.errors import WorkError
from flowopd_eval.harness import BenchRun, run_bench
from flowopd_eval.models import Backbone, resolve
from flowopd_eval.records import Generator, Prompt, Scorer
from flowopd_eval.store import BenchFolder

OFFICIAL_PICTURES = 2212


@dataclass
class Drawer:
    """A generator over the random pipeline of :mod:`benchmarks.generation`."""

    bench: Any

    def identity(self) -> Mapping[str, Any]:
        """Random weights have no hashes worth keeping."""
        return {"model": "random", "sampling": asdict(self.bench.settings["record"])}

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures, decoded by the VAE."""
        from flowopd_eval.pipeline import draw_noise

        pipe, record = self.bench.ours, self.bench.settings["record"]
        noise = draw_noise(seeds, self.bench.shape).to(pipe.transformer.device, pipe.transformer.dtype)
        return pipe(
            **self.bench.conditions([prompt.prompt for prompt in prompts]), expert="student", latents=noise,
            num_inference_steps=self.bench.settings["steps"], guidance_scale=record.guidance,
            height=record.height, width=record.width, max_sequence_length=record.text_length,
        ).images  # fmt: skip


def runs(
    generator: Generator, scorer: Scorer, prompts: Sequence[Prompt], batch: int, repetitions: int, folder: Path
) -> dict[str, Any]:
    """Drawing alone and the whole run, taking turns.

    Raises:
        WorkError: a picture is unscored, or the two drew other pictures.
    """
    whole = BenchRun("geneval", "geneval", 1, tuple(prompts), scorer, samples=1, batch_size=batch)
    number = itertools.count()
    seen: dict[str, list[str]] = {}

    def go(run: BenchRun, name: str) -> None:
        out = folder / f"{next(number)}"
        summary = run_bench(run, generator, out)
        if run.scorer and summary["unscored"]:
            raise WorkError(f"{summary['unscored']} of {len(prompts)} pictures were not judged; no figure is reported.")
        lines = BenchFolder.of(out, summary["model"], "geneval").samples.read_text().splitlines()
        seen[name] = [json.loads(line)["sha256"] for line in lines]

    work: dict[str, Callable[[], object]] = {
        "whole run": lambda: go(whole, "whole run"),
        "drawing alone": lambda: go(replace(whole, scorer=None), "drawing alone"),
    }
    run_bench(replace(whole, prompts=whole.prompts[:batch]), generator, folder / "warm")
    timings = measure.take_turns(work, repetitions, warm_up=0)
    if seen["whole run"] != seen["drawing alone"]:
        raise WorkError("The two runs drew other pictures; no figure is reported.")
    measure.show(f"{len(prompts)} pictures", measure.rows_of(timings, len(prompts), "pictures", "whole run"))
    drawing = timings["drawing alone"].median / len(prompts)
    return {
        "pictures": len(prompts), "batch": batch,
        "variants": {name: timing.to_json(len(prompts), "pictures") for name, timing in timings.items()},
        "times_drawing_alone": measure.ratio(timings["whole run"], timings["drawing alone"]),
        "hours_of_2212_pictures_drawing_alone": drawing * OFFICIAL_PICTURES / 3600,
    }  # fmt: skip


def on_a_gpu(pictures: int, batch: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """The full architecture and GenEval's detector, both with random weights."""
    import torch

    from benchmarks.full_size import SD35
    from benchmarks.generation import random_bench
    from benchmarks.scoring import OBJECTS, random_detector
    from flowopd_eval.scorers.geneval import GenEvalScorer

    prompts = find_bench("geneval", "coco").prompts()

    def clauses(prompt: Prompt, k: int) -> list[dict[str, Any]]:
        """As many, with a colour where the prompt has one, of what the random detector sees."""
        return [
            {"class": OBJECTS[(k + n) % 2], "count": 1} | ({"color": one["color"]} if "color" in one else {})
            for n, one in enumerate(prompt.fields["include"])
        ]

    everything = [replace(p, id=f"{p.id}-{k}", fields={"include": clauses(p, k)}) for p in prompts for k in range(4)]
    asked = [everything[n * len(everything) // pictures] for n in range(pictures)]  # all tasks in their proportion
    detector = random_detector(folder, "cuda", batch)
    drawer = Drawer(random_bench(SD35, torch.device("cuda"), SD35.base.record.steps))
    return runs(drawer, GenEvalScorer(detector), asked, batch, repetitions, folder / "runs")


def on_a_cpu(pictures: int, batch: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """The miniature, and its own detector."""
    spec = resolve("tiny:base")
    bench = find_bench("geneval", spec.objects)
    generator = Backbone(spec.base, [spec], "cpu", None).generator(spec, spec.record)
    prompts = bench.prompts()
    chosen = [prompts[n * len(prompts) // pictures] for n in range(pictures)]
    return runs(generator, bench.scorer(bench.protocols[0]), chosen, batch, repetitions, folder / "runs")


def first_command(folder: Path, *more: str) -> dict[str, Any]:
    """The README's first command after installation, in a process of its own.

    Raises:
        WorkError: it failed, or left no scored summary.
    """
    command = [sys.executable, "-m", "flowopd_eval", "--bench", "geneval", "--out", str(folder / "first"), *more]
    seconds, held, _ = measure.child(command)
    (benches,) = json.loads((folder / "first" / "summary.json").read_text())["models"].values()
    if not benches["geneval"]["n"]:
        raise WorkError("The README's first command scored no picture.")
    found = {"seconds": seconds, "memory_gb": held / 1e9, "pictures": benches["geneval"]["n"]}
    measure.show("flowopd-eval --bench geneval", [found])
    return found


def main() -> int:
    options = measure.parser("benchmarks.end_to_end", str(__doc__), repetitions=2)
    options.add_argument("--pictures", type=int, help="of both runs (default: 64 on a GPU, 96 on a CPU)")
    options.add_argument("--batch", type=int, default=16, help="pictures at a time (default: %(default)s)")
    asked = options.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    side = on_a_gpu if cuda and not asked.smoke else on_a_cpu
    pictures, batch = (2, 1) if asked.smoke else (asked.pictures or (64 if cuda else 96), asked.batch)
    try:
        with TemporaryDirectory() as folder:
            results = side(pictures, batch, asked.repetitions, Path(folder))
            if not cuda:
                few = ["--limit", "1", "--samples", "1", "--steps", "2"] if asked.smoke else []
                results["first_command"] = first_command(Path(folder), *few)
            measure.keep("end-to-end-cuda" if cuda else "end-to-end-cpu", results, asked.smoke)
    except WorkError as error:
        print(f"benchmarks.end_to_end: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
