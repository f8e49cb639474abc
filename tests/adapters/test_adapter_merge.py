"""Merging: the exact mean of products against dense algebra, the public script's average against its own formula."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flowopd_eval.adapters import Adapter, Factors, check_adapter, merge_adapters, read_adapter
from flowopd_eval.errors import RequestError


def random_adapter(seed: int, rank: int = 4, modules: tuple[str, ...] = ("x", "y"), scale: float = 1.0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    return Adapter(
        {m: Factors(torch.randn(rank, 24, generator=g), scale * torch.randn(20, rank, generator=g)) for m in modules},
        source=f"a{seed}",
    )


def dense(adapter: Adapter, module: str) -> torch.Tensor:
    """B @ A in fp64, zero where the adapter lacks the module."""
    if module not in adapter.factors:
        return torch.zeros(20, 24, dtype=torch.float64)
    a, b = adapter.factors[module]
    return b.double() @ a.double()


def test_exact_at_full_rank_is_the_weighted_sum():
    parts = [(random_adapter(0, 4), 0.5), (random_adapter(1, 3), 0.2), (random_adapter(2, 5, scale=3.0), -0.3)]
    merged, report = merge_adapters(parts, rank=12)
    for module in ("x", "y"):
        expected = sum(weight * dense(adapter, module) for adapter, weight in parts)
        assert torch.allclose(dense(merged, module), expected, atol=1e-5)
    assert report.discarded_energy < 1e-12
    assert merged.rank == 12


def test_exact_truncated_is_the_best_approximation_and_reports_its_loss():
    parts = [(random_adapter(seed), 1 / 3) for seed in range(3)]
    merged, report = merge_adapters(parts)
    assert merged.rank == 4
    lost = whole = 0.0
    for module in ("x", "y"):
        total = sum(weight * dense(adapter, module) for adapter, weight in parts)
        u, s, vh = torch.linalg.svd(total)  # Eckart-Young: the truncated SVD is the nearest matrix of rank 4
        assert torch.allclose(dense(merged, module), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5)
        tail, energy = float((s[4:] ** 2).sum()), float((s**2).sum())
        assert report.per_module[module] == pytest.approx(tail / energy, rel=1e-6)
        lost, whole = lost + tail, whole + energy
    assert report.discarded_energy == pytest.approx(lost / whole, rel=1e-6)


def test_exact_covers_every_module_of_any_adapter():
    parts = [(random_adapter(0, modules=("x",)), 0.5), (random_adapter(1, modules=("y",)), 0.5)]
    merged, report = merge_adapters(parts)
    assert torch.allclose(dense(merged, "x"), 0.5 * dense(parts[0][0], "x"), atol=1e-6)
    assert torch.allclose(dense(merged, "y"), 0.5 * dense(parts[1][0], "y"), atol=1e-6)
    assert report.discarded_energy < 1e-12


def test_merge_of_one_adapter_is_that_adapter():
    adapter = random_adapter(0)
    merged, report = merge_adapters([(adapter, 1.0)])
    assert torch.allclose(dense(merged, "x"), dense(adapter, "x"), atol=1e-6)
    assert report.cosines == ((pytest.approx(1.0),),)


def test_zero_change_stays_zero():
    still = Adapter({"x": Factors(torch.randn(4, 24), torch.zeros(20, 4))})
    merged, report = merge_adapters([(still, 0.5), (still, 0.5)])
    assert not merged.factors["x"].B.any()
    assert report.discarded_energy == 0.0


def test_cosines_are_those_of_the_dense_changes():
    adapters = [random_adapter(0), random_adapter(1, 6), random_adapter(2, modules=("x",))]
    _, report = merge_adapters([(adapter, 1 / 3) for adapter in adapters])
    flat = [torch.cat([dense(a, m).flatten() for m in ("x", "y")]) for a in adapters]
    for i, x in enumerate(flat):
        for j, y in enumerate(flat):
            expected = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
            assert report.cosines[i][j] == pytest.approx(expected, abs=1e-9)


def test_factors_is_the_public_scripts_average(make_peft, base, transformer, tmp_path):
    """``scripts/merge.py`` of CostaliyA/Flow-OPD: mean of each tensor, first adapter's config."""
    models = [make_peft(seed) for seed in range(3)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    merged, report = merge_adapters([(read_adapter(tmp_path / str(s)), 1 / 3) for s in range(3)], method="factors")
    config: LoraConfig = models[0].peft_config["default"]
    script = get_peft_model(transformer, config)
    states = [model.state_dict() for model in models]
    script.load_state_dict({key: torch.stack([s[key] for s in states]).mean(0) for key in states[0]})
    for name, (a, b) in merged.factors.items():
        layer = script.get_submodule(f"base_model.model.{name}")
        assert torch.allclose(b @ a, layer.get_delta_weight("default"), atol=1e-6)
    assert report.discarded_energy > 0.5  # of independent factors: the mean of factors is another change
    check_adapter(merged, base)


def test_report_of_factors_is_the_error_of_the_product():
    parts = [(random_adapter(0), 0.5), (random_adapter(1), 0.5)]
    merged, report = merge_adapters(parts, method="factors")
    total = sum(weight * dense(adapter, "x") for adapter, weight in parts)
    expected = float((dense(merged, "x") - total).square().sum() / total.square().sum())
    assert report.per_module["x"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, "Nothing to merge"),
        ([(random_adapter(0), 1.0)], {"method": "ties"}, "Unknown merge method 'ties'; expected one of exact, factors"),
        ([(random_adapter(0), math.nan)], {}, "must be finite"),
        ([(random_adapter(0), 1.0)], {"rank": 0}, "at least 1, but got 0"),
        ([(random_adapter(0), 0.5), (random_adapter(1, 6), 0.5)], {"method": "factors"}, r"\[4, 6\] should give 6"),
        (
            [(random_adapter(0), 0.5), (random_adapter(1, modules=("x",)), 0.5)],
            {"method": "factors"},
            r"\['a1'\] lack y",
        ),
    ],
)
def test_refuses(parts, options, message):
    with pytest.raises(RequestError, match=message):
        merge_adapters(parts, **options)
