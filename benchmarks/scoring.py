"""What judging costs: its share of a run's wall time, and what batching gives. ``python -m benchmarks.scoring``.

For each bench of the miniature three runs side by side: drawing alone, judging alone, and both as the harness overlaps
them. The share that judging adds is (both - drawing) / both; without overlap it would be judging / (drawing + judging).
For GenEval's network, on random weights of its architecture: pictures a second one by one and in batches. Ratios of one
machine, written to ``benchmarks/results/scoring.json`` with its description.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flowopd_eval import store
from flowopd_eval.benches import find_bench
from flowopd_eval.harness import BenchRun, run_bench
from flowopd_eval.models import Backbone, resolve
from flowopd_eval.rescore import rescore
from flowopd_eval.store import BenchFolder

RESULTS = Path(__file__).parent / "results" / "scoring.json"
PICTURES, BATCH = 96, 16


def seconds(work: Callable[[], object]) -> float:
    """Wall time of ``work``."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def share(flag: str, out: Path) -> dict[str, float]:
    """Drawing, judging and both, in seconds, and the two shares."""
    spec = resolve("tiny:base")
    bench = find_bench(flag, spec.objects)
    generator = Backbone(spec.base, [spec], "cpu", None).generator(spec, spec.record)
    prompts = bench.prompts()
    chosen = tuple(prompts[n * len(prompts) // PICTURES] for n in range(PICTURES))
    whole = BenchRun(
        flag,
        bench.key,
        bench.version,
        chosen,
        bench.scorer(bench.protocols[0]),
        samples=1,
        batch_size=BATCH,
        correct_at=bench.correct_at,
    )
    run_bench(replace(whole, prompts=chosen[:BATCH]), generator, out / "warm")
    drawing = seconds(lambda: run_bench(replace(whole, scorer=None), generator, out / "drawn"))
    folder = BenchFolder.of(out / "drawn", spec.name, flag)
    judging = seconds(lambda: rescore(folder, bench.scorer(bench.protocols[0]), batch_size=BATCH))
    both = seconds(lambda: run_bench(whole, generator, out / "both"))
    return {
        "drawing_s": drawing,
        "judging_s": judging,
        "both_s": both,
        "share_overlapped": max(0.0, (both - drawing) / both),
        "share_one_after_the_other": judging / (drawing + judging),
    }


def network() -> dict[str, float]:
    """GenEval's network on 512x512 pictures: pictures a second, one by one and four at a time."""
    import torch

    from flowopd_eval.scorers.mask2former import build_network

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_network().eval().to(device)
    rates = {}
    for batch in (1, 4):
        pixels = torch.randn(batch, 3, 800, 800, device=device)
        with torch.inference_mode():
            model(pixel_values=pixels)
            rates[f"pictures_per_second_batch_{batch}"] = (
                2
                * batch
                / seconds(
                    lambda pixels=pixels: [model(pixel_values=pixels).masks_queries_logits.cpu() for _ in range(2)]
                )
            )
    return rates


def main() -> None:
    results = {"pictures": PICTURES, "batch": BATCH, **store.provenance(), "benches": {}, "network": network()}
    with TemporaryDirectory() as folder:
        for flag in ("geneval", "ocr", "quality"):
            results["benches"][flag] = share(flag, Path(folder) / flag)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
