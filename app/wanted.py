"""What may be asked of the demo, its limits, and what is shown of an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flowopd_eval.errors import RequestError

PROMPT, ARMS, STEPS, GUIDANCE, SEED = 400, 8, 100, 20.0, 2**32 - 1
SIDES = {"shapes": (64,), "coco": (256, 384, 512, 640, 768, 1024)}  # pixels; the miniature draws one size
_WORDS = {
    "string_too_short": "write something",
    "string_too_long": "it is too long: at most {max_length} characters",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "tuple_type": "expected a list of names",
    "string_type": "expected text",
    "float_type": "expected a number",
    "too_short": "choose at least one",
    "too_long": "choose at most {max_length}",
    "greater_than_equal": "expected {ge} or more",
    "less_than_equal": "expected {le} or less",
    "extra_forbidden": "there is no such setting",
    "missing": "it is missing",
}
_CALLED = {"arms": "Models"}  # as on the page
_TOKEN = re.compile(r"\b(?:hf|sk|ghp|github_pat)_?[-\w]{16,}")
_PATH = re.compile(r"(?<![\w/:.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/:,;'\"()<>]+){2,}[\\/]?")


class Wanted(BaseModel):
    """One comparison as asked for. ``steps``, ``guidance`` and ``side`` None: what each arm's own record says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=PROMPT)]
    seed: Annotated[int, Field(ge=0, le=SEED)]
    arms: Annotated[tuple[str, ...], Field(min_length=1, max_length=ARMS, strict=False)]
    steps: Annotated[int, Field(ge=1, le=STEPS)] | None = None
    guidance: Annotated[float, Field(ge=0, le=GUIDANCE, allow_inf_nan=False)] | None = None
    side: Annotated[int, Field(ge=64, le=1024)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_line(cls, value: object) -> object:
        """White space, line ends among it, is one space; a character that is not seen is refused, not replaced."""
        if not isinstance(value, str):
            return value
        text = " ".join(value.split())
        if unseen := dict.fromkeys(f"U+{ord(one):04X}" for one in text if not _is_seen(one)):
            raise ValueError(f"remove the characters that cannot be seen: {', '.join(list(unseen)[:8])}")
        return text

    @field_validator("arms")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name each model once")
        return value


def _is_seen(one: str) -> bool:
    """Whether a character shows, or joins those that do, as in Persian words and in emoji of several people."""
    return one.isprintable() or one in "\u200c\u200d"


def wanted(values: Mapping[str, Any]) -> Wanted:
    """The request in ``values``. Raises ``RequestError`` with one sentence for each field that is not as it should."""
    try:
        return Wanted.model_validate(dict(values))
    except ValidationError as error:
        raise RequestError(" ".join(_sentence(one) for one in error.errors(include_url=False))) from None


def _sentence(one: Mapping[str, Any]) -> str:
    words = _WORDS.get(one["type"], one["msg"].removeprefix("Value error, "))
    got = "" if isinstance(one["input"], dict) else f" (got {shown(repr(one['input']), 60)})"
    if one["type"] in ("string_too_short", "too_short", "missing", "value_error") or one["input"] is None:
        got = ""
    field = str(one["loc"][0])
    return f"{_CALLED.get(field, field.capitalize())}: {words.format(**one.get('ctx', {}))}{got}."


def steps_in_words(steps: int) -> str:
    """``20 steps``."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def shown(text: object, longest: int = 600) -> str:
    """An error's words as the page may show them: no token, and of a path on this machine its last part only."""
    cut = _PATH.sub(lambda match: "…/" + match[0].rstrip("\\/").replace("\\", "/").rpartition("/")[2], str(text))
    cut = _TOKEN.sub("[token]", cut.replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else cut)
    return cut if len(cut) <= longest else cut[: longest - 1] + "…"
