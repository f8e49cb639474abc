"""Intervals against published values, exact enumeration and simulated truth."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowopd_eval import statistics
from flowopd_eval.records import Interval

RNG = np.random.default_rng
CLUSTERS = st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.0]), min_size=1, max_size=4), min_size=1, max_size=8)


def bounds(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def drawn_prompts(rng: np.random.Generator, prompts: int, pictures: int = 4) -> list[list[float]]:
    """0/1 scores of strongly correlated pictures: each prompt's success rate is Beta(0.6, 0.4), whose mean is 0.6."""
    rates = rng.beta(0.6, 0.4, size=(prompts, 1))
    return (rng.random((prompts, pictures)) < rates).astype(float).tolist()


# Wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_examples(hits: int, n: int, low: float, high: float) -> None:
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3 (score, no continuity correction).
    assert statistics.wilson_interval(hits / n, n) == pytest.approx((low, high), abs=5e-5)


@given(hits=st.integers(0, 50), extra=st.integers(0, 50), level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_ends_solve_the_score_equation_and_mirror(hits: int, extra: int, level: float) -> None:
    n = hits + extra + 1
    share = hits / n
    low, high = statistics.wilson_interval(share, n, level)
    assert 0 <= low <= share <= high <= 1
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    for end in (low, high):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-9)
    mirrored = statistics.wilson_interval(1 - share, n, level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


# The mean over pictures


def test_mean_is_over_pictures_and_counts_them() -> None:
    interval = statistics.mean_interval([[1.0, 1.0, 1.0], [0.0], []])
    assert (interval.value, interval.n, interval.level) == (0.75, 4, 0.95)


def test_bootstrap_equals_the_enumeration_of_every_resample() -> None:
    """Of 4 prompts there are 4^4 equally likely resamples; their exact quantiles are the limit of the bootstrap's.

    0.006 of probability to either side is five standard errors of 40,000 resamples and more at the outer quantiles.
    """
    clusters = [[0.0, 0.1], [0.3], [0.9, 0.8, 1.0], [0.45]]
    draws = itertools.product(clusters, repeat=4)
    means = np.sort([np.mean([score for cluster in draw for score in cluster]) for draw in draws])
    for level in (0.8, 0.9, 0.95):
        interval = statistics.mean_interval(clusters, resamples=40_000, level=level)
        for end, quantile in ((interval.low, (1 - level) / 2), (interval.high, (1 + level) / 2)):
            low, high = np.quantile(means, [quantile - 0.006, quantile + 0.006])
            assert low - 1e-12 <= end <= high + 1e-12


def test_interval_of_many_prompts_is_the_normal_one() -> None:
    prompt_means = RNG(1).random(500)
    interval = statistics.mean_interval([[x] for x in prompt_means], resamples=20_000)
    assert interval.half_width == pytest.approx(1.96 * prompt_means.std() / math.sqrt(500), rel=0.03)


def test_repeating_the_pictures_of_a_prompt_adds_no_certainty() -> None:
    once = [[x] for x in RNG(2).random(50)]
    repeated = [cluster * 4 for cluster in once]
    assert bounds(statistics.mean_interval(repeated)) == pytest.approx(bounds(statistics.mean_interval(once)))


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = RNG(3)
    sets = 400
    covered = 0
    for _ in range(sets):
        interval = statistics.mean_interval(drawn_prompts(rng, prompts=60), resamples=1000)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.92 <= covered / sets <= 0.98  # a bootstrap of single pictures covers about 77 %


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_equal_verdicts_get_wilson_with_prompts_as_n(score: float) -> None:
    interval = statistics.mean_interval([[score] * 4] * 25)
    assert interval.value == score
    assert bounds(interval) == pytest.approx(statistics.wilson_interval(score, 25))
    assert interval.n == 100


def test_the_interval_moves_down_with_every_failure() -> None:
    """79 of 80 must not look surer than 80 of 80, nor 71 of 80 (widened) surer than 70 of 80 (not widened)."""
    intervals = [statistics.mean_interval([[1.0]] * (80 - failed) + [[0.0]] * failed) for failed in range(15)]
    lows, highs = zip(*map(bounds, intervals), strict=True)
    assert all(lower <= low + 0.002 for low, lower in itertools.pairwise(lows))  # 0.002: the seam at ten failures
    assert all(lower <= high for high, lower in itertools.pairwise(highs))
    assert lows[1] == pytest.approx(statistics.wilson_interval(79 / 80, 80)[0])
    mirrored = statistics.mean_interval([[0.0]] * 79 + [[1.0]])
    assert bounds(mirrored) == pytest.approx((1 - highs[1], 1 - lows[1]), abs=1e-12)


def test_few_failures_of_whole_prompts_are_covered() -> None:
    """Of prompts that are right in 95 % of cases, whole: the bootstrap alone covers the truth in 90 % of samples."""
    rng = RNG(21)
    sets = 400
    covered = 0
    for _ in range(sets):
        right = (rng.random((80, 1)) < 0.95).astype(float)
        interval = statistics.mean_interval(np.repeat(right, 4, axis=1).tolist(), resamples=600)
        covered += interval.low <= 0.95 <= interval.high
    assert covered / sets >= 0.94


def test_pictures_that_fail_apart_say_more_than_prompts_that_fail_whole() -> None:
    apart = statistics.mean_interval([[1.0] * 4] * 72 + [[0.0, 1.0, 1.0, 1.0]] * 8)
    whole = statistics.mean_interval([[1.0] * 4] * 78 + [[0.0] * 4] * 2)
    assert apart.value == whole.value
    assert apart.half_width < 0.7 * whole.half_width
    assert whole.low == pytest.approx(statistics.wilson_interval(whole.value, 80)[0])  # Kish: 320 pictures / 4


def test_the_design_effect_is_kishs_averaged_with_one_prompt_of_the_worst_kind() -> None:
    """Three of 20 prompts fail two of their four pictures: by hand, Kish's effect is the ratio of two variances."""
    clusters = [[1.0] * 4] * 17 + [[0.0, 0.0, 1.0, 1.0]] * 3
    means = np.array([4.0] * 17 + [2.0] * 3) / 4
    effect = (means.var(ddof=1) / 20) / (means.mean() * (1 - means.mean()) / 80)
    assert 1 < effect < 4
    low, _ = statistics.wilson_interval(float(means.mean()), 80 / ((3 * effect + 4) / 4))
    assert statistics.mean_interval(clusters).low == pytest.approx(low)


def test_scores_between_0_and_1_of_few_prompts_are_the_bootstraps() -> None:
    """No prompt is right as a whole, so there are no rare failures: Wilson's width would be that of coin throws."""
    interval = statistics.mean_interval([[0.45 + 0.01 * i] for i in range(8)])
    assert interval.half_width < 0.02


def test_one_prompt_is_not_certainty() -> None:
    interval = statistics.mean_interval([[1.0, 0.0, 1.0, 0.0]])
    assert bounds(interval) == pytest.approx(statistics.wilson_interval(0.5, 1))


def test_equal_scores_beyond_the_unit_range_have_no_width() -> None:
    assert statistics.mean_interval([[21.5, 21.5], [21.5]]) == Interval(21.5, 21.5, 21.5, 3)


def test_empty_input_is_refused() -> None:
    nothing: tuple[list[list[float]], ...] = ([], [[], []])
    for empty in nothing:
        with pytest.raises(ValueError, match="Expected scored pictures"):
            statistics.mean_interval(empty)
        with pytest.raises(ValueError, match="Expected scored pictures"):
            statistics.any_correct(empty)
    with pytest.raises(ValueError, match="Expected scored pictures"):
        statistics.task_mean_interval({})
    with pytest.raises(ValueError, match="in task 'counting'"):
        statistics.task_mean_interval({"colors": [[1.0]], "counting": [[]]})


@given(clusters=CLUSTERS, seed=st.integers(0, 5), order=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_order_of_prompts_and_pictures_changes_nothing(clusters, seed, order) -> None:
    shuffled = [order.sample(cluster, len(cluster)) for cluster in order.sample(clusters, len(clusters))]
    plain = statistics.mean_interval(clusters, resamples=50, seed=seed)
    assert statistics.mean_interval(shuffled, resamples=50, seed=seed) == plain


def test_an_interval_that_would_miss_its_skewed_estimate_ends_there() -> None:
    """Of heavily skewed scores the middle 2 % of the resamples lie wholly to one side of the estimate."""
    skewed = RNG(17).lognormal(sigma=2.0, size=12)
    right = statistics.mean_interval([[x] for x in skewed], level=0.02)
    assert right.low < right.value == right.high
    left = statistics.mean_interval([[-x] for x in skewed], level=0.02)
    assert left.low == left.value < left.high


@given(clusters=CLUSTERS, level=st.sampled_from([0.05, 0.5, 0.95]))
@settings(max_examples=50, deadline=None)
def test_interval_holds_its_estimate_and_stays_in_range(clusters, level: float) -> None:
    interval = statistics.mean_interval(clusters, resamples=50, level=level)
    assert -1e-12 <= interval.low <= interval.value <= interval.high <= 1 + 1e-12


def test_same_seed_same_interval_other_seed_other_interval() -> None:
    clusters = drawn_prompts(RNG(4), 30)
    assert statistics.mean_interval(clusters, seed=1) == statistics.mean_interval(clusters, seed=1)
    assert statistics.mean_interval(clusters, seed=1) != statistics.mean_interval(clusters, seed=2)


def test_ten_thousand_prompts_take_seconds_and_bounded_memory() -> None:
    clusters = drawn_prompts(RNG(5), 10_000)
    tracemalloc.start()
    start = time.process_time()
    statistics.mean_interval(clusters)
    assert time.process_time() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 200e6  # all 2000 x 10^4 indices at once would be 160 MB an array
    tracemalloc.stop()


# The mean of tasks


def test_task_mean_weighs_tasks_not_prompts() -> None:
    interval = statistics.task_mean_interval({"position": [[0.0]] * 9, "colors": [[1.0, 1.0]]})
    assert (interval.value, interval.n) == (0.5, 11)


def test_task_interval_adds_the_variances_of_the_tasks() -> None:
    rng = RNG(6)
    tasks = {"counting": drawn_prompts(rng, 300), "colors": drawn_prompts(rng, 150)}
    alone = [statistics.mean_interval(clusters, resamples=20_000).half_width for clusters in tasks.values()]
    together = statistics.task_mean_interval(tasks, resamples=20_000)
    assert together.half_width == pytest.approx(math.hypot(*alone) / 2, rel=0.03)


def test_a_task_without_variance_widens_the_interval_by_its_wilson_half_widths() -> None:
    varied = drawn_prompts(RNG(7), 200)
    perfect = [[1.0] * 4] * 10
    alone = statistics.mean_interval(varied)
    together = statistics.task_mean_interval({"a": varied, "b": perfect})
    wilson_low, _ = statistics.wilson_interval(1.0, 10)
    below = math.hypot(alone.value - alone.low, 1 - wilson_low) / 2
    assert together.value - together.low == pytest.approx(below, rel=0.05)
    # nothing lies above a perfect task: only the varied one counts there
    assert together.high - together.value == pytest.approx((alone.high - alone.value) / 2, rel=0.05)


def test_order_of_tasks_changes_nothing() -> None:
    rng = RNG(8)
    tasks = {name: drawn_prompts(rng, 20) for name in ("position", "colors", "counting")}
    backwards = dict(reversed(tasks.items()))
    assert statistics.task_mean_interval(tasks) == statistics.task_mean_interval(backwards)


def test_task_interval_covers_the_truth_with_a_nearly_perfect_task() -> None:
    """Single objects at 99.5 % are usually all right in a sample: a zero variance there would still be wrong."""
    rng = RNG(9)
    sets = 300
    covered = 0
    for _ in range(sets):
        easy = (rng.random((30, 1)) < 0.995).astype(float).tolist()
        interval = statistics.task_mean_interval({"easy": easy, "hard": drawn_prompts(rng, 60)}, resamples=1000)
        covered += interval.low <= (0.995 + 0.6) / 2 <= interval.high
    assert 0.92 <= covered / sets <= 1.0


# pass@k


def test_any_correct_is_the_share_of_prompts_with_a_hit() -> None:
    interval = statistics.any_correct([[0.0, 1.0], [0.0, 0.0], [1.0], [0.5, 0.9], []])
    assert (interval.value, interval.n) == (0.5, 4)
    assert bounds(interval) == pytest.approx(statistics.wilson_interval(0.5, 4))


# Paired differences


def scores(clusters: list[list[float]]) -> dict[str, list[float]]:
    return {f"p{i}": cluster for i, cluster in enumerate(clusters)}


def test_difference_of_identical_scores_is_exactly_nothing() -> None:
    a = scores(drawn_prompts(RNG(10), 40))
    tasks = {key: ("easy", "hard")[i % 2] for i, key in enumerate(a)}
    for grouping in (None, tasks):
        assert statistics.paired_difference(a, dict(a), grouping) == Interval(0.0, 0.0, 0.0, 160)


def test_difference_is_that_of_the_estimates_with_and_without_tasks() -> None:
    rng = RNG(11)
    a, b = scores(drawn_prompts(rng, 30)), scores(drawn_prompts(rng, 30, pictures=3))
    tasks = {key: "easy" if i < 10 else "hard" for i, key in enumerate(a)}

    def by_task(side: dict[str, list[float]]) -> dict[str, list[list[float]]]:
        return {task: [side[key] for key in side if tasks[key] == task] for task in ("easy", "hard")}

    plain = statistics.mean_interval(list(b.values())).value - statistics.mean_interval(list(a.values())).value
    assert statistics.paired_difference(a, b).value == pytest.approx(plain)
    expected = statistics.task_mean_interval(by_task(b)).value - statistics.task_mean_interval(by_task(a)).value
    assert statistics.paired_difference(a, b, tasks).value == pytest.approx(expected)
    assert statistics.paired_difference(a, b).n == 90


def test_difference_mirrors_when_the_sides_are_exchanged() -> None:
    rng = RNG(12)
    a, b = scores(drawn_prompts(rng, 200)), scores(drawn_prompts(rng, 200))
    there = statistics.paired_difference(a, b, resamples=20_000)
    back = statistics.paired_difference(b, a, resamples=20_000)
    assert (-back.value, -back.high, -back.low) == pytest.approx((there.value, there.low, there.high), abs=0.005)


def test_pairing_cancels_what_makes_a_prompt_hard() -> None:
    rng = RNG(13)
    hardness = rng.random(200)
    a = scores([[x] for x in hardness])
    b = scores([[x + e] for x, e in zip(hardness, rng.normal(0.02, 0.01, 200), strict=True)])
    paired = statistics.paired_difference(a, b)
    assert paired.low > 0.015
    assert paired.half_width < 0.1 * statistics.mean_interval(list(a.values())).half_width


def test_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng = RNG(14)
    sets = 400
    covered = 0
    for _ in range(sets):
        rates = rng.beta(2, 2, size=(60, 1))
        a = scores((rng.random((60, 4)) < rates * 0.8).astype(float).tolist())
        b = scores((rng.random((60, 4)) < rates).astype(float).tolist())
        interval = statistics.paired_difference(a, b, resamples=1000)
        covered += interval.low <= 0.1 <= interval.high  # 0.5 - 0.8 * 0.5
    assert 0.92 <= covered / sets <= 0.98


def test_five_prompts_that_all_turn_right_are_not_certainty() -> None:
    interval = statistics.paired_difference(scores([[0.0]] * 5), scores([[1.0]] * 5))
    assert bounds(interval) == pytest.approx((2 * statistics.wilson_interval(1.0, 5)[0] - 1, 1.0))


def test_prompts_that_all_differ_by_half_get_wilson_on_the_scale_of_differences() -> None:
    interval = statistics.paired_difference(scores([[0.0, 0.0]] * 5), scores([[1.0, 0.0]] * 5))
    low, high = statistics.wilson_interval(0.75, 5)  # -1..1 on 0..1
    assert interval.value == 0.5
    assert bounds(interval) == pytest.approx((2 * low - 1, 2 * high - 1))


def test_prompts_on_one_side_only_are_refused_with_their_count() -> None:
    a = scores([[1.0], [0.0], [1.0], [0.0]])
    b = {"p0": [1.0], "p1": [], "p9": [1.0]}
    with pytest.raises(ValueError, match="3 are scored only in the first and 1 only in the second"):
        statistics.paired_difference(a, b)
    with pytest.raises(ValueError, match="3 are scored only in the first and 1 only in the second"):
        statistics.paired_sd(a, b)
    with pytest.raises(ValueError, match="Expected scored pictures"):
        statistics.paired_difference({}, {})


def test_prompts_unscored_on_both_sides_are_left_out() -> None:
    a, b = {"p0": [1.0], "p1": [0.0], "p2": []}, {"p0": [0.0], "p1": [0.0]}
    assert statistics.paired_difference(a, b).value == -0.5


# Power


def test_paired_sd_is_the_sample_deviation_of_the_prompts_differences() -> None:
    a, b = scores([[0.0, 1.0], [0.5], [1.0]]), scores([[1.0], [0.5], [0.0, 0.5]])
    assert statistics.paired_sd(a, b) == pytest.approx(np.std([0.5, 0.0, -0.75], ddof=1))


def test_paired_sd_predicts_the_interval_of_the_same_data() -> None:
    rng = RNG(15)
    a, b = scores(drawn_prompts(rng, 400)), scores(drawn_prompts(rng, 400))
    tasks = {key: "easy" if i < 100 else "hard" for i, key in enumerate(a)}
    for grouping in (None, tasks):
        predicted = 1.96 * statistics.paired_sd(a, b, grouping) / math.sqrt(400)
        observed = statistics.paired_difference(a, b, grouping, resamples=20_000).half_width
        assert observed == pytest.approx(predicted, rel=0.03)


def test_paired_sd_needs_two_prompts_a_task() -> None:
    with pytest.raises(ValueError, match="at least two prompts in task 'all', but got 1"):
        statistics.paired_sd(scores([[1.0]]), scores([[0.0]]))


def test_prompts_needed_is_cohens_number() -> None:
    # Effect 0.5 sd, 80 % power, two-sided 5 %: (1.95996 + 0.84162)^2 / 0.25 = 31.4 -> 32; effect 0.2: 196.2 -> 197.
    assert statistics.prompts_needed(0.5, 1.0) == 32
    assert statistics.prompts_needed(0.2, 1.0) == 197
    assert statistics.prompts_needed(2.0, 20.0) == statistics.prompts_needed(0.02, 0.2)  # points or shares
    assert statistics.prompts_needed(0.1, 0.0) == 2
    with pytest.raises(ValueError, match="positive, but got 0"):
        statistics.prompts_needed(0, 1.0)


def test_so_many_prompts_find_the_difference_four_times_in_five() -> None:
    rng = RNG(16)
    prompts = statistics.prompts_needed(0.1, 0.3)
    sets = 300
    found = 0
    for _ in range(sets):
        b = scores(rng.normal(0.1, 0.3, size=(prompts, 1)).tolist())
        found += statistics.paired_difference({key: [0.0] for key in b}, b, resamples=1000).low > 0
    assert found / sets == pytest.approx(0.8, abs=0.06)
