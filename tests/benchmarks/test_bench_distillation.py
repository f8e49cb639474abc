"""Training's own stage and the re-created public loop: the same gradients, and a check that would see it otherwise."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from benchmarks import distillation, distillation_tiny, loops, measure
from benchmarks.full_size import SMOKE
from benchmarks.hardware import flops, profile, waits
from flowopd_eval.errors import RequestError, WorkError
from training.policies import ANCHOR, STUDENT

CPU = torch.device("cpu")
PLAN = distillation.Plan(SMOKE, 3, 4, (2,))  # with two steps the first is nearly 1 long, as is its root
SHORT = distillation.Plan(SMOKE, 2, 2, (2,))


@pytest.fixture(scope="module")
def sides():
    return loops.Sides.random(SMOKE, CPU)


@pytest.fixture(scope="module")
def config():
    return PLAN.recipe(2)


@pytest.fixture(scope="module")
def ours(sides, config):
    return sides.ours(config, torch.float32)


@pytest.fixture
def public(sides, config, ours):
    return sides.public(config, ours)


def test_both_loops_have_the_same_gradient(sides, config, public):
    found = loops.parity(sides, config, public)
    assert found["public loop in fp32"] > 0.99999
    assert found["norm, public / ours"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda loop: setattr(loop, "guidance", 3.0),
        lambda loop: setattr(loop, "anchor_weight", 10.0),
        lambda loop: setattr(loop, "a", 0.3),
        lambda loop: loop.frozen.update(geneval=loop.frozen["ocr"]),
    ],
    ids=["guidance", "anchor", "noise", "teacher"],
)
def test_parity_sees_a_loop_that_computes_something_else(sides, config, public, change):
    change(public)
    with pytest.raises(WorkError, match="no figure is reported"):
        loops.parity(sides, config, public)


def test_parity_sees_another_weight_in_ours(sides, config, public):
    with pytest.raises(WorkError, match="no figure is reported"):
        loops.parity(sides, config.model_copy(update={"kl_weight": "velocity"}), public)


def test_given_states_are_those_of_the_trajectory(sides, config):
    small = config.model_copy(update={"batch_size": 2})
    free, held = (sides.ours(small, torch.float32, loops.Recorded) for _ in range(2))
    gradient = free.gradient()
    held.stage.states = free.stage.kept
    assert torch.equal(held.gradient(), gradient)
    held.stage.states = [2 * x for x in free.stage.kept]
    assert not torch.allclose(held.gradient(), gradient)


def test_the_work_is_eight_forwards_where_the_public_loop_makes_ten(sides, config, ours, public):
    counts = flops(ours.update), flops(partial(loops.public_update, public, ours))
    assert 0.75 < counts[0] / counts[1] < 0.85
    held = [measure.bytes_of(side.weights) for side in (public, ours)]
    assert held[0] > 4 * held[1]  # six backbones beside one, whose adapters are large at this scale


def test_updates_train_the_student_and_nothing_else(sides, config, public, ours):
    before = [[t.clone() for t in side.weights] for side in (public, ours)]
    loops.public_update(public, ours)
    ours.update()
    for side, was in zip((public, ours), before, strict=True):
        own = {id(p) for p in side.parameters}
        moved = {id(a) for a, b in zip(side.weights, was, strict=True) if not torch.equal(a, b)}
        assert moved <= own
        assert len(moved) > 0.8 * len(own)  # the last block's text queries change nothing


def test_the_public_student_starts_and_ends_as_an_adapter(sides, ours, public):
    modules = ours.stage.policies.bank.modules_covered
    now, was = public.adapter(modules), sides.adapters[STUDENT]
    for name in modules:
        torch.testing.assert_close(now.factors[name].B @ now.factors[name].A, was.factors[name].B @ was.factors[name].A)


def test_every_copy_of_the_backbone_has_the_same_weights(sides):
    one, other = (sides.copy(torch.float32).state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loop_asks_nothing_of_the_device_that_the_host_can_know(ours):
    assert {type(ok) for ok in ours.stage.defined} == {bool}
    assert {type(share) for share in ours.stage.share} == {float}


def test_a_mode_that_fails_does_not_cost_the_others(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(loops.MODES, "blocks compiled", broken)
    so_far = []
    found = distillation.compare_modes(
        SHORT, CPU, 2, ["blocks compiled", "gradient checkpointing"], lambda found: so_far.append(dict(found))
    )
    assert "modes" not in so_far[0]  # the gradients come first
    assert [one["modes"]["ours"]["repetitions"] for one in so_far[1:]] == [1, 2]
    assert so_far[-1] == found
    assert found["failed"] == {"blocks compiled": "RuntimeError: no compiler"}
    assert list(found["modes"]) == ["ours", "gradient checkpointing"]
    assert list(found["times_ours"]) == ["gradient checkpointing"]
    assert "no compiler" in capsys.readouterr().err


def test_modes_are_held_to_the_gradient_of_ours(monkeypatch, capsys):
    found = distillation.compare_modes(
        SHORT, CPU, 1, ["gradient checkpointing", "step window", "sparse anchor", "fp8 backbone, checkpointing"]
    )
    assert found["cosines"]["gradient checkpointing"] > 0.9999
    assert 0.9 < found["cosines"]["fp8 backbone, checkpointing"] < 1
    assert found["modes"]["step window"]["samples_steps_per_second"] > 0
    assert "step window" in capsys.readouterr().out

    def other(sides, config, dtype):
        return sides.ours(config.model_copy(update={"kl_weight": "velocity", "anchor": None}), dtype)

    monkeypatch.setitem(distillation.MODES, "another objective", other)
    with pytest.raises(WorkError, match="'another objective'"):
        distillation.compare_modes(SHORT, CPU, 1, ["another objective"])


def test_all_figures_of_a_comparison_are_there(capsys):
    so_far = []
    found = distillation.compare(SHORT, CPU, 1, lambda found: so_far.append(json.dumps(found)))
    kept = [json.loads(one) for one in so_far]
    assert [len(one["by_micro_batch"]) for one in kept] == [0, *range(1, 1 + len(SHORT.micros) + len(SHORT.alone))]
    assert all(one["cosines"] == found["cosines"] for one in kept)
    assert found["weights_ratio"] > 4
    assert found["by_micro_batch"]["2"]["times_public"]["ratio"] > 0
    assert found["share_of_matmul_rate"] > 0
    assert found["host_waits_an_update"] == {"ours": None, "public": None}
    assert found["profile"][0]["share"] >= found["profile"][-1]["share"] > 0
    out = capsys.readouterr().out
    assert "Cosine of gradients" in out
    assert "samples·steps/s" in out


def test_a_profile_finds_what_the_time_goes_to():
    a = torch.randn(400, 400)
    where, busy = profile(lambda: [a @ a for _ in range(20)])
    assert where[0]["operation"] == "aten::mm"
    assert where[0]["calls"] == 20
    assert busy is None
    assert waits(lambda: None) is None
    assert flops(lambda: a @ a) == 2 * 400**3


# --- the miniature ---------------------------------------------------------------------------------------------------
def test_teachers_are_named_by_the_recipes_names(tmp_path):
    config = distillation_tiny.settings_of(["quality=somewhere"], tmp_path)
    assert config.teachers["quality"].source == config.anchor.source == "somewhere"
    with pytest.raises(RequestError, match="--teacher shapes: the recipe has geneval, ocr, quality"):
        distillation_tiny.settings_of(["shapes=somewhere"], tmp_path)


def test_the_time_to_a_score_lies_on_the_line_between_two_exams():
    points = [(0, 0.0, 0.2), (10, 4.0, 0.4), (20, 8.0, 0.3)]
    assert distillation_tiny.seconds_to(points, 0.3) == pytest.approx(2.0)
    assert distillation_tiny.seconds_to(points, 0.1) == 0.0
    assert distillation_tiny.seconds_to(points, 0.5) is None


@pytest.mark.slow
def test_the_miniatures_gradients_agree_on_both_sides(tmp_path, monkeypatch):
    small = ["batch_size=4", "micro_batch=2", "rollout.steps=2", "steps=1"]
    config = distillation_tiny.settings_of(distillation_tiny.write_random_teachers(tmp_path), tmp_path, small)
    assert distillation_tiny.check_gradients(config) > 0.9999
    whole = distillation_tiny.public_of

    def without_anchor(ours):
        loop = whole(ours)
        loop.frozen[ANCHOR] = loop.frozen["ocr"]
        loop.anchor_weight = 1.0
        return loop

    monkeypatch.setattr(distillation_tiny, "public_of", without_anchor)
    with pytest.raises(WorkError, match="Gradients"):
        distillation_tiny.check_gradients(config)
