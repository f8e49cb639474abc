"""Whether a card keeps its word: some of its own pictures drawn again, judged again, and held against what it says.

What can be computed is computed: the adapter's hash, the seeds by the rule, the whole of the bench's prompts, the
card's numbers from its own list of scores. The same noise through the same weights should give the same picture, so
hashes and levels are compared; another device or precision may differ, which is told and decides nothing. Scores
decide: the paired difference, here less there, over prompts chosen by a hash of the card's commit, which its author
could not know while writing it.

The card claims a mean within its interval. It is contradicted where the whole 99 % interval of the difference lies
beyond half of that width, so that neither rounding nor a lucky handful of prompts decides; 99 %, because bootstrap
intervals of few prompts are too narrow (see :mod:`flowopd_eval.statistics`). How many scores came out as the card says
is given besides, with Wilson's interval: it bounds what share of the list can be wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval import store
from flowopd_eval.benches import USUAL, Bench, bench_by_key, scorer_of
from flowopd_eval.doctor import TOLERANCE
from flowopd_eval.download import commit_of, fetch_files
from flowopd_eval.errors import RequestError
from flowopd_eval.harness import Progress, identity_of, judge, mean_over, standard_metrics
from flowopd_eval.hub.card import score_rows
from flowopd_eval.hub.layout import CARD, CLAIMS, METRICS, WEIGHTS
from flowopd_eval.hub.metadata import card_metadata
from flowopd_eval.hub.repository import without_addresses, without_paths
from flowopd_eval.hub.results import Claim, pixels_sha256, prompt_of
from flowopd_eval.hub.stated import Stated, read_stated
from flowopd_eval.models import Backbone, ModelGenerator, resolve
from flowopd_eval.records import SETTINGS_FILE, Interval, Prompt, Sample, Score
from flowopd_eval.statistics import mean_interval, paired_difference, wilson_interval

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from PIL import Image

LEVEL = 0.99
SAME_LEVELS = 2  # of 255: what float32 may differ by between batch sizes
_BATCH = 8
_UNASKED = "the Hub could not be asked: this is the commit in the local cache, which may not be the newest there"


@dataclass(frozen=True)
class Redrawn:
    """A picture drawn again. ``levels`` is the largest difference of any value to the published picture, 0..255."""

    claim: Claim
    identical: bool
    levels: int | None
    score: Score | None


@dataclass(frozen=True)
class Verdict:
    """What came of one metric. ``contradictions`` say what is not as the card says; ``notes`` what bears on it."""

    key: str
    claimed: Interval
    redrawn: Sequence[Redrawn] = ()
    there: Interval | None = None
    here: Interval | None = None
    difference: Interval | None = None
    contradictions: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def agreeing(self) -> tuple[int, int]:
        """Of how many pictures with a score on both sides it is the same."""
        pairs = [(one.claim.score, one.score.value) for one in self.redrawn if one.score]
        both = [abs(a - b) <= TOLERANCE for a, b in pairs if a is not None and b is not None]
        return sum(both), len(both)


@dataclass
class _Findings:
    contradictions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.contradictions.append(otherwise)


def verify(source: str, pictures: int, device: str, progress: Progress) -> tuple[str, list[Verdict]]:
    """Draw and judge again what the card of ``hub:REPO[@REVISION]`` shows; its source at a commit, a verdict a metric.

    Args:
        source: the repository, as ``flowopd-eval push`` made it.
        pictures: prompts of each metric to draw again, one picture each; a quarter as many published ones besides.
        device: where it is drawn.
        progress: told after each batch.

    Raises:
        RequestError: no such repository or revision for this token, none that was published so, or one without scores.
        WorkError: the model drew NaN.
    """
    from flowopd_eval.adapters import disagreement
    from flowopd_eval.adapters.adapter import listing

    files = [SETTINGS_FILE, METRICS, CLAIMS, CARD, "samples/*", *WEIGHTS]
    now = _commit(source)
    folder, resolved = fetch_files(source, files)  # by its branch, so that the cache's branch moves along
    if now and resolved != now:
        folder, resolved = fetch_files(now, files)
    spec = resolve(resolved)
    if spec.adapter is None:
        raise RequestError(f"{resolved} is not an adapter that `flowopd-eval push` published.")
    stated, data = read_stated(folder, resolved), card_metadata(folder / CARD, resolved)
    generator = Backbone(spec.base, [spec], device, None).generator(spec, spec.record)
    seed = resolved.rpartition("@")[2]
    differ = disagreement(folder)
    verdicts = []
    for key, summary in stated.summaries.items():
        findings, bench = _Findings(notes=[] if now else [_unasked(source, folder)]), bench_by_key(key)
        findings.expect(differ is None, str(differ))
        findings.expect(bench.objects == spec.objects, f"{key} is not a metric of what {spec.about} draws")
        mine = [claim for claim in stated.claims if claim.key == key]
        lacking = [claim.file for claim in mine if claim.file and not (folder / claim.file).is_file()]
        told = f"{len(lacking)} pictures that the list names are missing: {listing(lacking)}"
        if now:
            findings.expect(not lacking, told)
        elif lacking:  # an earlier command may have fetched the rest alone
            findings.notes.append(f"{told}, from the local cache at least")
        _same_model(findings, generator, stated, summary)
        _numbers_of_the_card(findings, data, (folder / CARD).read_text(encoding="utf-8"), summary)
        _numbers_from_the_list(findings, bench, summary, mine)
        prompts = _prompts(findings, bench, summary, mine)
        if prompts is None:
            verdicts.append(_verdict(key, summary, [], findings))
            continue
        chosen, published = _chosen(mine, pictures, seed)
        drawn = _draw(generator, [*chosen, *published], prompts, lambda n, of, k=key: progress(n, of, k))
        scores = _judged(findings, bench, summary, drawn[: len(chosen)], [prompts[claim.id] for claim in chosen])
        scores += [None] * len(published)  # compared as pictures alone: their author chose where they lie
        redrawn = [
            _redrawn(folder, claim, picture, score)
            for claim, picture, score in zip([*chosen, *published], drawn, scores, strict=True)
        ]
        verdicts.append(_verdict(key, summary, redrawn, findings))
    return resolved, verdicts


def _commit(source: str) -> str | None:
    """As :func:`flowopd_eval.download.commit_of`; what is there as something else than an adapter is named."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return commit_of(source)
    except RequestError as error:
        repo = source.removeprefix("hub:").partition("@")[0]
        for kind, what in (("dataset", "a run's pictures and scores"), ("space", "an app")):
            try:
                HfApi().repo_info(repo, repo_type=kind)
            except (HfHubHTTPError, HTTPError, OSError, ValueError):
                continue
            raise RequestError(
                f"{repo} is a {kind} ({what}), and `verify` checks an adapter's card: name the adapter's repository."
            ) from error
        raise


def _unasked(source: str, folder: Path) -> str:
    """The note of what was verified without the Hub, with the commits that came into the cache later."""
    came = {one.name: one.stat().st_mtime for one in folder.parent.iterdir()}
    later = [name for name in came if came[name] > came[folder.name]]
    if "@" in source or not later:
        return _UNASKED
    repo, newest = source.removeprefix("hub:"), max(later, key=lambda name: came[name])
    return f"{_UNASKED}. A commit that came later lies in the cache, too: verify {repo}@{newest}"


def _interval(summary: Mapping[str, Any]) -> Interval:
    overall = summary["metrics"]["overall"]
    return Interval(float(overall["value"]), float(overall["low"]), float(overall["high"]), int(overall["n"]))


# ------------------------------------------------------------------------------------------------- what is computed


def _same_model(findings: _Findings, generator: ModelGenerator, stated: Stated, summary: Mapping[str, Any]) -> None:
    mine, theirs = generator.identity(), summary["generator"]
    hashes = {stated.adapter_sha256, theirs["adapter_sha256"]}
    findings.expect(
        hashes == {mine["adapter_sha256"]}, "the scores are of another adapter than the one that lies there"
    )
    if theirs.get("base_sha256") != mine["base_sha256"]:
        findings.notes.append("the backbone's files here are others than those it was drawn on")
    if changed := store.differences(theirs.get("sampling", {}), mine["sampling"]):
        findings.expect(False, f"drawn by other settings than the repository names: {'; '.join(changed)}")


def _numbers_of_the_card(findings: _Findings, data: ModelCardData, text: str, summary: Mapping[str, Any]) -> None:
    """What people and the Hub read, in the table and in the metadata, against ``metrics.json``."""
    mine = [one for one in data.eval_results or () if one.dataset_type == summary["key"]]
    told = [(one.metric_type, (one.metric_value, one.metric_args)) for one in mine]
    metrics = summary["metrics"]
    cells = {summary["key"]: metrics["overall"], **{f"{summary['key']}/{t}": c for t, c in metrics["tasks"].items()}}
    ours = {kind: (c["value"], {end: c[end] for end in ("low", "high", "level", "n")}) for kind, c in cells.items()}
    same = len(told) == len(ours) and all(one in told for one in ours.items())
    same = same and all(row in text for row in score_rows(summary))
    findings.expect(same, f"{CARD} shows other numbers than {METRICS}")


def _numbers_from_the_list(
    findings: _Findings, bench: Bench, summary: Mapping[str, Any], claims: Sequence[Claim]
) -> None:
    """The overall score and its interval again, from the scores of the list."""
    if bench.metrics:
        findings.notes.append("this metric's mean needs more than the list holds, and was not computed again")
        return
    unscored = sum(claim.score is None for claim in claims)
    findings.expect(not unscored, f"{unscored} of {len(claims)} pictures of the list have no score")
    samples = [Sample(c.id, c.k, c.task, "", c.seed, "", "", c.score) for c in claims]
    found = standard_metrics(samples, None)["images" if mean_over(summary) == "images" else "overall"]
    stated = _interval(summary)
    same = found is not None and abs(found["value"] - stated.value) <= 1e-9
    told = "none" if found is None else f"{found['value']:.4f}"
    findings.expect(same, f"the list's own scores give {told}, not {stated.value:.4f}")
    if found is not None:
        ends = (found["low"], found["high"])
        near = 0.1 * (ends[1] - ends[0]) + 1e-9  # a bootstrap of other random numbers
        same = all(abs(a - b) <= near for a, b in zip(ends, (stated.low, stated.high), strict=True))
        findings.expect(
            same, f"their interval is {ends[0]:.4f} to {ends[1]:.4f}, not {stated.low:.4f} to {stated.high:.4f}"
        )


def _prompts(
    findings: _Findings, bench: Bench, summary: Mapping[str, Any], claims: Sequence[Claim]
) -> dict[str, Prompt] | None:
    """The bench's prompts by id; None, with a note, where they are not to be had, or are others."""
    try:
        known = {prompt.id: prompt for prompt in bench.prompts()}
    except RequestError as error:
        findings.notes.append(f"not drawn again: {error}")
        return None
    if summary["version"] != bench.version:
        findings.notes.append(
            f"not drawn again: version {summary['version']} of the bench, and here is {bench.version}"
        )
        return None
    try:
        prompts = {claim.id: prompt_of(claim, known) for claim in claims}
    except RequestError as error:
        findings.expect(False, str(error))
        return None
    pictures = [(claim.id, claim.k) for claim in claims]
    whole = len(pictures) == len(known) * summary["samples"] and sorted(pictures) == sorted(
        (name, k) for name in known for k in range(summary["samples"])
    )
    findings.expect(
        whole, f"the list is not the whole bench, {len(known)} prompts with {summary['samples']} pictures each"
    )
    moved = sum(claim.task != prompts[claim.id].task for claim in claims)
    findings.expect(not moved, f"{moved} of {len(claims)} pictures stand under another task than their prompt's")
    off = sum(claim.seed != prompts[claim.id].seed(summary["seed"], claim.k) for claim in claims)
    findings.expect(not off, f"{off} of {len(claims)} seeds are not those of the rule for base seed {summary['seed']}")
    return prompts


# ---------------------------------------------------------------------------------------------------- drawn and judged


def _chosen(claims: Sequence[Claim], pictures: int, seed: str) -> tuple[list[Claim], list[Claim]]:
    """One picture each of ``pictures`` prompts, by a hash of ``seed``; and published pictures besides."""

    def rank(claim: Claim) -> bytes:
        return hashlib.sha256(f"{seed}|{claim.id}|{claim.k}".encode()).digest()

    one_each: dict[str, Claim] = {}
    for claim in sorted(claims, key=rank):
        one_each.setdefault(claim.id, claim)
    chosen = list(one_each.values())[:pictures]
    published = [claim for claim in sorted(claims, key=rank) if claim.file and claim not in chosen]
    return chosen, published[: pictures // 4]


def _draw(
    generator: ModelGenerator, claims: Sequence[Claim], prompts: Mapping[str, Prompt], progress: Any
) -> list[Image.Image]:
    drawn: list[Image.Image] = []
    for start in range(0, len(claims), _BATCH):
        batch = claims[start : start + _BATCH]
        drawn += generator.generate([prompts[claim.id] for claim in batch], [claim.seed for claim in batch])
        progress(len(drawn), len(claims))
    return drawn


def _judged(
    findings: _Findings,
    bench: Bench,
    summary: Mapping[str, Any],
    drawn: Sequence[Image.Image],
    prompts: Sequence[Prompt],
) -> list[Score | None]:
    """Scores by this machine's judge; all None, with a note, where it lacks something or the card's was a program."""
    theirs = summary.get("scorer") or {}
    if theirs.get("scorer") in ("own", "external"):
        findings.notes.append("not judged again: the judge was a program of the author's")
        return [None] * len(drawn)
    recorded = theirs.get("protocol")
    name = recorded.get("name") if isinstance(recorded, Mapping) else None
    try:
        scorer = scorer_of(bench, name if name in bench.protocols else bench.protocols[0], USUAL)
        mine = identity_of(scorer)
    except RequestError as error:
        findings.notes.append(f"not judged again: {error}")
        return [None] * len(drawn)
    if changed := store.differences(without_addresses(theirs), without_addresses(without_paths(mine))):
        findings.notes.append(f"another judge than the card's: {'; '.join(changed)}")
    return [*judge(scorer, drawn, prompts)]


def _redrawn(folder: Path, claim: Claim, picture: Image.Image, score: Score | None) -> Redrawn:
    levels = None
    if claim.file and (folder / claim.file).is_file():
        levels = level_difference(store.read_picture(folder / claim.file), picture)
    return Redrawn(claim, pixels_sha256(picture) == claim.pixels_sha256, levels, score)


def level_difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of any value of two RGB pictures, 0..255; 255 where their sizes differ."""
    import numpy as np

    if one.size != other.size:
        return 255
    return int(abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max())


def _verdict(key: str, summary: Mapping[str, Any], redrawn: Sequence[Redrawn], findings: _Findings) -> Verdict:
    claimed = _interval(summary)
    pairs = [
        (one.claim.id, one.claim.score, one.score.value)
        for one in redrawn
        if one.score and one.claim.score is not None and one.score.value is not None
    ]
    _expect_same_scores(findings, redrawn)
    verdict = Verdict(key, claimed, redrawn, contradictions=findings.contradictions, notes=findings.notes)
    if not pairs:
        return verdict
    there, here = ({name: [pair[side]] for name, *pair in pairs} for side in (0, 1))
    difference = paired_difference(there, here, level=LEVEL)
    allowed = max(claimed.high - claimed.value, claimed.value - claimed.low)
    findings.expect(
        difference.low <= allowed and difference.high >= -allowed,
        f"judged again, the pictures score {difference.value:+.3f} ({LEVEL:.0%} interval {difference.low:+.3f} to "
        f"{difference.high:+.3f}), which is beyond the card's own interval",
    )
    means = (mean_interval(list(side.values())) for side in (there, here))
    return replace(verdict, there=next(means), here=next(means), difference=difference)


def _expect_same_scores(findings: _Findings, redrawn: Sequence[Redrawn]) -> None:
    """One picture has one score, where the judge is the same."""
    same = [one for one in redrawn if one.identical and one.score]
    off = sum(_differs(one.claim.score, one.score.value) for one in same if one.score)
    told = f"{off} of {len(same)} pictures that are identical are judged otherwise"
    if off and any(note.startswith("another judge") for note in findings.notes):
        findings.notes.append(told)
    else:
        findings.expect(not off, told)


def _differs(there: float | None, here: float | None) -> bool:
    if there is None or here is None:
        return there is not here
    return abs(there - here) > TOLERANCE


# ------------------------------------------------------------------------------------------------------------- report


def report(source: str, verdicts: Sequence[Verdict]) -> str:
    """The verdicts in words, one paragraph a metric."""
    return "\n\n".join([source, *("\n".join(_lines(verdict)) for verdict in verdicts)])


def _lines(verdict: Verdict) -> list[str]:
    c = verdict.claimed
    lines = [f"{verdict.key}: the card says {c.value:.3f}, {c.level:.0%} interval {c.low:.3f} to {c.high:.3f}"]
    if verdict.redrawn:
        same = sum(one.identical for one in verdict.redrawn)
        lines.append(f"  pictures: {same} of {len(verdict.redrawn)} drawn again are identical, value by value")
    if levels := [one.levels for one in verdict.redrawn if one.levels is not None]:
        far = sum(one > SAME_LEVELS for one in levels)
        told = f"  of {len(levels)} published ones, the largest difference is {max(levels)} of 255 levels"
        lines.append(told + (f"; {far} differ by more than {SAME_LEVELS}" if far else ""))
    if verdict.difference and verdict.there and verdict.here:
        d = verdict.difference
        lines.append(
            f"  scores: {verdict.there.value:.3f} there, {verdict.here.value:.3f} here; difference {d.value:+.3f}, "
            f"{d.level:.0%} interval {d.low:+.3f} to {d.high:+.3f}"
        )
        agreeing, of = verdict.agreeing
        low, high = wilson_interval(agreeing / of, of)
        lines.append(f"  scored as the card says: {agreeing} of {of} (95% interval {low:.3f} to {high:.3f})")
    lines += [f"  note: {note}" for note in verdict.notes]
    lines += [f"  not so: {one}" for one in verdict.contradictions]
    return [*lines, f"  {_word(verdict)}"]


def _word(verdict: Verdict) -> str:
    if verdict.contradictions:
        return "NOT CONSISTENT"
    return "consistent" if verdict.difference else "nothing found against it, but not judged again"
