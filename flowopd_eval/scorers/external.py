"""A judge with an interpreter and packages of its own: a process that is spoken to in lines of JSON.

Protocol 1. The command is started once, without a shell. Its first line on standard output says who it is and whatever
decides its scores; then it answers each line with one line, and exits when its standard input ends::

    {"protocol": 1, "name": "image-reward", "version": "1.5", "weights_sha256": "…"}
    -> {"id": 7, "items": [{"picture": "/tmp/…/0.png", "prompt": "a cat", "task": "quality", "fields": {}}]}
    <- {"id": 7, "scores": [{"value": 0.5, "reason": "", "detail": {}, "error": null}]}

``picture`` is an RGB PNG, there until the answer is; ``value`` a finite number, or null where ``error`` says why.
``reason``, ``detail`` and ``error`` may be left out; a line has 4 MiB at most. The end of what it writes on standard
error stands in messages. ``examples/external_scorers`` has four of them.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from subprocess import PIPE, Popen, TimeoutExpired
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from PIL import Image

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Score

LONGEST_LINE = 4 << 20  # bytes


class _Failure(Exception):
    """The process is of no further use; the text says why, with the process as its subject."""


class ExternalScorer(AbstractContextManager["ExternalScorer"]):
    """Scores pictures by a process of the user's (:class:`flowopd_eval.records.Scorer`); safe to use from threads.

    The command runs with the user's rights and environment. It comes from the user's command line and from nowhere
    else: never from a recipe, a result or a prompt file.

    A process that ends while it judges is started again, once a batch. When it ends a second time, is over ``timeout``
    seconds (it is killed with all it has started; on Windows, it alone) or gives no proper answer, the ``batch``
    pictures asked about are unscored, with the reason, and the next ones get a process of their own. ``startup``:
    seconds for the first line, since a model may have to be fetched. ``RequestError``: there is no command.
    """

    def __init__(self, command: Sequence[str], batch: int = 16, timeout: float = 600, startup: float = 1800) -> None:
        if isinstance(command, str) or not command:
            raise RequestError("--scorer-command: expected a program and its arguments.")
        self.command, self.batch, self.timeout, self.startup = tuple(command), batch, timeout, startup
        self._lock, self._numbers = threading.Lock(), itertools.count(1)
        self._process: _Process | None = None
        self._said: dict[str, Any] = {}
        paths = [path for path in (shutil.which(self.command[0]), *self.command[1:]) if path and os.path.isfile(path)]
        self._files = [[Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest()] for path in paths]
        atexit.register(self.close)

    def __exit__(self, *error: object) -> None:
        """Ends the process. Another request starts it again."""
        with self._lock:
            self._stop(EOFError())

    close = __exit__

    def identity(self) -> Mapping[str, Any]:
        """What the process says of itself, and the sha256 of the files the command names; no path, no argument.

        Raises ``RequestError`` when it does not start, or does not say who it is.
        """
        with self._lock:
            try:
                self._running()
            except (_Failure, EOFError) as failure:
                raise RequestError(f"--scorer-command: {self._stop(failure)}") from failure
        return {**self._said, "scorer": "external", "files": self._files}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Score each picture as the process does, in order."""
        pairs, size = list(zip(images, prompts, strict=True)), self.batch
        return [score for start in range(0, len(pairs), size) for score in self._score(pairs[start : start + size])]

    def _score(self, batch: Sequence[tuple[Image.Image, Prompt]]) -> list[Score]:
        with self._lock, TemporaryDirectory(prefix="flowopd-") as folder:  # of mode 0700 and another name each time
            items = []
            for position, (image, asked) in enumerate(batch):
                path = os.path.join(folder, f"{position}.png")
                image.convert("RGB").save(path, compress_level=1)
                items.append({"picture": path, "prompt": asked.prompt, "task": asked.task, "fields": {**asked.fields}})
            for _ in range(2):
                try:
                    return [replace(s, error=s.error and s.error.replace(folder, "…")) for s in self._ask(items)]
                except (_Failure, EOFError) as failure:
                    error = self._stop(failure).replace(folder, "…")
                    if isinstance(failure, _Failure):
                        break
            return [Score(None, error=error)] * len(batch)

    def _ask(self, items: Sequence[Mapping[str, Any]]) -> list[Score]:
        number = next(self._numbers)
        request = json.dumps({"id": number, "items": items}).encode() + b"\n"
        answer = self._running().exchange(request, self.timeout)
        scores = answer.get("scores") if isinstance(answer, dict) and answer.get("id") == number else None
        if not isinstance(scores, list) or len(scores) != len(items):
            raise _Failure(f"answered request {number}, of {len(items)} pictures, with {answer!r:.200}")
        return [_score_of(said if isinstance(said, dict) else {"value": said}) for said in scores]

    def _running(self) -> _Process:
        if self._process is None:
            self._process = _Process(self.command)
            said = self._process.exchange(b"", self.startup)
            other = f"begins with {said!r:.200}, not with {self._said or 'protocol 1, name and version'}"
            named = isinstance(said, dict) and said.pop("protocol", 0) == 1 and said.get("name") and said.get("version")
            if not named or self._said not in ({}, said):
                raise _Failure(other)
            self._said = said
        return self._process

    def _stop(self, failure: Exception) -> str:
        """Ends the process; what went wrong, in words."""
        process, self._process = self._process, None
        ended = isinstance(failure, EOFError)
        code, words = process.end(2.0 if ended else 0) if process else (0, "")
        ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        what = f"{Path(self.command[0]).name} {f'ended ({ending})' if ended else failure}"
        return f"{what}. Its last words: {words}" if words else what


class _Process:
    """One life of the command."""

    def __init__(self, command: Sequence[str]) -> None:
        self._log = TemporaryFile()  # noqa: SIM115  (open as long as the process)
        try:  # a session of its own: one signal reaches all it starts, and Ctrl-C on the terminal does not
            self._popen: Any = Popen(command, stdin=PIPE, stdout=PIPE, stderr=self._log, start_new_session=True)
        except OSError as error:
            raise _Failure(f"cannot be started: {error.strerror or error}") from error

    def exchange(self, line: bytes, timeout: float) -> Any:
        """Sends ``line``; the line that comes back, parsed. Raises ``EOFError`` when it ended, else ``_Failure``."""
        replies: SimpleQueue[bytes] = SimpleQueue()

        def talk() -> None:
            reply = b""
            with suppress(OSError):  # it ended
                self._popen.stdin.write(line)
                self._popen.stdin.flush()
                reply = self._popen.stdout.readline(LONGEST_LINE)
            replies.put(reply)

        threading.Thread(target=talk, daemon=True).start()  # reading and writing may block
        try:
            reply = replies.get(timeout=timeout)
        except Empty:
            raise _Failure(f"gave no answer within {timeout:g} seconds") from None
        except KeyboardInterrupt:
            self.end(0)  # its answer would be taken for the next one
            raise
        if not reply.endswith(b"\n"):
            raise _Failure("wrote a line of over 4 MiB") if len(reply) == LONGEST_LINE else EOFError()
        try:
            return json.loads(reply, parse_constant=str)  # NaN becomes "NaN", which is no score
        except (ValueError, RecursionError):
            raise _Failure(f"wrote what is no JSON: {reply.decode(errors='replace')!r:.200}") from None

    def end(self, grace: float) -> tuple[int, str]:
        """Ends it with all it has started after ``grace`` seconds; its exit code, or minus a signal, and last words."""
        if self._popen.returncode is None:
            if grace:  # else a thread may still be writing to it
                with suppress(OSError):
                    self._popen.stdin.close()
                with suppress(TimeoutExpired):
                    self._popen.wait(grace)
            with suppress(OSError, AttributeError):  # none is left; Windows has no such groups
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.kill()
        code = self._popen.wait()
        self._log.seek(-min(self._log.seek(0, os.SEEK_END), 1000), os.SEEK_END)
        return code, " | ".join(self._log.read().decode(errors="replace").split("\n")).strip(" |")


def _score_of(said: Any) -> Score:
    value, detail, error = said.get("value"), said.get("detail") or {}, said.get("error")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not error and not (number and abs(value) <= sys.float_info.max and isinstance(detail, dict)):
        error = f"the process gave {said!r:.200} for a score"
    detail = detail if isinstance(detail, dict) else {}
    return Score(None if error else value, str(said.get("reason") or ""), detail, str(error) if error else None)
