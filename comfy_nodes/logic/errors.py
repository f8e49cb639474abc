"""What a node shows when it cannot do what it was asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PackError(ValueError):
    """A wrong file, name or combination. The message names the value, the place and the remedy; the node shows it."""


def listing(names: Iterable[str], limit: int = 4) -> str:
    """``names`` in order, cut after ``limit``: ``a, b and 7 more``."""
    ordered = sorted(names)
    rest = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raise a PackError unless ``value`` is one of ``choices``: ComfyUI does not hold linked values to their list."""
    if value not in choices:
        raise PackError(f"Unknown {what} {value!r}; expected one of {', '.join(choices)}.")
