"""DrawBench's prompts, fetched from their source; and the Pick-a-Pic lists that nobody screened, refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source
from flowopd_eval.prompts import read_prompts
from flowopd_eval.records import Prompt

# Saharia et al., "Imagen", arXiv 2205.11487: 200 prompts. The file repeats each five times, one line a picture; that of
# Flow-OPD's public code is the same.
SOURCE = Source(
    "drawbench_test.txt",
    "https://raw.githubusercontent.com/NVlabs/DiffusionNFT/24af5554898d85e93efa492f42b5e9cdf4156e9b/"
    "dataset/drawbench/test.txt",
    "9006b98feabb94b28a2bc0c88de42fd4f31a9ec3c2a19e308a02c5385b7172f0",
)
# sha256 of the files -> what they are. They hold sexual prompts, among them some about children.
UNSCREENED: Mapping[str, str] = {
    "d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262": "dataset/pickscore/test.txt",
    "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f": "dataset/pickscore/train.txt",
}


def drawbench_prompts(folder: Path | None = None, source: Source = SOURCE) -> list[Prompt]:
    """The 200 prompts, task ``preference``: fetched, checked and cached once.

    Raises:
        RequestError: as :meth:`flowopd_eval.fetched.Source.path`.
    """
    return read_prompts(source.path(folder), task="preference")


def refuse_unscreened(path: str | Path, unscreened: Mapping[str, str] = UNSCREENED) -> None:
    """Nothing for any other file, whether it is there or not.

    Raises:
        RequestError: the file has the bytes of a list in ``unscreened``, whatever it is called.
    """
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb") as file:
        name = unscreened.get(hashlib.file_digest(file, "sha256").hexdigest())
    if name:
        raise RequestError(
            f"{path} is Pick-a-Pic's unscreened list ({name} of yifan123/flow_grpo). It holds sexual prompts, some of "
            "them about children, and is not drawn here. Take DrawBench (`--bench preference` without --prompts), or a "
            "list that you have screened."
        )
