"""The metadata on top of a README: the Hub reads them, and so do licences, Spaces and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flowopd_eval.errors import RequestError

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def card_metadata(readme: Path, source: str) -> ModelCardData:
    """The metadata on top of a card that came from ``source``.

    Raises:
        RequestError: there is no card, or no metadata on it that can be read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        text = readme.read_text(encoding="utf-8")
        if not text.lstrip().startswith("---"):
            raise ValueError("there is none between two lines of --- on top")
        return cast("ModelCardData", ModelCard(text, ignore_metadata_errors=True).data)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, YAMLError) as error:
        why = " ".join(str(error).split()[:30])
        raise RequestError(
            f"{readme.name} of {source} has no metadata that can be read ({why}): correct it there, or push again."
        ) from error


def front_matter(readme: Path) -> dict[str, Any]:
    """The metadata on top of a README; empty where there is none that can be read."""
    try:
        return card_metadata(readme, str(readme.parent)).to_dict()
    except RequestError:
        return {}
