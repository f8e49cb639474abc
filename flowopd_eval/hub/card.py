"""The card of an adapter: metadata that the Hub reads, and what a person needs to use and to doubt it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from flowopd_eval.benches import bench_by_key
from flowopd_eval.export import escape_markdown, model_index
from flowopd_eval.harness import protocol_and_engine
from flowopd_eval.hub.licences import LICENCES, OPEN_PROMPTS, POWERED_BY, Licence, card_licence
from flowopd_eval.hub.results import Claim, Results

if TYPE_CHECKING:
    from flowopd_eval.hub.subject import Subject, Upstream
    from flowopd_eval.records import SamplingRecord

_JUDGED_BY = {"ocr": ("ocr", "sign_ocr"), "quality": ("shapes_quality",), "partial_credit": ("shapes_geneval",)}
_TAGS = ["lora", "flow-opd", "text-to-image"]
_PROMPT = {"tiny": "a drawing of a red circle on sand", "flow-opd": 'a sign that says "OPEN"'}


def render_card(
    subject: Subject,
    results: Results,
    record: SamplingRecord,
    name: str,
    provenance: Mapping[str, Any],
    texts: Mapping[Upstream, Collection[str]] = {},
) -> str:
    """``README.md`` of the repository ``name``. Texts from runs and recipes are escaped.

    ``texts`` are the licences and notices of others that go along, by the adapter that they belong to.
    """
    shown = [claim for claim in results.claims if claim.file]
    tiny = subject.family.name == "tiny"
    example = next((claim for claim in shown if claim.prompt), None)
    return render(
        "card.md.j2",
        metadata=_metadata(subject, results, name),
        name=name,
        title=name.rpartition("/")[2],
        tiny=tiny,
        base=subject.family.base.removeprefix("hub:"),
        subject=subject,
        record=record,
        prompt=json.dumps(example.prompt if example else _PROMPT[subject.family.name], ensure_ascii=False),
        seed=example.seed if example else 0,
        example=example.file if example else None,
        latent=(16, record.height // (4 if tiny else 8), record.width // (4 if tiny else 8)),
        device="cpu" if tiny else "cuda",
        tables=[_table(one) for one in results.summaries.values()],
        bench=bench_by_key(next(iter(results.summaries), "geneval")).flag,
        shown=[_caption(number, claim) for number, claim in enumerate(shown, 1)],
        pictures=len(results.claims),
        recipe=_recipe(subject),
        trained_on=_rewards(subject) & set(results.summaries),
        provenance=provenance,
        licence=_licence(subject),
        own_licence=LICENCES[subject.family.name],
        texts=texts,
        powered_by=None if tiny else POWERED_BY,
        withheld=sorted(set(results.summaries) - set(OPEN_PROMPTS)),
    )


def render(template: str, **context: Any) -> str:
    """A Markdown template of this package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flowopd_eval.hub", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = escape_markdown
    return environment.get_template(template).render(**context)


def _licence(subject: Subject) -> Licence:
    return card_licence(subject.family.name, [one.licence for one in subject.upstream if one.carried])


def _metadata(subject: Subject, results: Results, name: str) -> str:
    from huggingface_hub import ModelCardData

    licence = _licence(subject)
    base: str | list[str] | None = None if subject.family.name == "tiny" else subject.family.base.removeprefix("hub:")
    relation = "adapter"
    parts = [one.source for one in subject.upstream if one.source.startswith("hub:")]
    if subject.merged and parts:
        base = [source.removeprefix("hub:").partition("@")[0] for source in parts]
        relation = "merge"
    index = model_index(name, list(results.summaries.values())) if results.summaries else {}
    data = ModelCardData(
        license=licence.identifier,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=_TAGS + (["stable-diffusion-3.5"] if subject.family.name == "flow-opd" else []),
        base_model=base,
        base_model_relation=relation if base else None,
        license_name=licence.name,
        license_link=licence.link,
        **index,
    )
    return data.to_yaml()


def _table(summary: Mapping[str, Any]) -> dict[str, Any]:
    """One metric's numbers, overall first, each with its interval; and what decides them."""
    protocol, engine = protocol_and_engine(summary)
    metrics = summary["metrics"]
    rows = {"overall": metrics["overall"], **metrics["tasks"]}
    return {
        "key": summary["key"],
        "rows": [(task, row["value"], row["low"], row["high"], row["n"]) for task, row in rows.items()],
        "facts": f"version {summary['version']}, protocol {protocol}, engine {engine}",
        "size": f"{summary['prompts']} prompts, pictures of each: {summary['samples']}, base seed {summary['seed']}",
        "prompts_sha256": summary["prompts_sha256"],
    }


def score_rows(summary: Mapping[str, Any]) -> list[str]:
    """The lines of a metric's table as the card writes them."""
    return [
        f"| {escape_markdown(task)} | {value:.3f} | {low:.3f} to {high:.3f} | {n} |"
        for task, value, low, high, n in _table(summary)["rows"]
    ]


def _caption(number: int, claim: Claim) -> tuple[int, str, str, int, str]:
    text = claim.prompt if claim.prompt is not None else f"{claim.id} (text not published)"
    return number, text, claim.key, claim.seed, "–" if claim.score is None else f"{claim.score:.3g}"


def _recipe(subject: Subject) -> list[tuple[str, str]]:
    """The settings of the training that a reader asks for first."""
    recipe, lora = subject.recipe, subject.recipe.get("lora") or {}
    optimizer, rollout = recipe.get("optimizer") or {}, recipe.get("rollout") or {}
    rows = {
        "stage": recipe.get("stage"),
        "started from": recipe.get("start"),
        "steps × batch": f"{recipe['steps']} × {recipe['batch_size']}" if "batch_size" in recipe else None,
        "taken": subject.training.get("taken"),
        "rank, alpha": f"{lora['rank']}, {lora['alpha']}" if lora else None,
        "learning rate": optimizer.get("learning_rate"),
        "rollout": f"{rollout['steps']} steps of {rollout['sampler']}, a = {rollout['a']}" if rollout else None,
        "objective": recipe.get("objective"),
        "weights": recipe.get("kl_weight"),
        "method": recipe.get("method"),
        "merged from": _parts(recipe) if subject.merged else None,
        "discarded energy": _share(recipe.get("discarded_energy", subject.training.get("discarded_energy"))),
    }
    rows |= {f"task {task['name']}": _task(task) for task in recipe.get("tasks") or ()}
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def _parts(recipe: Mapping[str, Any]) -> str | None:
    """The adapters of a merge with their weights."""
    teachers = (recipe.get("teachers") or {}).items()
    named = [(one["source"], one.get("weight")) if isinstance(one, Mapping) else (name, one) for name, one in teachers]
    return " + ".join(str(name) if weight is None else f"{weight} × {name}" for name, weight in named) or None


def _share(value: Any) -> str | None:
    return f"{value:.2%} of the weighted sum's" if isinstance(value, int | float) else None


def _task(task: Mapping[str, Any]) -> str:
    rewards = ", ".join(f"{name} × {weight:g}" for name, weight in (task.get("rewards") or {}).items())
    parts = {"prompts": task.get("prompts"), "teacher": task.get("teacher"), "rewards": rewards or None}
    return "; ".join(f"{key} {value}" for key, value in parts.items() if value)


def _rewards(subject: Subject) -> set[str]:
    """Metric keys that the training rewarded; the rewards of other stages only tell `check` how good a teacher is."""
    recipe = subject.recipe
    chosen = recipe.get("stage") == "sft" and (recipe.get("best_of", 1) > 1 or recipe.get("least_reward") is not None)
    if not (chosen or recipe.get("stage") in ("grpo", "nft")):
        return set()
    names = (name for task in recipe.get("tasks") or () for name in task.get("rewards") or {})
    return {key for name in names for key in _JUDGED_BY.get(name, (name,))}
