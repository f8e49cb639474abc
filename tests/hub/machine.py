"""A process of its own that runs commands and code one after the other, as the Hub's address is read at import.

Waits between the client's repetitions are skipped; the client is otherwise the real one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
    code: int
    out: str
    err: str


class Machine:
    """The process; ``token`` is what the next command finds in HF_TOKEN."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.token = ""
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, **request: object) -> Answer:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"token": self.token, **request}) + "\n")
        self.process.stdin.flush()
        return Answer(*json.loads(self.process.stdout.readline()))

    def __call__(self, *words: object) -> Answer:
        """``flowopd-eval WORDS``."""
        return self.ask(words=[str(word) for word in words])

    def python(self, code: str) -> Answer:
        """Code, run in ``folder``."""
        return self.ask(code=code)

    def end(self) -> None:
        self.process.communicate()


def run(request: dict) -> int:
    from flowopd_eval import cli

    if "code" in request:
        try:
            exec(compile(request["code"], "snippet", "exec"), {"__name__": "snippet"})
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    sys.argv = ["flowopd-eval", *request["words"]]
    try:
        cli.run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def main() -> None:
    import huggingface_hub.utils._http as http

    http.time = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    for line in sys.stdin:
        request = json.loads(line)
        os.environ["HF_TOKEN"] = request["token"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(request)
        print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)


if __name__ == "__main__":
    main()
