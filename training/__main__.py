"""``python -m training RECIPE``: run one stage, going on from its last checkpoint.

``python -m training check RECIPE`` tests every teacher against the base on its own task. On several devices:
``accelerate launch -m training RECIPE``.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.quiet import quiet_libraries
from training.config import (
    AutoencoderConfig,
    Config,
    DistillConfig,
    MergeConfig,
    NFTConfig,
    PretrainConfig,
    SFTConfig,
    Trained,
    load_recipe,
)


def _speed(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected TFLOP/s above 0, but got {text}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("action", nargs="?", choices=["run", "check"], default="run", help="what to do (default: run)")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    parser.add_argument("--resume", action="store_true", help="refuse to begin where there is nothing to go on from")
    parser.add_argument("--dry-run", action="store_true", help="say what the recipe would cost, without weights")
    parser.add_argument(
        "--speed", type=_speed, metavar="TFLOPS", help="effective speed, for the device time of --dry-run"
    )
    arguments = parser.parse_args()
    try:
        config = load_recipe(arguments.recipe, arguments.set)
    except ValueError as error:
        return _fail(error, 2)
    try:
        if arguments.dry_run:
            with quiet_libraries():
                from training.price import print_price

            print_price(config, arguments.speed)
        elif arguments.action == "check":
            with quiet_libraries():
                from training.check import check_teachers

            return check_teachers(config)
        else:
            run(config, arguments.resume)
    except RequestError as error:
        return _fail(error, 2)
    except (WorkError, OSError) as error:
        return _fail(error, 1)
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"training: {error}", file=sys.stderr)
    return code


def run(config: Config, resume: bool) -> None:
    """Run the stage that ``config`` is of."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(config, PretrainConfig):
        from training.pretrain import pretrain

        pretrain(config, out)
    elif isinstance(config, AutoencoderConfig):
        from training.autoencoder import train_autoencoder

        train_autoencoder(config, out)
    elif isinstance(config, MergeConfig):
        with quiet_libraries():
            from training.coldstart import merge

        print(f"The adapter is in {merge(config, out)}.")
    elif isinstance(config, DistillConfig) and config.parameters == "full":
        with quiet_libraries():
            from training.sharded import train_full

            stage = _stage(config)
        print(f"The transformer is in {train_full(config, stage, out, resume=resume)}.")
    else:
        with quiet_libraries():
            from training.loop import train

            stage = _stage(config)
        print(f"The adapter is in {train(config, stage, out, resume=resume)}.")


def _stage(config: Trained):  # noqa: ANN202
    if isinstance(config, DistillConfig):
        from training.distill import Distillation, PolicyGradient

        return PolicyGradient if config.objective == "policy_gradient" else Distillation
    if isinstance(config, SFTConfig):
        from training.coldstart import SFT

        return SFT
    if isinstance(config, NFTConfig):
        from training.nft import NFT

        return NFT
    from training.grpo import GRPO

    return GRPO


if __name__ == "__main__":
    sys.exit(main())
