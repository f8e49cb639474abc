"""The paper's Table 2 in miniature: ``python -m benchmarks.table2``; with ``modes`` or ``long``, a part of its own.

Trains every arm with ``python -m training``, evaluates it on held-out prompts with ``flowopd-eval``, and writes
``benchmarks/results/table2.json``, ``docs/table2.md`` (the table, and what was hoped for beside what was seen),
``docs/table2.png`` (score against student samples), ``docs/table2-pictures.jpg``, and the README's table. As many arms
at a time as there are processors, one thread each. Stop it whenever you like: what is finished is kept, arms at hand go
on from their checkpoints. The teachers are those that ship, ``tiny:geneval``, ``tiny:ocr``, ``tiny:quality``, made by
DiffusionNFT where the paper has Flow-GRPO (:mod:`benchmarks.settings` says how and why); what the paper calls GRPO-Mix
is NFT-Mix here. All of them, and the students, are trained and drawn without guidance; the base also with its own.
Every student of NFT-Mix and Flow-OPD sees :data:`SAMPLES` pictures of its own, NFT-Mix once also :data:`BUDGET`, more
than any teacher; SFT draws none of its own, it is trained on noisings of 1,600 pictures of the teachers. The adapters
lie under ``runs/table2/train/ARM/adapter``.

``modes`` trains Flow-OPD (merge) with each mode that saves work or memory, ``long`` with :data:`BUDGET` samples; both
train anew what that is held against, since processors of another kind round otherwise, so that all must be of one
machine. Each writes its own ``benchmarks/results/table2-PART.json``, ``long`` also ``docs/table2-long.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from flowopd_eval.compare import compare_runs
from flowopd_eval.paper import TABLE

RUNS = Path("runs/table2")
RESULTS = Path("benchmarks/results/table2.json")
BENCHES = {"geneval": "shapes_geneval", "ocr": "sign_ocr", "quality": "shapes_quality"}
SHOWN = 12  # prompts on the page of pictures
SAMPLES = 1920  # of each student: 60 updates of Flow-OPD
BUDGET = 10_240  # no teacher has seen more (8,960, 7,680 and 3,840 to the snapshots that ship)
# Rows of the paper's table and what stands for them here.
IN_PAPER = {
    "SD3.5-M": "base", "GRPO-GenEval": "geneval", "GRPO-OCR": "ocr", "GRPO-DeQA": "quality", "GRPO-Mix": "mix",
    "Flow-OPD (SFT)": "opd-sft", "Flow-OPD (Merge)": "opd-merge",
}  # fmt: skip
START, END = "<!-- table2 -->\n", "<!-- end of table2 -->\n"  # in the README
PAGE = """# The paper's table in miniature

Written by `python -m benchmarks.table2`; `benchmarks/results/table2.json` has commands, samples, seeds, hashes and the
curves. Held-out prompts, 20 steps, 95 % intervals clustered by prompt. What the arms are says the module's docstring,
how their settings were chosen `benchmarks/settings.py`, what follows from the table
[miniature.md](miniature.md#what-the-table-says).

{table}
Differences are paired by picture (of several benches: their mean).

{hopes}
![Score against student samples](table2.png)

*On the first {limit} prompts of each task, one picture each; from the row that an arm starts from to its own.*

The same prompts and seeds, one row an arm:

![Pictures of all arms](table2-pictures.jpg)
"""
WEIGHTS = ("transition", "flow-opd-code", "velocity")
CURVES = ("mix-long", "opd-merge-long", "mix", "opd-none", "opd-sft", "opd-merge")  # arms in the plot
CURVE = 32  # prompts a task
WITHOUT_GUIDANCE = ("--guidance", "1")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Arm:
    """One row of the table: a recipe with changes. ``title`` is how the row reads, ``start`` the row it starts from."""

    name: str
    title: str
    recipe: str | None = None  # None: the model ``tiny:NAME``, not trained here
    changes: tuple[str, ...] = ()
    start: str = "base"

    @property
    def out(self) -> Path:
        """Where the arm trains."""
        return RUNS / "train" / self.name

    @property
    def command(self) -> list[str]:
        """The command that trains it, or goes on with it."""
        settings = (f"out={self.out}", *self.changes)
        sets = [word for setting in settings for word in ("--set", setting)]
        return [sys.executable, "-m", "training", f"training/recipes/{self.recipe}.toml", *sets]


def weight_settings(weight: str | None = None) -> tuple[str, ...]:
    """The changes of ``tiny_opd`` for a KL weight (None: the chosen one) with its rate; none before any was chosen.

    Chosen on development prompts (:mod:`benchmarks.settings`, rule 4).
    """
    path = Path("benchmarks/results/settings.json")
    found = json.loads(path.read_text()).get("weight") if path.is_file() else None
    if found is None:
        return (f"kl_weight={weight}",) if weight else ()
    weight = weight or found["chosen"]
    return f"kl_weight={weight}", f"optimizer.learning_rate={found['rates'][weight]}"


def _mix(recipe: str, name: str, title: str, *changes: str, samples: int = SAMPLES) -> Arm:
    steps = samples // 128
    return Arm(name, title, recipe, (f"steps={steps}", f"snapshot_every={steps // 3}", *changes))


def _opd(name: str, title: str, start: str, *changes: str, samples: int = SAMPLES, weight: str | None = None) -> Arm:
    steps = samples // 32
    source = str(RUNS / "train" / "sft" / "adapter") if start == "sft" else start
    kept = (f"start={source}", f"steps={steps}", f"snapshot_every={steps // 3}")
    return Arm(
        name, title, "tiny_opd", (*weight_settings(weight), *kept, *changes), "base" if start == "none" else start
    )


ARMS = (
    Arm("base", "the base, guidance 1"),
    Arm("geneval", "NFT-GenEval (teacher)"),
    Arm("ocr", "NFT-OCR (teacher)"),
    Arm("quality", "NFT-Quality (teacher, anchor)"),
    _mix("tiny_nft_mix", "mix-long", f"NFT-Mix (all rewards), {BUDGET:,} samples", samples=BUDGET),
    _mix("tiny_nft_mix_two", "mix-two", "NFT-Mix (GenEval + OCR)"),
    _mix("tiny_nft_mix", "mix", "NFT-Mix (all rewards)"),
    Arm("merge", "Merge of the teachers"),
    Arm("sft", "SFT on the teachers' pictures", "tiny_sft"),
    _opd("opd-none", "Flow-OPD (no cold start)", "none"),
    _opd("opd-sft", "Flow-OPD (SFT)", "sft"),
    _opd("opd-merge", "Flow-OPD (merge)", "merge"),
    _opd("opd-none-no-mar", "Flow-OPD (no cold start), without MAR", "none", "anchor.weight=0"),
    _opd("opd-sft-no-mar", "Flow-OPD (SFT), without MAR", "sft", "anchor.weight=0"),
    _opd("opd-merge-no-mar", "Flow-OPD (merge), without MAR", "merge", "anchor.weight=0"),
    *(
        _opd(f"opd-merge-{w}", f"Flow-OPD (merge), weight {w}", "merge", weight=w)
        for w in WEIGHTS
        if weight_settings(w) != weight_settings()
    ),
    *(_mix("tiny_nft_mix", f"mix-seed{n}", f"NFT-Mix (all rewards), seed {n}", f"seed={n}") for n in (1, 2)),
    *(_opd(f"opd-merge-seed{n}", f"Flow-OPD (merge), seed {n}", "merge", f"seed={n}") for n in (1, 2)),
)
LONG = (_opd("opd-merge-long", f"Flow-OPD (merge), {BUDGET:,} samples", "merge", samples=BUDGET),)
MODES = (
    _opd("opd-merge-window", "Flow-OPD (merge), window of two steps", "merge", "rollout.window=2"),
    _opd("opd-merge-sparse", "Flow-OPD (merge), anchor at every second step", "merge", "anchor.every=2"),
    _opd("opd-merge-fp8", "Flow-OPD (merge), backbone in fp8", "merge", "storage=float8"),
)


def train(arm: Arm) -> None:
    """Train an arm: a finished run of the same recipe ends at once, one of another recipe is refused."""
    if arm.recipe:
        arm.out.mkdir(parents=True, exist_ok=True)
        with (arm.out / "output.txt").open("a") as said:
            subprocess.run(arm.command, check=True, env=ONE_THREAD, stdout=said, stderr=said)


def evaluate(name: str, *model: str) -> dict[str, Any]:
    """Both suites and the quality of a model; bench -> summary. Finished parts are not drawn again."""
    out = RUNS / "evaluation" / name
    benches = [word for flag in BENCHES for word in ("--bench", flag)]
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flowopd_eval", *model, *benches, "--ocr-workers", "1", "--out", str(out)]
    with (out.parent / f"{name}.txt").open("w") as said:
        subprocess.run(command, check=True, env=ONE_THREAD, stdout=said, stderr=said)
    return next(iter(json.loads((out / "summary.json").read_text())["models"].values()))


def drawn_by(adapter: Path) -> tuple[str, ...]:
    """The options that draw with a student."""
    return ("--model", "tiny:base", "--lora", str(adapter), *WITHOUT_GUIDANCE)


def on_first_prompts(name: str) -> dict[str, float]:
    """Scores of an evaluation on the first :data:`CURVE` prompts of every task; bench -> mean over the tasks."""
    found = {}
    for flag in BENCHES:
        (log,) = (RUNS / "evaluation" / name).glob(f"*/{flag}/samples.jsonl")
        tasks: dict[str, list[float]] = {}
        for line in log.read_text().splitlines():
            sample = json.loads(line)
            tasks.setdefault(sample["task"], []).append(sample["score"])
        found[flag] = fmean(fmean(scores[:CURVE]) for scores in tasks.values())
    return found


def curve(arm: Arm) -> list[dict[str, float]]:
    """Score against student samples, from the row that the arm starts from to its own, on the same prompts."""
    recipe = json.loads((arm.out / "recipe.json").read_text())
    points = {0: arm.start, recipe["steps"]: arm.name}
    for snapshot in sorted((arm.out / "snapshots").glob("step-*")):
        if (step := int(snapshot.name.removeprefix("step-"))) not in points:
            points[step] = f"{arm.name}-{snapshot.name}"
            evaluate(points[step], *drawn_by(snapshot), "--limit", str(CURVE))
    return [{"samples": step * recipe["batch_size"], **on_first_prompts(points[step])} for step in sorted(points)]


def value(summary: dict[str, Any]) -> float:
    """A summary's overall score."""
    return float(summary["metrics"]["overall"]["value"])


def row(arm: Arm | None) -> dict[str, Any]:
    """What the table says of an arm (None: the base as it is meant to be drawn, guided)."""
    name = arm.name if arm else "base-guided"
    if arm is None:
        found = evaluate(name, "--model", "tiny:base")
    elif arm.recipe is None:
        found = evaluate(name, "--model", f"tiny:{name}", *WITHOUT_GUIDANCE)
    else:
        found = evaluate(name, *drawn_by(arm.out / "adapter"))
    scores = {flag: found[flag]["metrics"]["overall"] for flag in BENCHES}
    kept = {
        "title": arm.title if arm else "the base, guidance 4.5",
        "scores": scores,
        "average": sum(value(found[f]) for f in BENCHES) / 3,
        "generator": found["geneval"]["generator"],
    }
    if arm is None or arm.recipe is None:
        return kept
    facts = json.loads((arm.out / "run.json").read_text())
    return kept | {
        "command": " ".join(["python", *arm.command[1:]]),
        "samples": 0 if facts["identity"]["recipe"]["stage"] == "sft" else facts["samples"],
        "identity": facts["identity"],
        "curve": curve(arm) if arm.name in CURVES else [],
    }


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table with 95 % intervals."""
    lines = [
        "| | " + " | ".join(BENCHES.values()) + " | average | student samples |",
        "|---" * (len(BENCHES) + 3) + "|",
    ]
    for found in results.values():
        cells = [f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in found["scores"].values()]
        lines.append(
            f"| {found['title']} | {' | '.join(cells)} | {found['average']:.3f} | {found.get('samples', 0):,} |"
        )
    return "\n".join(lines) + "\n"


def beside_paper(results: dict[str, dict[str, Any]]) -> str:
    """The rows that the paper has too, without intervals, beside the paper's."""
    lines = [
        "| | shapes | signs | quality | average | in the paper | GenEval | OCR | DeQA | PickScore | average |",
        "|---" * 11 + "|",
    ]
    for theirs in TABLE:
        if (ours := results.get(IN_PAPER.get(theirs.name, ""))) is None:
            continue
        scores = [f"{ours['scores'][flag]['value']:.2f}" for flag in BENCHES] + [f"{ours['average']:.3f}"]
        printed = [f"{value:.2f}" for value in theirs.columns] + [f"{theirs.average:.4f}"]
        lines.append(f"| {' | '.join([ours['title'], *scores, theirs.name, *printed])} |")
    return "\n".join(lines) + "\n"


def write_readme(table: str, path: Path = Path("README.md")) -> None:
    """Put the table in its place in the README."""
    text = path.read_text()
    if not 0 <= text.find(START) < text.find(END):
        raise ValueError(f"{path} has no place for the table: {START.strip()} … {END.strip()}")
    before, after = text[: text.index(START)], text[text.index(END) + len(END) :]
    path.write_text(f"{before}{START}\n{table}\n{END}{after}")


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Score against student samples, one panel a bench."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(BENCHES), figsize=(15, 4.5), sharex=True, layout="constrained")
    for axis, (flag, key) in zip(axes, BENCHES.items(), strict=True):
        for found in results.values():
            if points := found.get("curve"):
                axis.plot([p["samples"] for p in points], [p[flag] for p in points], marker=".", label=found["title"])
        axis.set(title=key, xlabel="student samples", ylabel="score")
    axes[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def page(results: dict[str, dict[str, Any]]) -> Image.Image:
    """The same prompts and seeds, one row an arm."""
    side, left = 68, 330
    sheet = Image.new("RGB", (left + SHOWN * side, len(results) * side), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for y, (name, found) in enumerate(results.items()):
        pen.text((left - 8, y * side + side // 2), found["title"], fill="black", font=font, anchor="rm")
        files = []
        for flag, count in (("geneval", SHOWN * 3 // 4), ("ocr", SHOWN // 4)):
            everything = sorted((RUNS / "evaluation" / name).glob(f"*/{flag}/samples/*.png"))
            files += [everything[n * len(everything) // count] for n in range(count)]
        for x, file in enumerate(files):
            with Image.open(file) as picture:
                sheet.paste(picture, (left + x * side, y * side))
    return sheet


Hope: TypeAlias = tuple[str, str, str, tuple[str, ...], float]
# What the paper lets one hope for: (what, arm, arm it is held against, benches, least difference that is hoped for).
# All three benches: their mean.
HOPES = (
    *((f"The {f} teacher is 20 points over the base", f, "base", (f,), 0.20) for f in BENCHES),
    *(
        (f"NFT-Mix on all rewards, {BUDGET:,} samples, loses to the {f} teacher", f, "mix-long", (f,), 0.0)
        for f in BENCHES
    ),
    *((f"Flow-OPD (merge) is within 3 points of the {f} teacher", "opd-merge", f, (f,), -0.03) for f in BENCHES),
    ("Flow-OPD (merge) is 5 points over NFT-Mix at equal samples", "opd-merge", "mix", tuple(BENCHES), 0.05),
    ("the same with seed 1", "opd-merge-seed1", "mix-seed1", tuple(BENCHES), 0.05),
    ("the same with seed 2", "opd-merge-seed2", "mix-seed2", tuple(BENCHES), 0.05),
    *(
        (f"MAR raises the quality of Flow-OPD ({start})", f"opd-{start}", f"opd-{start}-no-mar", ("quality",), 0.0)
        for start in ("none", "sft", "merge")
    ),
)


MODE_HOPES = tuple(
    (f"{arm.title} is within 3 points of without", arm.name, "opd-merge", tuple(BENCHES), -0.03) for arm in MODES
)
LONG_HOPES = (
    *(
        (
            f"Flow-OPD (merge), {BUDGET:,} samples, is within 3 points of the {f} teacher",
            "opd-merge-long",
            f,
            (f,),
            -0.03,
        )
        for f in BENCHES
    ),
    (f"it is 5 points over NFT-Mix with {BUDGET:,} samples", "opd-merge-long", "mix-long", tuple(BENCHES), 0.05),
    (f"it is better than with {SAMPLES:,} samples", "opd-merge-long", "opd-merge", tuple(BENCHES), 0.0),
)
# Parts of their own: (rows of the table that are made anew, rows beside them, hopes).
PARTS = {
    "modes": (("merge", "opd-merge"), MODES, MODE_HOPES),
    "long": (("base", *BENCHES, "merge", "mix-long", "opd-merge"), LONG, LONG_HOPES),
}


def hopes(results: dict[str, dict[str, Any]], of: Sequence[Hope]) -> list[dict[str, Any]]:
    """Each hope with the difference that was seen, paired by picture, its interval, and whether it came true.

    The mean over several benches has the root of the summed squares of their intervals' half widths as its own: the
    benches are judged on different prompts.
    """
    found = []
    for what, arm, against, flags, least in of:
        if not {arm, against} <= results.keys():
            continue
        compared = compare_runs([RUNS / "evaluation" / name for name in (against, arm)]).comparisons
        rows = [c.overall.difference for c in compared if c.key in {BENCHES[flag] for flag in flags}]
        mean_difference = sum(row.value for row in rows) / len(rows)
        half = sum(((row.high - row.low) / 2) ** 2 for row in rows) ** 0.5 / len(rows)
        low, high = (rows[0].low, rows[0].high) if len(rows) == 1 else (mean_difference - half, mean_difference + half)
        verdict = "yes" if mean_difference > least else "no"
        if low <= least <= high:
            verdict += ", within the interval"
        seen = {"difference": mean_difference, "low": low, "high": high, "least": least, "seen": verdict}
        found.append({"hope": what, **seen})
    return found


def hopes_table(found: list[dict[str, Any]]) -> str:
    """The hopes as a Markdown table, in points."""
    lines = ["| hoped for | seen: difference in points | true |", "|---|---|---|"]
    for h in found:
        shown = f"{100 * h['difference']:+.1f} [{100 * h['low']:+.1f}, {100 * h['high']:+.1f}]"
        lines.append(f"| {h['hope']} | {shown} | {h['seen']} |")
    return "\n".join(lines) + "\n"


def run(arms: Sequence[Arm], guided: bool) -> Iterator[dict[str, dict[str, Any]]]:
    """Train and evaluate ``arms``, with ``guided`` also the base as it is meant to be drawn; all rows, row by row."""
    console, trained = Console(stderr=True), {}

    def whole(arm: Arm) -> dict[str, Any]:
        if arm.recipe and arm.start in trained:
            trained[arm.start].result()
        console.print(f"{arm.name}: in {arm.out if arm.recipe else RUNS / 'evaluation' / arm.name}")
        train(arm)
        found = row(arm)
        scores = ", ".join(f"{flag} {score['value']:.3f}" for flag, score in found["scores"].items())
        console.print(f"{arm.name}: {scores}")
        return found

    results: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures: dict[str, Future[dict[str, Any]]] = {"base-guided": pool.submit(row, None)} if guided else {}
        for arm in arms:
            futures[arm.name] = trained[arm.name] = pool.submit(whole, arm)
        for name, future in futures.items():
            results[name] = future.result()
            yield results


def part(name: str) -> None:
    """One of :data:`PARTS`."""
    again, beside, hoped = PARTS[name]
    for results in run([*(arm for arm in ARMS if arm.name in again), *beside], guided=False):
        seen = hopes(results, hoped)
        path = RESULTS.with_name(f"table2-{name}.json")
        path.write_text(json.dumps({"arms": results, "hopes": seen}, indent=2) + "\n")
    if sum(bool(found.get("curve")) for found in results.values()) > 1:
        plot(results, Path(f"docs/table2-{name}.png"))
    print(markdown(results), hopes_table(seen), sep="\n")


def table() -> None:
    """All of the table, and what is made of it."""
    for results in run(ARMS, guided=True):
        seen = hopes(results, HOPES)
        RESULTS.write_text(json.dumps({"arms": results, "hopes": seen}, indent=2) + "\n")
        Path("docs/table2.md").write_text(PAGE.format(table=markdown(results), hopes=hopes_table(seen), limit=CURVE))
    write_readme(beside_paper(results))
    plot(results, Path("docs/table2.png"))
    page(results).save("docs/table2-pictures.jpg", quality=92, subsampling=0)
    print(markdown(results), hopes_table(seen), sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.table2", description=str(__doc__).partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="what modes cost, or more samples, instead of the table")
    asked = parser.parse_args().part
    part(asked) if asked else table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
