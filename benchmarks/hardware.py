"""What the device does: FLOPs counted, the rate that it can reach, where its time goes, how often the host waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure

Work = Callable[[], object]


def flops(work: Work) -> int:
    """FLOPs of one call by PyTorch's own counter; on a CPU, whose fused attention it does not know, as two products."""
    kernels = [SDPBackend.MATH]
    if measure.cuda() is not None:
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(kernels), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a product of large square matrices: what the device can do at best, as measured here."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timing = measure.take_turns({"product": lambda: a @ b}, repetitions=10, warm_up=3)["product"]
    return 2 * side**3 / timing.median


def profile(work: Work, most: int = 15) -> tuple[list[dict[str, Any]], float | None]:
    """The operations that take most of one call: share, milliseconds, calls; and how much of the time the GPU is busy.

    On CUDA the device's own time counts, else the processor's; the second value is None without a GPU.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    gpu = measure.cuda() is not None
    seconds, _ = measure.timed(work)
    with profiled(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as found:
        measure.timed(work)

    def own(event: Any) -> float:
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    # On CUDA a kernel is listed under its operation and once more by itself: the operations are enough.
    events = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    total = sum(map(own, events))
    events.sort(key=own, reverse=True)
    rows = [
        {"operation": event.key, "share": own(event) / total, "ms": own(event) / 1e3, "calls": event.count}
        for event in events[:most]
    ]
    return rows, total / 1e6 / seconds if gpu else None


def waits(work: Work) -> int | None:
    """How often one call makes the host wait for the device; None without one."""
    if measure.cuda() is None:
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def show_profile(title: str, rows: list[dict[str, Any]]) -> None:
    """Print what :func:`profile` found."""
    measure.show(title, [{**row, "share": f"{row['share']:.1%}"} for row in rows])
