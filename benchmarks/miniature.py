"""What the README shows of the miniature: its 36 pictures and its scores. ``python -m benchmarks.miniature [STEPS…]``.

Writes ``docs/miniature.png`` and ``benchmarks/results/miniature.json``; the runs lie under ``runs/miniature`` and are
gone on with when the command is given again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

RUNS = Path("runs/miniature")
SCALE, GAP, COLUMNS, ROWS = 2, 4, 12, 3


def evaluate(steps: int) -> dict:
    """Both benches of the miniature at ``steps``: model -> bench -> summary."""
    out = RUNS / f"{steps}-steps"
    command = [sys.executable, "-m", "flowopd_eval", "--model", "tiny:base", "--bench", "geneval", "--bench", "ocr"]
    subprocess.run([*command, "--steps", str(steps), "--out", str(out)], check=True)
    return json.loads((out / "summary.json").read_text())["models"]["tiny:base"]


def contact_sheet(folders: list[Path], pictures: int) -> Image.Image:
    """Pictures that the judges call right, evenly spaced among them; a person picks none.

    What the others look like shows the report; how many they are, the scores.
    """
    files: list[Path] = []
    for folder in folders:
        lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
        everything = [folder / line["file"] for line in lines if line["score"] == 1]
        share = pictures * 5 // 6 if folder.name == "geneval" else pictures - pictures * 5 // 6
        files += [everything[i * len(everything) // share] for i in range(share)]
    side = 64 * SCALE + GAP
    sheet = Image.new("RGB", (COLUMNS * side - GAP, ROWS * side - GAP), "white")
    for index, file in enumerate(files):
        picture = Image.open(file).resize((64 * SCALE, 64 * SCALE), Image.Resampling.NEAREST)
        sheet.paste(picture, (index % COLUMNS * side, index // COLUMNS * side))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature", description=__doc__)
    parser.add_argument("steps", type=int, nargs="*", default=[20, 40], help="sampling steps (default: 20 and 40)")
    chosen = parser.parse_args().steps
    results = {f"{steps} steps": evaluate(steps) for steps in chosen}
    folders = [RUNS / f"{chosen[0]}-steps" / "tiny-base" / bench for bench in ("geneval", "ocr")]
    contact_sheet(folders, COLUMNS * ROWS).save("docs/miniature.png", optimize=True)
    kept = {
        name: {
            bench: {k: summary[k] for k in ("metrics", "n", "unscored", "partial", "version", "generator", "scorer")}
            for bench, summary in benches.items()
        }
        for name, benches in results.items()
    }
    Path("benchmarks/results/miniature.json").write_text(json.dumps(kept, indent=2) + "\n")
    for name, benches in results.items():
        for bench, summary in benches.items():
            overall = summary["metrics"]["overall"]
            print(f"{name}, {bench}: {overall['value']:.3f} [{overall['low']:.3f}, {overall['high']:.3f}]")


if __name__ == "__main__":
    main()
