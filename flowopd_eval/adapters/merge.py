"""One adapter out of several: the cold start without training (Flow-OPD, arXiv 2605.08063, "Merge")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flowopd_eval.adapters.adapter import Adapter, Factors
from flowopd_eval.errors import RequestError

Weighted = Sequence[tuple[Factors, float]]


@dataclass(frozen=True)
class MergeReport:
    """How much of the weighted sum of products the merged adapter lost, and how alike the adapters were.

    ``discarded_energy`` is ``|merged - sum|² / |sum|²`` (Frobenius, over all modules; ``per_module`` for each alone):
    0 is exact. For ``exact`` it is the share of the squared singular values that were cut off; for ``factors`` it may
    exceed 1.
    ``cosines[i][j]`` compares the whole changes ``B @ A`` of adapters i and j, -1..1.
    """

    discarded_energy: float
    per_module: Mapping[str, float]
    cosines: tuple[tuple[float, ...], ...]


def merge_adapters(
    weighted: Sequence[tuple[Adapter, float]], rank: int | None = None, method: str = "exact"
) -> tuple[Adapter, MergeReport]:
    """Merge adapters into one.

    Args:
        weighted: adapters with their weights, used as given: a mean has weights that sum to 1.
        rank: rank of the merged adapter; None takes the largest of the adapters'.
        method: ``exact``, the best approximation of that rank to ``sum_i w_i B_i A_i`` (a module that an adapter lacks
            counts as no change); or ``factors``, ``(sum_i w_i B_i)(sum_i w_i A_i)`` as the public code's
            ``scripts/merge.py`` does (equal to it where all adapters have one scale alpha / r).

    Returns: the merged adapter and its report.

    Raises:
        RequestError: no adapters, a weight that is not finite, an unknown method, a rank below 1, adapters of models of
            different sizes, weights by which they cancel out; for ``factors``, modules or ranks that differ.
    """
    if not weighted:
        raise RequestError("Nothing to merge: give at least one adapter.")
    if method not in METHODS:
        raise RequestError(f"Unknown merge method {method!r}; expected one of {', '.join(METHODS)}.")
    if not all(math.isfinite(weight) for _, weight in weighted):
        raise RequestError(f"Merge weights must be finite, but got {[weight for _, weight in weighted]}.")
    rank = max(adapter.rank for adapter, _ in weighted) if rank is None else rank
    if rank < 1:
        raise RequestError(f"Expected a rank of at least 1, but got {rank}.")
    merged: dict[str, Factors] = {}
    energies: dict[str, tuple[float, float]] = {}
    for name in sorted({name for adapter, _ in weighted for name in adapter.factors}):
        parts = [(_double(adapter.factors[name]), w) for adapter, w in weighted if name in adapter.factors]
        if method == "factors" and len(parts) < len(weighted):
            lacking = [adapter.source for adapter, _ in weighted if name not in adapter.factors]
            raise RequestError(f"Averaging factors needs the same modules everywhere; {lacking} lack {name}.")
        shapes = {(f.B.shape[0], f.A.shape[1]) for f, _ in parts}
        if len(shapes) > 1:
            made_for = ", ".join(f"{a.source} {_size(a.factors[name])}" for a, _ in weighted if name in a.factors)
            raise RequestError(f"{name} has another size in each: {made_for} (out x in). They are of different models.")
        total, product = _concatenated(parts), METHODS[method](parts, rank)
        energies[name] = (_residual(total, product), _inner(total, total))
        merged[name] = Factors(*(t.float().contiguous() for t in product))
    lost, whole = (sum(values) for values in zip(*energies.values(), strict=True))
    changes = [sum(_inner(f, f) for f in map(_double, adapter.factors.values())) for adapter, _ in weighted]
    if any(changes) and whole <= 1e-12 * sum(w * w * change for (_, w), change in zip(weighted, changes, strict=True)):
        raise RequestError(f"With the weights {[weight for _, weight in weighted]} nothing is left: they cancel out.")
    report = MergeReport(
        discarded_energy=lost / whole if whole else 0.0,
        per_module={name: part / all_ if all_ else 0.0 for name, (part, all_) in energies.items()},
        cosines=_cosines([adapter for adapter, _ in weighted]),
    )
    recipe = " + ".join(f"{weight:g} * {adapter.source or adapter.sha256[:12]}" for adapter, weight in weighted)
    declared = {"target_modules": list(merged)} if all(adapter.declared for adapter, _ in weighted) else {}
    return Adapter(merged, source=f"{method} merge: {recipe}", declared=declared), report


def _size(factors: Factors) -> str:
    return f"{factors.B.shape[0]}x{factors.A.shape[1]}"


def _double(factors: Factors) -> Factors:
    return Factors(factors.A.double(), factors.B.double())


def _concatenated(parts: Weighted) -> Factors:
    """Factors of ``sum_i w_i B_i A_i``, with the ranks added up."""
    return Factors(torch.cat([f.A for f, _ in parts]), torch.cat([w * f.B for f, w in parts], dim=1))


def _truncated_sum(parts: Weighted, rank: int) -> Factors:
    """The best rank-``rank`` factors of the sum: QR of the concatenated factors, then the SVD of a small matrix."""
    total = _concatenated(parts)
    q_b, r_b = torch.linalg.qr(total.B)
    q_a, r_a = torch.linalg.qr(total.A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    return Factors(root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root)


def _averaged_factors(parts: Weighted, rank: int) -> Factors:
    ranks = {f.rank for f, _ in parts}
    if ranks != {rank}:
        raise RequestError(f"Averaging factors needs one rank everywhere, but {sorted(ranks)} should give {rank}.")
    return Factors(torch.stack([w * f.A for f, w in parts]).sum(0), torch.stack([w * f.B for f, w in parts]).sum(0))


METHODS: dict[str, Callable[[Weighted, int], Factors]] = {"exact": _truncated_sum, "factors": _averaged_factors}


def _inner(x: Factors, y: Factors) -> float:
    """Frobenius product of ``x.B @ x.A`` and ``y.B @ y.A`` without forming either."""
    return float(((x.B.T @ y.B) * (x.A @ y.A.T)).sum())


def _residual(x: Factors, y: Factors) -> float:
    return max(0.0, _inner(x, x) - 2 * _inner(x, y) + _inner(y, y))


def _cosines(adapters: Sequence[Adapter]) -> tuple[tuple[float, ...], ...]:
    changes = [{name: _double(f) for name, f in adapter.factors.items()} for adapter in adapters]
    products = [[sum(_inner(x[name], y[name]) for name in x.keys() & y.keys()) for y in changes] for x in changes]
    gram = torch.tensor(products, dtype=torch.float64)
    norms = gram.diagonal().sqrt()
    return tuple(tuple(row) for row in (gram / torch.outer(norms, norms)).tolist())
