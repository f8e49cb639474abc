"""What a repository states, in files that anybody may have written: read, their shapes checked, refused in words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from flowopd_eval import store
from flowopd_eval.errors import RequestError
from flowopd_eval.hub.layout import CLAIMS, METRICS
from flowopd_eval.hub.results import Claim

_FILE = re.compile(r"samples/[\w.-]+\.png", re.ASCII)
_AGAIN = "`flowopd-eval push` writes it: ask the author of the repository to push again"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Cell(_Strict):
    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    n: PositiveInt
    level: FiniteFloat


class _Means(_Strict):
    overall: _Cell
    tasks: dict[str, _Cell]


class _Generator(_Strict):
    adapter_sha256: str
    sampling: dict[str, Any]


class _Summary(_Strict):
    key: str
    version: int
    prompts: PositiveInt
    prompts_sha256: str
    samples: PositiveInt
    seed: NonNegativeInt
    scorer: dict[str, Any] | None
    generator: _Generator
    metrics: _Means


class _Metrics(_Strict):
    adapter_sha256: str
    metrics: dict[str, _Summary]


@dataclass(frozen=True)
class Stated:
    """What a card claims: the adapter that was scored, by metric key its summary, and every picture."""

    adapter_sha256: str
    summaries: Mapping[str, Mapping[str, Any]]
    claims: list[Claim]


def read_stated(folder: Path, source: str) -> Stated:
    """The scores that the files in ``folder``, which came from ``source``, state; published pictures are opened once.

    Raises:
        RequestError: there are none; or, with its name and what is wrong, a file that is not what a push writes.
    """
    if not (folder / METRICS).is_file() or not (folder / CLAIMS).is_file():
        raise _nothing(source)
    content = (folder / METRICS).read_bytes()
    try:
        checked = _Metrics.model_validate_json(content)
        if strange := [key for key, summary in checked.metrics.items() if summary.key != key]:
            raise ValueError(f"metrics.{strange[0]}.key is {checked.metrics[strange[0]].key!r}")
    except ValueError as error:
        raise _damaged(METRICS, source, error) from error
    if not checked.metrics:
        raise _nothing(source)
    claims = _claims(folder / CLAIMS, source)
    for claim in claims:
        if claim.file:
            _check_picture(folder, claim.file, source)
    return Stated(checked.adapter_sha256, json.loads(content)["metrics"], claims)


def _claims(path: Path, source: str) -> list[Claim]:
    """The lines of a ``samples.jsonl``, types checked."""
    reader, claims = TypeAdapter(Claim), []
    if (content := path.read_bytes()) and not content.endswith(b"\n"):
        raise _damaged(path.name, source, ValueError("its last line is cut off"))
    for number, line in enumerate(store.whole_lines(path), 1):
        try:
            claim = reader.validate_json(line, strict=True)
            if claim.file is not None and not _FILE.fullmatch(claim.file):
                raise ValueError(f"file {claim.file!r} does not lie in samples/")
            if not 0 <= claim.seed < 2**32:  # as the rule makes them
                raise ValueError(f"seed {claim.seed} is none")
            if claim.score is not None and not isfinite(claim.score):
                raise ValueError(f"score {claim.score} is no finite number")
        except ValueError as error:
            raise RequestError(
                f"{path.name}, line {number}, of {source} is no picture of a card ({_words(error)}). {_AGAIN}."
            ) from error
        claims.append(claim)
    return claims


def _check_picture(folder: Path, file: str, source: str) -> None:
    if (folder / file).is_file():
        try:
            store.read_picture(folder / file)
        except (OSError, ValueError, SyntaxError) as error:
            raise _damaged(file, source, error) from error


def _nothing(source: str) -> RequestError:
    return RequestError(f"{source} publishes no scores: there is nothing to verify.")


def _damaged(file: str, source: str, error: Exception) -> RequestError:
    return RequestError(f"{file} of {source} is damaged or foreign ({_words(error)}). {_AGAIN}.")


def _words(error: Exception) -> str:
    """What is wrong and where, on one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()[:3])
    return " ".join(str(error).split()[:30]) or type(error).__name__
