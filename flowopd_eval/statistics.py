"""How sure a score is: intervals, paired differences, and how many prompts a difference takes.

Pictures of one prompt resemble one another, so the prompt is what is resampled: a *cluster* is the list of the scores
of one prompt's pictures, unscored ones left out. Prompts without a scored picture count for nothing. Intervals are
percentile cluster bootstraps (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 13; Field & Welsh,
*Bootstrapping clustered data*, JRSS B 69, 2007). Of few prompts they are too narrow: with four strongly correlated
pictures a prompt, simulated 95 % intervals covered the truth in 87 % of cases for 5 prompts, 93 % for 10, 94 % for 20.

**Few failures, or few successes.** Near 0 and 1 a percentile bootstrap is too short: one failure among 80 prompts says
little about how many there would be among 80 others, and none says nothing at all. For scores within 0..1, where most
prompts of a task are right as a whole and fewer than ten have a failure (or wrong, and a success; ten is the old rule
for the normal approximation), the interval is widened to Wilson's. Its n is the *effective* number of pictures: their
number over the design effect (Kish, *Survey Sampling*, 1965), estimated from those prompts and one more, supposed to be
right or wrong as a whole. Without any, or where every prompt has the same mean, n is thus the number of prompts:
further pictures of a prompt cannot be taken for independent ones. Scores between 0 and 1 spread less than those of 0
and 1 with the same mean, so the interval errs on the wide side. Simulated with 80 prompts of one or four pictures and
true shares of 0.9 to 0.995, 95 % intervals cover the truth in 93 to 100 % of cases, whatever the correlation (the
bootstrap alone: 88 to 100 %). For scores beyond 0..1 no such bound is known. In a mean of tasks, what Wilson adds to a
task is added in quadrature, with the weight that the task has in the mean.

A *difference* is not widened: under the hypothesis of no difference, simulated with 80 prompts of which 2 to 20 differ,
its bootstrap excludes 0 in 5.3 % of cases or fewer. Only where all prompts differ equally, and not by 0, does it take
Wilson's width.

Every function is deterministic, and its result depends on the order of neither tasks, prompts nor pictures: clusters
are sorted before they are resampled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from flowopd_eval.records import Interval

Clusters = Sequence[Sequence[float]]
Scores = Mapping[str, Sequence[float]]  # prompt id -> scores of its pictures
Array = NDArray[np.float64]

_CELLS = 2_000_000  # prompts x resamples held at a time: 16 MB an array
_ROUNDING = 1e-9  # a bootstrap spread below this is rounding, not variance
_FEW = 10  # prompts with a failure, or with a success, below which a bootstrap near 0 or 1 is too short


def wilson_interval(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, JASA 22, 1927).

    Args:
        share: observed share, 0..1.
        n: number of independent trials, > 0; not necessarily whole.
        level: confidence, in (0, 1).

    Returns:
        Low and high end, ``0 <= low <= share <= high <= 1``.
    """
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 / n * (share * (1 - share) + z2 / (4 * n))) / (1 + z2 / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mean_interval(clusters: Clusters, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean over all pictures, with a cluster bootstrap over prompts; ``n`` counts pictures.

    Near 0 and 1 the interval is at least Wilson's; see the module's notes.

    Args:
        clusters: scores by prompt.
        resamples: bootstrap replicates.
        seed: of the bootstrap.
        level: confidence, in (0, 1).

    Raises:
        ValueError: there is no scored picture.
    """
    return task_mean_interval({"all": clusters}, resamples, seed, level)


def task_mean_interval(
    tasks: Mapping[str, Clusters], resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """GenEval's overall score: the unweighted mean of the tasks' means over pictures; ``n`` counts pictures.

    Prompts are resampled within each task. A task near 0 or 1 enters with Wilson's half widths where they are the
    wider; see the module's notes. Other arguments as in :func:`mean_interval`. Source: the official
    ``summary_scores.py`` (github.com/djghosh13/geneval) averages task accuracies.

    Raises:
        ValueError: there is no task, or a task has no scored picture.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for task in sorted(tasks):
        clusters = [cluster for cluster in tasks[task] if len(cluster)]
        if not clusters:
            raise ValueError(f"Expected scored pictures in task {task!r}, but there are none.")
        columns = _sorted_rows([_totals(cluster) for cluster in clusters])
        part = _Part(float(_ratio(columns.sum(axis=0))), _ratio(_resampled_totals(columns, resamples, rng)))
        if _within_unit(clusters) and (part.flat or _prompts_of_the_rarer(columns) < min(_FEW, len(columns) / 2)):
            share = min(1.0, max(0.0, part.value))
            part = part.at_least(*wilson_interval(share, _effective_pictures(columns), level), level)
        parts.append(part)
    return _mean_of_parts(parts, sum(len(c) for clusters in tasks.values() for c in clusters), level)


def any_correct(clusters: Clusters, level: float = 0.95) -> Interval:
    """Share of prompts with at least one correct picture (score 1): pass@k, GenEval's "correct prompts".

    Prompts are independent, so the interval is Wilson's. ``n`` counts prompts here.

    Raises:
        ValueError: there is no scored picture.
    """
    hits = [max(cluster) >= 1 for cluster in clusters if len(cluster)]
    if not hits:
        raise ValueError("Expected scored pictures, but there are none.")
    share = sum(hits) / len(hits)
    low, high = wilson_interval(share, len(hits), level)
    return Interval(share, low, high, len(hits), level)


def paired_difference(
    a: Scores,
    b: Scores,
    tasks: Mapping[str, str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """``b - a`` in the same estimator over the same prompts, bootstrapped by prompt; ``n`` counts pairs of pictures.

    Both sides of a prompt are drawn together, so what makes a prompt hard for both cancels. Tasks in which all prompts
    differ equally show no variance: where the difference is 0 (identical scores above all) they add no width, else
    scores within 0..1 get Wilson's interval on the difference scaled from -1..1 to 0..1.

    Args:
        a: scores of the first model by prompt id.
        b: scores of the second.
        tasks: task of each prompt id: compares :func:`task_mean_interval`'s estimates. None: :func:`mean_interval`'s.
        resamples: bootstrap replicates.
        seed: of the bootstrap.
        level: confidence, in (0, 1).

    Raises:
        ValueError: there are no prompts, or prompts have a scored picture on one side only; the message counts them.
    """
    rng = np.random.default_rng(seed)
    groups = _pairs_by_task(a, b, tasks)
    parts = []
    for pairs in groups.values():
        columns = _sorted_rows([(*_totals(ours), *_totals(theirs)) for ours, theirs in pairs])
        value = float(_ratio_difference(columns.sum(axis=0)))
        part = _Part(value, _ratio_difference(_resampled_totals(columns, resamples, rng)))
        if part.flat and abs(value) > _ROUNDING and all(_within_unit(pair) for pair in pairs):
            low, high = wilson_interval(min(1.0, max(0.0, (value + 1) / 2)), len(columns), level)
            part = part.at_least(2 * low - 1, 2 * high - 1, level)
        parts.append(part)
    return _mean_of_parts(parts, sum(min(map(len, pair)) for pairs in groups.values() for pair in pairs), level)


def paired_sd(a: Scores, b: Scores, tasks: Mapping[str, str] | None = None) -> float:
    """Between-prompt standard deviation of the paired difference, for :func:`prompts_needed`.

    The standard error of ``b - a`` over N prompts is this number over sqrt(N). Without tasks it is the sample standard
    deviation of the prompts' mean differences; with tasks it is the one that the mean of task means has when further
    prompts come in the same shares. Arguments as in :func:`paired_difference`; in the units of the scores.

    Raises:
        ValueError: as :func:`paired_difference`, or a task has fewer than two prompts.
    """
    groups = _pairs_by_task(a, b, tasks)
    variance = 0.0
    for task, pairs in groups.items():
        if len(pairs) < 2:
            raise ValueError(f"Expected at least two prompts in task {task!r}, but got {len(pairs)}.")
        differences = [math.fsum(theirs) / len(theirs) - math.fsum(ours) / len(ours) for ours, theirs in pairs]
        variance += float(np.var(np.sort(differences), ddof=1)) / len(pairs)
    return math.sqrt(variance * sum(map(len, groups.values()))) / len(groups)


def prompts_needed(difference: float, sd: float, power: float = 0.8, level: float = 0.95) -> int:
    """Prompts after which a paired two-sided comparison finds ``difference`` with probability ``power``.

    ``((z_(1+level)/2 + z_power) * sd / difference)^2``, rounded up, at least 2 (J. Cohen, *Statistical Power Analysis*,
    1988, ch. 2, in the normal approximation: for fewer than about 30 prompts it is a little too small).

    Args:
        difference: smallest difference worth finding, > 0, in the units of ``sd`` (points with points).
        sd: :func:`paired_sd` of an observed comparison.
        power: probability of finding it, in (0, 1).
        level: confidence of the interval that must then exclude 0, in (0, 1).

    Raises:
        ValueError: ``difference`` is not positive.
    """
    if difference <= 0:
        raise ValueError(f"Expected `difference` to be positive, but got {difference}.")
    z = NormalDist().inv_cdf
    return max(2, math.ceil(((z((1 + level) / 2) + z(power)) * sd / difference) ** 2))


@dataclass(frozen=True)
class _Part:
    """One task's estimate, its bootstrap replicates (R,), and the half widths that the bootstrap could not see."""

    value: float
    replicates: Array
    unseen_below: float = 0.0
    unseen_above: float = 0.0

    @property
    def flat(self) -> bool:
        return bool(np.ptp(self.replicates) <= _ROUNDING)

    def at_least(self, low: float, high: float, level: float) -> _Part:
        """With what is missing, in quadrature, from the bootstrap's interval to ``low`` and ``high``."""
        below, above = _half_widths(self.value, self.replicates, level)
        return replace(
            self,
            unseen_below=math.sqrt(max(0.0, (self.value - low) ** 2 - below**2)),
            unseen_above=math.sqrt(max(0.0, (high - self.value) ** 2 - above**2)),
        )


def _half_widths(value: float, replicates: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    # A percentile interval of skewed scores can miss its own estimate; the interval promises not to.
    return max(0.0, value - float(low)), max(0.0, float(high) - value)


def _mean_of_parts(parts: Sequence[_Part], n: int, level: float) -> Interval:
    if not parts:
        raise ValueError("Expected scored pictures, but there are none.")
    value = math.fsum(part.value for part in parts) / len(parts)
    below, above = _half_widths(value, np.mean([part.replicates for part in parts], axis=0), level)
    below = math.hypot(below, *(part.unseen_below / len(parts) for part in parts))
    above = math.hypot(above, *(part.unseen_above / len(parts) for part in parts))
    return Interval(value, value - below, value + above, n, level)


def _prompts_of_the_rarer(columns: Array) -> int:
    """Prompts with a failure or prompts with a success, whichever are fewer, from rows of (score, pictures)."""
    score, pictures = columns.T
    return int(min((score < pictures).sum(), (score > 0).sum()))


def _effective_pictures(columns: Array) -> float:
    """Independent pictures that would say as much as these of scores within 0..1, at least one a prompt.

    The design effect compares the variance of the ratio between prompts (linearised) with that of independent scores of
    0 and 1. It is an average over the prompts of the rarer verdict and one supposed prompt of the worst kind.
    """
    prompts = len(columns)
    score, pictures = columns.T
    total = float(pictures.sum())
    worst = total / prompts
    share = float(score.sum()) / total
    independent = share * (1 - share) / total
    between = float(((score - share * pictures) ** 2).sum()) / total**2 * prompts / max(1, prompts - 1)
    if between <= 0 or independent <= 0:
        return prompts
    estimated = min(worst, max(1.0, between / independent))
    seen = _prompts_of_the_rarer(columns)
    return total / ((seen * estimated + worst) / (seen + 1))


def _resampled_totals(columns: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Column totals of ``resamples`` draws of the rows with replacement: (prompts, columns) -> (resamples, columns)."""
    prompts = len(columns)
    at_once = max(1, _CELLS // prompts)
    chunks = []
    for start in range(0, resamples, at_once):
        rows = rng.integers(prompts, size=(min(at_once, resamples - start), prompts))
        chunks.append(np.stack([column[rows].sum(axis=1) for column in columns.T], axis=1))
    return np.concatenate(chunks)


def _ratio(totals: Array) -> Array:
    """Mean over pictures from totals of (score, pictures) in the last axis."""
    return totals[..., 0] / totals[..., 1]


def _ratio_difference(totals: Array) -> Array:
    """Second mean less the first, from totals of (score, pictures, score, pictures) in the last axis."""
    return _ratio(totals[..., 2:]) - _ratio(totals[..., :2])


def _totals(cluster: Sequence[float]) -> tuple[float, float]:
    return math.fsum(cluster), float(len(cluster))


def _sorted_rows(rows: Sequence[tuple[float, ...]]) -> Array:
    return np.array(sorted(rows), dtype=np.float64)


def _within_unit(clusters: Clusters) -> bool:
    return all(0 <= score <= 1 for cluster in clusters for score in cluster)


def _pairs_by_task(
    a: Scores, b: Scores, tasks: Mapping[str, str] | None
) -> dict[str, list[tuple[Sequence[float], Sequence[float]]]]:
    scored_a, scored_b = ({key for key, scores in side.items() if len(scores)} for side in (a, b))
    if scored_a != scored_b:
        raise ValueError(
            f"Expected the same scored prompts on both sides, but {len(scored_a - scored_b)} are scored only in the "
            f"first and {len(scored_b - scored_a)} only in the second."
        )
    groups = defaultdict(list)
    for key in scored_a:
        groups["all" if tasks is None else tasks[key]].append((a[key], b[key]))
    return dict(sorted(groups.items()))
