"""How much of the quoted text a picture shows: the OCR rule of Flow-GRPO (``ocr.py`` of yifan123/flow_grpo)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Score

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    from PIL import Image

    from flowopd_eval.scorers.ocr_engines import Engine


def target_text(prompt: str) -> str:
    """The text between the first pair of straight double quotes.

    Raises:
        RequestError: the prompt quotes nothing, so nothing could be scored.
    """
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].replace(" ", ""):
        raise RequestError(f'Prompt {prompt!r} quotes no text; OCR needs a target in straight double quotes ("...").')
    return parts[1]


def normalise(text: str) -> str:
    """The rule's normal form: ASCII spaces removed, lower case; punctuation stays."""
    return text.replace(" ", "").lower()


def levenshtein(a: str, b: str) -> int:
    """Least number of insertions, deletions and substitutions that turn ``a`` into ``b``."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def ocr_reward(recognised: str, target: str) -> float:
    """``1 - distance / len(target)`` in 0..1; distance 0 where the target is contained, and at most ``len(target)``."""
    found, wanted = normalise(recognised), normalise(target)
    if wanted in found:
        return 1.0
    return 1.0 - min(levenshtein(found, wanted), len(wanted)) / len(wanted)


def error_rate(recognised: str, target: str) -> float:
    """Character error rate of the normal forms, 0 and up: the distance is not capped and nothing else is forgiven."""
    found, wanted = normalise(recognised), normalise(target)
    return levenshtein(found, wanted) / len(wanted)


Reading = tuple[str | None, str]  # the text; or None, and why there is none


class OCRScorer:
    """Scores pictures against the text their prompt quotes (:class:`flowopd_eval.records.Scorer`).

    With ``workers`` > 1 the pictures of one call are read in as many processes, which start at the first call with
    more than one picture and end with the scorer; the scores are the same. They are spawned, so that a script of one's
    own needs ``if __name__ == "__main__":``. ``RequestError``: fewer than one.
    """

    def __init__(self, engine: Engine, workers: int = 1) -> None:
        if workers < 1:
            raise RequestError(f"Expected at least one process that reads pictures, but got {workers}.")
        self.engine, self.workers = engine, workers
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._ending: weakref.finalize | None = None

    def identity(self) -> Mapping[str, Any]:
        """The rule and the engine."""
        return {"scorer": "ocr", "rule": "flow-grpo", **self.engine.identity()}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Reward in 0..1 for each picture; one that the engine fails on is unscored.

        When a process that reads dies, the pictures of this call are read again, once.
        """
        targets = [target_text(prompt.prompt) for _, prompt in zip(images, prompts, strict=True)]
        pictures = [_decoded(image) for image in images]
        if self.workers == 1 or len(pictures) < 2:
            readings = [_reading(self.engine, picture) for picture in pictures]
        else:
            readings = self._read_in_processes(pictures)
        return [_score(target, *reading) for target, reading in zip(targets, readings, strict=True)]

    def close(self) -> None:
        """Ends the processes, after the pictures at hand. Another call of ``score`` starts new ones."""
        with self._lock:
            pool, ending, self._pool, self._ending = self._pool, self._ending, None, None
        if pool and ending:
            ending.detach()
            pool.shutdown(cancel_futures=True)

    def _read_in_processes(self, pictures: Sequence[Image.Image | str]) -> list[Reading]:
        from concurrent.futures.process import BrokenProcessPool

        for _ in range(2):
            pool = self._running()
            try:
                with _interrupts_held():
                    readings = pool.map(_read_in_worker, pictures)
                return list(readings)
            except BrokenProcessPool:
                self._drop(pool)
        return [(None, "a process that reads pictures died on this batch, and again on a second try")] * len(pictures)

    def _running(self) -> ProcessPoolExecutor:
        from concurrent.futures import ProcessPoolExecutor

        with self._lock:
            if self._pool is None:
                # spawned: a fork would copy locks that other threads hold, and a CUDA context that no child can use
                spawn = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self.workers, spawn, _begin_worker, (self.engine,))
                # at exit, too; it may run in any thread, so it waits for nobody
                self._ending = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
            return self._pool

    def _drop(self, pool: ProcessPoolExecutor) -> None:
        """Leaves a broken pool, unless another thread has done so."""
        with self._lock:
            if self._pool is pool and self._ending:
                self._ending()
                self._pool = self._ending = None


def _decoded(image: Image.Image) -> Image.Image | str:
    """The picture in RGB with nothing attached, or why it cannot be had."""
    try:
        picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's for files cut short or broken
        return f"{type(error).__name__}: {error}"
    picture.info = {}  # whatever it holds need not be fit to travel
    return picture


def _reading(engine: Engine, picture: Image.Image | str) -> Reading:
    if isinstance(picture, str):
        return None, picture
    try:
        return engine.read(picture), ""
    except RequestError:  # there is no reader: that is no fault of the picture
        raise
    except Exception as error:  # engines raise what their runtime raises
        return None, f"{type(error).__name__}: {error}"


def _score(target: str, recognised: str | None, error: str) -> Score:
    if recognised is None:
        return Score(None, error=error)
    value = ocr_reward(recognised, target)
    also = {"exact_match": float(normalise(recognised) == normalise(target)), "cer": error_rate(recognised, target)}
    detail = {"target": target, "recognised": recognised, "also": also}
    return Score(value, "" if value == 1 else f'reads "{recognised}", not "{target}"', detail)


# ---------------------------------------------------------------------------------------------- in a worker process

_here: dict[str, Engine] = {}  # a worker's engine


def _begin_worker(engine: Engine) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _here["engine"] = engine
    with suppress(Exception):  # reading says it again, where it is heard
        engine.load()


def _end_with_parent() -> None:
    """A worker waits for work for ever, also when whoever would give it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read_in_worker(picture: Image.Image | str) -> Reading:
    return _reading(_here["engine"], picture)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started within never see Ctrl-C, not even before they can ignore it: a signal mask is inherited."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
