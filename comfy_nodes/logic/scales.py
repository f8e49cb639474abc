"""The scale alpha / r by which a file's ``B @ A`` is multiplied, and where it stands.

The published experts have r = 32 and alpha = 64: a scale of 2 that stands only in ``adapter_config.json``. A loader
that does not see it draws with half of the expert and says nothing; here a scale is found or the file is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import PackError, listing
from .layouts import BARE, DIFFUSERS, KOHYA, PEFT, Sorted

CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"  # diffusers writes PEFT's config there
KNOWN_ALPHAS: dict[str, float] = {}
"""Alpha of published files that do not say it themselves, by the sha256 of the file."""

_UNSCALED = {DIFFUSERS: "none in the file: alpha = r, as diffusers takes it", KOHYA: "none in the file: alpha = r"}
_UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA with a bias",
    "modules_to_save": "fully trained modules",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
}
_UNSUPPORTED_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")  # they change the base's weights


@dataclass(frozen=True)
class Scale:
    """``of(module, rank)`` is what ``B @ A`` is multiplied by; ``alpha`` (None: it differs) and ``origin`` are told."""

    of: Callable[[str, int], float]
    alpha: float | None
    origin: str


def find_scale(keys: Sorted, header: Mapping[str, str], beside: str | None, sha256: str, name: str) -> Scale:
    """The scale of a file.

    Args:
        keys: its sorted keys.
        header: the file's own metadata.
        beside: text of the ``adapter_config.json`` in the same folder; None: there is none.
        sha256: of the file.
        name: of the file, for messages.

    Raises:
        PackError: the config is no config of plain LoRA, disagrees with the file, or no scale is to be found.
    """
    config = _config(keys.layout, header, beside, name)
    _refuse_fields(config, name)
    _check_against(config, keys, name)
    if keys.alphas:
        alphas = keys.alphas
        alone = next(iter(alphas.values())) if len(set(alphas.values())) == 1 else None
        return Scale(lambda module, rank: alphas.get(module, rank) / rank, alone, "the file's .alpha keys")
    if config:
        return _config_scale(config, f"the header's {HEADER}" if HEADER in header else CONFIG, name)
    if sha256 in KNOWN_ALPHAS:
        known = KNOWN_ALPHAS[sha256]
        return Scale(lambda module, rank: known / rank, known, "known of this published file")
    if keys.layout in _UNSCALED:
        return Scale(lambda module, rank: 1.0, None, _UNSCALED[keys.layout])
    raise PackError(
        f"{name} is a bare PEFT file: its scale alpha / r stands only in the {CONFIG} of its repository. Put that file "
        "into the same folder, or write a file with the scale inside: `flowopd-eval convert FILE --out FOLDER` "
        "(python -m pip install 'flowopd-eval @ file:///PATH/TO/CHECKOUT'). Loaded as it is, it might have half "
        "of its strength."
    )


def _config(layout: str, header: Mapping[str, str], beside: str | None, name: str) -> Mapping[str, Any]:
    if HEADER in header:
        found = _parse(header[HEADER], f"{name}: header {HEADER}")
        return {key.removeprefix(DIFFUSERS): value for key, value in found.items()}
    # A config beside a file is PEFT's; files of diffusers and kohya carry their own scale or none.
    return _parse(beside, f"{CONFIG} beside {name}") if beside is not None and layout in (PEFT, BARE) else {}


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackError(f"{where} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise PackError(f"{where} should hold an object, but holds {type(found).__name__}.")
    return found


def _refuse_fields(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("peft_type") or "LORA")
    used = [what for field, what in _UNSUPPORTED_FIELDS.items() if config.get(field)]
    used += [kind] if kind != "LORA" else []
    init = str(config.get("init_lora_weights"))
    if init.lower().startswith(_UNSUPPORTED_INITS):
        used.append(f"the initialisation {init!r} (it changes the base)")
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not isinstance(pattern, Mapping) or not all(isinstance(number, int | float) for number in pattern.values()):
            raise PackError(f"{name}: {field} in its config should give patterns numbers, but is {pattern!r}.")
        for one in pattern:
            try:
                re.compile(one)
            except re.error as error:
                raise PackError(f"{name}: {one!r} in its config is no regular expression: {error}.") from error
    if used:
        raise PackError(f"{name}: its config says {', '.join(used)}, which is not supported; only plain LoRA is.")


def _check_against(config: Mapping[str, Any], keys: Sorted, name: str) -> None:
    """A config beside a file may be another file's: rank and modules must agree."""
    if not config:
        return
    missing = [field for field in ("r", "lora_alpha") if not isinstance(config.get(field), int | float)]
    if missing:
        raise PackError(f"{name}: its config does not say {' nor '.join(missing)}, so its scale is unknown.")
    ranks = config.get("rank_pattern") or {}
    other = [m for m, (a, _) in keys.pairs.items() if a.shape[0] != ranks.get(_pattern(ranks, m), config["r"])]
    if other:
        raise PackError(
            f"{name}: {len(other)} of {len(keys.pairs)} modules have another rank than its config's r = "
            f"{config['r']}: {listing(other)}. Is the {CONFIG} beside it another file's?"
        )
    targets = config.get("target_modules")
    if isinstance(targets, list):
        extra = [m for m in keys.pairs if not any(m == t or m.endswith(f".{t}") for t in targets)]
        if extra:
            raise PackError(
                f"{name}: {len(extra)} of {len(keys.pairs)} modules are not among its config's targets: "
                f"{listing(extra)}. Is the {CONFIG} beside it another file's?"
            )


def _config_scale(config: Mapping[str, Any], origin: str, name: str) -> Scale:
    alphas = config.get("alpha_pattern") or {}
    root = math.sqrt if config.get("use_rslora") else float

    def of(module: str, rank: int) -> float:
        return float(alphas.get(_pattern(alphas, module), config["lora_alpha"]) / root(rank))

    return Scale(of, None if alphas else float(config["lora_alpha"]), origin)


def _pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first of PEFT's patterns that names ``module`` (``peft.utils.other.get_pattern_key``)."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
