"""How soon something happens: ``python -m benchmarks.start``.

``flowopd-eval --help``, the imports, and one picture of the miniature, each in a new process, files cached. What is
heavy must not be loaded where it is not needed, and the picture must be the one that this process draws.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks import measure
from flowopd_eval.errors import WorkError

HEAVY = ("torch", "diffusers", "transformers", "cv2", "gradio")
LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
PICTURE = """
import hashlib
from flowopd_eval.models import Backbone, resolve
from flowopd_eval.records import Prompt
spec = resolve("tiny:base")
generator = Backbone(spec.base, [spec], "cpu", None).generator(spec, spec.record)
(picture,) = generator.generate([Prompt("p", "a photo of a red circle", "colors")], [1])
print(hashlib.sha256(picture.tobytes()).hexdigest())
"""
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "python, nothing else": ("-c", LOADED),
    "flowopd-eval --help": ("-m", "flowopd_eval", "--help"),
    "import flowopd_eval, its command line": ("-c", f"import flowopd_eval.cli; {LOADED}"),
    "import torch": ("-c", "import torch"),
    "import flowopd_eval.pipeline": ("-c", "import flowopd_eval.pipeline"),
    "import training.distill": ("-c", "import training.distill"),
    "first picture of the miniature": ("-c", PICTURE),
}
LIGHT = ("python, nothing else", "import flowopd_eval, its command line")


def check(outputs: Mapping[str, str], picture: str) -> None:
    """Raises a WorkError if a light import is heavy, help is empty, or the picture is another one."""
    for name in LIGHT:
        if outputs[name].strip() != "[]":
            raise WorkError(f"{name!r} loads {outputs[name].strip()}; its time would be theirs.")
    if "--bench" not in outputs["flowopd-eval --help"]:
        raise WorkError("flowopd-eval --help says nothing of --bench.")
    if outputs["first picture of the miniature"].strip() != picture:
        raise WorkError("A new process draws another picture than this one.")


def own_picture() -> str:
    """The hash of the picture as this process draws it."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(PICTURE, {})  # a constant of this module
    return said.getvalue().strip()


def start(repetitions: int, warm_up: int = 1) -> dict[str, Any]:
    """Seconds and memory of each program; the warm-up fills the file cache and is not counted."""
    outputs: dict[str, str] = {}
    held: dict[str, int] = {}

    def run(name: str) -> None:
        _, held[name], outputs[name] = measure.child([sys.executable, *PROGRAMS[name]])

    work: dict[str, Callable[[], object]] = {name: partial(run, name) for name in PROGRAMS}
    timings = measure.take_turns(work, repetitions, warm_up)
    check(outputs, own_picture())
    first = next(iter(PROGRAMS))
    rows = [
        {"program": name, "median s": timing.median, "beyond python's own": timing.median - timings[first].median,
         "memory GB": held[name] / 1e9}
        for name, timing in timings.items()
    ]  # fmt: skip
    measure.show("From a command to its end", rows)
    return {name: timing.to_json() | {"memory_gb": held[name] / 1e9} for name, timing in timings.items()}


def main() -> int:
    asked = measure.parser("benchmarks.start", str(__doc__), repetitions=7).parse_args()
    try:
        programs = start(1, warm_up=0) if asked.smoke else start(asked.repetitions)
        measure.keep("start", {"programs": programs}, asked.smoke)
    except WorkError as error:
        print(f"benchmarks.start: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
