"""The main job: from what is asked for to pictures, scores and a report."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError, Unavailable, WorkError
from flowopd_eval.terminal import conclude, progress_bar, status

if TYPE_CHECKING:
    from flowopd_eval.benches import Bench, Judge
    from flowopd_eval.harness import BenchRun
    from flowopd_eval.models import ModelSpec
    from flowopd_eval.records import Prompt, SamplingRecord
    from flowopd_eval.store import BenchFolder, Shard

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the options of a run say."""

    benches: Sequence[str]
    models: Sequence[str]
    lora: str | None
    out: Path | None
    limit: int | None
    tasks: str | None
    samples: int | None
    steps: int | None
    guidance: float | None
    seed: int
    batch_size: int | None
    dtype: str | None
    device: str | None
    protocol: str | None
    prompts: Path | None
    shard: str | None
    judge: Judge


def draw(settings: Settings, *, score: bool) -> None:
    """Draw every bench with every model, judge where ``score``, and show what came of it.

    Raises:
        RequestError: what is asked for cannot be done so; nothing has been drawn.
        WorkError: as :func:`flowopd_eval.harness.run_bench`.
    """
    from flowopd_eval import harness, store
    from flowopd_eval.benches import PAPER, find_bench, flags_for
    from flowopd_eval.models import resolve
    from flowopd_eval.others import open_models
    from flowopd_eval.records import DTYPES

    if settings.dtype not in (None, *DTYPES):
        raise RequestError(f"--dtype {settings.dtype!r} is none of {', '.join(DTYPES)}.")
    specs = list(dict.fromkeys(resolve(name, settings.lora) for name in settings.models))
    _refuse_equal_names(specs)
    work = [(s, find_bench(flag, s.objects)) for s in specs for flag in flags_for(settings.benches, s.objects)]
    device = device_of(settings.device)
    by_base = {spec.base: [other for other in specs if other.base == spec.base] for spec in specs}
    opened = {base: open_models(base, mine, device, settings.dtype) for base, mine in by_base.items()}
    refuse_protocol([bench for _, bench in work], settings.protocol)
    _refuse_equal_folders(work)
    plans, lacking = _plans(settings, work, score=score)
    shard = _shard(settings.shard)
    if settings.out is None and shard.count > 1:
        raise RequestError("Parts of one run need one folder: give --out DIR, the same for each part.")
    out = settings.out or _default_out(settings.benches, specs)
    notices = [models.notice for models in opened.values() if models.notice]
    for notice in notices:
        _log.warning(notice)
    note = "\n".join([_note(specs), *notices])
    for base in by_base:
        models = opened.pop(base)  # one backbone in memory at a time
        with status(f"loading {', '.join(spec.name for spec in by_base[base])}"):
            models.load()
        for spec, run in plans:
            if spec.base == base:
                _warn_of_cut(models.cut(run.prompts), spec.name)
                generator = models.generator(spec, _record(settings, models.record(spec)))
                with progress_bar() as progress:
                    harness.run_bench(run, generator, out, shard=shard, note=note, progress=progress)
    store.note_unavailable(out, lacking)
    folders = [store.BenchFolder.of(out, spec.name, run.bench) for spec, run in plans]
    if settings.shard is None and shard.count > 1 and not _last_of_the_launch(folders, shard):
        return
    conclude(out)
    if score:
        refuse_unjudged(folders)
    if PAPER in settings.benches:
        _beside_the_paper(out)


def _warn_of_cut(prompts: Sequence[Prompt], name: str) -> None:
    if prompts:
        which = ", ".join(prompt.id for prompt in prompts[:5]) + (" …" if len(prompts) > 5 else "")
        _log.warning(
            "%d of the prompts are longer than the text encoders of %s take, which see only their beginnings: %s.",
            len(prompts), name, which,
        )  # fmt: skip


def refuse_unjudged(folders: Sequence[BenchFolder]) -> None:
    """Raises ``WorkError`` where a judge gave not a single score: whoever asked for its scores has none."""
    from flowopd_eval import store

    for folder in folders:
        summary = json.loads((folder.path / "summary.json").read_bytes())
        if summary["n"] or not summary["unscored"]:
            continue
        every = (sample for path in folder.journals() for sample in store.read_samples(path))
        why = next((sample.error for sample in every if sample.error), "no reason was given")
        raise WorkError(
            f"Not one picture of {folder.entry} could be judged. The first: {why}. The pictures are kept; once that is "
            f"mended, `flowopd-eval score {folder.out}` judges them."
        )


def _beside_the_paper(out: Path) -> None:
    from rich.console import Console

    from flowopd_eval import paper, store

    result = paper.beside_paper(json.loads((out / "summary.json").read_bytes())["models"])
    Console().print(paper.terminal_report(result), crop=False)
    store.write_json(out / "paper.json", result.to_json())
    print(f"Written to {out / 'paper.json'}.")


def _plans(
    settings: Settings, work: Sequence[tuple[ModelSpec, Bench]], *, score: bool
) -> tuple[list[tuple[ModelSpec, BenchRun]], dict[str, str | None]]:
    """What can be run; and of each bench, by its metric's key, what its judge lacks, or None.

    Raises:
        Unavailable: no bench that was asked for has a judge.
    """
    plans: list[tuple[ModelSpec, BenchRun]] = []
    lacking: dict[str, str | None] = {}
    for spec, bench in work:
        try:
            run = _bench_run(settings, bench, spec, score=score)
            if run.scorer:
                run.scorer.identity()  # it may lack something
        except Unavailable as error:
            lacking[bench.key] = str(error)
        else:
            lacking[bench.key] = None
            plans.append((spec, run))
    if not plans:
        raise Unavailable("\n".join(filter(None, lacking.values())))
    return plans, lacking


def _bench_run(settings: Settings, bench: Bench, spec: ModelSpec, *, score: bool) -> BenchRun:
    from flowopd_eval.benches import scorer_of
    from flowopd_eval.drawbench import refuse_unscreened
    from flowopd_eval.harness import OWN_PROMPTS, BenchRun
    from flowopd_eval.prompts import read_prompts
    from flowopd_eval.report import metrics_of

    protocol = protocol_of(bench, _protocol_of_the_paper(settings, bench))
    if settings.prompts:
        refuse_unscreened(settings.prompts)
    prompts = read_prompts(settings.prompts, task=bench.flag) if settings.prompts else bench.prompts()
    chosen, partial = _choose(bench.flag, prompts, settings.tasks, settings.limit)
    if bench.flag not in settings.judge.own:  # which may know other words, and need other fields
        for prompt in chosen:
            bench.check(prompt)
    if settings.prompts and not _are_of(bench, prompts):
        partial = " ".join([OWN_PROMPTS, *([partial] if partial else [])])
    default_batch = 16 if spec.record.width <= 128 else 4
    return BenchRun(
        bench=bench.flag,
        key=bench.key,
        version=bench.version,
        prompts=tuple(chosen),
        scorer=scorer_of(bench, protocol, settings.judge) if score else None,
        samples=settings.samples or bench.samples,
        seed=settings.seed,
        batch_size=settings.batch_size or default_batch,
        partial=partial,
        correct_at=bench.correct_at,
        metrics=metrics_of(bench),
    )


def _protocol_of_the_paper(settings: Settings, bench: Bench) -> str | None:
    """The protocol asked for; for ``--bench paper``, GenEval's is Flow-GRPO's, and the others have one each."""
    from flowopd_eval.benches import PAPER
    from flowopd_eval.scorers.geneval import FLOW_GRPO

    if PAPER not in settings.benches:
        return settings.protocol
    return (settings.protocol or FLOW_GRPO.name) if bench.flag == "geneval" else None


def _are_of(bench: Bench, prompts: Sequence[Prompt]) -> bool:
    """Whether prompts are all of the bench's; not where those cannot be had, as without a network."""
    from flowopd_eval.prompts import prompts_sha256

    try:
        return prompts_sha256(prompts) == prompts_sha256(bench.prompts())
    except (RequestError, WorkError):
        return False


def judge_of(
    benches: Sequence[str],
    url: str | None,
    model: str | None,
    metrics: Sequence[str] | None,
    ocr_engine: str,
    ocr_workers: int | None,
    own: Sequence[str] | None,
    commands: Sequence[str] | None,
) -> Judge:
    """What the options say of the judges; never what a run names."""
    from flowopd_eval.benches import Judge

    if url is None and model is not None:
        raise RequestError(f"--judge-model {model} needs the server that has it: give --judge-url.")
    return Judge(
        url,
        model,
        tuple(metrics or ()),
        ocr_engine,
        ocr_workers,
        _by_bench("--scorer", own, benches),
        _by_bench("--scorer-command", commands, benches),
    )


def _by_bench(option: str, values: Sequence[str] | None, benches: Sequence[str]) -> dict[str, str]:
    """``BENCH=VALUE``, or a value alone where one bench is asked for, as flag -> value; BENCH may be a key."""
    from flowopd_eval.benches import BENCHES, PAPER_FLAGS, flags_for

    of_key = {bench.key: bench.flag for bench in BENCHES}
    found: dict[str, str] = {}
    flags = list(dict.fromkeys(flag for objects in PAPER_FLAGS for flag in flags_for(benches, objects)))
    for value in values or ():
        flag, sign, rest = value.partition("=")
        if not (sign and flag in flags):
            if len(flags) > 1:
                raise RequestError(f"{option} {value}: say which bench it judges, as in {option} '{flags[0]}={value}'.")
            flag, rest = flags[0], value
        flag = of_key.get(flag, flag)
        if flag in found:
            raise RequestError(f"{option}: {flag} was given two judges, {found[flag]!r} and {rest!r}.")
        found[flag] = rest
    return found


def refuse_protocol(benches: Sequence[Bench], wanted: str | None) -> None:
    """Raises ``RequestError`` for a protocol that none of ``benches`` has."""
    if wanted and not any(wanted in bench.protocols for bench in benches):
        raise RequestError(
            " ".join(
                f"Bench {flag} has no protocol {wanted!r}; it has: {', '.join(protocols)}."
                for flag, protocols in dict.fromkeys((bench.flag, bench.protocols) for bench in benches)
            )
        )


def protocol_of(bench: Bench, wanted: str | None) -> str:
    """The protocol ``wanted`` where the bench has it, else its first: a protocol is that of some benches of a run."""
    return wanted if wanted in bench.protocols else bench.protocols[0]


def _choose(
    flag: str, prompts: Sequence[Prompt], tasks: str | None, limit: int | None
) -> tuple[list[Prompt], str | None]:
    """The prompts that --tasks and --limit leave, and in words why they are not all."""
    chosen, why = list(prompts), []
    if tasks:
        wanted = [task.strip() for task in tasks.split(",")]
        known = dict.fromkeys(prompt.task for prompt in prompts)
        for task in wanted:
            if task not in known:
                raise RequestError(f"--tasks: {flag} has no task {task!r}; there are: {', '.join(known)}.")
        chosen = [prompt for prompt in chosen if prompt.task in wanted]
        why.append(f"--tasks {','.join(wanted)}")
    if limit:
        place = Counter[str]()  # of a prompt within its task
        kept = []
        for prompt in chosen:
            place[prompt.task] += 1
            if place[prompt.task] <= limit:
                kept.append(prompt)
        if len(kept) < len(chosen):
            why.append(f"--limit {limit}")
        chosen = kept
    return chosen, " ".join(why) or None


def _record(settings: Settings, record: SamplingRecord) -> SamplingRecord:
    changes: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance}
    return replace(record, **{name: value for name, value in changes.items() if value is not None})


def _default_out(flags: Sequence[str], specs: Sequence[ModelSpec]) -> Path:
    import time

    stem = "-".join([time.strftime("%Y%m%d-%H%M%S"), *dict.fromkeys(flags), *(spec.slug for spec in specs)])
    return Path("runs") / stem[:120]


def _shard(text: str | None) -> Shard:
    """The shard asked for, or this process's part of an ``accelerate launch`` / ``torchrun``."""
    from flowopd_eval.store import WHOLE, Shard

    if text is not None:
        return Shard.parse(text)
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK")
    return Shard(int(rank), count) if count > 1 and rank else WHOLE


def _last_of_the_launch(folders: Sequence[BenchFolder], shard: Shard) -> bool:
    """Whether this process of a launch is the one that concludes: the first, once the others are done."""
    import time

    from flowopd_eval.harness import collect

    if shard.index > 0:
        return False
    while any(collect(folder)[1] for folder in folders):
        time.sleep(1)  # a process that fails is ended by the launcher, and this one with it
    return True


def device_of(name: str | None) -> str:
    import torch

    if name is None:
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"--device {name!r} is not a device; give cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"--device {name}: PyTorch {torch.__version__} finds no CUDA device here; use --device cpu.")
    return name


def _note(specs: Sequence[ModelSpec]) -> str:
    tiny = "Evaluated: the built-in miniature, not SD3.5. Its scores compare with nothing but the miniature's own."
    said = [tiny if spec.base == "builtin:tiny" else f"Evaluated: {spec.name} ({spec.about})." for spec in specs]
    return "\n".join(dict.fromkeys(said))


def _refuse_equal_folders(work: Sequence[tuple[ModelSpec, Bench]]) -> None:
    """Raises ``RequestError`` for two benches of a model that would draw into one folder."""
    seen: dict[tuple[str, str], Bench] = {}
    for spec, bench in work:
        other = seen.setdefault((spec.name, bench.flag), bench)
        if other.key != bench.key:
            raise RequestError(
                f"{other.key} and {bench.key} of {spec.name} would lie in one folder: draw them into an --out each."
            )


def _refuse_equal_names(specs: Sequence[ModelSpec]) -> None:
    """Raises ``RequestError`` for two models whose results would lie in one folder."""
    from flowopd_eval.store import folder_name

    seen: dict[str, ModelSpec] = {}
    for spec in specs:
        other = seen.setdefault(folder_name(spec.name), spec)
        if other is not spec:
            raise RequestError(
                f"Two models go by the name {spec.name!r}, and so would their results: {other.adapter or other.base} "
                f"and {spec.adapter or spec.base}. Rename a folder, or draw them into an --out each."
            )
