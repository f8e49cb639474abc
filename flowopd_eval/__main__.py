"""``python -m flowopd_eval``, for ``accelerate launch -m flowopd_eval --bench geneval``."""

from flowopd_eval.cli import run

run()
