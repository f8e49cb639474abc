"""The loss of the miniature's pre-training: ``python -m benchmarks.curve``.

Reads the log under ``runs/train/tiny_base``; writes ``benchmarks/results/tiny_base_loss.json`` (pictures seen, mean
loss since the line before) and ``docs/miniature-loss.png``.
"""

import argparse
import json
from pathlib import Path

LOG = Path("runs/train/tiny_base/log.jsonl")
RESULTS, PICTURE = Path("benchmarks/results/tiny_base_loss.json"), Path("docs/miniature-loss.png")


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.curve", description=__doc__).parse_args()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # a resumed run writes again what it had seen since its checkpoint: the later line stands
    points = {line["samples"]: line["loss"] for line in map(json.loads, LOG.read_text().splitlines())}
    samples = sorted(points)
    RESULTS.write_text(json.dumps([[n, points[n]] for n in samples]) + "\n")
    figure, axis = pyplot.subplots(figsize=(8, 3), layout="constrained")
    axis.plot([n / 1e3 for n in samples], [points[n] for n in samples], linewidth=1)
    for at, what in ((288, "grid of 4"), (729, "grid of 8, fewer signs")):
        axis.axvline(at, color="grey", linestyle=":")
        axis.text(at + 5, 1.0, what, fontsize=8)
    axis.set(yscale="log", xlabel="thousand pictures seen", ylabel="flow-matching loss")
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
