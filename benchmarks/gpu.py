"""Everything that needs a CUDA device: ``python -m benchmarks.gpu [PART…]``; without a part: all, in order.

Every part is a command of its own that ends within nine minutes (or is stopped), prints its table and writes its
results; ``results/gpu.json`` says which parts ran, how they ended and on what. A checkout and the wheels of
``".[test]"`` are all they need.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from benchmarks import measure

SECONDS = 540
_TESTS, _RECIPES = ("pytest", "-m", "gpu", "--no-cov", "-s"), "tests/test_training_sd35.py"
PARTS: Mapping[str, tuple[str, ...]] = {
    "tests": (*_TESTS, "tests/test_gpu.py"),  # by name: to collect the others takes all that they import
    "tests-recipes": (*_TESTS, _RECIPES),
    "distillation": ("benchmarks.distillation",),
    "distillation-modes": ("benchmarks.distillation", "--modes", "--repetitions", "2"),
    "generation": ("benchmarks.generation",),
    "scoring": ("benchmarks.scoring", "detector"),
    "end-to-end": ("benchmarks.end_to_end",),
}


def command(part: str) -> list[str]:
    """The command of a part."""
    return [sys.executable, "-m", *PARTS[part]]


def run(parts: Sequence[str], seconds: float = SECONDS) -> dict[str, dict[str, object]]:
    """Run parts one after the other; how each ended: ``passed``, ``failed`` or ``stopped``."""
    found: dict[str, dict[str, object]] = {}
    for part in parts:
        print(f"--- {part}: {' '.join(command(part)[1:])}", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run(command(part), cwd=measure.ROOT, timeout=seconds).returncode
            ended = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            ended = "stopped"
        found[part] = {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
    return found


def main() -> int:
    import torch

    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=str(__doc__).split("\n\n")[0])
    options.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    asked = options.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        options.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no CUDA device here; these checks need one.", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    found = run(asked.parts or list(PARTS))
    path = measure.RESULTS / "gpu.json"
    before = json.loads(path.read_text()).get("parts", {}) if path.is_file() else {}
    named = {part: {**ended, "machine": measure.machine()} for part, ended in found.items()}
    path.write_text(json.dumps({"parts": {**before, **named}}, indent=2) + "\n")
    measure.show("Parts", [{"part": part, **ended} for part, ended in found.items()])
    return int(any(ended["ended"] != "passed" for ended in found.values()))


if __name__ == "__main__":
    sys.exit(main())
