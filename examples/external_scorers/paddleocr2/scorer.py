"""Flow-GRPO's OCR reward with its own engine, PaddleOCR 2.9, in an environment of its own; see README.md.

The protocol is in flowopd_eval/scorers/external.py.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any


def reward(recognised: str, target: str) -> float:
    """1 where the target is contained, else 1 - min(Levenshtein, length) / length; no spaces, lower case."""
    found, wanted = (text.replace(" ", "").lower() for text in (recognised, target))
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        above, row = row, [i]
        for j, b in enumerate(wanted, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return 1.0 if wanted in found else 1 - min(row[-1], len(wanted)) / len(wanted)


def main() -> None:
    """Say who this is, then answer line by line until there is no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no reply
    import numpy as np
    from paddleocr import PaddleOCR
    from PIL import Image

    reader = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)
    versions = {"version": version("paddleocr"), "paddlepaddle": version("paddlepaddle"), "lang": "en"}
    print(json.dumps({"protocol": 1, "name": "paddleocr", "rule": "flow-grpo", **versions}), file=replies, flush=True)

    def score(item: dict[str, Any]) -> dict[str, Any]:
        try:
            target = item["prompt"].split('"')[1]
            pixels = np.asarray(Image.open(item["picture"]).convert("RGB"))  # RGB where BGR is meant: as Flow-GRPO does
            lines = reader.ocr(pixels, cls=False)[0] or []
            recognised = "".join(text for _, (text, confidence) in lines if confidence > 0)
            value = reward(recognised, target)
        except (ArithmeticError, LookupError, OSError, RuntimeError, ValueError) as error:
            return {"value": None, "error": f"{type(error).__name__}: {error}"}
        reason = "" if value == 1 else f'reads "{recognised}", not "{target}"'
        return {"value": value, "reason": reason, "detail": {"target": target, "recognised": recognised}}

    for line in sys.stdin:
        request = json.loads(line)
        answer = {"id": request["id"], "scores": [score(item) for item in request["items"]]}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
