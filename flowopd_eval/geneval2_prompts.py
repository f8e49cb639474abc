"""GenEval 2's 800 prompts, fetched from their source: CC BY-NC 4.0 lets nobody ship them with an Apache-2.0 package."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source
from flowopd_eval.records import Prompt

COMMIT = "a6e82d2289e8d418f27f0adee77908b07060eea3"  # the file is the same in each of the repository's commits
SOURCE = Source(
    "geneval2_data.jsonl",
    f"https://raw.githubusercontent.com/facebookresearch/GenEval2/{COMMIT}/geneval2_data.jsonl",
    "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
)
LICENCE = (
    "GenEval 2's prompts and questions are licensed CC BY-NC 4.0 (non-commercial use, with attribution: Kamath et al., "
    "arXiv 2512.16853)."
)


def geneval2_prompts(folder: Path | None = None, source: Source = SOURCE) -> list[Prompt]:
    """The 800 prompts of ``geneval2_data.jsonl``: fetched, checked and cached once; their licence goes to stderr.

    Raises:
        RequestError: as :meth:`flowopd_eval.fetched.Source.path`.
    """
    _print_licence()
    path = source.path(folder)
    return parse_geneval2(path.read_text(), str(path))


def parse_geneval2(text: str, source: str = "geneval2_data.jsonl") -> list[Prompt]:
    """The prompts of GenEval 2's lines: ids ``geneval2-00000`` … by line, task ``atoms-N`` by their atomicity.

    ``fields`` are the line's ``atom_count``, ``vqa_list`` and ``skills``.

    Raises:
        RequestError: with the line, for one that is not as in the official file; and for a text without lines.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise RequestError(f"{source} holds no prompt.")
    return [_prompt(f"geneval2-{n:05d}", line, f"{source}:{number}") for n, (number, line) in enumerate(lines)]


def _prompt(identity: str, line: str, place: str) -> Prompt:
    try:
        record: Any = json.loads(line)
        prompt, atom_count, pairs, skills = (record[key] for key in ("prompt", "atom_count", "vqa_list", "skills"))
        texts = [prompt, *skills, *(text for question, answer in pairs for text in (question, answer))]
    except (ValueError, LookupError, TypeError) as error:
        raise RequestError(f"{place} is no line of GenEval 2 ({type(error).__name__}: {error}).") from error
    if not all(isinstance(text, str) and text for text in texts) or type(atom_count) is not int:
        raise RequestError(f"{place}: expected texts that are not empty and a whole atom_count, but got {line[:120]}.")
    if not pairs or len(pairs) != len(skills):
        raise RequestError(f"{place}: expected a skill for each question, but got {len(skills)} for {len(pairs)}.")
    fields = {"atom_count": atom_count, "vqa_list": pairs, "skills": skills}
    return Prompt(identity, prompt, f"atoms-{atom_count}", fields)


@cache
def _print_licence() -> None:
    """Once a process."""
    print(LICENCE, file=sys.stderr)
