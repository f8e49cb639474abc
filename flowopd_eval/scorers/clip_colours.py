"""GenEval's colour classifier: CLIP ViT-L/14, zero-shot, on the object alone.

An object is cut out by its mask, laid on grey #999, cropped to its box, and compared with three sentences for each of
ten colours. The official script takes the model from open_clip and its pictures through torchvision; transformers'
model is the same network, and :mod:`flowopd_eval.scorers.clip_model` has open_clip's transform in Pillow (transformers'
own processor rounds the centre crop differently).

Source: djghosh13/geneval, ``evaluate_images.py`` (``color_classification``) with clip_benchmark's classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowopd_eval.prompts import GENEVAL_COLOURS
from flowopd_eval.scorers.clip_model import ClipModel
from flowopd_eval.scorers.mask2former import MaskedDetection

if TYPE_CHECKING:
    import torch
    from PIL import Image

SOURCE = "hub:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = (153, 153, 153)


def cut_out(image: Image.Image, detection: MaskedDetection) -> Image.Image:
    """The object on grey, cropped to its box."""
    from PIL import Image

    left, top, right, bottom = (round(edge) for edge in detection.box)
    box = (left, top, right, bottom)
    if detection.mask is None:
        return image.crop(box)
    blank = Image.new("RGB", image.size, GREY)
    return Image.composite(image, blank, Image.fromarray(detection.mask)).crop(box)


class ClipColours:
    """The colours of detected objects (:class:`flowopd_eval.scorers.mask2former.ColourClassifier`).

    Args:
        source: ``hub:REPO@REVISION`` or a folder with a CLIP model and its tokenizer.
        device: where it runs.
        batch: crops at a time, whatever picture they come from.
    """

    def __init__(self, source: str = SOURCE, device: str = "cpu", batch: int = 32) -> None:
        self.clip = ClipModel(source, device=device, batch=batch)
        self._classes: dict[str, torch.Tensor] = {}

    def identity(self) -> Mapping[str, Any]:
        """Where the model comes from, and the hash of its weights."""
        return self.clip.identity()

    def directions(self, name: str) -> torch.Tensor:
        """The text direction (10, width) of each colour for objects called ``name``, computed once."""
        from torch.nn.functional import normalize

        if name not in self._classes:
            texts = [t.format(colour=colour, name=name) for colour in GENEVAL_COLOURS for t in TEMPLATES]
            means = self.clip.text_features(texts).unflatten(0, (len(GENEVAL_COLOURS), len(TEMPLATES))).mean(1)
            self._classes[name] = normalize(means, dim=-1)
        return self._classes[name]

    def classify(self, images: Sequence[Image.Image], queries: Sequence[Sequence[MaskedDetection]]) -> list[list[str]]:
        """For each picture the colours of the asked-for objects; crops of all pictures share batches."""
        asked = [(n, detection) for n, detections in enumerate(queries) for detection in detections]
        colours: list[list[str]] = [[] for _ in images]
        if not asked:
            return colours
        features = self.clip.image_features([cut_out(images[n], detection) for n, detection in asked])
        for (n, detection), vector in zip(asked, features, strict=True):
            best = int((self.directions(detection.label) @ vector).argmax())
            colours[n].append(GENEVAL_COLOURS[best])
        return colours
