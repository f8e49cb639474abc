"""GenEval's colour classifier: CLIP ViT-L/14, zero-shot, on the object alone.

An object is cut out by its mask, laid on grey #999, cropped to its box, and compared with three sentences for each of
ten colours. The official script takes the model from open_clip and its pictures through torchvision; transformers'
model is the same network, and :func:`crop_pixels` is open_clip's transform in Pillow (transformers' own processor
rounds the centre crop differently).

Source: djghosh13/geneval, ``evaluate_images.py`` (``color_classification``) with clip_benchmark's classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowopd_eval.download import fetch_files
from flowopd_eval.prompts import GENEVAL_COLOURS
from flowopd_eval.scorers.mask2former import MaskedDetection

if TYPE_CHECKING:
    import torch
    from PIL import Image

SOURCE = "hub:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
_FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = (153, 153, 153)
SIDE = 224
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def cut_out(image: Image.Image, detection: MaskedDetection) -> Image.Image:
    """The object on grey, cropped to its box."""
    from PIL import Image

    left, top, right, bottom = (round(edge) for edge in detection.box)
    box = (left, top, right, bottom)
    if detection.mask is None:
        return image.crop(box)
    blank = Image.new("RGB", image.size, GREY)
    return Image.composite(image, blank, Image.fromarray(detection.mask)).crop(box)


def crop_pixels(image: Image.Image) -> NDArray[np.float32]:
    """open_clip's transform: shortest side to 224 (bicubic), centre crop, normalise; (3, 224, 224)."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    size = (int(SIDE * width / short), int(SIDE * height / short))
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))


class ClipColours:
    """The colours of detected objects (:class:`flowopd_eval.scorers.mask2former.ColourClassifier`).

    Args:
        source: ``hub:REPO@REVISION`` or a folder with a CLIP model and its tokenizer.
        device: where it runs.
        batch: crops at a time, whatever picture they come from.
    """

    def __init__(self, source: str = SOURCE, device: str = "cpu", batch: int = 32) -> None:
        self.source, self.device, self.batch = source, device, batch
        self._classes: dict[str, torch.Tensor] = {}

    @cached_property
    def model(self) -> Any:
        """The CLIP model."""
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(self._folder, use_safetensors=True).to(self.device).eval()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self._folder)

    @cached_property
    def _folder(self) -> Path:
        """Raises ``RequestError`` when the Hub's files cannot be had."""
        return fetch_files(self.source, _FILES)[0] if self.source.startswith("hub:") else Path(self.source)

    def identity(self) -> Mapping[str, Any]:
        """Where the model comes from, and the hash of its weights."""
        import hashlib

        with (self._folder / "model.safetensors").open("rb") as file:
            return {"model": self.source, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def directions(self, name: str) -> torch.Tensor:
        """The text direction (10, width) of each colour for objects called ``name``, computed once."""
        import torch
        from torch.nn.functional import normalize

        if name not in self._classes:
            texts = [t.format(colour=colour, name=name) for colour in GENEVAL_COLOURS for t in TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                embedded = normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
            means = embedded.unflatten(0, (len(GENEVAL_COLOURS), len(TEMPLATES))).mean(1)
            self._classes[name] = normalize(means, dim=-1)
        return self._classes[name]

    def classify(self, images: Sequence[Image.Image], queries: Sequence[Sequence[MaskedDetection]]) -> list[list[str]]:
        """For each picture the colours of the asked-for objects; crops of all pictures share batches."""
        import torch
        from torch.nn.functional import normalize

        asked = [(n, detection) for n, detections in enumerate(queries) for detection in detections]
        colours: list[list[str]] = [[] for _ in images]
        for start in range(0, len(asked), self.batch):
            chunk = asked[start : start + self.batch]
            pixels = np.stack([crop_pixels(cut_out(images[n], detection)) for n, detection in chunk])
            with torch.inference_mode():
                features = self.model.get_image_features(pixel_values=torch.from_numpy(pixels).to(self.device))
                embedded = normalize(features.pooler_output, dim=-1)
            for (n, detection), vector in zip(chunk, embedded, strict=True):
                best = int((self.directions(detection.label) @ vector).argmax())
                colours[n].append(GENEVAL_COLOURS[best])
        return colours
