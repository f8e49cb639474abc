"""ImageReward-v1.0 (Xu et al., arXiv 2304.05977) in an environment of its own; see README.md.

The protocol is in flowopd_eval/scorers/external.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Say who this is, then answer line by line until there is no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no reply
    import ImageReward
    import torch

    weights = Path.home() / ".cache" / "ImageReward" / "ImageReward.pt"
    model = ImageReward.load("ImageReward-v1.0", download_root=str(weights.parent))
    identity = {
        "protocol": 1,
        "name": "image-reward",
        "version": version("image-reward"),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    print(json.dumps(identity), file=replies, flush=True)

    def score(item: dict[str, Any]) -> dict[str, Any]:
        try:
            with torch.no_grad():  # one picture with its own prompt: a list would be ranked against one prompt
                return {"value": float(model.score(item["prompt"], item["picture"]))}
        except (OSError, RuntimeError, ValueError) as error:
            return {"value": None, "error": f"{type(error).__name__}: {error}"}

    for line in sys.stdin:
        request = json.loads(line)
        answer = {"id": request["id"], "scores": [score(item) for item in request["items"]]}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
