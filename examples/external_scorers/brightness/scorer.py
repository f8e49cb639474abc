"""How bright a picture is, 0 (black) to 1 (white): the smallest judge of its own process, to start others from.

The protocol is in flowopd_eval/scorers/external.py. Needs Pillow.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from PIL import Image, ImageStat, __version__


def score(item: dict[str, Any]) -> dict[str, Any]:
    """The mean of the picture's luma (ITU-R 601) over 255."""
    try:
        with Image.open(item["picture"]) as picture:
            value = ImageStat.Stat(picture.convert("L")).mean[0] / 255
    except (OSError, ValueError) as error:
        return {"value": None, "error": f"{type(error).__name__}: {error}"}
    return {"value": value, "reason": "too dark to see" if value < 0.05 else ""}


def main() -> None:
    """Say who this is, then answer line by line until there is no more."""
    print(json.dumps({"protocol": 1, "name": "brightness", "version": "1", "pillow": __version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"id": request["id"], "scores": [score(item) for item in request["items"]]}), flush=True)


if __name__ == "__main__":
    main()
