"""Keeps off the user's terminal what should not be there: other libraries' chatter (not their errors), and the control
characters by which a foreign text could steer it.
"""

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


def printable(text: str, keep: str = "") -> str:
    """The text with a replacement character for whatever is not printable and not in ``keep``."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Within: of the Hub's client errors alone, not what it makes of files that are not there or have not changed."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
