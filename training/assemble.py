"""Put the miniature together from the checkpoints of its three stages, as a diffusers folder.

    python -m training.assemble [--out flowopd_eval/tiny/weights]
    python -m training.assemble --experts geneval=FOLDER …   # adapters, into flowopd_eval/tiny/experts instead

Weights are stored in fp16 (the wheel stays small) and drawn with in fp32. The folder is what stock diffusers loads as
``StableDiffusion3Pipeline(text_encoder_3=None, tokenizer_3=None)``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel

from flowopd_eval.adapters import read_adapter, write_adapter
from flowopd_eval.models import TINY_RECORD
from flowopd_eval.tiny.vocabulary import build_tokenizer
from training.autoencoder import build_autoencoder
from training.pretrain import Base
from training.state import load_checkpoint


def load_stage(folder: Path) -> dict:
    """The checkpoint of a stage.

    Raises:
        FileNotFoundError: the stage has not been run.
    """
    state = load_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint; run `python -m training` with its recipe first.")
    return state


def assemble(train: Path, out: Path) -> dict:
    """Write the miniature's folder from ``train``'s stages; returns what is recorded about it."""
    state = load_stage(train / "tiny_base")
    model = Base()
    model.load_state_dict(state["model"])
    ema = EMAModel(model.parameters())
    ema.load_state_dict(state["ema"])
    ema.copy_to(model.parameters())
    vae = build_autoencoder()
    provenance = {"tiny_base": {"step": state["step"]}}
    for half in ("encoder", "decoder"):
        if (half_state := load_checkpoint(train / f"tiny_{half}")) is None:
            print(f"No checkpoint of the {half}: it stays untrained.")
            continue
        prefix = f"{half}."
        weights = {k.removeprefix(prefix): v for k, v in half_state["model"].items() if k.startswith(prefix)}
        vae.get_submodule(half).load_state_dict(weights)
        provenance[f"tiny_{half}"] = {"step": half_state["step"]}
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TINY_RECORD.shift),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    if out.exists():
        shutil.rmtree(out)
    pipeline.to(torch.float16).save_pretrained(out)
    logs = {stage: (train / stage / "log.jsonl").read_text().splitlines() for stage in provenance}
    for stage, lines in logs.items():
        provenance[stage]["log_end"] = json.loads(lines[-1])
    return provenance


def ship(name: str, source: Path, experts: Path) -> Path:
    """Write the adapter ``source`` as ``experts/name``: a PEFT folder in fp16, so that the wheel stays small."""
    target = experts / name
    with TemporaryDirectory() as made:
        write_adapter(read_adapter(source), made, base_model="tiny:base", dtype=torch.float16)
        target.mkdir(parents=True, exist_ok=True)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(Path(made) / file, target / file)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, default=Path("runs/train"))
    parser.add_argument("--out", type=Path, default=Path("flowopd_eval/tiny/weights"))
    parser.add_argument("--experts", nargs="+", metavar="NAME=FOLDER", help="adapters to ship")
    arguments = parser.parse_args()
    if arguments.experts:
        for name, _, source in (text.partition("=") for text in arguments.experts):
            print(ship(name, Path(source), arguments.out.parent / "experts"))
        return
    print(json.dumps(assemble(arguments.train, arguments.out), indent=2))


if __name__ == "__main__":
    main()
