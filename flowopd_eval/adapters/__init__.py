"""LoRA adapters: read, check, merge, write; many on one backbone."""

from flowopd_eval.adapters.adapter import Adapter, Factors, check_adapter, fresh_adapter
from flowopd_eval.adapters.files import KNOWN_ALPHAS, disagreement, read_adapter, write_adapter
from flowopd_eval.adapters.merge import MergeReport, merge_adapters
from flowopd_eval.adapters.rows import AdapterBank

__all__ = [
    "KNOWN_ALPHAS",
    "Adapter",
    "AdapterBank",
    "Factors",
    "MergeReport",
    "check_adapter",
    "disagreement",
    "fresh_adapter",
    "merge_adapters",
    "read_adapter",
    "write_adapter",
]
