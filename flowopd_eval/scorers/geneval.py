"""GenEval: does the picture show the objects, counts, colours and positions that its prompt names?

Ghosh, Hajishirzi, Schmidt: "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", NeurIPS
2023; code djghosh13/geneval, ``evaluation/evaluate_images.py``. The verdict is a pure function of what a detector
found, so it can be replayed from a log without a model:

    objects = keep(detections, task)            # the detector's findings that count
    queries = colour_queries(record, objects)   # those whose colour the record asks about
    objects = with_colours(objects, dict(zip(queries, colours)))
    score = verdict(record, objects)

A *record* is what stands in a GenEval prompt line: ``include`` clauses ``{"class", "count"[, "color"][, "position":
[relation, index of an earlier clause]]}`` and ``exclude`` clauses ``{"class", "count"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flowopd_eval.errors import RequestError
from flowopd_eval.prompts import GENEVAL_RELATIONS, plural
from flowopd_eval.records import Box, Detection, Prompt, Score

if TYPE_CHECKING:
    from PIL import Image

Objects = Mapping[str, Sequence[Detection]]  # class -> its detections that count, best first


@dataclass(frozen=True)
class GenEvalProtocol:
    """The numbers of a GenEval protocol; the defaults are the official ones.

    A detection counts when its score is strictly above ``threshold``, or above ``counting_threshold`` in counting
    prompts; the ``max_objects`` best of a class are taken; of two whose boxes overlap by ``nms_iou`` or more only the
    better stays (None: both stay). ``position_margin`` is the share of the two objects' summed extents by which an
    offset must exceed zero before it says anything about position. ``jpeg_quality``: the judge gets the picture through
    JPEG (None: as it is). ``swapped_channels``: the detector, and it alone, sees red and blue exchanged. ``mean_over``:
    the overall score is the mean of the ``tasks``' means or the mean over all ``images``.
    """

    name: str
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    nms_iou: float | None = None
    position_margin: float = 0.1
    jpeg_quality: int | None = None
    swapped_channels: bool = False
    mean_over: Literal["tasks", "images"] = "tasks"


OFFICIAL = GenEvalProtocol("official")
# What the evaluation of Flow-GRPO and its descendants does (yifan123/reward-server, ``reward_server/gen_eval.py``, and
# its client): pictures travel as JPEG at Pillow's default quality, an RGB array goes where mmdet expects BGR, and what
# is logged is the mean over pictures.
FLOW_GRPO = GenEvalProtocol("flow-grpo", jpeg_quality=75, swapped_channels=True, mean_over="images")
# The two, and what lies between them when one thing is changed after the other.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        OFFICIAL,
        replace(OFFICIAL, name="official+jpeg", jpeg_quality=75),
        replace(FLOW_GRPO, name="flow-grpo-by-task", mean_over="tasks"),
        FLOW_GRPO,
    )
}


class Detector(Protocol):
    """Finds objects and tells their colours. Pictures come upright and in RGB; both methods work on whole batches.

    A detector that needs an object's mask to tell its colour returns its own subclass of :class:`Detection` with the
    mask in a field that takes no part in comparison: ``classify_colours`` gets the very objects that ``detect`` gave.
    """

    def identity(self) -> Mapping[str, Any]:
        """Name, version and hashes of whatever decides its findings. Plain JSON."""

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """What stands in each picture, in any order; boxes in its pixels; colours where they cost nothing, or None."""

    def classify_colours(
        self, images: Sequence[Image.Image], queries: Sequence[Sequence[Detection]]
    ) -> list[list[str]]:
        """For each picture, the colours of the asked-for detections, in their order."""


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, with the official script's convention that a box is a pixel larger."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b)]
    return shared / (sum(areas) - shared)


def keep(
    detections: Sequence[Detection], task: str, protocol: GenEvalProtocol = OFFICIAL
) -> dict[str, list[Detection]]:
    """The detections that count in a picture of a prompt of ``task``, by class and best first.

    Between equal scores the detector's order stands (the official script leaves it open).
    """
    threshold = protocol.counting_threshold if task == "counting" else protocol.threshold
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            objects.setdefault(detection.label, []).append(detection)
    return {label: _suppress(found[: protocol.max_objects], protocol.nms_iou) for label, found in objects.items()}


def _suppress(found: list[Detection], nms_iou: float | None) -> list[Detection]:
    """Non-maximum suppression within one class; ``found`` comes best first."""
    if nms_iou is None:
        return found
    kept: list[Detection] = []
    for detection in found:
        if all(box_iou(detection.box, better.box) < nms_iou for better in kept):
            kept.append(detection)
    return kept


def relative_position(a: Box, b: Box, margin: float = OFFICIAL.position_margin) -> set[str]:
    """Where box ``a`` lies relative to box ``b``: a subset of left of, right of, above, below (y points down).

    The offset o of the centres is shortened on each axis by ``margin`` times the boxes' summed extents; the object is
    left of (right of, above, below) the other when the rest, divided by ||o||, exceeds one half on that axis. On a
    diagonal two relations may hold; for near or coinciding centres none does.
    """
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    reach = [margin * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    rest = [math.copysign(max(abs(o) - r, 0.0), o) for o, r in zip(offset, reach, strict=True)]
    if max(abs(r) for r in rest) < 1e-3:
        return set()
    dx, dy = (r / math.hypot(*offset) for r in rest)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}


def colour_queries(record: Mapping[str, Any], objects: Objects) -> list[Detection]:
    """The detections whose colour :func:`verdict` needs and which nobody has told yet, each once."""
    asked: dict[Detection, None] = {}
    for clause in record.get("include", ()):
        taken = _take(clause, objects)
        if "color" in clause and len(taken) == clause["count"]:
            asked.update((detection, None) for detection in taken if detection.colour is None)
    return list(asked)


def with_colours(objects: Objects, colours: Mapping[Detection, str]) -> dict[str, list[Detection]]:
    """``objects`` with the colours of those that stand in ``colours``."""
    return {
        label: [replace(d, colour=colours[d]) if d in colours else d for d in found] for label, found in objects.items()
    }


def verdict(record: Mapping[str, Any], objects: Objects, protocol: GenEvalProtocol = OFFICIAL) -> Score:
    """GenEval's verdict on one picture: ``value`` 1.0 (all clauses hold) or 0.0, and what is wrong, clause by clause.

    Args:
        record: the prompt's ``include`` and ``exclude`` clauses.
        objects: what :func:`keep` kept, with the colours that :func:`colour_queries` named.
        protocol: only its ``position_margin`` matters here.

    Of each class the ``count`` best objects are taken; with a colour, all of them must have it; with a position, each
    of them must have the relation to each object taken by the clause it refers to, which must itself hold.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in record.get("include", ()):
        taken = _take(clause, objects)
        wrong = _wrong_count(clause, taken) or _wrong_colour(clause, taken)
        if not wrong and "position" in clause:
            wrong = _wrong_position(clause, taken, record["include"], groups, protocol.position_margin)
        reasons.append(wrong)
        groups.append(None if wrong else taken)
    reasons += [_too_many(clause, objects) for clause in record.get("exclude", ())]
    reasons = [reason for reason in reasons if reason]
    return Score(0.0 if reasons else 1.0, "; ".join(reasons), _detail(objects))


def partial_credit(record: Mapping[str, Any], objects: Objects, protocol: GenEvalProtocol = OFFICIAL) -> Score:
    """A reward for training, 0..1, that grows with every clause half met; not a verdict, and never reported as one.

    The mean over include clauses of: ``1 - |count - found| / count``, at least 0, all found objects of the class
    counted; where the clause names a colour, the share of objects that have it; where it names a position, 1 or 0. A
    colour or position of a clause whose count is wrong is worth 0. This is the reward of Flow-GRPO's server with its
    two mistakes left out: there an excess of objects counts without a floor (down to -14), and a wrong position as 1/2.
    """
    points: list[float] = []
    reasons: list[str] = []
    include = record.get("include", ())
    groups = [_take(clause, objects) for clause in include]
    for clause, taken in zip(include, groups, strict=True):
        found, count = len(objects.get(clause["class"], ())), clause["count"]
        points.append(max(0.0, 1 - abs(count - found) / count))
        if found != count:
            reasons.append(f"expected {_number_of(count, clause['class'])}, found {found}")
        if "color" in clause:
            right = sum(detection.colour == clause["color"] for detection in taken)
            points.append(right / count if found == count else 0.0)
            reasons.append(_wrong_colour(clause, taken) if found == count else "")
        if "position" in clause:
            wrong = _wrong_position(clause, taken, include, [g or None for g in groups], protocol.position_margin)
            points.append(float(found == count and not wrong))
            reasons.append(wrong)
    value = math.fsum(points) / len(points)
    return Score(value, "; ".join(reason for reason in reasons if reason), _detail(objects))


def flow_grpo_measures(record: Mapping[str, Any], objects: Objects, protocol: GenEvalProtocol) -> dict[str, float]:
    """The two other numbers of Flow-GRPO's server, its mistakes included (``evaluate_reward`` of ``gen_eval.py``).

    ``strict_accuracy`` is 1 where each include clause finds exactly its count and all else holds; exclude clauses play
    no part. ``score`` is a mean of points that an excess of objects drives below zero without a floor, and in which a
    wrong position earns one point of two.
    """
    points: list[float] = []
    include = record.get("include", ())
    groups: list[Sequence[Detection] | None] = []
    for clause in include:
        found, count = objects.get(clause["class"], ()), clause["count"]
        points.append(1 - abs(count - len(found)) / count)
        matched = len(found) == count
        if not matched and ("color" in clause or "position" in clause):
            points.append(0.0)
        if matched and "color" in clause:
            right = sum(detection.colour == clause["color"] for detection in found)
            points.append(1 - abs(count - right) / count)
            matched = right == count
        if matched and "position" in clause:
            wrong = _wrong_position(clause, found, include, groups, protocol.position_margin)
            points += [0.0] * bool(wrong) + [1.0] * (groups[clause["position"][1]] is not None)
            matched = not wrong
        groups.append(found if matched else None)
    return {"strict_accuracy": float(None not in groups), "score": math.fsum(points) / len(points)}


def flow_grpo_verdict(record: Mapping[str, Any], objects: Objects, protocol: GenEvalProtocol) -> Score:
    """The official verdict, with the server's other numbers under ``also`` in the detail."""
    score = verdict(record, objects, protocol)
    return replace(score, detail={**score.detail, "also": flow_grpo_measures(record, objects, protocol)})


def _take(clause: Mapping[str, Any], objects: Objects) -> Sequence[Detection]:
    return objects.get(clause["class"], ())[: clause["count"]]


def _number_of(count: int, name: str) -> str:
    return f"{count} {name if count == 1 else plural(name)}"


def _wrong_count(clause: Mapping[str, Any], taken: Sequence[Detection]) -> str:
    if len(taken) >= clause["count"]:
        return ""
    if not taken and clause["count"] == 1:
        return f"no {clause['class']} found"
    return f"expected {_number_of(clause['count'], clause['class'])}, found {len(taken)}"


def _too_many(clause: Mapping[str, Any], objects: Objects) -> str:
    found = len(objects.get(clause["class"], ()))
    if found < clause["count"]:
        return ""
    return f"expected at most {_number_of(clause['count'] - 1, clause['class'])}, found {found}"


def _wrong_colour(clause: Mapping[str, Any], taken: Sequence[Detection]) -> str:
    wanted = clause.get("color")
    others = [str(detection.colour) for detection in taken if detection.colour != wanted]
    if wanted is None or not others:
        return ""
    if len(taken) == 1:
        return f"the {clause['class']} is {others[0]}, not {wanted}"
    found = f"{len(others)} of {_number_of(len(taken), clause['class'])}"
    return f"{found} {'is' if len(others) == 1 else 'are'} {', '.join(sorted(set(others)))}, not {wanted}"


def _wrong_position(
    clause: Mapping[str, Any],
    taken: Sequence[Detection],
    include: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[Detection] | None],
    margin: float,
) -> str:
    relation, index = clause["position"]
    name, target = clause["class"], include[index]["class"]
    others = groups[index]
    if others is None:
        return f"no right {target} for the {name} to be {relation}"
    for object_ in taken:
        for other in others:
            found = relative_position(object_.box, other.box, margin)
            if relation not in found:
                return _misplaced(name, relation, target, found)
    return ""


def _misplaced(name: str, relation: str, target: str, found: set[str]) -> str:
    if not found:
        return f"the {name} is not clearly {relation} the {target}"
    others = " and ".join(other for other in GENEVAL_RELATIONS if other in found)
    return f"the {name} is {others} the {target}, not {relation} it"


def _detail(objects: Objects) -> dict[str, Any]:
    """What was judged, as JSON: boxes in the official script's layout ``[x1, y1, x2, y2, score]``, and the colours."""
    boxes = {label: [[*d.box, d.score] for d in objects[label]] for label in sorted(objects)}
    colours = {label: [d.colour for d in objects[label]] for label in boxes if any(d.colour for d in objects[label])}
    return {"boxes": boxes} | ({"colours": colours} if colours else {})


def check_record(prompt: Prompt) -> None:
    """Raises a RequestError, naming the prompt, if its ``include`` or ``exclude`` clauses are missing or ill-formed."""
    include, exclude = prompt.fields.get("include"), prompt.fields.get("exclude", ())
    if not include:
        raise RequestError(f'The prompt {prompt.id!r} has no "include" clauses; GenEval cannot judge it.')
    for name, clauses in (("include", include), ("exclude", exclude)):
        if not isinstance(clauses, list | tuple):
            raise RequestError(
                f'The prompt {prompt.id!r}: expected a list of clauses as "{name}", but got {clauses!r}.'
            )
    for index, clause in enumerate([*include, *exclude]):
        known = isinstance(clause, Mapping) and isinstance(clause.get("class"), str)
        if not known or not isinstance(clause.get("count"), int) or clause["count"] < 1:
            expected = 'an object with a "class" and a "count" of at least 1'
            raise RequestError(f"The prompt {prompt.id!r}: expected {expected}, but got {clause!r}.")
        if "position" in clause and not _is_position(clause["position"], index):
            expected = f"[relation, index of an earlier clause] with a relation among {', '.join(GENEVAL_RELATIONS)}"
            raise RequestError(f"The prompt {prompt.id!r}: expected a position {expected}, but got {clause!r}.")


def check_words(prompt: Prompt, classes: Sequence[str], colours: Sequence[str]) -> None:
    """Raises a RequestError for a class or colour that no detection will ever have: all its pictures would be wrong."""
    for clause in (*prompt.fields["include"], *prompt.fields.get("exclude", ())):
        for kind, known in (("class", classes), ("color", colours)):
            word = clause.get(kind)
            if word is not None and word not in known:
                near = get_close_matches(str(word), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}."
                raise RequestError(f"The prompt {prompt.id!r}: GenEval's judge knows no {kind} {word!r}; {hint}")


def _is_position(position: Any, clauses: int) -> bool:
    return (
        isinstance(position, Sequence)
        and len(position) == 2
        and position[0] in GENEVAL_RELATIONS
        and position[1] in range(clauses)
    )


class GenEvalScorer:
    """GenEval over batches of pictures, with any :class:`Detector`; a :class:`flowopd_eval.records.Scorer`.

    Pictures are turned upright (EXIF) and made RGB first. A picture whose judgement fails is unscored, with the error;
    the others of its batch are judged.
    """

    metric = "geneval"

    def __init__(self, detector: Detector, protocol: GenEvalProtocol | str = OFFICIAL) -> None:
        """``protocol`` is one of :data:`PROTOCOLS` by name, or one of your own; another name is a RequestError."""
        if isinstance(protocol, str):
            if protocol not in PROTOCOLS:
                raise RequestError(f"Unknown GenEval protocol {protocol!r}; expected one of {', '.join(PROTOCOLS)}.")
            protocol = PROTOCOLS[protocol]
        self.detector = detector
        self.protocol = protocol
        self.judge = flow_grpo_verdict if protocol == FLOW_GRPO else verdict

    def identity(self) -> Mapping[str, Any]:
        """The metric, the protocol with its numbers, and the detector."""
        return {"metric": self.metric, "protocol": asdict(self.protocol), "detector": dict(self.detector.identity())}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Judge each picture against its prompt's clauses: 1.0, 0.0, or None with the error.

        Raises:
            RequestError: if a prompt's clauses are missing or ill-formed.
        """
        for prompt in prompts:
            check_record(prompt)
        return self._judge_or_split(images, prompts)

    def _judge_or_split(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """A batch that fails is judged picture by picture, so that only the pictures at fault go unscored."""
        try:
            return self._judge(images, prompts)
        except Exception as error:  # whatever a broken file or a detector raises
            if len(images) == 1:
                return [Score(None, error=f"{type(error).__name__}: {error}")]
        return [
            score
            for image, prompt in zip(images, prompts, strict=True)
            for score in self._judge_or_split([image], [prompt])
        ]

    def _judge(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        pictures = [_sent(_upright(image), self.protocol.jpeg_quality) for image in images]
        found = self._detect(pictures)
        for detections in found:
            _refuse_nan(detections)
        objects = [keep(d, p.task, self.protocol) for d, p in zip(found, prompts, strict=True)]
        queries = [colour_queries(p.fields, o) for p, o in zip(prompts, objects, strict=True)]
        if any(queries):
            colours = self.detector.classify_colours(pictures, queries)
            objects = [
                with_colours(o, dict(zip(q, c, strict=True))) for o, q, c in zip(objects, queries, colours, strict=True)
            ]
        return [self.judge(p.fields, o, self.protocol) for p, o in zip(prompts, objects, strict=True)]

    def _detect(self, pictures: Sequence[Image.Image]) -> list[list[Detection]]:
        if not self.protocol.swapped_channels:
            return self.detector.detect(pictures)
        found = self.detector.detect([_red_and_blue_exchanged(picture) for picture in pictures])
        # colours are told from the picture itself: what the detector saw of them is void
        return [[replace(detection, colour=None) for detection in detections] for detections in found]


class PartialCreditScorer(GenEvalScorer):
    """:func:`partial_credit` over batches of pictures: a reward for training."""

    metric = "partial_credit"

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        self.judge = partial_credit


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


def _sent(image: Image.Image, jpeg_quality: int | None) -> Image.Image:
    """The picture after its way to the judge."""
    if jpeg_quality is None:
        return image
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=jpeg_quality)
    return Image.open(buffer).convert("RGB")


def _red_and_blue_exchanged(image: Image.Image) -> Image.Image:
    from PIL import Image

    return Image.merge("RGB", image.split()[::-1])


def _refuse_nan(detections: Sequence[Detection]) -> None:
    for detection in detections:
        if not all(math.isfinite(number) for number in (*detection.box, detection.score)):
            raise ValueError(f"the detector returned a number that is not finite: {detection}")
