"""Flow-OPD against the public loop's cost: ``python -m benchmarks.distillation``.

On a CUDA device: SD3.5 Medium's architecture with random weights, 512², ten steps, guidance 4.5, four teachers and an
anchor, rank 32. Without one: two of its 24 layers at 128² (``results/distillation-reduced-cpu.json``), where both sides
compute in fp32 and only the number of forwards differs. ``--miniature``: see :mod:`benchmarks.distillation_tiny`.

Before anything is timed, the gradients of both sides are compared in fp32 (they must be the same), and that of ours in
its own precision with the fp32 reference at the same states. What is stopped leaves the figures that it had, marked
``unfinished``. ``--modes`` times modes of ours, by name, against ours;
:data:`NOT_BUILT` says which there are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from benchmarks import measure
from benchmarks.full_size import REDUCED, SD35, SMOKE, Scale
from benchmarks.hardware import flops, matmul_rate, profile, show_profile, waits
from benchmarks.loops import CLOSE, MODES, OTHER, Ours, Sides, mixture_of, parity, public_update, recipe, trained
from flowopd_eval.errors import RequestError, WorkError
from training.config import DistillConfig

NOT_BUILT = {
    "cached anchor": "needs states that come again, and on-policy states never do; the sparse anchor saves as much",
    "CUDA graphs": "need inputs at fixed addresses; neither torch.compile's blocks nor the loop provide them",
    "attention kernel": "left to PyTorch's own choice, which FLOPs are counted without",
}


# --- what is measured ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """Scale, steps a trajectory, samples an update; how many at a time on both sides, and for ours alone afterwards."""

    scale: Scale
    steps: int
    batch: int
    micros: tuple[int, ...]
    alone: tuple[int, ...] = ()

    def recipe(self, micro: int) -> DistillConfig:
        """The recipe, ``micro`` samples at a time."""
        return recipe(self.scale, self.steps, self.batch, micro)


UNIT = "samples·steps"


SoFar: TypeAlias = Callable[[Mapping[str, Any]], object]  # is given the figures as they grow


def compare(plan: Plan, device: torch.device, repetitions: int, so_far: SoFar = lambda found: None) -> dict[str, Any]:
    """Ours against the public loop; their gradients first."""
    sides, dtype = Sides.random(plan.scale, device), getattr(torch, plan.scale.dtype)
    config = plan.recipe(plan.micros[0])
    ours = sides.ours(config, dtype)
    public = sides.public(config, ours)
    cosines = parity(sides, config, public)
    measure.show("Cosine of gradients", [{"of": name, "value": value} for name, value in cosines.items()])
    weights = {name: measure.bytes_of(side.weights) / 1e9 for name, side in (("ours", ours), ("public", public))}
    print(f"Weights: public {weights['public']:.2f} GB, ours {weights['ours']:.2f} GB.")
    results = _facts(plan) | {"cosines": cosines, "weights_gb": weights, "by_micro_batch": {}}
    results["weights_ratio"] = weights["public"] / weights["ours"]
    so_far(results)
    for micro in plan.micros:
        one = _at(ours, plan, micro)
        both = {"public": partial(public_update, public, one), "ours": one.update}
        results["by_micro_batch"][str(micro)] = _timed(both, plan, repetitions, micro)
        so_far(results)
    last = _at(ours, plan, plan.micros[-1])
    asked = {"ours": last.update, "public": partial(public_update, public, last)}
    results["host_waits_an_update"] = {name: waits(work) for name, work in asked.items()}
    del public, asked, both  # their room, for larger micro batches
    measure.free()
    for micro in plan.alone:
        one = _at(ours, plan, micro)
        results["by_micro_batch"][f"{micro}, ours alone"] = _timed({"ours": one.update}, plan, repetitions, micro)
        so_far(results)
    ours_at = {int(n.split(",")[0]): found["variants"]["ours"] for n, found in results["by_micro_batch"].items()}
    micro = max(ours_at, key=lambda n: _pace(ours_at[n]))
    share = _share(_at(ours, plan, micro), plan, micro, ours_at[micro]["median_s"], device, dtype)
    return results | {"share_at_micro_batch": micro} | share


def compare_modes(
    plan: Plan, device: torch.device, repetitions: int, modes: Sequence[str], so_far: SoFar = lambda found: None
) -> dict[str, Any]:
    """Modes of ours against ours, each with the cosine of its gradient."""
    sides, dtype = Sides.random(plan.scale, device), getattr(torch, plan.scale.dtype)
    micro = plan.micros[-1]
    config = plan.recipe(micro)
    made = {"ours": sides.ours(config, dtype)}
    expected = made["ours"].gradient()
    cosines: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in modes:
        least = -1.0 if name in OTHER else CLOSE[plan.scale.dtype]
        try:
            one = MODES[name](sides, config, dtype)
            found = one.gradient()
        except (RequestError, WorkError):
            raise
        except Exception as error:  # what a compiler or a device lacks is no reason to lose the other modes
            failed[name] = f"{type(error).__name__}: {error}".strip()[:500]
            print(f"The mode {name!r} failed: {failed[name]}", file=sys.stderr)
            continue
        cosines[name] = measure.alike(f"Gradient of the mode {name!r}", found, expected, least)
        made[name] = one
    facts = _facts(plan) | {"micro_batch": micro, "cosines": cosines, "not_built": NOT_BUILT, "failed": failed}

    def figures(timings: Mapping[str, measure.Timing]) -> dict[str, Any]:
        paces = {
            name: timing.to_json(trained(made[name].stage.config), "samples_steps") for name, timing in timings.items()
        }
        return facts | {
            "modes": paces,
            "times_ours": {name: measure.ratio(timings["ours"], timings[name]) for name in cosines},
        }

    so_far(facts)
    work = {name: one.update for name, one in made.items()}
    timings = measure.take_turns(work, repetitions, after_round=lambda timings: so_far(figures(timings)))
    rows = measure.rows_of(timings, plan.batch * plan.steps, UNIT, "ours")
    for row, one in zip(rows, made.values(), strict=True):
        row[f"{UNIT}/s"] = trained(one.stage.config) / row["median s"]
    measure.show(f"Modes of ours, {micro} samples at a time; a window trains fewer of the steps that it draws", rows)
    return figures(timings)


def _at(ours: Ours, plan: Plan, micro: int) -> Ours:
    config = plan.recipe(micro)
    return Ours.of(config, ours.stage.policies, mixture_of(config))


def _facts(plan: Plan) -> dict[str, Any]:
    scale = plan.scale
    return {"scale": scale.name, "side": scale.side, "dtype": scale.dtype, "steps": plan.steps, "batch": plan.batch}


def _pace(found: dict[str, float]) -> float:
    return found["samples_steps_per_second"]


def _timed(work: dict[str, Callable[[], object]], plan: Plan, repetitions: int, micro: int) -> dict[str, Any]:
    timings = measure.take_turns(work, repetitions)
    amount, slow = plan.batch * plan.steps, next(iter(work))
    rows = measure.rows_of(timings, amount, UNIT, slow)
    measure.show(f"An update of {plan.batch} samples and {plan.steps} steps, {micro} samples at a time", rows)
    return {
        "variants": {name: timing.to_json(amount, "samples_steps") for name, timing in timings.items()},
        "times_public": measure.ratio(timings[slow], timings["ours"]) if slow == "public" else None,
    }


def _share(
    ours: Ours, plan: Plan, micro: int, seconds: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """FLOPs of an update, the share of the measured rate of products, and where the rest goes."""
    count, rate = flops(ours.update), matmul_rate(device, dtype)
    small = recipe(plan.scale, 2, micro, micro)  # two steps of one micro batch are enough to see the shares
    where, busy = profile(Ours.of(small, ours.stage.policies, mixture_of(small)).update)
    used = count / seconds
    show_profile(
        f"{count / 1e12:.3g} TFLOP an update, {used / 1e12:.3g} TFLOP/s: {used / rate:.1%} of the {rate / 1e12:.3g} "
        f"that a product of large matrices reaches in {plan.scale.dtype}. Where the time goes",
        where,
    )
    return {
        "tflop_an_update": count / 1e12, "tflops_per_second": used / 1e12,
        "matmul_tflops_per_second": rate / 1e12, "share_of_matmul_rate": used / rate,
        "device_busy": busy, "profile": where,
    }  # fmt: skip


def main() -> int:
    options = measure.parser("benchmarks.distillation", str(__doc__), repetitions=3)
    options.add_argument("--micro", type=int, nargs="+", help="samples at a time (default: 4; on a CPU: 2)")
    options.add_argument("--modes", nargs="*", choices=sorted(MODES), help="modes of ours against ours instead")
    options.add_argument("--miniature", action="store_true", help="the miniature's recipe instead; see its own --help")
    if "--miniature" in sys.argv:
        from benchmarks.distillation_tiny import main as of_the_miniature

        return of_the_miniature([word for word in sys.argv[1:] if word != "--miniature"])
    asked = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(SD35, 10, 16, (4,), (8, 16)) if device.type == "cuda" else Plan(REDUCED, 3, 2, (2,))
    plan = Plan(SMOKE, 3, 4, (2,), (4,)) if asked.smoke else plan
    plan = replace(plan, micros=tuple(asked.micro)) if asked.micro else plan
    name = "distillation-cuda" if device.type == "cuda" else "distillation-reduced-cpu"
    name += "" if asked.modes is None else "-modes"

    def so_far(found: Mapping[str, Any]) -> None:
        if not asked.smoke:
            measure.keep_so_far(name, found | {"unfinished": True})

    try:
        if asked.modes is None:
            measure.keep(name, compare(plan, device, asked.repetitions, so_far), asked.smoke)
        else:
            modes = asked.modes or list(MODES)
            found = compare_modes(plan, device, asked.repetitions, modes, so_far)
            measure.keep(name, found, asked.smoke)
            return int(bool(found["failed"]))
    except WorkError as error:
        print(f"benchmarks.distillation: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
