"""LoRA files: every layout in, one baked layout out.

The public experts have r = 32 and alpha = 64, so a scale of 2 that stands only in ``adapter_config.json``. Loaders that
do not see it draw with half of the expert and say nothing. Hence: what is read here has its scale found or is refused,
and what is written has alpha / r multiplied into B, so that it has full strength wherever it is dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from flowopd_eval.adapters.adapter import Adapter, Factors, linear_modules, listing, targets
from flowopd_eval.download import fetch_files, list_files
from flowopd_eval.errors import RequestError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_HEADER = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY

KNOWN_ALPHAS: dict[str, float] = {}
"""Alpha of published files that do not say it themselves, by the sha256 of the file."""

_PEFT, _DIFFUSERS, _KOHYA, _BARE = "base_model.model.", "transformer.", "lora_transformer_", ""
_KEY = re.compile(
    rf"(?P<layout>{re.escape(_PEFT)}|{re.escape(_DIFFUSERS)}|{_KOHYA}|)(?P<module>.+?)"
    r"\.(?:alpha|(?:lora_(?P<new>A|B|down|up)|lora\.(?P<old>down|up))(?:\.(?P<adapter>[^.]+))?\.weight)"
)
# Layouts that mean alpha = r where they name no alpha: diffusers' `get_peft_kwargs`, sd-scripts' `LoRAModule`.
_UNSCALED = {
    _DIFFUSERS: "no alpha in the file: alpha = r, as diffusers takes it; say --alpha where it was trained with another",
    _KOHYA: "no alpha in the file: alpha = r, as sd-scripts takes it; say --alpha where it was trained with another",
}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNSUPPORTED_KEYS = {
    "DoRA": r"lora_magnitude_vector|dora_scale",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT": r"\.oft_",
    "text-encoder LoRA": r"^(text_encoder(_\d)?\.|text_encoders\.|lora_te\d?_)",
    "LoRA with a bias": r"\.lora_(B|up)(\.[^.]+)?\.bias$",
    "LoRA in the original SD3 naming (fused q, k, v)": r"^(lora_unet_|diffusion_model\.|model\.diffusion_model\.)",
    "fully trained modules": r"modules_to_save|\.diff(_b)?$",
}
_UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA with a bias",
    "modules_to_save": "fully trained modules",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
}
# These initialisations change the base's weights, so that the adapter alone means nothing.
_UNSUPPORTED_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
_DECLARED = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class _File:
    """An opened file: its tensors by key, its header, its hash, and the PEFT config beside it."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    header: Mapping[str, str]
    sha256: str
    config: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Scale:
    """``of(module, rank)`` is what ``B @ A`` is multiplied by; ``alpha`` and ``origin`` say where it comes from."""

    of: Callable[[str, int], float]
    alpha: float | None
    origin: str


def read_adapter(source: str | Path, *, alpha: float | None = None) -> Adapter:
    """Read a LoRA adapter for a diffusers transformer, with its scale inside B.

    Args:
        source: a ``.safetensors`` file, a folder, or ``hub:REPO@REVISION`` (without ``@REVISION``: the default branch).
            A folder or repository is read from ``adapter_model.safetensors`` with ``adapter_config.json``, else from
            ``pytorch_lora_weights.safetensors``. The keys may be PEFT's (``base_model.model.X.lora_A.weight``),
            diffusers' (``transformer.X.lora_A.weight`` or ``.lora.down.weight``) or kohya's
            (``lora_transformer_X.lora_down.weight``).
        alpha: the LoRA alpha, for a file that does not name it; it must agree with one that does.

    Raises:
        RequestError: no such file; a pickle; a truncated file; a kind that is not supported; keys that mean nothing; an
            incomplete pair; rank or targets that disagree with the config; no alpha to be found, or another one than
            was given; values that are not finite; ``lora_A`` or ``lora_B`` all zero.
    """
    path, resolved = _fetch(source) if str(source).startswith("hub:") else (Path(source), str(source))
    file = _open(_weights_file(path, resolved), resolved)
    _refuse_kinds(file)
    layout, sides, alphas = _sort_keys(file)
    config = _config(file, layout)
    _refuse_fields(config, file.name)
    _refuse_malformed(config, file.name)
    scale = _scale(file, layout, config, alphas, alpha)
    factors = {
        module: Factors(a.float().contiguous(), b.float() * scale.of(module, a.shape[0]))
        for module, (a, b) in sorted(sides.items())
    }
    if config:
        _check_ranks(config, factors, file.name)
        _check_targets(config, factors, file.name)
    _check_values(factors, file.name)
    declared = {name: config[name] for name in _DECLARED if config.get(name) is not None}
    return Adapter(
        factors, resolved, scale.alpha, scale.origin, file.sha256, declared, config.get("base_model_name_or_path")
    )


def disagreement(folder: Path) -> str | None:
    """In words, how the two adapter files of a folder differ in what they change; None where they do not, or one lacks.

    Other factors of the same product are no difference, nor is what rounding both factors to half precision does
    (bfloat16: 2^-8 of each value, a little over 2^-7 of a product; below float16's smallest normal number, its step
    of 2^-24).

    Raises:
        RequestError: as :func:`read_adapter`.
    """
    if not all((folder / name).is_file() for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)):
        return None
    peft, other = (read_adapter(folder / name).factors for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))
    both = f"{PEFT_WEIGHTS} and {DIFFUSERS_WEIGHTS}"
    if odd := peft.keys() ^ other.keys():
        return f"{both} differ: {len(odd)} modules are in one of them alone: {listing(odd)}"
    worst: tuple[float, str] | None = None
    for name, (a, b) in peft.items():
        a2, b2 = other[name]
        if torch.equal(a, a2) and torch.equal(b, b2):
            continue
        if (a.shape[1], b.shape[0]) != (a2.shape[1], b2.shape[0]):
            return f"{both} differ: {name} is of another shape"
        far = (b @ a - b2 @ a2).abs()
        allowed = 2**-6.9 * (b.abs() @ a.abs()) + 2**-24 * (a.abs().sum(0)[None] + b.abs().sum(1)[:, None])
        if (far > allowed).any():
            worst = max(worst or (0.0, ""), (float(far.max()), name))
    return worst and f"{both} differ: the change of {worst[1]} by up to {worst[0]:.3g}"


def _fetch(source: str | Path) -> tuple[Path, str]:
    """The local folder of a Hub repository's adapter files, and the source with the commit it was resolved to."""
    names = [PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS]
    folder, resolved = fetch_files(str(source), names)
    if not any((folder / name).is_file() for name in names[1:]):
        raise _no_weights(resolved, list_files(resolved))
    return folder, resolved


def _weights_file(path: Path, source: str) -> Path:
    if path.is_file():
        if path.suffix.lower() in _PICKLES:
            raise _pickled(path.name)
        return path
    if not path.is_dir():
        raise RequestError(f"No adapter at {source!r}: neither a file nor a folder. Write a repository as hub:REPO.")
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise _no_weights(source, [child.name for child in path.iterdir()])


def _no_weights(source: str, names: Iterable[str]) -> RequestError:
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        return _pickled(f"{source}: {listing(pickles)}")
    if "adapter" in (names := list(names)):
        return RequestError(f"{source!r} is a run of the training; what it has made is {source}/adapter.")
    return RequestError(
        f"{source!r} holds neither {PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}, but {listing(names) or 'nothing'}. "
        "Name the .safetensors file itself if it goes by another name."
    )


def _pickled(what: str) -> RequestError:
    return RequestError(
        f"{what} is a pickle, which can run code when it is opened, and is not read. Convert it where you trust it: "
        "`safetensors.torch.save_file(torch.load(path, weights_only=True), 'adapter_model.safetensors')`."
    )


def _open(path: Path, source: str) -> _File:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            header = file.metadata() or {}
    except SafetensorError as error:
        raise RequestError(f"{path} is truncated or no safetensors file ({error}). Fetch it again.") from error
    with path.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
    beside = path.parent / PEFT_CONFIG
    config = _parse(beside.read_bytes(), str(beside)) if beside.is_file() else None
    name = str(path) if not source.startswith("hub:") else f"{source}/{path.name}"
    return _File(name, tensors, header, digest, config)


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RequestError(f"{where} should hold an object, but holds {type(content).__name__}.")
    return content


def _refuse_kinds(file: _File) -> None:
    for kind, pattern in _UNSUPPORTED_KEYS.items():
        keys = [key for key in file.tensors if re.search(pattern, key)]
        if keys:
            raise RequestError(
                f"{file.name}: {kind} is not supported ({len(keys)} of {len(file.tensors)} keys: {listing(keys)}). "
                "Only plain LoRA on the transformer's linear layers is."
            )


def _sort_keys(file: _File) -> tuple[str, dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
    """The file's layout, its A and B by module, and its own alphas by module."""
    matches = {key: _KEY.fullmatch(key) for key in file.tensors}
    strange = [key for key, match in matches.items() if match is None]
    if strange or not matches:
        raise RequestError(
            f"{file.name}: {len(strange)} of {len(matches)} keys match no LoRA layout: {listing(strange)}. "
            "Expected PEFT, diffusers or kohya keys."
        )
    parsed = {key: match for key, match in matches.items() if match is not None}
    layouts = sorted({match["layout"] for match in parsed.values()})
    adapters = sorted({match["adapter"] for match in parsed.values() if match["adapter"]})
    if len(layouts) > 1 or len(adapters) > 1:
        raise RequestError(f"{file.name} mixes layouts {layouts} or adapters {adapters}; split it into one each.")
    named = _kohya_names(file, parsed) if layouts[0] == _KOHYA else {key: m["module"] for key, m in parsed.items()}
    a_side: dict[str, torch.Tensor] = {}
    b_side: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, match in parsed.items():
        side = match["new"] or match["old"]
        if side is None:
            if file.tensors[key].numel() != 1:
                raise RequestError(f"{file.name}: {key} should hold one number, but holds {file.tensors[key].numel()}.")
            alphas[named[key]] = float(file.tensors[key])
            continue
        half = a_side if side in ("A", "down") else b_side
        if named[key] in half:
            raise RequestError(f"{file.name}: {named[key]} stands in it twice, the second time as {key}.")
        half[named[key]] = file.tensors[key]
    lonely = [f"{name}.lora_B" for name in a_side.keys() - b_side.keys()]
    lonely += [f"{name}.lora_A" for name in (b_side.keys() | alphas.keys()) - a_side.keys()]
    if lonely:
        raise RequestError(f"{file.name}: {len(lonely)} halves are missing: {listing(lonely)}. The file is incomplete.")
    _check_shapes(a_side, b_side, file.name)
    return layouts[0], {name: (a_side[name], b_side[name]) for name in a_side}, alphas


def _check_shapes(a_side: Mapping[str, torch.Tensor], b_side: Mapping[str, torch.Tensor], name: str) -> None:
    pairs = [(module, tuple(a.shape), tuple(b_side[module].shape)) for module, a in a_side.items()]
    wrong = [f"{m} (A {a}, B {b})" for m, a, b in pairs if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]]
    if wrong:
        raise RequestError(
            f"{name}: {len(wrong)} of {len(pairs)} modules are not A (r, in) and B (out, r), r at least 1: "
            f"{listing(wrong)}."
        )
    whole = sorted({str(t.dtype) for side in (a_side, b_side) for t in side.values() if not t.is_floating_point()})
    if whole:
        raise RequestError(f"{name} holds {', '.join(whole)}: it is quantised. Save it in fp16 where it was made.")


def _kohya_names(file: _File, parsed: Mapping[str, re.Match[str]]) -> dict[str, str]:
    """kohya writes a module's dots as underscores; only the architecture tells which they were."""
    dotted = {}
    for key, match in parsed.items():
        block = re.fullmatch(r"transformer_blocks_(\d+)_(.+)", match["module"])
        flat = f"transformer_blocks_0_{block[2]}" if block else match["module"]
        name = _sd3_names().get(flat)
        if name is not None:
            dotted[key] = name.replace("blocks.0.", f"blocks.{block[1]}.", 1) if block else name
    strange = parsed.keys() - dotted.keys()
    if strange:
        raise RequestError(
            f"{file.name}: {len(strange)} of {len(parsed)} keys match no module of SD3: {listing(strange)}."
        )
    return dotted


@cache
def _sd3_names() -> dict[str, str]:
    """``transformer_blocks_0_attn_to_q`` -> ``transformer_blocks.0.attn.to_q``, for every linear layer SD3 can have."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=2, num_layers=2, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=2, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    return {name.replace(".", "_"): name for name in linear_modules(cast(nn.Module, model))}


def _config(file: _File, layout: str) -> Mapping[str, Any]:
    """PEFT's config of the adapter: in diffusers' header, or beside the file. Empty where there is none."""
    if DIFFUSERS_HEADER in file.header:
        raw = _parse(file.header[DIFFUSERS_HEADER], f"{file.name}: header {DIFFUSERS_HEADER}")
        return {key.removeprefix(_DIFFUSERS): value for key, value in raw.items()}
    # The config beside a file is PEFT's; diffusers and kohya files carry their own scale or none.
    return file.config or {} if layout in (_PEFT, _BARE) else {}


def _refuse_fields(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("peft_type") or "LORA")
    used = [what for key, what in _UNSUPPORTED_FIELDS.items() if config.get(key)]
    used += [kind] if kind != "LORA" else []
    init = str(config.get("init_lora_weights"))
    if init.lower().startswith(_UNSUPPORTED_INITS):
        used.append(f"the initialisation {init!r} (it changes the base)")
    if used:
        raise RequestError(f"{name}: {', '.join(used)} stands in its config and is not supported; only plain LoRA is.")


def _refuse_malformed(config: Mapping[str, Any], name: str) -> None:
    """Values of another kind than PEFT's, and patterns that are none."""
    patterns: list[str] = []
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, Mapping) or not all(isinstance(number, int | float) for number in value.values()):
            raise RequestError(f"{name}: {key} in its config should give patterns numbers, but is {value!r}.")
        patterns += value
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        if not (value is None or isinstance(value, str) or _are_texts(value)):
            raise RequestError(f"{name}: {key} in its config should be a text or a list of texts, but is {value!r}.")
        patterns += [value] if isinstance(value, str) else []
    base = config.get("base_model_name_or_path")
    if not (base is None or isinstance(base, str)):
        raise RequestError(f"{name}: base_model_name_or_path in its config should be a text, but is {base!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RequestError(f"{name}: {pattern!r} in its config is no regular expression: {error}.") from error


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _scale(
    file: _File, layout: str, config: Mapping[str, Any], alphas: Mapping[str, float], given: float | None
) -> _Scale:
    if alphas:
        alone = next(iter(alphas.values())) if len(set(alphas.values())) == 1 else None
        found = _Scale(lambda module, rank: alphas.get(module, rank) / rank, alone, "the `.alpha` keys of the file")
    elif config:
        found = _config_scale(config, file)
    elif given is not None:
        return _Scale(lambda module, rank: given / rank, given, "given by the caller")
    elif file.sha256 in KNOWN_ALPHAS:
        known = KNOWN_ALPHAS[file.sha256]
        found = _Scale(lambda module, rank: known / rank, known, "known of this published file")
    elif layout in _UNSCALED:
        return _Scale(lambda module, rank: 1.0, None, _UNSCALED[layout])
    else:
        raise RequestError(
            f"{file.name} has no {PEFT_CONFIG} beside it, and its scale alpha / r stands nowhere else. Put the config "
            "there, or give alpha (64 for the public experts of rank 32)."
        )
    if given is not None and given != found.alpha:
        raise RequestError(f"alpha {given:g} was given for {file.name}, but {found.origin} says {found.alpha}.")
    return found


def _config_scale(config: Mapping[str, Any], file: _File) -> _Scale:
    from peft.utils.other import get_pattern_key

    missing = [name for name in ("r", "lora_alpha") if not isinstance(config.get(name), int | float)]
    if missing:
        raise RequestError(f"{file.name}: its config does not say {' nor '.join(missing)}, so its scale is unknown.")
    pattern = config.get("alpha_pattern") or {}
    root = math.sqrt if config.get("use_rslora") else float

    def of(module: str, rank: int) -> float:
        return float(pattern.get(get_pattern_key(list(pattern), module), config["lora_alpha"]) / root(rank))

    origin = f"the header's {DIFFUSERS_HEADER}" if DIFFUSERS_HEADER in file.header else PEFT_CONFIG
    return _Scale(of, None if pattern else float(config["lora_alpha"]), origin)


def _check_ranks(config: Mapping[str, Any], factors: Mapping[str, Factors], name: str) -> None:
    from peft.utils.other import get_pattern_key

    pattern = config.get("rank_pattern") or {}
    declared = {module: pattern.get(get_pattern_key(list(pattern), module), config.get("r")) for module in factors}
    wrong = {module: f.rank for module, f in factors.items() if f.rank != declared[module]}
    if wrong:
        raise RequestError(
            f"{name}: the rank of {len(wrong)} of {len(factors)} modules is {sorted(set(wrong.values()))}, but the "
            f"config says r = {config.get('r')}: {listing(wrong)}."
        )


def _check_targets(config: Mapping[str, Any], factors: Mapping[str, Factors], name: str) -> None:
    declared = {key: config[key] for key in _DECLARED if config.get(key) is not None}
    if "target_modules" not in declared:
        raise RequestError(f"{name}: its config names no target_modules.")
    extra = factors.keys() - targets(declared, factors)
    if extra:
        raise RequestError(f"{name}: {len(extra)} modules are not among the config's targets: {listing(extra)}.")
    wanted = declared["target_modules"]
    idle = [] if isinstance(wanted, str) else [t for t in wanted if not targets({"target_modules": [t]}, factors)]
    if idle:
        raise RequestError(
            f"{name}: {len(idle)} of the config's {len(wanted)} targets have no module in the file: {listing(idle)}. "
            "The file is incomplete."
        )


def _check_values(factors: Mapping[str, Factors], name: str) -> None:
    broken = [module for module, f in factors.items() if not (f.A.isfinite().all() and f.B.isfinite().all())]
    if broken:
        raise RequestError(f"{name}: NaN or infinity in {len(broken)} of {len(factors)} modules: {listing(broken)}.")
    zero = {module for module, f in factors.items() if not (f.A.any() and f.B.any())}
    if zero - _untrainable(factors):
        raise RequestError(
            f"{name}: lora_A or lora_B is all zero in {len(zero)} of {len(factors)} modules: {listing(zero)}. There "
            "the adapter is the base: it was saved before training, or in part."
        )


def _untrainable(modules: Iterable[str]) -> set[str]:
    """SD3's last block throws its text stream away, so the text queries there never get a gradient: B stays zero."""
    blocks = [re.search(r"(?:^|\.)transformer_blocks\.(\d+)\.", module) for module in modules]
    last = max((int(block[1]) for block in blocks if block), default=0)
    return {f"transformer_blocks.{last}.attn.add_q_proj"}


def write_adapter(
    adapter: Adapter, folder: str | Path, *, base_model: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write ``adapter`` so that any reader has its full strength: alpha / r is inside B, and alpha = r besides.

    ``pytorch_lora_weights.safetensors`` (``transformer.*`` keys; diffusers, ComfyUI) and a PEFT directory
    (``adapter_model.safetensors`` with ``adapter_config.json``). The bytes depend on the adapter alone; each file
    is whole or absent.

    Args:
        adapter: what to write.
        folder: made if need be; other files in it stay.
        base_model: the backbone's repository, for the config.
        dtype: of the tensors (default: fp32).

    Raises:
        RequestError: ``folder`` cannot be made.
    """
    from safetensors.torch import save

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be a folder ({error.strerror}): name one to write into.") from error
    # One key only: safetensors writes a longer header in no fixed order.
    for name, prefix in ((DIFFUSERS_WEIGHTS, _DIFFUSERS), (PEFT_WEIGHTS, _PEFT)):
        tensors = {
            f"{prefix}{module}.lora_{side}.weight": tensor.detach().to("cpu", dtype or torch.float32).contiguous()
            for module, factors in adapter.factors.items()
            for side, tensor in zip("AB", factors, strict=True)
        }
        _replace(folder / name, save(tensors, metadata={"format": "pt"}))
    config = json.dumps(_baked_config(adapter, base_model), indent=2, sort_keys=True) + "\n"
    _replace(folder / PEFT_CONFIG, config.encode())


def _baked_config(adapter: Adapter, base_model: str | None) -> dict[str, Any]:
    ranks = {name: factors.rank for name, factors in sorted(adapter.factors.items())}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "r": usual,
        "rank_pattern": others,
        "target_modules": list(ranks),
        "task_type": None,
    }


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
