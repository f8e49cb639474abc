"""Keys of LoRA files: which layout they are in, and which tensor is whose A and B.

Layouts: PEFT (``base_model.model.X.lora_A.weight``, also with an adapter's name before ``weight``), diffusers
(``transformer.X.lora_A.weight``, or ``.lora.down.weight``), kohya (``lora_transformer_X.lora_down.weight``), and PEFT's
without its prefix (``X.lora_A.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import PackError, listing
from .sd3 import dotted

PEFT, DIFFUSERS, KOHYA, BARE = "base_model.model.", "transformer.", "lora_transformer_", ""
_KEY = re.compile(
    r"(?P<layout>base_model\.model\.|transformer\.|lora_transformer_|)(?P<module>.+?)"
    r"\.(?:alpha|(?:lora_(?P<new>A|B|down|up)|lora\.(?P<old>down|up))(?:\.(?P<adapter>[^.]+))?\.weight)"
)
_UNSUPPORTED = {
    "DoRA": r"lora_magnitude_vector|dora_scale",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT": r"\.oft_",
    "text-encoder LoRA": r"^(text_encoder(_\d)?\.|text_encoders\.|lora_te\d?_)",
    "LoRA with a bias": r"\.lora_(B|up)(\.[^.]+)?\.bias$",
    "LoRA in the original SD3 naming (fused q, k, v)": r"^(lora_unet_|diffusion_model\.|model\.diffusion_model\.)",
    "fully trained modules": r"modules_to_save|\.diff(_b)?$",
}


@dataclass(frozen=True)
class Sorted:
    """A file's keys in order: ``pairs[module]`` is A (r, in) and B (out, r) as stored; ``alphas`` stand in the file."""

    layout: str
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    alphas: Mapping[str, float]


def sort_keys(tensors: Mapping[str, torch.Tensor], name: str) -> Sorted:
    """Sort a file's tensors by module of the transformer.

    Raises:
        PackError: a kind that is not supported, keys of no layout or of several, a missing half, shapes that do not
            fit; with counts and names.
    """
    _refuse_kinds(tensors, name)
    matches = {key: _KEY.fullmatch(key) for key in tensors}
    parsed = {key: match for key, match in matches.items() if match is not None}
    strange = tensors.keys() - parsed.keys()
    if strange or not parsed:
        raise PackError(
            f"{name}: {len(strange)} of {len(tensors)} keys match no LoRA layout: {listing(strange)}. Expected keys of "
            "PEFT, diffusers or kohya."
        )
    layouts = sorted({match["layout"] for match in parsed.values()})
    adapters = sorted({match["adapter"] for match in parsed.values() if match["adapter"]})
    if len(layouts) > 1 or len(adapters) > 1:
        raise PackError(f"{name} mixes layouts {layouts} or adapters {adapters}; split it into one each.")
    modules = {key: match["module"] for key, match in parsed.items()}
    if layouts[0] == KOHYA:
        modules = _kohya_names(modules, name)
    a_side: dict[str, torch.Tensor] = {}
    b_side: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, match in parsed.items():
        side = match["new"] or match["old"]
        if side is None:
            if tensors[key].numel() != 1:
                raise PackError(f"{name}: {key} should hold one number, but holds {tensors[key].numel()}.")
            alphas[modules[key]] = float(tensors[key])
            continue
        half = a_side if side in ("A", "down") else b_side
        if modules[key] in half:
            raise PackError(f"{name}: {modules[key]} stands in it twice, the second time as {key}.")
        half[modules[key]] = tensors[key]
    _check_halves(a_side, b_side, alphas, name)
    return Sorted(layouts[0], {module: (a_side[module], b_side[module]) for module in sorted(a_side)}, alphas)


def _refuse_kinds(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    for kind, pattern in _UNSUPPORTED.items():
        keys = [key for key in tensors if re.search(pattern, key)]
        if keys:
            raise PackError(
                f"{name}: {kind} is not supported here ({len(keys)} of {len(tensors)} keys: {listing(keys)}). Only "
                "plain LoRA on the transformer's linear layers is; ComfyUI's own LoRA loader may take it."
            )


def _kohya_names(modules: Mapping[str, str], name: str) -> dict[str, str]:
    named = {key: dotted(flat) for key, flat in modules.items()}
    strange = [key for key, module in named.items() if module is None]
    if strange:
        raise PackError(f"{name}: {len(strange)} of {len(named)} keys match no layer of SD3: {listing(strange)}.")
    return {key: module for key, module in named.items() if module is not None}


def _check_halves(
    a_side: Mapping[str, torch.Tensor], b_side: Mapping[str, torch.Tensor], alphas: Mapping[str, float], name: str
) -> None:
    lonely = [f"{module}.lora_B" for module in a_side.keys() - b_side.keys()]
    lonely += [f"{module}.lora_A" for module in (b_side.keys() | alphas.keys()) - a_side.keys()]
    if lonely:
        raise PackError(f"{name}: {len(lonely)} halves are missing: {listing(lonely)}. The file is incomplete.")
    wrong = [
        f"{module} (A {tuple(a.shape)}, B {tuple(b_side[module].shape)})"
        for module, a in a_side.items()
        if a.ndim != 2 or b_side[module].ndim != 2 or a.shape[0] != b_side[module].shape[1] or not a.shape[0]
    ]
    if wrong:
        raise PackError(f"{name}: {len(wrong)} of {len(a_side)} modules are not A (r, in) and B (out, r): "
                        f"{listing(wrong)}.")  # fmt: skip
    whole = sorted({str(t.dtype) for side in (a_side, b_side) for t in side.values() if not t.is_floating_point()})
    if whole:
        raise PackError(f"{name} holds {', '.join(whole)}: it is quantised. Save it in fp16 where it was made.")
