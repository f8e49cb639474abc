"""A painter, a judge and a bench small enough to be run a hundred times: real ones, only tiny."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from flowopd_eval.errors import WorkError
from flowopd_eval.harness import BenchRun, Interrupted, run_bench
from flowopd_eval.records import Prompt, Score
from flowopd_eval.store import Shard


class Painter:
    """Draws a bright square on noise, both from the seed alone; ``drawn`` counts the pictures."""

    def __init__(self, side: int = 12, pause: float = 0.0, **sampling: float):
        self.side, self.pause, self.sampling = side, pause, {"steps": 20, "guidance": 4.5, **sampling}
        self.drawn = 0

    def identity(self):
        return {"model": "painter:base", "base_sha256": "ab" * 32, "sampling": self.sampling}

    def generate(self, prompts, seeds):
        pictures = []
        for seed in seeds:
            time.sleep(self.pause)
            rng = np.random.default_rng(seed)
            pixels = rng.integers(0, 100, (self.side, self.side, 3), dtype=np.uint8)
            x, y = rng.integers(0, self.side // 2, 2)
            pixels[y : y + 4, x : x + 4] = rng.integers(100, 256, 3)
            pictures.append(Image.fromarray(pixels))
        self.drawn += len(pictures)
        return pictures


class Judge:
    """Right when the square is more red than blue. ``padding`` makes long lines."""

    def __init__(self, version: int = 1, padding: int = 0):
        self.version, self.padding, self.judged = version, padding, 0

    def identity(self):
        return {"name": "red", "version": self.version}

    def score(self, images, prompts):
        self.judged += len(images)
        return [self.one(np.asarray(image, dtype=float), prompt) for image, prompt in zip(images, prompts, strict=True)]

    def one(self, pixels, prompt):
        red, _, blue = pixels.reshape(-1, 3)[pixels.sum(-1).argmax()]
        detail = {"red": red, "blue": blue, "padding": "x" * self.padding}
        return Score(float(red > blue), "" if red > blue else f"{blue:.0f} blue, {red:.0f} red", detail)


PROMPTS = tuple(Prompt(f"p{i}", f"a photo of {i} cats", ("counting", "colors")[i % 2], {"n": i}) for i in range(10))
RUN = BenchRun("squares", "red_squares", 1, PROMPTS, Judge(), samples=2, seed=7, batch_size=3)
ENTRY = "painter-base/squares"


def main(out: str, shard="0/1", side=12, pause=0.0, padding=0, limit=None) -> None:
    """One run in this process; ``limit`` is the largest file it may write, in bytes."""
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run = replace(RUN, scorer=Judge(padding=padding))
    try:
        run_bench(
            run,
            Painter(side, pause),
            Path(out),
            shard=Shard.parse(shard),
            progress=lambda *_: print("progress", flush=True),
        )
    except (Interrupted, WorkError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
