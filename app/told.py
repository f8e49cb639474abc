"""What the tabs and the programming interface share: errors in words, files to download, turns at drawing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from app.wanted import shown
from flowopd_eval.errors import RequestError, WorkError

# One picture is drawn at a time, for whoever asks; the others wait in gradio's queue and see their place in it.
DRAWING: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1}
_log = logging.getLogger(__name__)


def in_words(error: Exception) -> str:
    """An error as a visitor may read it. What nobody foresaw goes to the server's log, and to the log alone."""
    if isinstance(error, RequestError | WorkError):
        return shown(error)
    _log.error("Not foreseen", exc_info=error)
    return "Something failed here that was not foreseen. The server's log says what."


def on_a_shared_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a GPU for as long as it runs, where the Hub lends one by the call (ZeroGPU)."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(duration=120)(function)


def saved_file(data: bytes, name: str) -> str:
    """A file in gradio's own cache, which it serves and clears."""
    from gradio.processing_utils import save_bytes_to_cache
    from gradio.utils import get_upload_folder

    return save_bytes_to_cache(data, name, get_upload_folder())
