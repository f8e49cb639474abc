"""Recipes: small TOML files, read into typed and validated settings."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class _Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int = Field(0, ge=0, description="Decides scenes, noise and initial weights.")
    out: str = Field(description="Folder of checkpoints and logs, relative to where the command runs.")


class PretrainConfig(_Stage):
    """The miniature's base (see :mod:`training.pretrain`)."""

    stage: Literal["pretrain"]
    samples: int = Field(gt=0, description="Pictures to see in all.")
    init: str | None = Field(None, description="Folder of a miniature to go on from where there is no checkpoint.")
    init_samples: int = Field(0, ge=0, description="Pictures that `init` has seen.")
    batch_size: int = Field(64, gt=0)
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's, for all that Muon does not train.")
    matrix_learning_rate: float = Field(2e-3, gt=0, description="Muon's, for the matrices in the transformer's blocks.")
    warmup_samples: int = Field(6_400, gt=0)
    cooldown: float = Field(0.25, gt=0, le=1, description="Share of the samples over which the rate falls to zero.")
    ema: float = Field(0.9995, gt=0, lt=1)
    text_dropout: float = Field(0.1, ge=0, le=1)
    sigma_mean: float = Field(0.0, description="Mean of the logit-normal noise level.")
    sigma_std: float = Field(1.0, gt=0)
    compile: bool = True
    log_every: int = Field(50, gt=0)
    strip_every: int = Field(1000, gt=0)
    save_minutes: float = Field(4.0, gt=0)


class AutoencoderConfig(_Stage):
    """The miniature's autoencoder (see :mod:`training.autoencoder`)."""

    stage: Literal["autoencoder"]
    half: Literal["encoder", "decoder"]
    samples: int = Field(gt=0, description="Pictures to see in all.")
    batch_size: int = Field(16, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    noise: float = Field(0.3, ge=0, description="Largest standard deviation of the noise the decoder sees.")
    log_every: int = Field(50, gt=0)
    save_minutes: float = Field(4.0, gt=0)


Config = PretrainConfig | AutoencoderConfig
Recipe = Annotated[Config, Field(discriminator="stage")]


def load_recipe(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe and apply ``key=value`` overrides (values are TOML, a bare word is a string).

    Raises:
        ValueError: names the file, each wrong key and what was expected.
    """
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for item in overrides or []:
        key, separator, text = item.partition("=")
        if not separator:
            raise ValueError(f"--set {item}: expected key=value.")
        try:
            values[key] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        ]
        raise ValueError(f"{path} is not a valid recipe:\n" + "\n".join(lines)) from None
