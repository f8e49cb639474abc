"""What judging costs: ``python -m benchmarks.scoring [share] [detector] [ocr]``; without a part: all three.

- ``share``: its share of a run's wall time. For each bench of the miniature drawing alone, judging alone, and both as
  the harness overlaps them. The share that judging adds is (both - drawing) / both; without overlap it would be
  judging / (drawing + judging). ``results/scoring.json``.
- ``detector``: GenEval's detector and CLIP, random weights of the real size, as :class:`GenEvalScorer` runs them and
  as the official script does: picture by picture, all hundred masks enlarged, crop by crop, on transformers' network
  as it is. Verdicts, boxes and colours must be the same. ``results/scoring-detector-cpu.json`` or ``-cuda.json``.
- ``ocr``: pictures a second by number of processes; all must read the same. ``results/scoring-ocr.json``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks import measure
from flowopd_eval.benches import OCR_SIDE, find_bench
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.harness import BenchRun, run_bench
from flowopd_eval.models import Backbone, resolve
from flowopd_eval.prompts import COCO_CLASSES, GENEVAL_COLOURS
from flowopd_eval.records import Detection, Prompt, Score
from flowopd_eval.rescore import rescore
from flowopd_eval.scorers.clip_colours import ClipColours, cut_out
from flowopd_eval.scorers.geneval import OFFICIAL, GenEvalScorer, colour_queries, keep, verdict, with_colours
from flowopd_eval.scorers.mask2former import (
    Mask2FormerDetector,
    MaskedDetection,
    build_network,
    load_weights,
    prepare,
)
from flowopd_eval.scorers.ocr import OCRScorer
from flowopd_eval.store import BenchFolder, read_samples

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

BATCH = 16
OBJECTS = ("dog", "bicycle")  # what the random detector is biased to see


# --- share -----------------------------------------------------------------------------------------------------------
def share(flag: str, out: Path, pictures: int, repetitions: int) -> dict[str, float]:
    """Drawing, judging and both, in seconds (medians of runs that take turns), and the two shares.

    Raises:
        WorkError: judging afterwards gives other scores than judging meanwhile.
    """
    spec = resolve("tiny:base")
    bench = find_bench(flag, spec.objects)
    generator = Backbone(spec.base, [spec], "cpu", None).generator(spec, spec.record)
    prompts = bench.prompts()
    chosen = tuple(prompts[n * len(prompts) // pictures] for n in range(pictures))
    whole = BenchRun(
        flag,
        bench.key,
        bench.version,
        chosen,
        bench.scorer(bench.protocols[0]),
        samples=1,
        batch_size=BATCH,
        correct_at=bench.correct_at,
    )
    run_bench(replace(whole, prompts=chosen[:BATCH]), generator, out / "warm")
    places = count()

    def drawn(run: BenchRun) -> BenchFolder:
        place = out / str(next(places))
        run_bench(run, generator, place)
        return BenchFolder.of(place, spec.name, flag)

    folder, scorer = drawn(replace(whole, scorer=None)), bench.scorer(bench.protocols[0])
    timings = measure.take_turns(
        {
            "drawing": lambda: drawn(replace(whole, scorer=None)),
            "judging": lambda: rescore(folder, scorer, again=True, batch_size=BATCH),
            "both": lambda: drawn(whole),
        },
        repetitions,
    )
    meanwhile, afterwards = ([sample.score for sample in read_samples(one.samples)] for one in (drawn(whole), folder))
    measure.same(f"Scores of {flag}", meanwhile, afterwards)
    drawing, judging, both = (timing.median for timing in timings.values())
    return {
        "drawing_s": drawing,
        "judging_s": judging,
        "both_s": both,
        "share_overlapped": (both - drawing) / both,
        "share_one_after_the_other": judging / (drawing + judging),
    }


def shares(repetitions: int, smoke: bool) -> None:
    """All benches of the miniature."""
    pictures = 2 if smoke else 96
    benches = {}
    with TemporaryDirectory() as folder:
        for flag in ("geneval",) if smoke else ("geneval", "ocr", "quality"):
            benches[flag] = share(flag, Path(folder) / flag, pictures, repetitions)
    measure.show("What judging adds to a run", [{"bench": flag, **found} for flag, found in benches.items()])
    measure.keep("scoring", {"pictures": pictures, "batch": BATCH, "benches": benches}, smoke)


# --- detector --------------------------------------------------------------------------------------------------------
def random_detector(folder: Path, device: str, batch: int, **clip: Any) -> Mask2FormerDetector:
    """GenEval's detector and CLIP ViT-L/14 with random weights of the real size, sure of :data:`OBJECTS`.

    ``clip`` are sizes of a narrower CLIP.
    """
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = build_network()
    bias = network.class_predictor.bias.data
    for name in OBJECTS:
        bias[COCO_CLASSES.index(name)] += 8
    weights = folder / "detector.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, weights)
    colours = ClipColours(str(write_random_clip(folder / "clip", **clip)), device)
    return Mask2FormerDetector(weights, colours, device, batch=batch)


def write_random_clip(folder: Path, **sizes: Any) -> Path:
    """CLIP ViT-L/14 with random weights (narrower by ``sizes``), and a tokenizer that spells."""
    import json
    import string

    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    folder.mkdir(parents=True)
    pieces = [*string.ascii_lowercase, "-", *(f"{letter}</w>" for letter in [*string.ascii_lowercase, "-"])]
    words = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=len(words), eos_token_id=len(words) - 1, **{**text, **sizes}).to_dict(),
        vision_config=CLIPVisionConfig(image_size=224, patch_size=14, **{**vision, **sizes}).to_dict(),
        projection_dim=sizes.get("hidden_size", 768),
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def questions(count: int, height: int = 512) -> tuple[list[Image.Image], list[Prompt]]:
    """Pictures of noise, 512 pixels wide, with GenEval's questions; every other one asks for a colour."""
    pictures, prompts = [], []
    for n in range(count):
        rng = np.random.default_rng(n)
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        pictures.append(coarse.resize((512, height), Image.Resampling.BICUBIC))
        clause: dict[str, Any] = {"class": OBJECTS[n % 2], "count": 1}
        if n % 2 == 0:
            clause["color"] = GENEVAL_COLOURS[n % len(GENEVAL_COLOURS)]
        prompts.append(Prompt(str(n), "", "colors" if n % 2 == 0 else "single_object", {"include": [clause]}))
    return pictures, prompts


class OneByOne:
    """GenEval's script as it runs: ``evaluate_images.py`` of djghosh13/geneval, with transformers' own network.

    One picture at a time through the detector; all of mmdet's hundred masks enlarged, whatever their score; each crop
    alone through CLIP, the sentences of a class once.
    """

    def __init__(self, detector: Mask2FormerDetector, network: Mask2FormerForUniversalSegmentation) -> None:
        self.detector, self.network = detector, network

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Score]:
        """Verdicts, in order."""
        return [self._score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]

    def _score(self, picture: Image.Image, prompt: Prompt) -> Score:
        objects = keep(self._detect(picture), prompt.task, OFFICIAL)
        asked = colour_queries(prompt.fields, objects)
        return verdict(prompt.fields, with_colours(objects, {d: self._colour(picture, d) for d in asked}), OFFICIAL)

    def _detect(self, picture: Image.Image) -> list[Detection]:
        import torch
        from torch.nn.functional import interpolate

        prepared = prepare(picture)
        with torch.inference_mode():
            out = self.network(pixel_values=torch.from_numpy(prepared.pixels)[None].to(self.detector.device))
            scores = out.class_queries_logits[0].float().softmax(-1)[:, :-1]
            best = scores.flatten().topk(min(100, scores.numel()))
            queries, labels = best.indices // scores.shape[1], best.indices % scores.shape[1]
            sized = {"mode": "bilinear", "align_corners": False}
            masks = interpolate(out.masks_queries_logits[:, queries].float(), prepared.pixels.shape[1:], **sized)
            height, width = prepared.inner
            masks = interpolate(masks[..., :height, :width], prepared.original, **sized)[0]
            inside = (masks > 0).float()
            sure = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        found = []
        for label, mask, score in zip(labels.tolist(), inside.bool().cpu().numpy(), (best.values * sure).tolist()):
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
            found.append(MaskedDetection(COCO_CLASSES[label], tuple(map(float, box)), score, mask=mask))  # type: ignore[arg-type]
        return found

    def _colour(self, picture: Image.Image, detection: Detection) -> str:
        colours: ClipColours = self.detector.colours  # type: ignore[assignment]
        vector = colours.clip.image_features([cut_out(picture, detection)])[0]  # type: ignore[arg-type]
        return GENEVAL_COLOURS[int((colours.directions(detection.label) @ vector).argmax())]


def same_verdicts(found: Sequence[Score], expected: Sequence[Score]) -> int:
    """How many objects were judged alike, in any order: a random detector is as sure of many, and of many nearly not.

    Raises:
        WorkError: another verdict, reason, class or colour; of more than a hundredth of the objects no counterpart with
            a box less than a pixel off and a confidence less than 1e-3.
    """
    objects = apart = 0
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        said = [(s.value, s.reason, _colours(s), sorted(s.detail.get("boxes", {}))) for s in (a, b)]
        if said[0] != said[1] or a.value is None:
            raise WorkError(f"Picture {n} is judged {a.value} ({a.reason or a.error}) and {b.value} ({b.reason}).")
        for label, boxes in a.detail["boxes"].items():
            ours, theirs = (np.asarray(side).reshape(-1, 5) for side in (boxes, b.detail["boxes"][label]))
            alike = abs(ours[:, None] - theirs[None]) <= np.array([1.0] * 4 + [1e-3])
            pairs = alike.all(-1)
            apart += int(max((~pairs.any(1)).sum(), (~pairs.any(0)).sum(), abs(len(ours) - len(theirs))))
            objects += len(boxes)
    if apart > objects / 100:
        raise WorkError(f"{apart} of {objects} objects have no counterpart; no figure is reported.")
    return objects - apart


def _colours(score: Score) -> dict[str, set[str]]:
    """The colours that were told, by class."""
    return {label: {c for c in told if c} for label, told in score.detail.get("colours", {}).items()}


def detection(
    detector: Mask2FormerDetector,
    plain: Mask2FormerForUniversalSegmentation,
    pictures: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    repetitions: int,
) -> dict[str, Any]:
    """Ours, by its batch and one by one, against the official loop with ``plain``, transformers' network as it is."""
    official, ours = OneByOne(detector, plain), GenEvalScorer(detector)

    def at(batch: int) -> list[Score]:
        detector.batch = batch
        return ours.score(pictures, prompts)

    variants: dict[str, Callable[[], list[Score]]] = {
        "official, one by one": lambda: official.score(pictures, prompts),
        "ours, one by one": partial(at, 1),
        f"ours, {detector.batch} at a time": partial(at, detector.batch),
    }
    expected = official.score(pictures, prompts)
    objects = {name: same_verdicts(work(), expected) for name, work in variants.items() if name.startswith("ours")}
    timings = measure.take_turns(variants, repetitions, warm_up=0)  # the comparison was the warm-up
    slow = "official, one by one"
    measure.show("GenEval's judge", measure.rows_of(timings, len(pictures), "pictures", slow))
    return {
        "pictures": len(pictures), "objects": objects,
        "variants": {name: timing.to_json(len(pictures), "pictures") for name, timing in timings.items()},
        "times_official": {name: measure.ratio(timings[slow], timing) for name, timing in timings.items()},
    }  # fmt: skip


def detector_part(repetitions: int, pictures: int | None, smoke: bool) -> None:
    """On the GPU where there is one."""
    import torch

    from benchmarks.hardware import profile, show_profile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # on all sides: verdicts are compared
    count = pictures or (64 if device == "cuda" else 4)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with TemporaryDirectory() as folder:
        detector = random_detector(Path(folder), device, 8 if device == "cuda" else 4, **(narrow if smoke else {}))
        plain = load_weights(detector.weights).to(device).eval()
        images, prompts = questions(2, height=16) if smoke else questions(count)
        results = detection(detector, plain, images, prompts, repetitions)
        where, busy = profile(lambda: GenEvalScorer(detector).score(images[:4], prompts[:4]), most=10)
    show_profile("Where the time goes", where)
    measure.keep(f"scoring-detector-{device}", {**results, "profile": where, "device_busy": busy}, smoke)


# --- text ------------------------------------------------------------------------------------------------------------
def signs(count: int) -> tuple[list[Image.Image], list[Prompt]]:
    """Signs of the miniature's world, drawn by rule, enlarged to 512²."""
    from flowopd_eval.tiny.scenes import draw_scene, sample_scene

    scenes = [sample_scene(np.random.default_rng(n), "ocr") for n in range(count)]
    pictures = [Image.fromarray(draw_scene(scene)).resize((512, 512), Image.Resampling.BICUBIC) for scene in scenes]
    return pictures, [Prompt(str(n), scene.caption, "ocr") for n, scene in enumerate(scenes)]


def reading(
    scorers: Mapping[int, OCRScorer], pictures: Sequence[Image.Image], prompts: Sequence[Prompt], repetitions: int
) -> dict[str, Any]:
    """Pictures a second by number of processes; what they read must be the same."""
    work = {f"{workers} processes": partial(s.score, pictures, prompts) for workers, s in scorers.items()}
    texts = {name: [score.detail.get("recognised") for score in run()] for name, run in work.items()}
    first, *others = texts
    for name in others:
        if texts[name] != texts[first]:
            raise WorkError(f"With {name} other texts are read than with {first}.")
    timings = measure.take_turns(work, repetitions, warm_up=0)
    measure.show("Reading", measure.rows_of(timings, len(pictures), "pictures", first))
    return {
        "pictures": len(pictures), "texts_read": sum(bool(text) for text in texts[first]),
        "variants": {name: timing.to_json(len(pictures), "pictures") for name, timing in timings.items()},
        "times_one_process": {name: measure.ratio(timings[first], timing) for name, timing in timings.items()},
    }  # fmt: skip


def ocr_part(repetitions: int, pictures: int | None, smoke: bool) -> None:
    """With one process, two, four … up to the machine's processors."""
    from flowopd_eval.scorers.ocr_engines import RapidOCREngine

    images, prompts = signs(2 if smoke else pictures or 64)
    counts = [n for n in (1, 2, 4, 8, 16) if n <= max(2, os.cpu_count() or 1)][: 2 if smoke else None]
    scorers = {n: OCRScorer(RapidOCREngine(OCR_SIDE), n) for n in counts}
    try:
        results = reading(scorers, images, prompts, repetitions)
    finally:
        for scorer in scorers.values():
            scorer.close()
    measure.keep("scoring-ocr", results, smoke)


PARTS = ("share", "detector", "ocr")


def main() -> int:
    options = measure.parser("benchmarks.scoring", str(__doc__), repetitions=3)
    options.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options.add_argument("--pictures", type=int, help="of detector and ocr")
    asked = options.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        options.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    try:
        for part in asked.parts or PARTS:
            if part == "share":
                shares(asked.repetitions, asked.smoke)
            elif part == "detector":
                detector_part(asked.repetitions, asked.pictures, asked.smoke)
            else:
                ocr_part(asked.repetitions, asked.pictures, asked.smoke)
    except (RequestError, WorkError) as error:
        print(f"benchmarks.scoring: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
