"""The adapter that is to be published: what it fits, what it was made from and how, as far as files tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.download import fetch_files
from flowopd_eval.errors import RequestError
from flowopd_eval.hub.licences import binding, licence_of_folder, licence_of_repository
from flowopd_eval.hub.repository import without_places
from flowopd_eval.models import (
    FAMILIES,
    MERGE,
    Family,
    ModelSpec,
    fetch_base,
    load_adapter,
    resolve,
    settings_of,
)
from flowopd_eval.records import SETTINGS_FILE, SamplingRecord, record_of

if TYPE_CHECKING:
    from torch import nn

    from flowopd_eval.adapters import Adapter
    from flowopd_eval.hub.there import There

RECIPE = "recipe.json"
_MERGE_REPORT = "merge.json"
AGAIN, MERGED, STARTED = "published again", "merged", "started from"  # roles of what an adapter's values come from
# SD3.5-Medium's transformer (transformer/config.json of stabilityai/stable-diffusion-3.5-medium), so that an adapter is
# checked against every one of its layers without 5 GB of weights.
_SD35_TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True)
class Upstream:
    """An adapter of somebody's that this one was made from: its source at a commit, what it gave, its licence.

    ``source`` of one that lies in a local ``folder``, whose card states a licence, is the folder's name.
    """

    source: str
    role: str
    licence: str
    folder: Path | None = None

    @property
    def carried(self) -> bool:
        """Whether its licence holds for what was made from it: its values are in it, or the licence says so."""
        return any(role in self.role for role in (AGAIN, MERGED, STARTED)) or binding(self.licence)


@dataclass(frozen=True)
class Subject:
    """An adapter with its backbone's family, the record it is drawn with, and how it was made.

    ``record_from`` says in words where the record was found. ``folder`` is where it lies (None: on the Hub); ``recipe``
    and ``training`` are what a training run left, with local paths cut down to names; ``upstream`` are the adapters of
    others that it was made from.
    """

    adapter: Adapter
    family: Family
    record: SamplingRecord
    record_from: str
    folder: Path | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    upstream: tuple[Upstream, ...] = ()

    @property
    def base(self) -> str:
        """The backbone's name, as ``--model`` takes it."""
        return f"{self.family.name}:base"

    @property
    def merged(self) -> bool:
        """Whether it is several adapters' weighted sum."""
        return self.recipe.get("stage") == "merge"

    @property
    def change(self) -> str:
        """What it changes of its backbone, in words."""
        made = f"made by stage {self.recipe['stage']!r}" if self.recipe.get("stage") else "of unknown making"
        size = f"rank {self.adapter.rank} in {len(self.adapter.factors)} linear layers of the transformer"
        return f"low-rank matrices (LoRA, {size}), {made}, are added to it when it is loaded."


def read_subject(source: str, there: There | None = None) -> Subject:
    """The adapter ``source``: a folder, a file, ``hub:REPO@REVISION``, or a known name such as ``tiny:student``.

    ``there`` is the repository that it goes to: its record holds for the same adapter, unless one lies nearer.

    Raises:
        RequestError: as :func:`flowopd_eval.adapters.read_adapter`; an adapter that does not fit its backbone whole; an
            upstream adapter whose licence is unknown, or does not let it be passed on.
    """
    spec = _known(source)
    place = spec.adapter if spec and spec.adapter else source
    adapter = load_adapter(place)
    folder = None if place.startswith(("hub:", MERGE)) else _folder(Path(place))
    _check_files(place, adapter.source)
    making = _making(folder) if folder else {}
    recipe: Mapping[str, Any] = making.get("recipe", {})
    if place.startswith(MERGE):
        recipe = {"stage": "merge", "teachers": dict.fromkeys(place.removeprefix(MERGE).split("+"))}
    origin = adapter.source if place.startswith("hub:") else str(folder) if folder else None
    settings = _settings(origin)
    declared = settings.get("adapter_of") or recipe.get("base") or (folder and _declared(folder)) or ""
    family = _family(adapter, str(declared))
    before = there.settings if there and there.adapter_sha256 == adapter.sha256 else {}
    record, record_from = _record(spec, settings, origin, family, recipe, before)
    upstream = _upstream(recipe, making.get("file", RECIPE), {str(folder)})
    if place.startswith("hub:"):
        upstream = (Upstream(adapter.source, AGAIN, licence_of_repository(adapter.source)), *upstream)
    elif folder and (licence := licence_of_folder(folder)):
        upstream = (Upstream(folder.resolve().name, AGAIN, licence, folder), *upstream)
    return Subject(
        adapter,
        family,
        record,
        record_from,
        folder,
        without_places(recipe),
        without_places(making.get("run", {})),
        upstream,
    )


def _check_files(place: str, resolved: str) -> None:
    """Raises ``RequestError`` where a folder or repository holds two adapters by the two names of one."""
    from flowopd_eval.adapters import disagreement

    where = Path(place)
    if place.startswith("hub:"):
        where = fetch_files(resolved, ["*.safetensors", "adapter_config.json"])[0]
    if not place.startswith(MERGE) and where.is_dir() and (how := disagreement(where)):
        raise RequestError(f"{place}: {how}. Remove the one that is not meant, or name the file that is.")


def _settings(origin: str | None) -> Mapping[str, Any]:
    """What an earlier push left with the adapter; empty where there is nothing, or a saved pipeline's."""
    settings = settings_of(origin) if origin else {}
    return settings if "adapter_of" in settings else {}


def _known(source: str) -> ModelSpec | None:
    """The registry's entry of that name. Raises ``RequestError`` for a name of a family that has no adapter."""
    if source.partition(":")[0] not in FAMILIES:
        return None
    spec = resolve(source)
    if spec.adapter is None:
        raise RequestError(f"{source} is a backbone without an adapter: there is nothing to publish.")
    return spec


def _folder(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _making(folder: Path) -> dict[str, Any]:
    """What training or a merge left beside an adapter: ``recipe``, its ``file``, and ``run`` of one that ended."""
    run = folder.parent.parent if folder.parent.name == "snapshots" else folder.parent
    for place in (folder, run):
        if (place / RECIPE).is_file():
            made: dict[str, Any] = {"recipe": _read(place / RECIPE), "file": str(place / RECIPE)}
            finished = _read(place / "run.json") if (place / "run.json").is_file() else {}
            if folder.parent.name == "snapshots":
                return made | {"run": {"taken": f"on the way, {folder.name}"}}
            if "identity" in finished:
                return made | {"run": finished}
            return (
                made
                if made["recipe"].get("stage") == "merge"
                else made | {"run": {"taken": "before the run had ended"}}
            )
        if (place / _MERGE_REPORT).is_file():
            found = _read(place / _MERGE_REPORT)
            recipe = found.pop("recipe", {})
            return {"recipe": {"stage": "merge", **recipe}, "run": found, "file": str(place / _MERGE_REPORT)}
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise RequestError(f"{path} is no JSON ({error}): restore it, or move it away from the adapter.") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} should hold an object, but holds {type(found).__name__}.")
    return found


def _declared(folder: Path) -> str | None:
    """The backbone that PEFT's config names."""
    config = folder / "adapter_config.json"
    return _read(config).get("base_model_name_or_path") if config.is_file() else None


# ------------------------------------------------------------------------------------------------------- the backbone


def _family(adapter: Adapter, declared: str) -> Family:
    """The family whose backbone ``declared`` names, else the one whose every layer the adapter fits."""
    from flowopd_eval.adapters import check_adapter

    known = [f for f in FAMILIES.values() if declared in (f"{f.name}:base", f.base, f.base.removeprefix("hub:"))]
    if declared and not known:
        raise RequestError(
            f"The adapter says that it was made for {declared!r}; a card can name {', '.join(FAMILIES)}. Where that is "
            "one of them by another name, correct adapter_of in "
            f"{SETTINGS_FILE}, base in the recipe, or base_model_name_or_path in adapter_config.json."
        )
    refusals = []
    for family in known or FAMILIES.values():
        try:
            check_adapter(adapter, skeleton(family))
            return family
        except RequestError as error:
            refusals.append(f"{family.name}:base: {error}")
    raise RequestError("The adapter does not fit its backbone, and is not published.\n" + "\n".join(refusals))


def skeleton(family: Family) -> nn.Module:
    """The transformer of a family's backbone without its values."""
    import torch
    from diffusers import SD3Transformer2DModel

    config: Any = _SD35_TRANSFORMER
    if family.base.startswith("builtin:"):
        stored = json.loads((fetch_base(family.base) / "transformer" / "config.json").read_bytes())
        config = {key: value for key, value in stored.items() if not key.startswith("_")}
    with torch.device("meta"):
        return SD3Transformer2DModel(**config)


def _record(
    spec: ModelSpec | None,
    settings: Mapping[str, Any],
    origin: str | None,
    family: Family,
    recipe: Mapping[str, Any],
    before: Mapping[str, Any],
) -> tuple[SamplingRecord, str]:
    """The record it is drawn with, and where that was found: the nearest to the adapter itself counts."""
    if spec:
        return spec.record, f"the known name {spec.name}"
    if settings and origin:
        where = f"of {origin}" if origin.startswith("hub:") else "beside the adapter"
        return record_of(settings, origin), f"{SETTINGS_FILE} {where}"
    if before.get("adapter_of") == f"{family.name}:base":
        where = "the repository, as an earlier push of this adapter left it"
        return record_of(before, where), f"{SETTINGS_FILE} of {where}"
    guidance = recipe.get("guidance") or (recipe.get("rollout") or {}).get("guidance")
    if guidance:
        return replace(family.record, guidance=float(guidance)), f"the recipe's guidance and {family.base}'s usual"
    lacking = f"its recipe, of stage {recipe.get('stage')!r}, names no guidance" if recipe else "it has no recipe"
    return family.record, f"{family.base}'s usual, as no {SETTINGS_FILE} lies with the adapter, and {lacking}"


# ----------------------------------------------------------------------------------------------------------- upstream


def _upstream(recipe: Mapping[str, Any], file: str, seen: set[str]) -> tuple[Upstream, ...]:
    """The adapters on the Hub that a recipe starts from, merges or learns from; those of local ones' recipes too."""
    found: dict[str, Upstream] = {}
    for source, role in _sources(recipe):
        for place in _places(source):
            if place.startswith("hub:"):
                roles = f"{found[place].role}, {role}" if place in found else role
                found[place] = Upstream(place, roles, licence_of_repository(place))
            elif place not in seen:
                if not Path(place).exists():
                    raise RequestError(
                        f"{file} names {place!r} ({role}), which is not here, so nobody can tell what it was made "
                        f"from: push from the folder in which it was made, or correct {file}. Nothing was sent."
                    )
                seen.add(place)
                folder = _folder(Path(place))
                if licence := licence_of_folder(folder):
                    found[place] = Upstream(folder.resolve().name, role, licence, folder)
                further = _making(folder)
                theirs = _upstream(further.get("recipe", {}), further.get("file", RECIPE), seen)
                found |= {one.source: one for one in theirs}
    return tuple(found.values())


def _sources(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sources that a recipe names, each with what it gave."""
    teachers = recipe.get("teachers") or {}
    role = MERGED if recipe.get("stage") == "merge" else "teacher"
    named = [(str(one["source"]) if isinstance(one, Mapping) else str(name), role) for name, one in teachers.items()]
    pull, start = recipe.get("anchor"), str(recipe.get("start") or "none")
    named += [(str(pull["source"]), "anchor")] if isinstance(pull, Mapping) and pull.get("weight") else []
    return named + ([(start, STARTED)] if start not in ("none", "merge") else [])


def _places(source: str) -> list[str]:
    """Where the adapters of a recipe's source lie; none for a backbone."""
    if source.partition(":")[0] in FAMILIES:
        adapter = resolve(source).adapter
        return adapter.removeprefix(MERGE).split("+") if adapter else []
    return [] if source == "base" else [source]
