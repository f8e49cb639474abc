"""``python -m training RECIPE [--set key=value]...``: run one stage, going on from its last checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.config import AutoencoderConfig, load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    arguments = parser.parse_args()
    try:
        config = load_recipe(arguments.recipe, arguments.set)
    except (OSError, ValueError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(config, AutoencoderConfig):
        from training.autoencoder import train_autoencoder

        train_autoencoder(config, out)
    else:
        from training.pretrain import pretrain

        pretrain(config, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
