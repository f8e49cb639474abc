"""DeQA-Score-Mix3 (You et al., arXiv 2501.11561) in an environment of its own; see README.md.

Its repository brings Python of its own, which is run: that takes --trust-remote-code and a commit you have looked at.
The protocol is in flowopd_eval/scorers/external.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from importlib.metadata import version
from typing import Any

MODEL = "zhiyuanyou/DeQA-Score-Mix3"


def commit(text: str) -> str:
    """A full commit: a branch or a tag could be other code tomorrow."""
    if not re.fullmatch(r"[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no commit of 40 hexadecimal digits")
    return text


def main() -> None:
    """Say who this is, then answer line by line until there is no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revision", type=commit, required=True, help=f"commit of {MODEL} to load and run")
    parser.add_argument("--trust-remote-code", action="store_true", required=True, help="run that commit's Python")
    parser.add_argument("--jpeg", action="store_true", help="show it JPEGs, as the client of Flow-GRPO does")
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no reply
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        MODEL,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        attn_implementation="eager",
        torch_dtype=torch.float16 if torch.cuda.is_available() else torch.float32,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    identity = {"protocol": 1, "name": "deqa", "model": MODEL, "revision": arguments.revision}
    identity |= {"version": version("transformers"), "jpeg": arguments.jpeg}
    print(json.dumps(identity), file=replies, flush=True)

    def picture(path: str) -> Image.Image:
        image = Image.open(path).convert("RGB")
        if not arguments.jpeg:
            return image
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        return Image.open(buffer).convert("RGB")

    def score(item: dict[str, Any]) -> dict[str, Any]:
        try:
            with torch.no_grad():
                return {"value": float(model.score([picture(item["picture"])])[0])}  # 1 to 5
        except (OSError, RuntimeError, ValueError) as error:
            return {"value": None, "error": f"{type(error).__name__}: {error}"}

    for line in sys.stdin:
        request = json.loads(line)
        answer = {"id": request["id"], "scores": [score(item) for item in request["items"]]}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
