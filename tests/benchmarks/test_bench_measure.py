"""What every benchmark rests on: turns, ratios, parity checks that can fail, results that only a real run leaves."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import measure
from flowopd_eval.errors import WorkError


def test_variants_take_turns_after_their_warm_up():
    calls = []
    timings = measure.take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 3, warm_up=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert {name: len(found.seconds) for name, found in timings.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_medians_with_the_extremes_of_the_rounds():
    slow, fast = measure.Timing((2.0, 4.0, 9.0)), measure.Timing((1.0, 1.0, 3.0))
    assert measure.ratio(slow, fast) == {"ratio": 4.0, "low": 2.0, "high": 4.0}
    assert slow.to_json(8, "pictures")["pictures_per_second"] == 2.0


@pytest.mark.parametrize(("found", "expected"), [([1.0, 2.2], [1, 2]), ([1.0], [1, 2]), ([np.nan], [1]), ([], [])])
def test_what_is_not_the_same_is_refused(found, expected):
    with pytest.raises(WorkError, match="no figure is reported"):
        measure.same("Numbers", found, expected, 0.1)


def test_what_is_the_same_within_a_tolerance_is_measured():
    assert measure.same("Numbers", [1.0, 2.05], [1, 2], 0.1) == pytest.approx(0.05)


def test_alike_is_a_cosine_and_nan_is_not_alike():
    a = torch.tensor([1.0, 0.0])
    assert measure.alike("Vectors", 3 * a, a, 0.99) == pytest.approx(1)
    for other in (torch.tensor([1.0, 1.0]), torch.tensor([torch.nan, 0.0])):
        with pytest.raises(WorkError, match="cosine"):
            measure.alike("Vectors", other, a, 0.99)


def test_bytes_of_views_count_once():
    whole = torch.zeros(10)
    assert measure.bytes_of([whole, whole[:3], torch.zeros(2, dtype=torch.bfloat16)]) == 44


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    sizes = [10, 100, 1000]
    assert measure.exponent(sizes, [3 * n**power for n in sizes]) == pytest.approx(power)


def test_a_fixed_cost_does_not_hide_growth():
    sizes = [100, 300, 1000, 3000, 10_000]
    assert measure.exponent(sizes, [1 + 1e-6 * n**2 for n in sizes]) > 1.2
    assert measure.exponent(sizes, [5 + 1e-3 * n for n in sizes]) < 1


def test_a_childs_memory_is_its_own_and_its_failure_is_told():
    small = measure.child([sys.executable, "-c", "print('here')"])
    large = measure.child([sys.executable, "-c", "x = b'x' * 200_000_000"])
    assert small[2].strip() == "here"
    assert large[1] - small[1] > 150e6
    with pytest.raises(WorkError, match=r"ended with 3:\n.*no room"):
        measure.child([sys.executable, "-c", "import sys; print('no room', file=sys.stderr); sys.exit(3)"])


def test_results_come_with_their_machine_and_a_smoke_run_leaves_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    measure.keep("one", {"value": 1}, smoke=True)
    assert not (tmp_path / "results").exists()
    measure.keep("one", {"value": 1}, smoke=False)
    kept = json.loads((tmp_path / "results" / "one.json").read_text())
    assert kept["value"] == 1
    assert {"versions", "platform", "cpus", "device"} <= kept["machine"].keys()
    assert "one.json" in capsys.readouterr().out


def test_a_table_has_every_column_and_a_dash_for_what_is_missing(capsys):
    measure.show("A table", [{"variant": "a", "s": 1.23456}, {"variant": "b", "GB": 2}])
    out = capsys.readouterr().out
    assert "A table" in out
    assert "1.235" in out
    assert "–" in out
