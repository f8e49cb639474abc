"""Keeps other libraries' chatter off the user's terminal; their errors still come through."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CHATTY = (
    "diffusers",
    "transformers",
    "huggingface_hub",
    "peft",
    "accelerate",
    "rapidocr",
    "RapidOCR",
    "paddlex",
    "paddleocr",
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within: no progress bars and no warnings of libraries (missing torchvision, unused components, deprecations)."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
