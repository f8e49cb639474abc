"""The published and the built-in models by name, as data, and how a name becomes something that draws."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.download import fetch_files
from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.records import (
    SD35_RECORD,
    SETTINGS_FILE,
    Prompt,
    SamplingRecord,
    read_settings,
    record_of,
    write_settings,
)
from flowopd_eval.userfile import is_userfile

if TYPE_CHECKING:
    from PIL import Image

    from flowopd_eval.adapters import Adapter
    from flowopd_eval.pipeline import FlowOPDPipeline

TINY_RECORD = SamplingRecord(steps=20, guidance=4.5, shift=3.0, width=64, height=64, text_length=0, dtype="float32")
REAL_MODEL_HELP = (
    "The real model is Stable Diffusion 3.5 Medium (about 16 GB to download, a CUDA card with 24 GB): "
    "accept its licence at https://huggingface.co/stabilityai/stable-diffusion-3.5-medium, run "
    "`hf auth login`, then `flowopd-eval --bench geneval --model flow-opd`."
)


@dataclass(frozen=True)
class Member:
    """One member of a family: the adapter that makes it (None: the bare backbone) and a line about it.

    ``guidance`` is the scale it was made for, where that is not the family's.
    """

    adapter: str | None
    about: str
    guidance: float | None = None

    def record(self, family: SamplingRecord) -> SamplingRecord:
        """Its sampling record."""
        return family if self.guidance is None else replace(family, guidance=self.guidance)


@dataclass(frozen=True)
class Family:
    """Models that share one backbone, one sampling record and one kind of picture (``objects``: which benches fit)."""

    name: str
    base: str
    record: SamplingRecord
    members: Mapping[str, Member]
    objects: str
    about: str


_MERGED = "the exact mean of the experts' changes, made on the spot"
MERGE = "merge:"  # an adapter made on the spot: the exact mean of the sources after it, joined by "+"
_TINY_GUIDANCE = 1.0  # its teachers are trained without guidance (DiffusionNFT), and so is their student
_TINY_EXPERTS = {
    "student": "distilled from the three experts",
    "geneval": "expert of composition",
    "ocr": "expert of signs",
    "quality": "expert of clean pictures, and the anchor",
}


def _tiny_folder() -> Path:
    return Path(str(resources.files("flowopd_eval.tiny").joinpath("weights")))


def _tiny_members() -> dict[str, Member]:
    """The base and those of its adapters that are there; the merge once there are experts to merge."""
    folder = Path(str(resources.files("flowopd_eval.tiny").joinpath("experts")))
    there = {name: str(folder / name) for name in _TINY_EXPERTS if (folder / name).is_dir()}
    members = {"base": Member(None, "the built-in miniature")}
    members |= {name: Member(path, _TINY_EXPERTS[name], _TINY_GUIDANCE) for name, path in there.items()}
    experts = [path for name, path in there.items() if name != "student"]
    merged = Member(MERGE + "+".join(experts), _MERGED, _TINY_GUIDANCE)
    return members | ({"merge": merged} if len(experts) > 1 else {})


def load_adapter(source: str) -> Adapter:
    """The adapter that a member names: read from its source, or merged on the spot.

    Raises:
        RequestError: as :func:`flowopd_eval.adapters.read_adapter`.
    """
    from flowopd_eval.adapters import merge_adapters, read_adapter

    if not source.startswith(MERGE):
        return read_adapter(source)
    parts = source.removeprefix(MERGE).split("+")
    return merge_adapters([(read_adapter(part), 1 / len(parts)) for part in parts])[0]


FAMILIES: dict[str, Family] = {
    "flow-opd": Family(
        "flow-opd",
        "hub:stabilityai/stable-diffusion-3.5-medium",
        SD35_RECORD,
        {
            "student": Member("hub:CostaliyA/Flow-OPD", "the student of the paper"),
            "base": Member(None, "Stable Diffusion 3.5 Medium"),
            "geneval": Member("hub:jieliu/SD3.5M-FlowGRPO-GenEval", "expert of composition"),
            "ocr": Member("hub:jieliu/SD3.5M-FlowGRPO-Text", "expert of written text"),
            "pickscore": Member("hub:jieliu/SD3.5M-FlowGRPO-PickScore", "expert of human preference"),
            "deqa": Member("hub:CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix", "expert of picture quality, and the anchor"),
            "merge": Member(
                MERGE + "hub:jieliu/SD3.5M-FlowGRPO-GenEval+hub:jieliu/SD3.5M-FlowGRPO-Text"
                "+hub:jieliu/SD3.5M-FlowGRPO-PickScore+hub:CostaliyA/SD3.5M-FlowGRPO-Deqa-Mix",
                _MERGED,
            ),
        },
        "coco",
        "Stable Diffusion 3.5 Medium, 512x512",
    ),
    "tiny": Family(
        "tiny",
        "builtin:tiny",
        TINY_RECORD,
        _tiny_members(),
        "shapes",
        "the built-in miniature: the same architecture at 1/550 of the size, 64x64 pictures of shapes and signs",
    ),
}
DEFAULT_MEMBERS = ("student", "base")
OURS = ("StableDiffusion3Pipeline", "FlowOPDPipeline")  # pipelines that FlowOPDPipeline draws for
ANYTHING = "anything"  # what a model draws of which nothing is known


@dataclass(frozen=True)
class ModelSpec:
    """A model as asked for: a backbone, at most one adapter on it, and the sampling record it is drawn with."""

    name: str
    base: str
    adapter: str | None
    record: SamplingRecord
    objects: str
    about: str

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return "".join(c if c.isalnum() or c in "-._" else "-" for c in self.name).strip("-.")


def resolve(name: str, lora: str | None = None) -> ModelSpec:
    """The model that goes by ``name``: ``family[:member]``, a folder, ``hub:REPO@REVISION``, or ``FILE.py:NAME``.

    An adapter ``lora`` that says that it was made for that family's base is drawn by its own record.

    Raises:
        RequestError: no such family, member or folder, or one whose own record cannot be read.
    """
    family_name, _, member_name = name.partition(":")
    if family_name in FAMILIES:
        family = FAMILIES[family_name]
        member_name = member_name or next(m for m in DEFAULT_MEMBERS if m in family.members)
        if member_name not in family.members:
            raise RequestError(
                f"Model {name!r}: {family_name} has no member {member_name!r}; it has: {', '.join(family.members)}."
            )
        member = family.members[member_name]
        if lora and member.adapter:
            raise RequestError(f"Model {name!r} has an adapter of its own; use --lora with {family_name}:base.")
        full = f"{family_name}:{member_name}"
        own = settings_of(lora) if lora else {}
        return ModelSpec(
            f"{full}+{short_name(lora)}" if lora else full,
            family.base,
            lora or member.adapter,
            record_of(own, str(lora)) if own.get("adapter_of") == full else member.record(family.record),
            family.objects,
            family.about if member.adapter is None else member.about,
        )
    if name.startswith("hub:") or Path(name).is_dir() or is_userfile(name):
        added = f"+{short_name(lora)}" if lora else ""
        short = (name if name.startswith("hub:") else short_name(name)) + added
        settings = {} if is_userfile(name) else settings_of(name)
        if "adapter_of" in settings:
            return _published(name, settings, lora)
        if _is_bare_adapter(f"{name}/adapter"):
            raise RequestError(f"{name} is a run of the training; what it has made is {name}/adapter.")
        if _is_bare_adapter(name):
            raise RequestError(
                f"{name} is an adapter that does not say what it was made for: draw with --model BASE --lora {name}, "
                f"or give it a record, `flowopd-eval convert {name} --base BASE --out FOLDER`, BASE being tiny:base or "
                "flow-opd:base."
            )
        record = record_of(settings, name) if settings else SD35_RECORD
        return ModelSpec(short, name, lora, record, ANYTHING, f"{name}{added}")
    raise RequestError(
        f"Unknown model {name!r}: neither a known name ({', '.join(FAMILIES)}), nor a folder, nor hub:REPO@REVISION, "
        "nor a function FILE.py:NAME. `flowopd-eval models` lists the known names."
    )


def short_name(source: str) -> str:
    """What a folder, file or repository is called in tables: its name, or that of the training run that it lies in.

    ``runs/mine/adapter`` is ``mine``, ``runs/mine/snapshots/step-000010`` is ``mine/step-000010``.
    """
    path = Path(source)
    if source.startswith("hub:") or is_userfile(source):
        return path.name
    path = path.resolve()
    if path.name == "adapter":
        return path.parent.name or path.name
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "snapshots" else path.name


def _is_bare_adapter(source: str) -> bool:
    """Whether a folder on disk holds a LoRA and no pipeline."""
    names = ("adapter_config.json", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
    folder = Path(source)
    return not (folder / "model_index.json").is_file() and any((folder / name).is_file() for name in names)


def own_record(source: str) -> SamplingRecord | None:
    """The sampling record by which a model of known name, a saved pipeline or a published adapter is meant to be drawn;
    None for one that says nothing of it."""
    if source.partition(":")[0] in FAMILIES:
        return resolve(source).record
    if not settings_of(source):
        return None
    place = Path(source)  # an adapter named by its file is its folder's
    return resolve(str(place.parent) if place.is_file() else source).record


def adapter_settings(base: str, record: SamplingRecord) -> dict[str, Any]:
    """What stands in the settings file beside an adapter of ``base`` (``FAMILY:base``) that is drawn by ``record``."""
    return {"adapter_of": base, "record": asdict(record)}


def base_settings(base: str) -> dict[str, Any]:
    """The settings of an adapter of ``base`` of which nothing is known but that: it is drawn as the base is.

    Raises:
        RequestError: ``base`` is no backbone of known name.
    """
    known = [f"{family}:base" for family in FAMILIES]
    if base not in known:
        raise RequestError(f"--base {base!r} is no backbone of known name; there are: {', '.join(known)}.")
    return adapter_settings(base, resolve(base).record)


def pass_on_settings(sources: Sequence[str], folder: Path) -> SamplingRecord | None:
    """Write beside an adapter in ``folder`` the record of the adapters it was made of, where all have the same.

    ``sources`` are known names, folders, or ``hub:…``. Returns that record; None where one has none, or they differ.

    Raises:
        RequestError: as :func:`settings_of`.
    """
    said = []
    for source in sources:
        family = source.partition(":")[0]
        known = family in FAMILIES
        said.append(adapter_settings(f"{family}:base", resolve(source).record) if known else settings_of(source))
    (folder / SETTINGS_FILE).unlink(missing_ok=True)  # of what was written there before
    if "adapter_of" not in said[0] or any(one != said[0] for one in said):
        return None
    write_settings(folder, said[0])
    return record_of(said[0], sources[0])


def settings_of(source: str) -> dict[str, Any]:
    """What a saved pipeline, or an adapter that was trained or published here, says of itself; empty for any other.

    Raises:
        RequestError: its file is no JSON object; and as :func:`flowopd_eval.download.fetch_files`.
    """
    folder = fetch_files(source, [SETTINGS_FILE])[0] if source.startswith("hub:") else Path(source)
    if folder.is_file():  # an adapter's, named itself
        settings = read_settings(folder.parent, source)
        return settings if "adapter_of" in settings else {}
    return read_settings(folder, source)


def _published(source: str, settings: Mapping[str, Any], lora: str | None) -> ModelSpec:
    """A published adapter on the backbone that it names, which must be one of ours: others could be anything."""
    base = settings["adapter_of"]
    if base not in [f"{family}:base" for family in FAMILIES]:
        raise RequestError(f"{source} names the backbone {base!r}; known are {', '.join(FAMILIES)}, with :base.")
    if lora:
        raise RequestError(f"{source} is an adapter itself; use --lora with {base}.")
    short = source if source.startswith("hub:") else short_name(source)
    about = f"{short}, an adapter of {base}"
    return replace(resolve(base, source), name=short, record=record_of(settings, source), about=about)


def _another_base(name: str, adapter: Adapter, base: str) -> str:
    """A warning where an adapter names another repository as its backbone than the one it is drawn on, else "".

    Other backbones of the same shapes exist (Stable Diffusion 3 Medium among them), so that the file alone cannot tell.
    A path on the disk of whoever trained it says nothing, nor does a backbone in a folder.
    """
    families = {f"{family.name}:base": family.base for family in FAMILIES.values()}
    said = families.get(adapter.made_for or "", f"hub:{adapter.made_for}")
    known = base.startswith("hub:") or base in families.values()
    if not known or not re.fullmatch(r"hub:[\w.-]+/[\w.-]+|builtin:\w+", said):
        return ""
    if said.lower() == base.partition("@")[0].lower():
        return ""
    return (
        f"{name}: its adapter_config.json says that it was made for {adapter.made_for}, but it is drawn on "
        f"{base.removeprefix('hub:')}: unless these are the same weights, its pictures mean little."
    )


def fetch_base(source: str) -> Path:
    """Folder of the backbone ``source``: built in, on disk, or downloaded from the Hub at its revision.

    Raises:
        RequestError: the licence is not accepted, there is no such repository, or no network and nothing cached.
    """
    if source == "builtin:tiny":
        folder = _tiny_folder()
        if not (folder / "model_index.json").is_file():
            raise RequestError(f"The miniature's weights are missing from {folder}; reinstall flowopd-eval.")
        return folder
    if not source.startswith("hub:"):
        return Path(source)
    return fetch_files(source, ["*.json", "*.txt", "*.model", "*/*.safetensors"])[0]


def pipeline_class(base: str) -> str:
    """The class of a pipeline by its ``model_index.json``.

    Raises:
        RequestError: there is none, or it is not JSON.
    """
    folder = fetch_files(base, ["model_index.json"])[0] if base.startswith("hub:") else Path(base)
    path = folder / "model_index.json"
    try:
        return str(json.loads(path.read_bytes())["_class_name"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RequestError(
            f"{base} is no pipeline of diffusers: it has no model_index.json that names a class. For a LoRA, name its "
            "base with --model and the LoRA with --lora."
        ) from error


def folder_sha256(folder: Path) -> str:
    """One hash of every weight and configuration file of a diffusers folder, by relative path and content.

    Files in the Hub's cache carry their sha256 as the name of the blob they link to; it is taken from there.
    """
    import hashlib

    def file_hash(path: Path) -> str:
        blob = path.resolve().name
        if path.is_symlink() and len(blob) == 64:
            return blob
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    wanted = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".json") and "experts" not in path.relative_to(folder).parts
    )
    digest = hashlib.sha256()
    for path in wanted:
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()


class Backbone:
    """One backbone in memory with every adapter that a command needs; makes one generator a model."""

    def __init__(self, base: str, specs: Sequence[ModelSpec], device: str, dtype: str | None) -> None:
        """Raises a RequestError for records that it cannot keep to: another sampler, or two dtypes at once."""
        for spec in specs:
            if spec.record.sampler != "euler":
                raise RequestError(
                    f"{spec.name} is to be drawn by the sampler {spec.record.sampler!r}, as its {SETTINGS_FILE} says; "
                    "pictures are drawn here by euler, the ODE's: change the record to evaluate it by that."
                )
        dtypes = {spec.record.dtype: spec.name for spec in reversed(specs)}
        if dtype is None and len(dtypes) > 1:
            said = ", ".join(f"{name} in {dtype}" for dtype, name in dtypes.items())
            raise RequestError(f"One backbone has one dtype, but {said}: give --dtype, or one model a run.")
        self.base, self.folder = base, fetch_base(base)
        self.specs = list(specs)
        self.device = device
        self.dtype = dtype or specs[0].record.dtype
        self._unsaid = base not in [family.base for family in FAMILIES.values()] and not read_settings(
            self.folder, base
        )
        scheduler = self.folder / "scheduler" / "scheduler_config.json"
        shift = json.loads(scheduler.read_bytes()).get("shift") if scheduler.is_file() else None
        self.shift = specs[0].record.shift if shift is None else float(shift)
        for spec in () if self._unsaid else specs:
            if spec.record.shift != self.shift:
                raise RequestError(
                    f"{spec.name} is to be drawn with shift {spec.record.shift:g}, as its {SETTINGS_FILE} says, but "
                    f"the scheduler of {base} has {self.shift:g}: correct the one that is wrong."
                )

    @cached_property
    def sha256(self) -> str:
        """Hash of the backbone's files."""
        return folder_sha256(self.folder)

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """The adapter of each model that has one, read when first asked for."""
        from flowopd_eval.quiet import quiet_libraries

        with quiet_libraries():
            return {spec.name: load_adapter(spec.adapter) for spec in self.specs if spec.adapter}

    @cached_property
    def notice(self) -> str:
        """What nobody would guess of how the models are drawn, a line each; empty where there is nothing."""
        said = [words for name, adapter in self.adapters.items() if (words := _another_base(name, adapter, self.base))]
        if self._unsaid:
            said.append(
                f"{self.base} has no {SETTINGS_FILE}, which would say how it is meant to be drawn: unless told "
                f"otherwise, as Stable Diffusion 3.5 Medium is, with {SD35_RECORD.steps} steps, guidance "
                f"{SD35_RECORD.guidance:g} and {SD35_RECORD.width}x{SD35_RECORD.height} pixels."
            )
        return "\n".join(said)

    @cached_property
    def pipeline(self) -> FlowOPDPipeline:
        """The pipeline, loaded when first asked for."""
        from flowopd_eval.quiet import quiet_libraries

        with quiet_libraries():
            import torch

            from flowopd_eval.pipeline import FlowOPDPipeline

            record = next((spec.record for spec in self.specs if not spec.adapter), self.specs[0].record)
            try:
                pipeline = FlowOPDPipeline.from_pretrained(
                    self.folder,
                    experts=self.adapters,
                    guidance={spec.name: spec.record.guidance for spec in self.specs if spec.adapter},
                    record=replace(record, shift=self.shift),
                    dtype=getattr(torch, self.dtype),
                    use_safetensors=True,  # pickles are neither opened nor hashed
                )
            except OSError as error:
                raise RequestError(f"{self.base} cannot be loaded, all of it from safetensors: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def load(self) -> None:
        """Have everything in memory."""
        self.pipeline  # noqa: B018  (loads)

    def record(self, spec: ModelSpec) -> SamplingRecord:
        """The record ``spec`` is drawn with unless told otherwise."""
        return spec.record

    def generator(self, spec: ModelSpec, record: SamplingRecord) -> ModelGenerator:
        """What draws with ``spec`` by ``record``."""
        return ModelGenerator(self, spec, replace(record, dtype=self.dtype, shift=self.shift))

    def cut(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those of ``prompts`` whose end no text encoder sees."""
        from flowopd_eval.pipeline import longer_than_all

        limits = self.pipeline.text_limits
        return [prompt for prompt in prompts if longer_than_all(prompt.prompt, limits)]


def load_pipeline(*names: str, device: str = "cpu", dtype: str | None = None) -> FlowOPDPipeline:
    """Models by the names that ``--model`` takes, as one pipeline: each is an expert by its full name.

    Without its backbone being named, too, it is there: ``expert=None`` draws with it.

    Args:
        *names: ``tiny``, ``flow-opd:ocr``, a folder, ``hub:REPO@REVISION``; all on one Stable Diffusion 3 backbone.
        device: where it runs.
        dtype: float32, bfloat16 or float16; None takes the models' record.

    Raises:
        RequestError: no such model, models of several backbones, or of another pipeline than SD3's.
    """
    specs = [resolve(name) for name in names]
    bases = dict.fromkeys(spec.base for spec in specs)
    if len(bases) != 1:
        raise RequestError(f"A pipeline has one backbone, but {', '.join(names) or 'no name'} has {len(bases)}.")
    (base,) = bases
    if is_userfile(base) or (base != "builtin:tiny" and (kind := pipeline_class(base)) not in OURS):
        what = "a function of yours" if is_userfile(base) else f"a {kind}"
        raise RequestError(f"{base} is {what}: this pipeline is for models of Stable Diffusion 3.")
    return Backbone(base, specs, device, dtype).pipeline


@dataclass(frozen=True)
class ModelGenerator:
    """Draws with one model of a backbone (see :class:`flowopd_eval.harness.Generator`)."""

    backbone: Backbone
    spec: ModelSpec
    record: SamplingRecord

    def identity(self) -> dict[str, Any]:
        """Name, hashes and sampling record, as plain JSON."""
        adapter = self.backbone.pipeline.adapter(self.spec.name) if self.spec.adapter else None
        return {
            "model": self.spec.name,
            "base_sha256": self.backbone.sha256,
            "adapter_sha256": adapter.sha256 if adapter else None,
            "sampling": asdict(self.record),
        }

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """One RGB picture for each prompt and seed.

        Raises:
            WorkError: the model drew NaN.
        """
        import numpy as np
        from PIL import Image

        output = self.backbone.pipeline(
            [prompt.prompt for prompt in prompts],
            expert=self.spec.name if self.spec.adapter else None,
            seed=list(seeds),
            num_inference_steps=self.record.steps,
            guidance_scale=self.record.guidance,
            height=self.record.height,
            width=self.record.width,
            max_sequence_length=self.record.text_length,
            negative_prompt=self.record.negative_prompt,
            output_type="np",
        )
        pictures = np.asarray(output.images)  # type: ignore[union-attr]
        if not np.isfinite(pictures).all():
            bad = [p.id for p, picture in zip(prompts, pictures, strict=True) if not np.isfinite(picture).all()]
            raise WorkError(
                f"{self.spec.name} drew NaN for {', '.join(bad)} in {self.record.dtype}; try --dtype float32."
            )
        return [Image.fromarray((picture * 255).round().astype("uint8")) for picture in pictures]
