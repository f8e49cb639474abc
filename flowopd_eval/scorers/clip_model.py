"""One CLIP for every metric that is made of its features: transformers' network, open_clip's transforms and weights.

:class:`ClipModel` gives L2-normalised features of pictures and texts. Its weights are a repository's or a folder's
safetensors, or a :class:`Checkpoint` in open_clip's layout, which :func:`from_open_clip` renames (the network is the
same). Pictures are prepared here rather than by transformers' processor, which resizes otherwise where torchvision is
installed.

Sources: mlfoundations/open_clip (``model.py``, ``transformer.py``); tgxs002/HPSv2 (``open_clip/transform.py``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowopd_eval.download import fetch_files
from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source

if TYPE_CHECKING:
    import torch
    from PIL import Image

TEXTS = ("*.json", "*.txt")  # configuration and tokenizer
WEIGHTS = "model.safetensors"
CONTEXT = 77  # tokens, start and end among them: every text is padded or cut to it

SIDE = 224
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

Pixels = Callable[["Image.Image"], NDArray[np.float32]]


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


def fit_pixels(image: Image.Image) -> NDArray[np.float32]:
    """HPS v2's transform: longest side to 224 (bicubic), the rest black, normalise; (3, 224, 224).

    It resizes floats where :func:`crop_pixels` resizes bytes: nothing is rounded or clipped in between. What it calls
    is what torchvision calls from 0.17 on; earlier ones resized without antialiasing.
    """
    import torch
    from torch.nn.functional import interpolate

    picture = torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)
    scale = SIDE / max(image.size)
    height, width = (max(1, round(side * scale)) for side in picture.shape[1:])
    resized = interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0] if scale != 1 else picture
    canvas = np.zeros((SIDE, SIDE, 3), np.float32)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    canvas[top : top + height, left : left + width] = resized.permute(1, 2, 0).numpy()
    return np.ascontiguousarray(((canvas - MEAN) / STD).transpose(2, 0, 1))


# --- weights ---------------------------------------------------------------------------------------------------------
class Need(Protocol):
    """Something that must be here before a metric can be had."""

    @property
    def source(self) -> str | Source:
        """Where it comes from: ``hub:REPO@REVISION``, a folder, or a file's address."""

    @property
    def command(self) -> str:
        """What provides it; for a folder of the user's, what is to be done."""

    def fetch(self) -> object:
        """Have it here. Raises ``RequestError`` when it cannot be had, or is another one."""


@dataclass(frozen=True)
class Files:
    """Files of ``hub:REPO@REVISION`` or of a folder: those to be fetched and those that must be there (patterns)."""

    source: str
    names: tuple[str, ...]
    least: tuple[str, ...]

    @property
    def command(self) -> str:
        """The Hub's own command; for a folder, what is to be done."""
        if not self.source.startswith("hub:"):
            return f"put {', '.join(self.least)} into {self.source}"
        repo, _, revision = self.source.removeprefix("hub:").partition("@")
        pinned = f" --revision {revision}" if revision else ""
        return f"hf download {repo}{pinned} " + " ".join(f'--include "{name}"' for name in self.names)

    def fetch(self) -> Path:
        """The folder they are in. A snapshot in the Hub's cache may hold other files alone, so each is looked for.

        Raises:
            RequestError: as :func:`flowopd_eval.download.fetch_files`, or one is not there.
        """
        folder = fetch_files(self.source, self.names)[0] if self.source.startswith("hub:") else Path(self.source)
        if lacking := [name for name in self.least if not any(folder.glob(name))]:
            raise RequestError(f"{self.source} has no {' and no '.join(lacking)}.")
        return folder


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_pickled(path: Path) -> Any:
    """What a checkpoint holds, on the CPU: tensors and plain containers, nothing that would run code.

    Raises:
        RequestError: it holds anything else.
    """
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise RequestError(f"{path} is no checkpoint of plain tensors: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A state dict in open_clip's layout: ``file`` of a Hub repository or folder ``source``, by its sha256.

    The file is pickled; it is read only after its hash was found right, and as tensors alone.
    """

    source: str
    file: str
    sha256: str

    @property
    def _files(self) -> Files:
        return Files(self.source, (self.file,), (self.file,))

    @property
    def command(self) -> str:
        """As :attr:`Files.command`."""
        return self._files.command

    def fetch(self) -> Path:
        """The file. Raises ``RequestError`` when it cannot be had, or is another one."""
        return self._checked

    @cached_property
    def _checked(self) -> Path:
        path = self._files.fetch() / self.file
        if (found := file_sha256(path)) != self.sha256:
            raise RequestError(f"{path} is not the file that was meant: sha256 {found}, expected {self.sha256}.")
        return path


def open_clip_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a :class:`Checkpoint`'s file, under open_clip's names. Raises as :func:`load_pickled`."""
    state = load_pickled(path)
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise RequestError(f'{path} holds no "state_dict".')
    return state["state_dict"]


# open_clip's names -> transformers'; all that match, in order. `{}` are split three ways, in the order q, k, v.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_", ".self_attn.{}_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TRANSPOSED = ("visual_projection.weight", "text_projection.weight")  # open_clip multiplies from the other side


def from_open_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's state dict of a ViT CLIP under the names of transformers' ``CLIPModel``; unknown names stay."""
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        if "{}" in name:
            found.update({name.format(part): piece for part, piece in zip("qkv", value.chunk(3), strict=True)})
        else:
            found[name] = value.T.contiguous() if name in _TRANSPOSED else value
    return found


# --- the model -------------------------------------------------------------------------------------------------------
class ClipModel:
    """CLIP's features of pictures and texts, L2-normalised, in fp32.

    Args:
        source: ``hub:REPO@REVISION`` or a folder with the configuration and, unless there is a ``checkpoint``,
            ``model.safetensors``.
        tokenizer: likewise, with the tokenizer (default: ``source``).
        checkpoint: weights in open_clip's layout.
        pixels: the transform of a picture, to (3, 224, 224).
        device: where it runs.
        batch: pictures, or texts, at a time.
    """

    def __init__(
        self,
        source: str,
        tokenizer: str | None = None,
        checkpoint: Checkpoint | None = None,
        pixels: Pixels = crop_pixels,
        device: str = "cpu",
        batch: int = 32,
    ) -> None:
        self.source, self.tokenizer_source, self.checkpoint = source, tokenizer or source, checkpoint
        self.pixels, self.device, self.batch = pixels, device, batch
        weights = () if checkpoint else (WEIGHTS,)
        self._model_files = Files(source, (*TEXTS, *weights), ("config.json", *weights))
        self._tokenizer_files = Files(self.tokenizer_source, TEXTS, ("tokenizer*.json",))

    @property
    def needs(self) -> list[Need]:
        """All that it is read from."""
        checkpoint = [self.checkpoint] if self.checkpoint else []
        return [self._model_files, *checkpoint, self._tokenizer_files]

    def load(self) -> None:
        """Have everything in memory. Raises ``RequestError`` for weights that cannot be had or do not fit."""
        self.network, self._tokenizer  # noqa: B018

    @cached_property
    def _folder(self) -> Path:
        return self._model_files.fetch()

    @cached_property
    def _weights(self) -> Path:
        return self.checkpoint.fetch() if self.checkpoint else self._folder / WEIGHTS

    def identity(self) -> Mapping[str, Any]:
        """Where the weights come from, and their hash. Raises as :meth:`load`."""
        if self.checkpoint is None:
            return {"model": self.source, "sha256": file_sha256(self._weights), "tokenizer": self.tokenizer_source}
        origin = {"model": self.checkpoint.source, "file": self.checkpoint.file, "sha256": self.checkpoint.sha256}
        return {**origin, "config": self.source, "tokenizer": self.tokenizer_source}

    @cached_property
    def network(self) -> Any:
        """transformers' model with its weights."""
        import torch
        from transformers import CLIPConfig, CLIPModel

        from flowopd_eval.quiet import quiet_libraries

        options = {"dtype": torch.float32, "output_loading_info": True}
        with quiet_libraries():
            try:
                if self.checkpoint is None:
                    network, info = CLIPModel.from_pretrained(self._folder, use_safetensors=True, **options)
                else:
                    config = CLIPConfig.from_pretrained(self._folder)
                    state = from_open_clip(open_clip_state(self._weights))
                    network, info = CLIPModel.from_pretrained(None, config=config, state_dict=state, **options)
            except RequestError:
                raise
            except (OSError, RuntimeError, ValueError) as error:
                raise RequestError(f"{self._weights} does not fit {self.source}: {error}") from error
        # safetensors of older transformers hold buffers besides; a checkpoint under new names must fit to the letter
        misfits = sorted(info["missing_keys"]) + (sorted(info["unexpected_keys"]) if self.checkpoint else [])
        if misfits:
            raise RequestError(
                f"{self._weights} does not fit {self.source}: {len(misfits)} weights are missing or unknown "
                f"({', '.join(misfits[:4])} …)."
            )
        return network.to(self.device).eval()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self._tokenizer_files.fetch())

    @property
    def logit_scale(self) -> torch.Tensor:
        """The logarithm of the model's own scale of cosines."""
        return self.network.logit_scale.detach()

    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(pictures, width), each of length 1, in order."""
        import torch

        def encode(chunk: Sequence[Image.Image]) -> torch.Tensor:
            pixels = torch.from_numpy(np.stack([self.pixels(image) for image in chunk])).to(self.device)
            return self.network.get_image_features(pixel_values=pixels).pooler_output

        return self._in_batches(encode, images)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, width), each of length 1, in order. A text is cut to 77 tokens, its end token kept.

        All are padded to 77: what a text's feature is does not depend on its neighbours' lengths.
        """

        def encode(chunk: Sequence[str]) -> torch.Tensor:
            fixed = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "return_tensors": "pt"}
            tokens = self._tokenizer(list(chunk), **fixed).to(self.device)
            return self.network.get_text_features(**tokens).pooler_output

        return self._in_batches(encode, texts)

    def _in_batches(self, encode: Callable[[Sequence[Any]], torch.Tensor], items: Sequence[Any]) -> torch.Tensor:
        import torch
        from torch.nn.functional import normalize

        with torch.inference_mode():
            starts = range(0, len(items), self.batch)
            return normalize(torch.cat([encode(items[start : start + self.batch]) for start in starts]), dim=-1)
