"""Prompt files, and the official GenEval prompts made from their grammar."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.fetched import Source
from flowopd_eval.records import Prompt

if TYPE_CHECKING:
    import numpy as np

# The 80 COCO classes in COCO's (and mmdet's) order, with GenEval's three renamings: computer mouse, tv remote,
# computer keyboard. Source: djghosh13/geneval, object_names.txt.
# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
GENEVAL_NUMBERS = {2: "two", 3: "three", 4: "four"}
GENEVAL_SEED = 43
GENEVAL_DRAWS = 100  # a task, before repeated records are dropped
GENEVAL_MD5 = "9a0ed515640279a48ed3380d90aec0ed"  # of evaluation_metadata.jsonl in djghosh13/geneval@af4902f


def article(phrase: str) -> str:
    """``phrase`` with its indefinite article by GenEval's rule: ``an`` before a, e, i, o, u, else ``a``."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    """GenEval's plural: ``es`` after an ``s``, else ``s`` (so "sheeps" and "knifes" are official)."""
    return noun + ("es" if noun.endswith("s") else "s")


def read_prompts(path: str | Path, task: str = "preference") -> list[Prompt]:
    """The prompts of a file, in its order.

    Args:
        path: a ``.txt`` file with one prompt a line (empty lines are passed over), or JSON lines with ``prompt``,
            ``task`` and, if there is one, ``id``. The lines of GenEval's ``evaluation_metadata.jsonl``, which say
            ``tag`` for ``task``, are such lines.
        task: the task of the lines of a ``.txt`` file, which name none.

    A line without an id gets one made from its content, so that it is the same in whatever order the file stands; when
    such a line stands there several times (the public DrawBench and GenEval lists repeat theirs, one line a picture),
    it is one prompt. Lines of GenEval's official file have the ids of :func:`official_geneval`.

    Raises:
        RequestError: with the file and line, for a line that is no JSON object, lacks a key, has an empty text or
            repeats an earlier id; and for a file that is missing or holds no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"Cannot read the prompt file {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    lines = [(f"{path}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise RequestError(f"{path} holds no prompt. Expected one prompt or one JSON object a line.")
    official = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() == GENEVAL_MD5
    prompts: dict[str, Prompt] = {}
    for place, line in lines:
        prompt = Prompt("", line, task) if path.suffix == ".txt" else _json_line(line, place)
        if prompt.id in prompts:
            raise RequestError(f"{place}: the id {prompt.id!r} stands already on an earlier line. Ids must be unique.")
        identity = prompt.id or (f"geneval-{len(prompts):05d}" if official else _content_id(prompt))
        prompts[identity] = replace(prompt, id=identity)
    return list(prompts.values())


# The 1,018 prompts of Flow-GRPO's and Flow-OPD's OCR evaluation (the two repositories hold the same file).
OCR_SOURCE = Source(
    "flow_grpo_ocr_test.txt",
    "https://raw.githubusercontent.com/yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/dataset/ocr/test.txt",
    "4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
)


def ocr_prompts(folder: Path | None = None, source: Source = OCR_SOURCE) -> list[Prompt]:
    """The public OCR prompts, task ``ocr``: fetched from their source, checked and cached once.

    Raises:
        RequestError: as :meth:`flowopd_eval.fetched.Source.path`.
    """
    return read_prompts(source.path(folder), task="ocr")


def _json_line(line: str, place: str) -> Prompt:
    """The prompt of one JSON line; its id is empty where the line gives none."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError as error:
        raise RequestError(f"{place} is not JSON: {error.msg} at column {error.colno}.") from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RequestError(f"{place} holds {half}, half of a character: write both halves, or itself.") from error
    except ValueError as error:
        raise RequestError(f"{place} holds a number that is not finite (NaN or Infinity).") from error
    if not isinstance(record, dict):
        raise RequestError(f"{place}: expected a JSON object, but got {line[:60]}.")
    task = "tag" if "tag" in record and "task" not in record else "task"
    return Prompt(
        id=_text(record, "id", place) if "id" in record else "",
        prompt=_text(record, "prompt", place),
        task=_text(record, task, place),
        fields={key: value for key, value in record.items() if key not in ("id", "prompt", task)},
    )


def _text(record: Mapping[str, Any], key: str, place: str) -> str:
    if key not in record:
        raise RequestError(f'{place} lacks "{key}". A line reads {{"id": …, "prompt": …, "task": …}}.')
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f'{place}: expected "{key}" to be a text that is not empty, but got {value!r}.')
    return value


def _canonical(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _content_id(prompt: Prompt) -> str:
    return "prompt-" + hashlib.sha256(_canonical(prompt.to_json()).encode()).hexdigest()[:12]


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """SHA-256 (hex) of the prompts' content: ids, texts, tasks and fields. Their order and spacing do not matter."""
    lines = sorted(_canonical(prompt.to_json()) for prompt in prompts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def official_geneval() -> list[Prompt]:
    """The 553 official GenEval prompts, in the order of ``evaluation_metadata.jsonl``.

    They are drawn afresh from the grammar of ``create_prompts.py`` (djghosh13/geneval, seed 43, 100 a task) and
    compared with the official file byte for byte. ``fields`` holds ``include`` and, for counting, ``exclude``; ids
    are ``geneval-00000`` … by line.

    Raises:
        WorkError: if this numpy's random stream gives other prompts.
    """
    import numpy as np

    records = _geneval_records(np.random.default_rng(GENEVAL_SEED))
    text = "".join(json.dumps(record) + "\n" for record in records)
    md5 = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    if md5 != GENEVAL_MD5:
        raise WorkError(
            f"numpy {np.__version__} draws other GenEval prompts than the official ones (md5 {md5}, expected "
            f"{GENEVAL_MD5}). Install numpy 2.4, or pass the official evaluation_metadata.jsonl with --prompts."
        )
    return [
        Prompt(f"geneval-{n:05d}", r["prompt"], r["tag"], {k: r[k] for k in ("include", "exclude") if k in r})
        for n, r in enumerate(records)
    ]


def _geneval_records(rng: np.random.Generator) -> list[dict[str, Any]]:
    """The official records, keys in the official order; one stream of random numbers runs through all six tasks."""
    singles = rng.choice(len(COCO_CLASSES), size=len(COCO_CLASSES), replace=False)
    records = [_single_object(COCO_CLASSES[i]) for i in singles]
    for draw in (_two_object, _counting, _colors, _position, _color_attr):
        records += [draw(rng) for _ in range(GENEVAL_DRAWS)]
    distinct: dict[str, dict[str, Any]] = {}
    for record in records:
        distinct.setdefault(_canonical(record), record)
    return list(distinct.values())


def _record(tag: str, phrase: str, include: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {phrase}"}


def _clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _two_classes(rng: np.random.Generator) -> tuple[str, str]:
    a, b = rng.choice(len(COCO_CLASSES), size=2, replace=False)
    return COCO_CLASSES[a], COCO_CLASSES[b]


def _single_object(name: str) -> dict[str, Any]:
    return _record("single_object", article(name), [_clause(name)])


def _two_object(rng: np.random.Generator) -> dict[str, Any]:
    a, b = _two_classes(rng)
    return _record("two_object", f"{article(a)} and {article(b)}", [_clause(a), _clause(b)])


def _counting(rng: np.random.Generator) -> dict[str, Any]:
    name = COCO_CLASSES[rng.choice(len(COCO_CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    phrase = f"{GENEVAL_NUMBERS[count]} {plural(name)}"
    return _record("counting", phrase, [_clause(name, count)], exclude=[_clause(name, count + 1)])


# The two tasks with colours never take a person, which stands first in the list.
def _colors(rng: np.random.Generator) -> dict[str, Any]:
    name = COCO_CLASSES[rng.choice(len(COCO_CLASSES) - 1) + 1]
    colour = GENEVAL_COLOURS[rng.choice(len(GENEVAL_COLOURS))]
    return _record("colors", f"{article(colour)} {name}", [_clause(name, color=colour)])


def _color_attr(rng: np.random.Generator) -> dict[str, Any]:
    a, b = (COCO_CLASSES[i + 1] for i in rng.choice(len(COCO_CLASSES) - 1, size=2, replace=False))
    ca, cb = (GENEVAL_COLOURS[i] for i in rng.choice(len(GENEVAL_COLOURS), size=2, replace=False))
    return _record(
        "color_attr", f"{article(ca)} {a} and {article(cb)} {b}", [_clause(a, color=ca), _clause(b, color=cb)]
    )


def _position(rng: np.random.Generator) -> dict[str, Any]:
    a, b = _two_classes(rng)
    relation = GENEVAL_RELATIONS[rng.choice(len(GENEVAL_RELATIONS))]
    phrase = f"{article(a)} {relation} {article(b)}"
    return _record("position", phrase, [_clause(b), _clause(a, position=[relation, 0])])
