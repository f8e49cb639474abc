"""DeQA-Score-Mix3 (You et al., arXiv 2501.11561) in an environment of its own; see README.md.

Its repository brings Python of its own, which is run: that takes --trust-remote-code and a commit you have looked at.
The protocol is in flowopd_eval/scorers/external.py.
"""

from __future__ import annotations

import argparse
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
        raise argparse.ArgumentTypeError(f"{text!r} is no commit of 40 hex digits")
    return text


def main() -> None:
    """Say who this is, then answer line by line until there is no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revision", type=commit, required=True, help=f"commit of {MODEL} to load and run")
    parser.add_argument("--trust-remote-code", action="store_true", required=True, help="run that commit's Python")
    revision = parser.parse_args().revision
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is no reply
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM

    where = {"torch_dtype": torch.float16, "device_map": "cuda"} if torch.cuda.is_available() else {}
    known = {"revision": revision, "trust_remote_code": True, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(MODEL, **known, **where)
    identity = {"protocol": 1, "name": "deqa", "model": MODEL, "revision": revision, "version": version("transformers")}
    print(json.dumps(identity), file=replies, flush=True)

    def score(item: dict[str, Any]) -> dict[str, Any]:
        try:
            with torch.no_grad():
                return {"value": float(model.score([Image.open(item["picture"]).convert("RGB")])[0])}
        except (OSError, RuntimeError, ValueError) as error:
            return {"value": None, "error": f"{type(error).__name__}: {error}"}

    for line in sys.stdin:
        request = json.loads(line)
        print(
            json.dumps({"id": request["id"], "scores": [score(i) for i in request["items"]]}), file=replies, flush=True
        )


main()
