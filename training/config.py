"""Recipes: small TOML files, read into typed and validated settings.

Every stage of ``python -m training RECIPE`` has its class here, beside the parts they share. A wrong key, a value out
of range or a pair that cannot work together is refused before anything is loaded, with what would be right.
"""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

ATTENTION = [
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Stage(_Part):
    seed: int = Field(0, ge=0, description="Decides prompts, noise and initial weights.")
    out: str = Field(description="Folder of checkpoints and logs, relative to where the command runs.")


# --- the miniature's own stages --------------------------------------------------------------------------------------
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
    sign_share: float = Field(0.2, ge=0, le=1, description="Share of signs among the scenes.")
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


# --- parts of the stages that train an adapter -----------------------------------------------------------------------
class Task(_Part):
    """Prompts of one kind: how many of a batch, who teaches them, what rewards them."""

    name: str
    prompts: str = Field(description="A prompt file, or `builtin:shapes` or `builtin:signs` of the miniature.")
    share: float = Field(1.0, gt=0, description="Weight of this task among the samples of a batch.")
    balance: Literal["tags", "prompts"] = Field(
        "tags", description="tags: the prompts' own tasks take turns; prompts: all prompts of the file alike."
    )
    held_out: int = Field(64, ge=0, description="Prompts kept from training, for `check`; 0 for builtin prompts.")
    teacher: str | None = Field(None, description="One of [teachers]; needed by `distill` and `sft`.")
    rewards: dict[str, float] = Field(
        default_factory=dict,
        description="Reward -> weight; needed by `grpo` and `nft`, and by `check` to judge the teacher.",
    )

    @field_validator("rewards")
    @classmethod
    def _some_weight(cls, value: dict[str, float]) -> dict[str, float]:
        if value and not any(value.values()):
            raise ValueError("all weights are 0, so that nothing is rewarded")
        return value


class Teacher(_Part):
    """One frozen expert: an adapter, or a whole model at the price of a copy of the backbone."""

    source: str = Field(description="An adapter (folder, file, hub:REPO@REV), a model such as tiny:ocr, or `base`.")
    guidance: float | None = Field(None, gt=0, description="Where its record differs from the student's.")
    text_length: int | None = Field(None, ge=0, description="In T5 tokens, where its record differs.")


class Anchor(Teacher):
    """Manifold Anchor Regularization: ``weight`` is lambda (0.02 in the paper's v5, 0.04 in the public code)."""

    weight: float = Field(0.02, ge=0)
    every: int = Field(
        1, gt=0, description="A sample is held to the anchor at one step of so many, with as many times the weight."
    )


class Lora(_Part):
    """The student's adapter."""

    rank: int = Field(32, gt=0)
    alpha: float = Field(64.0, gt=0, description="The change is alpha / rank * B A.")
    target_modules: list[str] = Field(default_factory=lambda: list(ATTENTION), min_length=1)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(_Part):
    """AdamW with the settings of record, and the weights' moving average."""

    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Of the learning rate after the warm-up; linear and cosine fall to zero at the end."
    )
    ema: float = Field(0.9, ge=0, lt=1, description="Decay of the average; the n-th update's is at most n / (9 + n).")
    ema_every: int = Field(8, gt=0, description="Steps of the run between two updates of the average.")


class Rollout(_Part):
    """How trajectories are drawn, and on which of their steps the student is trained."""

    steps: int = Field(10, gt=0, description="T.")
    sampler: Literal["sde", "cps", "ode"] = "sde"
    a: float = Field(0.7, ge=0, description="Noise level of sde and cps.")
    guidance: float | None = Field(None, gt=0, description="None: the sampling record's.")
    window: int | None = Field(None, gt=0, description="Trained steps a sample, drawn per sample; None: all.")
    window_range: tuple[int, int] | None = Field(None, description="Steps from, and up to but not with, drawn from.")

    @property
    def trainable(self) -> int:
        """Steps from the first that have a density or, on the ODE, a weight: all but the last of cps."""
        return self.steps - 1 if self.sampler == "cps" else self.steps

    @property
    def bounds(self) -> tuple[int, int]:
        """Where windows are drawn."""
        return self.window_range or (0, self.trainable)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sampler == "cps" and self.a > 1:
            raise ValueError(f"cps takes a noise level of at most 1, but a is {self.a}.")
        if self.sampler != "ode" and self.a == 0:
            raise ValueError(f"{self.sampler} with a = 0 is deterministic; say sampler = 'ode'.")
        low, high = self.bounds
        if not 0 <= low < high <= self.trainable:
            raise ValueError(
                f"window_range {self.window_range} is not within steps 0..{self.trainable} (the last step of cps is "
                "deterministic and cannot be trained)."
            )
        if self.window_range and self.window is None:
            raise ValueError("window_range says where `window` is drawn; give `window` too.")
        if self.window and self.window > high - low:
            raise ValueError(f"A window of {self.window} steps does not fit into steps {low}..{high}.")
        return self


class _Trained(_Stage):
    """What the stages that train an adapter on a frozen backbone have in common."""

    base: str = Field(description="The backbone: tiny:base, flow-opd:base, a folder, hub:REPO@REV.")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="None: the sampling record's.")
    storage: Literal["float8"] | None = Field(
        None, description="float8: the backbone's large weights lie in fp8 (e4m3) and are computed with in `dtype`."
    )
    start: str = Field("none", description="none, merge (of the teachers), or an adapter to go on from.")
    steps: int = Field(gt=0, description="Optimiser steps (`grpo`, `nft`: batches of samples.)")
    batch_size: int = Field(gt=0, description="Samples a step, over all processes.")
    micro_batch: int = Field(gt=0, description="Samples a forward.")
    tasks: list[Task] = Field(min_length=1)
    teachers: dict[str, Teacher] = Field(default_factory=dict)
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    gradient_checkpointing: bool = False
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    cache: str = Field("runs/cache/embeddings", description="Where text embeddings are kept.")
    log_every: int = Field(1, gt=0)
    strip_every: int = Field(50, ge=0, description="Steps between two strips of pictures; 0 for none.")
    strip_prompts: int = Field(6, gt=0)
    save_minutes: float = Field(5.0, ge=0)
    keep: int = Field(2, gt=0, description="Checkpoints on the disk.")
    snapshot_every: int = Field(0, ge=0, description="Steps between adapters that are kept, to score later; 0: none.")
    patience: int = Field(20, gt=0, description="Steps that zero gradients or rewards without variance may last.")

    @property
    def group(self) -> int:
        """Samples a prompt."""
        return 1

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"Task names must differ, but got {', '.join(names)}.")
        if self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}.")
        if self.micro_batch % self.group:
            raise ValueError(f"micro_batch {self.micro_batch} is no multiple of group {self.group}.")
        for name in ("student", "anchor"):
            if name in self.teachers:
                raise ValueError(f"No teacher can be called {name!r}: that name has a meaning of its own here.")
        known = ", ".join(self.teachers) or "none"
        for task in self.tasks:
            if task.teacher is not None and task.teacher not in self.teachers:
                raise ValueError(
                    f"Task {task.name!r} names the teacher {task.teacher!r}; [teachers] has: {known}. "
                    f"Add [teachers.{task.teacher}] or change the task."
                )
        if self.start == "merge" and not self.teachers:
            raise ValueError("start = 'merge' merges the teachers, but there are no [teachers].")
        return self

    def _needs_teachers(self) -> None:
        known = ", ".join(self.teachers) or "none"
        for task in self.tasks:
            if task.teacher is None:
                raise ValueError(f"Task {task.name!r} has no teacher; give it `teacher = …`, one of: {known}.")
        idle = set(self.teachers) - {task.teacher for task in self.tasks}
        if idle:
            raise ValueError(f"No task is routed to {', '.join(sorted(idle))}; remove it or give it a task.")


# --- the stages ------------------------------------------------------------------------------------------------------
class DistillConfig(_Trained):
    """Flow-OPD (see :mod:`training.distill`)."""

    stage: Literal["distill"]
    objective: Literal["direct", "ode", "policy_gradient"] = "direct"
    parameters: Literal["lora", "full"] = Field(
        "lora", description="full: all of the student's weights, sharded over the processes (see training.sharded)."
    )
    kl_weight: Literal["transition", "flow-opd-code", "velocity", "euler"] = "transition"
    group_size: int = Field(1, gt=0, description="Samples a prompt; policy_gradient needs two or more.")
    advantage: Literal["leave_one_out", "normalised"] = Field("leave_one_out", description="policy_gradient only.")
    clip: float | None = Field(None, gt=0, description="policy_gradient: PPO's clip of the ratio; None is unclipped.")
    rollout: Rollout = Rollout()
    anchor: Anchor | None = None

    @property
    def pull(self) -> Anchor | None:
        """The anchor if it has a weight."""
        return self.anchor if self.anchor is not None and self.anchor.weight else None

    @property
    def group(self) -> int:
        """Samples a prompt."""
        return self.group_size

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        self._needs_teachers()
        sampler, weight = self.rollout.sampler, self.kl_weight
        if self.storage and self.parameters == "full":
            raise ValueError(
                "storage = 'float8' rounds weights that stay as they are; with parameters = 'full' leave it."
            )
        if self.objective == "ode" and sampler != "ode":
            raise ValueError(f"objective = 'ode' takes its states from the ODE; set rollout.sampler (now {sampler!r}).")
        if self.objective == "policy_gradient" and sampler == "ode":
            raise ValueError("policy_gradient needs transitions with a density; set rollout.sampler to sde or cps.")
        if self.objective == "policy_gradient" and self.group_size < 2:
            raise ValueError(f"policy_gradient compares samples of one prompt; group_size is {self.group_size}.")
        if weight == "transition" and sampler == "ode":
            raise ValueError("An ODE step has no density, so no `transition` weight; use euler or velocity.")
        if weight == "flow-opd-code" and sampler != "sde":
            raise ValueError("flow-opd-code is the public code's weight of the SDE; use rollout.sampler = 'sde'.")
        return self


class SFTConfig(_Trained):
    """The cold start by fine-tuning on the teachers' pictures (see :mod:`training.coldstart`)."""

    stage: Literal["sft"]
    pictures: int = Field(gt=0, description="Pictures of the routed teachers to train on, drawn once.")
    picture_steps: int = Field(20, gt=0, description="Euler steps of those pictures.")
    best_of: int = Field(1, gt=0, description="Candidates for each picture: the one with the highest reward is kept.")
    least_reward: float | None = Field(None, description="Kept pictures with less reward are not trained on.")
    text_dropout: float = Field(0.1, ge=0, le=1)
    sigma_mean: float = Field(
        1.1, description="Of the noise level's logit; ln 3 is that of a shift of 3 (Flow-GRPO's SFT)."
    )
    sigma_std: float = Field(1.0, gt=0)

    @property
    def group(self) -> int:
        """Candidates side by side."""
        return self.best_of

    @property
    def judged(self) -> bool:
        """Whether rewards decide which pictures are trained on."""
        return self.best_of > 1 or self.least_reward is not None

    @model_validator(mode="after")
    def _taught(self) -> Self:
        self._needs_teachers()
        for task in self.tasks:
            if self.judged and not task.rewards:
                raise ValueError(f"best_of and least_reward need rewards; task {task.name!r} has none.")
        return self


class _Rewarded(_Trained):
    """What the stages that learn from rewards have in common: groups of samples of one prompt."""

    group_size: int = Field(16, gt=1, description="G: samples a prompt.")
    std: Literal["batch", "group", "none"] = Field("batch", description="What advantages are divided by.")

    @property
    def group(self) -> int:
        """Samples a prompt."""
        return self.group_size

    @model_validator(mode="after")
    def _rewarded(self) -> Self:
        for task in self.tasks:
            if not task.rewards:
                raise ValueError(f"Task {task.name!r} has no rewards; give it `rewards = {{ocr = 1.0}}` or others.")
        return self


class GRPOConfig(_Rewarded):
    """Flow-GRPO on one reward, or on several at once (GRPO-Mix) (see :mod:`training.grpo`)."""

    stage: Literal["grpo"]
    rollout: Rollout = Rollout()
    trust: Literal["clip", "dppo"] = "clip"
    clip: float = Field(1e-4, gt=0, description="Of the ratio of mean log-probabilities.")
    tau: float = Field(1e-5, gt=0, description="dppo: largest transition KL to the policy that drew the sample.")
    beta: float = Field(0.0, ge=0, description="Weight of the transition KL to the base.")
    updates: int = Field(1, gt=0, description="Optimiser steps for each batch of rollouts.")
    shared_noise: bool = Field(False, description="One starting noise for all samples of a prompt.")

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps * self.updates

    @model_validator(mode="after")
    def _dense(self) -> Self:
        if self.rollout.sampler == "ode":
            raise ValueError("GRPO needs transitions with a density; set rollout.sampler to sde or cps.")
        if (self.batch_size // self.micro_batch) % self.updates:
            raise ValueError(f"{self.batch_size // self.micro_batch} micro batches do not make {self.updates} updates.")
        return self


class NFTConfig(_Rewarded):
    """DiffusionNFT on one reward, or on several at once (see :mod:`training.nft`)."""

    stage: Literal["nft"]
    picture_steps: int = Field(10, gt=1, description="Steps of the pictures.")
    solver: Literal["euler", "two-step"] = Field(
        "two-step", description="Of the pictures (see training.rollout.solve)."
    )
    guidance: float = Field(1.0, gt=0, description="For drawing and training; 1 is without guidance, as in the paper.")
    updates: int = Field(2, gt=0, description="Optimiser steps on each batch, each with noise drawn anew.")
    beta: float = Field(1.0, gt=0, description="How strongly the old policy pulls back.")
    base_weight: float = Field(0.0, ge=0, description="Weight of the squared distance to the base's velocity.")
    advantage_clip: float = Field(2.0, gt=0, description="Advantage from which a picture counts as altogether good.")
    sigma_mean: float = Field(0.0, description="Mean of the logit-normal noise level.")
    sigma_std: float = Field(1.0, gt=0)

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps * self.updates


class MergeConfig(_Stage):
    """One adapter out of several, without training (see :mod:`training.coldstart`)."""

    stage: Literal["merge"]
    base: str
    teachers: dict[str, float] = Field(min_length=1, description="Adapter source or model -> weight.")
    rank: int | None = Field(None, gt=0)
    method: Literal["exact", "factors"] = "exact"


Trained = DistillConfig | SFTConfig | GRPOConfig | NFTConfig
Config = PretrainConfig | AutoencoderConfig | DistillConfig | SFTConfig | GRPOConfig | NFTConfig | MergeConfig
_STAGES: dict[str, type[Config]] = {get_args(one.model_fields["stage"].annotation)[0]: one for one in get_args(Config)}
_RECIPE: TypeAdapter[Config] = TypeAdapter(Annotated[Config, Field(discriminator="stage")])


RECIPES = Path(__file__).parent / "recipes"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe and apply ``key=value`` overrides (``rollout.steps=5``; values are TOML, a bare word is a string).

    Raises:
        ValueError: names the file, each wrong key and what was expected.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        ours = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise ValueError(
            f"There is no recipe {path} to read ({error.strerror}). Those in training/recipes: {ours}."
        ) from None
    for item in overrides or []:
        _override(values, item)
    try:
        return _RECIPE.validate_python(values)
    except ValidationError as error:
        lines = [f"  {_explained(e, values)}{_got(e)}" for e in error.errors()]
        raise ValueError(f"{path} is not a valid recipe:\n" + "\n".join(lines)) from None


def _override(values: dict[str, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator:
        raise ValueError(f"--set {item}: expected key=value.")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    table: Any = values
    try:
        for name in tables:  # `tasks.0.share=2` reaches into a list
            table = table[int(name)] if isinstance(table, list) else table.setdefault(name, {})
        table[int(last) if isinstance(table, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ValueError(f"--set {item}: the recipe has no place {key}; lists are counted from 0.") from None


def _explained(error: Any, values: dict[str, Any]) -> str:
    """One of pydantic's errors as the place in the recipe and what is right there."""
    place = ".".join(str(part) for part in error["loc"][1:])
    match error["type"]:
        case "union_tag_not_found" | "union_tag_invalid":
            return f"stage: expected one of {', '.join(_STAGES)}"
        case "extra_forbidden":
            meant = get_close_matches(place, known := _settings(_STAGES[values["stage"]]), 1, 0.8)
            meant = meant or [one for one in known if one.rpartition(".")[2] == error["loc"][-1]]
            return f"{place}: there is no such setting" + (f"; did you mean {' or '.join(meant)}?" if meant else "")
        case "model_type":
            return f"{place}: expected a table of settings"
    return f"{place or 'recipe'}: {error['msg'].removeprefix('Value error, ')}"


def _settings(part: type[BaseModel]) -> list[str]:
    """The places that a recipe may set: ``steps``, ``rollout.guidance``, ``teachers.NAME.source``."""
    places = []
    for name, field in part.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        between = {"list": ".0", "dict": ".NAME"}.get(getattr(get_origin(field.annotation), "__name__", ""), "")
        inner = [
            one for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel) for one in _settings(kind)
        ]
        places += [f"{name}{between}.{one}" for one in inner] or [name]
    return places


def _got(error: Any) -> str:
    if error["type"] == "union_tag_invalid":
        return f" (got {error['ctx']['tag']!r})"
    return "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
