"""The Flow-OPD toolkit: inference and evaluation for on-policy distilled flow-matching models (arXiv 2605.08063)."""
