"""What reads the text in a picture: rapidocr, and PaddleOCR 3."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flowopd_eval.errors import RequestError, Unavailable, extra

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class Engine(Protocol):
    """Reads the text in a picture.

    Small and picklable: its reader is built where it reads and never travels. Whoever misses a package or weights
    raises :class:`flowopd_eval.errors.Unavailable`.
    """

    def identity(self) -> dict[str, Any]:
        """Engine, versions, side: whatever changes what is read. Plain JSON."""

    def load(self) -> None:
        """Have the reader in memory."""

    def read(self, image: Image.Image) -> str:
        """All lines found in the picture, in reading order, joined without a separator."""


class _LineEngine:
    """What the engines share: a reader that is built once a process, and the picture's least side in pixels."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    @cached_property
    def _reader(self) -> Any:
        return self._build()

    def _build(self) -> Any:
        raise NotImplementedError

    def _lines(self, bgr: np.ndarray) -> Sequence[str]:
        raise NotImplementedError

    def load(self) -> None:
        """Have the reader in memory."""
        self._reader  # noqa: B018  (builds)

    def read(self, image: Image.Image) -> str:
        """All lines found in the picture, in reading order, joined without a separator."""
        return "".join(self._lines(_bgr(image, self.side)))


def _bgr(image: Image.Image, side: int) -> np.ndarray:
    """The picture as OpenCV reads files: (H, W, 3) uint8, blue first; enlarged to a least side of ``side`` pixels."""
    import numpy as np
    from PIL import Image

    image = image.convert("RGB")
    if min(image.size) < side:
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


class RapidOCREngine(_LineEngine):
    """``rapidocr`` with the PP-OCRv6 models its wheel ships: no network, no torch.

    ``side`` is both the least side to which a small picture is enlarged and the detector's ``limit_side_len``; one
    value for training and evaluation alike, since it changes what is read.
    """

    name = "rapidocr-ppocrv6-small"

    def _build(self) -> Any:
        try:
            from rapidocr import RapidOCR
        except (ImportError, RuntimeError) as error:
            raise Unavailable(f"OCR needs rapidocr ({error}): {extra('ocr')}") from error
        limits = {"Det.limit_side_len": self.side, "Det.limit_type": "min"}
        quiet = {"Global.use_cls": False, "Global.log_level": "critical"}
        return RapidOCR(params={**quiet, **limits, "EngineConfig.onnxruntime.intra_op_num_threads": 1})

    def _lines(self, bgr: np.ndarray) -> Sequence[str]:
        return self._reader(bgr).txts or ()

    def identity(self) -> dict[str, Any]:
        """Engine, versions and side length."""
        from importlib.metadata import version

        self.load()  # a missing package shows before anything is drawn
        versions = {package: version(package) for package in ("rapidocr", "onnxruntime")}
        return {"engine": self.name, "side": self.side, **versions}


PADDLE_DEFAULTS = ("PP-OCRv6_medium_det", "PP-OCRv6_medium_rec")
_PADDLE_INSTALL = extra("paddle")
# Not orientation, unwarping or turned lines: the rule's engine has none of them, and each is a model to fetch.
_PADDLE_OFF = {"use_doc_orientation_classify": False, "use_doc_unwarping": False, "use_textline_orientation": False}
_PADDLE_FETCH = (
    f'`python -c "from paddleocr import PaddleOCR; PaddleOCR({", ".join(f"{k}={v}" for k, v in _PADDLE_OFF.items())})"`'
)


class PaddleOCR3Engine(_LineEngine):
    """PaddleOCR 3 (``paddleocr`` and ``paddlepaddle``), on the CPU; its default models are PP-OCRv6 medium.

    The models are fetched once into PaddleX's own cache, or come from folders of PaddleX inference models (with an
    ``inference.yml`` that says which model it is). ``side`` as in :class:`RapidOCREngine`.

    ``PaddleOCR.predict`` takes an array for BGR: PaddleX's OCR pipeline reads files through OpenCV with
    ``ReadImage(format="BGR")`` and passes arrays on as they are (PaddlePaddle/PaddleX 3.7.2,
    ``paddlex/inference/pipelines/ocr/pipeline.py`` and ``paddlex/inference/common/reader/image_reader.py``).
    """

    name = "paddleocr3-ppocrv6-medium"

    def __init__(
        self,
        side: int,
        text_detection_model_dir: str | None = None,
        text_recognition_model_dir: str | None = None,
    ) -> None:
        super().__init__(side)
        self.folders = {"text_detection": text_detection_model_dir, "text_recognition": text_recognition_model_dir}

    def _build(self) -> Any:
        named: dict[str, str] = {}
        for (part, folder), default in zip(self.folders.items(), PADDLE_DEFAULTS, strict=True):
            named[f"{part}_model_name"] = model_of(folder) if folder else default
            if folder:
                named[f"{part}_model_dir"] = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # paddle's, about a compiler cache
            try:
                import paddle  # noqa: F401  (paddleocr can be imported without it, but not made)
                from paddleocr import PaddleOCR
            except (ImportError, RuntimeError) as error:
                raise Unavailable(f"PaddleOCR cannot be imported ({error}): {_PADDLE_INSTALL}") from error
            logging.getLogger("paddlex").setLevel(logging.ERROR)
            limits = {"text_det_limit_side_len": self.side, "text_det_limit_type": "min"}
            try:
                return PaddleOCR(**_PADDLE_OFF, **named, **limits, device="cpu", cpu_threads=1)
            except Exception as error:  # without a network it is a plain one
                fetch = f"with a network, {_PADDLE_FETCH}"
                raise Unavailable(f"PaddleOCR has no models to read with ({error}): {fetch}") from error

    def _lines(self, bgr: np.ndarray) -> Sequence[str]:
        return [line for page in self._reader.predict(bgr) for line in lines_of(page)]

    def identity(self) -> dict[str, Any]:
        """Engine, models (detection, recognition), versions, side length, and the sha256 of folders given."""
        pipeline = self._reader.paddlex_pipeline
        models = tuple(getattr(pipeline, part).model_name for part in ("text_det_model", "text_rec_model"))
        folders = {f"{part}_sha256": _folder_sha256(Path(folder)) for part, folder in self.folders.items() if folder}
        return {
            "engine": self.name if models == PADDLE_DEFAULTS else "paddleocr3",
            "models": list(models),
            "side": self.side,
            "paddleocr": _version("paddleocr"),
            "paddlepaddle": _version("paddlepaddle", "paddlepaddle-gpu"),
            **folders,
        }


def lines_of(page: Mapping[str, Any]) -> list[str]:
    """The lines of one page of ``PaddleOCR.predict``, in its order, without those of confidence 0 or less.

    Flow-GRPO's rule drops those, too. Raises ``ValueError`` for a page without ``rec_texts`` and ``rec_scores``, or
    with unequal numbers of them.
    """
    try:
        pairs = list(zip(page["rec_texts"], page["rec_scores"], strict=True))
    except (KeyError, TypeError) as error:
        got = sorted(page) if isinstance(page, Mapping) else type(page).__name__
        raise ValueError(f"Expected a page with rec_texts and rec_scores, but got {got}.") from error
    return [str(text) for text, score in pairs if score > 0]


def model_of(folder: str | Path) -> str:
    """The model that lies in a folder, by the ``Global.model_name`` of its ``inference.yml``.

    Raises:
        RequestError: the folder has no such file, or it names no model.
    """
    try:
        import yaml
    except ImportError as error:
        raise Unavailable(f"PaddleOCR's models cannot be read ({error}): {_PADDLE_INSTALL}") from error
    path = Path(folder) / "inference.yml"
    try:
        return str(yaml.safe_load(path.read_bytes())["Global"]["model_name"])
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        raise RequestError(
            f"{folder} is no folder of a PaddleX inference model: it has no inference.yml with Global.model_name "
            f"({type(error).__name__})."
        ) from error


def _folder_sha256(folder: Path) -> str:
    """One hash of a model folder's files, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _version(*packages: str) -> str:
    """The version of the first of these that is installed, with its name where that is not the first."""
    from importlib.metadata import PackageNotFoundError, version

    for package in packages:
        with suppress(PackageNotFoundError):
            return version(package) if package == packages[0] else f"{package} {version(package)}"
    return "unknown"


ENGINES: Mapping[str, Callable[[int], Engine]] = {"rapidocr": RapidOCREngine, "paddle3": PaddleOCR3Engine}
