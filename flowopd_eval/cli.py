"""``flowopd-eval``: results on stdout, progress and warnings on stderr.

Exit codes: 0 done, 1 the work failed or was stopped, 2 the request was wrong.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flowopd_eval.errors import RequestError, Unavailable, WorkError
from flowopd_eval.job import Settings, device_of, draw, judge_of, protocol_of, refuse_protocol, refuse_unjudged
from flowopd_eval.publishing_cli import push, verify
from flowopd_eval.records import SETTINGS_FILE, SamplingRecord
from flowopd_eval.terminal import conclude, progress_bar, status

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Draw and score text-to-image benches with the Flow-OPD student, its experts, or any other model.",
)

BenchOption = Annotated[list[str] | None, typer.Option("--bench", help="Bench to run; repeatable. See `benches`.")]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model", help="Model: family:member, folder, hub:REPO@REV or FILE.py:FUNCTION; repeatable."),
]
LoraOption = Annotated[str | None, typer.Option(help="LoRA to put on the model: folder, file or hub:REPO@REV.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/<date>-<bench>-<model>).")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first N prompts of each task.")]
TasksOption = Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")]
SamplesOption = Annotated[int | None, typer.Option(min=1, help="Pictures a prompt (default: the bench's).")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Sampling steps (default: the model's record).")]
GuidanceOption = Annotated[float | None, typer.Option(min=0, help="Guidance scale (default: the model's record).")]
SeedOption = Annotated[int, typer.Option(min=0, help="Base seed.")]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Pictures drawn at a time (default: 16; 4 at 512 pixels).")
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the model's record).")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (default: cuda where there is one).")]
ProtocolOption = Annotated[str | None, typer.Option(help="Scoring protocol (default: the bench's first).")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Prompt file instead of the bench's own: JSON lines, or .txt with one a line.")
]
JudgeUrlOption = Annotated[
    str | None,
    typer.Option(
        help="For geneval2 (with log-probs), unifiedreward, qwenvl: base URL of an OpenAI-compatible server; its key "
        "from OPENAI_API_KEY."
    ),
]
ScorerOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[BENCH=]NAME",
        help="Judge of your own, in the bench's judge's place: FILE.py:CLASS (it is "
        "run), or an entry point's name; repeatable.",
    ),
]
ScorerCommandOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[BENCH=]COMMAND",
        help="Program that judges in the bench's judge's place (it is run): ocr, "
        "preference, quality, deqa; repeatable.",
    ),
]
MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        help="For preference: pickscore, hps_v2_1, aesthetic_v2, clip_score; repeatable, the first is the score."
    ),
]
OcrEngineOption = Annotated[str, typer.Option(help="For ocr: rapidocr or paddle3.")]
OcrWorkersOption = Annotated[
    int | None, typer.Option(min=1, help="For ocr: processes that read (default: half the processors, at most 4).")
]
JudgeModelOption = Annotated[str | None, typer.Option(help="Model on that server (default: the bench's official one).")]
ShardOption = Annotated[str | None, typer.Option(help="Do part i of n (0/3, 1/3, 2/3) of each run.")]
AcrossOption = Annotated[
    str | None, typer.Option(metavar="record", help="Let the sampling records differ: they are what is compared.")
]


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"flowopd-eval {version('flowopd-eval')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    bench: BenchOption = None,
    model: ModelOption = None,
    lora: LoraOption = None,
    out: OutOption = None,
    limit: LimitOption = None,
    tasks: TasksOption = None,
    samples: SamplesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    protocol: ProtocolOption = None,
    prompts: PromptsOption = None,
    shard: ShardOption = None,
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    metric: MetricOption = None,
    ocr_engine: OcrEngineOption = "rapidocr",
    ocr_workers: OcrWorkersOption = None,
    scorer: ScorerOption = None,
    scorer_command: ScorerCommandOption = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Draw and score: `flowopd-eval --bench geneval --model flow-opd`. Without --model, the built-in miniature."""
    if context.invoked_subcommand is not None:

        def was_given(name: str) -> bool:
            source = context.get_parameter_source(name)
            return source is not None and source.name != "DEFAULT"

        before = [f"--{name.replace('_', '-')}" for name in context.params if was_given(name)]
        if before:
            command = context.invoked_subcommand
            raise RequestError(f"Put the options of `{command}` after its name; before it stand: {', '.join(before)}.")
        return
    if not bench:
        raise RequestError("Nothing to do: name a bench (`--bench geneval`; `flowopd-eval benches` lists them).")
    draw(
        Settings(bench, model or ["tiny"], lora, out, limit, tasks, samples, steps, guidance, seed, batch_size, dtype,
                 device, protocol, prompts, shard,
                 judge_of(bench, judge_url, judge_model, metric, ocr_engine, ocr_workers, scorer, scorer_command)),
        score=True,
    )  # fmt: skip


@app.command()
def generate(
    bench: BenchOption = None,
    model: ModelOption = None,
    lora: LoraOption = None,
    out: OutOption = None,
    limit: LimitOption = None,
    tasks: TasksOption = None,
    samples: SamplesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    prompts: PromptsOption = None,
    shard: ShardOption = None,
) -> None:
    """Only draw a bench's pictures; `score` judges them later."""
    from flowopd_eval.benches import Judge

    if not bench:
        raise RequestError("Nothing to draw: name a bench (`--bench geneval`).")
    draw(
        Settings(bench, model or ["tiny"], lora, out, limit, tasks, samples, steps, guidance, seed, batch_size, dtype,
                 device, None, prompts, shard, Judge()),
        score=False,
    )  # fmt: skip


@app.command()
def score(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run, a folder in GenEval's layout, or GenEval's results.jsonl.")
    ],
    bench: Annotated[
        str | None,
        typer.Option(help="Metric of a foreign folder: a bench's key, as `benches` lists (default: geneval)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model that drew a foreign folder (default: unknown).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run to make of a foreign folder (default: runs/score-<its name>).")
    ] = None,
    protocol: ProtocolOption = None,
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    metric: MetricOption = None,
    ocr_engine: OcrEngineOption = "rapidocr",
    ocr_workers: OcrWorkersOption = None,
    scorer: ScorerOption = None,
    scorer_command: ScorerCommandOption = None,
    again: Annotated[bool, typer.Option("--again", help="Judge pictures that have a score, too.")] = False,
) -> None:
    """Judge pictures that exist: those of a run that have no score yet, or any folder in GenEval's layout.

    With another judge or protocol than the run's, named by an option, all of its pictures are judged, and their scores
    replaced; --protocol is for the benches that have it, the others keep theirs.
    Of a results.jsonl of GenEval's own, the numbers with intervals, and each verdict replayed from its boxes.
    """
    from flowopd_eval import harness, rescore, store
    from flowopd_eval.benches import bench_by_key, scorer_of
    from flowopd_eval.report import metrics_of

    if folder.is_file():
        _replay(folder)
        return
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder. Give a run, or a folder with NNNNN/metadata.jsonl and samples/.")
    said = (judge_url, judge_model, metric, ocr_engine, ocr_workers, scorer, scorer_command)
    if (folder / "run.json").exists():
        foreign = {"--bench": bench, "--model": model, "--out": out}
        if given := [option for option, value in foreign.items() if value is not None]:
            raise RequestError(
                f"{folder} is a run: its benches and models are known, and its scores stay in it. Leave out "
                f"{', '.join(given)}, which are for a folder of other pictures."
            )
        out, folders = folder, store.bench_folders(folder)
        judge = judge_of([entry.request()["bench"] for entry in folders], *said)
    else:
        kind = bench_by_key(bench or "geneval")
        judge = judge_of([kind.flag], *said)
        refuse_protocol([kind], protocol)
        scorer_of(kind, protocol_of(kind, protocol), judge).identity()  # first: it may lack something
        out = out or Path("runs") / f"score-{folder.resolve().name}"
        run = harness.BenchRun(
            kind.flag, kind.key, kind.version, tuple(kind.prompts()), None, correct_at=kind.correct_at
        )
        folders = [rescore.import_geneval(folder, out, run, model=model or "unknown")]
    refuse_protocol([bench_by_key(entry.request()["key"]) for entry in folders], protocol)
    named = again or ocr_engine != "rapidocr" or any([judge_url, metric])
    lacking: dict[str, str | None] = {}
    todo = []  # every judge is there before the first score is touched
    for entry in folders:
        request = entry.request()
        kind = bench_by_key(request["key"])
        recorded = (request["scorer"] or {}).get("protocol")
        own = recorded.get("name") if isinstance(recorded, dict) else None
        try:
            chosen = scorer_of(kind, protocol if protocol in kind.protocols else protocol_of(kind, own), judge)
            if not (named or protocol in kind.protocols or kind.flag in {*judge.own, *judge.command}):
                rescore.refuse_another(entry, chosen)
            todo.append((entry, kind, chosen))
            lacking[kind.key] = None
        except Unavailable as error:
            lacking[kind.key] = str(error)
    if all(lacking.values()):
        raise Unavailable("\n".join(filter(None, lacking.values())))
    for entry, kind, chosen in todo:
        with progress_bar() as progress:
            rescore.rescore(entry, chosen, again=again, metrics=metrics_of(kind), progress=progress)
    store.note_unavailable(out, lacking)
    conclude(out)
    refuse_unjudged([entry for entry, _, _ in todo])


def _replay(path: Path) -> None:
    from rich.console import Console

    from flowopd_eval import official

    Console().print(official.terminal_report(official.read_results(path)), crop=False)


@app.command()
def explain(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run.")]) -> None:
    """Judge a run's pictures by one protocol after the other: how much of a number is its protocol."""
    from rich.console import Console

    from flowopd_eval import explain as explaining
    from flowopd_eval import store
    from flowopd_eval.benches import bench_by_key

    for entry in store.bench_folders(folder):
        bench = bench_by_key(entry.request()["key"])
        if not bench.steps:
            typer.echo(f"{entry.entry}: {bench.title} has one protocol only.")
            continue
        scorers = [(name, bench.scorer(protocol)) for name, protocol in bench.steps]
        with progress_bar() as progress:
            explanation = explaining.explain(entry, scorers, progress=progress)
        Console().print(explaining.terminal_report(explanation), crop=False)
        typer.echo(f"Written to {entry.path / 'explain.json'}.")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Also write DIR/export: md, csv, latex, json, model-index, eval-results; geneval and compbench "
            "write a folder; repeatable.",
        ),
    ] = None,
    hub_dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=OWNER/NAME[:TASK]", help="For eval-results: the Hub's dataset of a metric."),
    ] = None,
    source_url: Annotated[
        str | None, typer.Option(help="For model-index and eval-results: where the results can be looked up.")
    ] = None,
) -> None:
    """Merge a run's shards, sum it up, and write its report.html."""
    from flowopd_eval import compbench_layout, export, official, store

    datasets = dict(map(_hub_dataset, hub_dataset or ()))
    conclude(folder)
    if formats:
        summaries = json.loads((folder / "summary.json").read_bytes())["models"]
        results = export.Results(summaries, store.read_run(folder), datasets, source_url)
        folders = {
            "geneval": lambda entry, place: [official.write_folder(entry, place)],
            "compbench": compbench_layout.write_layout,
        }
        paths = export.write_exports(folder, results, [name for name in formats if name not in folders])
        for bench in [name for name in formats if name in folders]:
            chosen = [entry for entry in store.bench_folders(folder) if entry.request()["bench"] == bench]
            if not chosen:
                raise RequestError(f"{folder} holds no run of --bench {bench}: --format {bench} writes nothing.")
            for entry in chosen:
                paths += folders[bench](entry, folder / "export" / entry.entry)
        for path in paths:
            typer.echo(f"Export: {path}")


def _hub_dataset(text: str) -> tuple[str, tuple[str, str]]:
    """Key, dataset and its task (``default`` unless given) of ``KEY=OWNER/NAME:TASK``."""
    import re

    if match := re.fullmatch(r"([\w.-]+)=([\w.-]+/[\w.-]+)(?::([\w.-]+))?", text, re.ASCII):
        return match[1], (match[2], match[3] or "default")
    raise RequestError(f"Expected --hub-dataset KEY=OWNER/NAME or KEY=OWNER/NAME:TASK, but got {text!r}.")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A B...", help="Runs (OUT, or OUT/MODEL); A is the baseline.")],
    across: AcrossOption = None,
    show: Annotated[int, typer.Option(min=0, help="Changed prompts to list in each direction.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with all pictures side by side.")
    ] = None,
) -> None:
    """Paired differences on the same prompts and seeds: `flowopd-eval compare A B`, or one run of several models."""
    from rich.console import Console

    from flowopd_eval import compare as comparing
    from flowopd_eval import store

    result = comparing.compare_runs(runs, across)
    Console().print(comparing.terminal_report(result, show), crop=False)
    if json_file:
        store.write_json(json_file, result.to_json())
        typer.echo(f"Written to {json_file}.")
    if html_file:
        from flowopd_eval.gallery import write_gallery

        typer.echo(f"Written to {write_gallery(runs, html_file, across)}.")


@app.command()
def power(
    runs: Annotated[list[Path], typer.Argument(metavar="A B", help="Two runs on the same prompts, or one of two.")],
    delta: Annotated[float, typer.Option(help="Difference to find: points of 100, or the metric's own units.")],
    power: Annotated[float, typer.Option(help="Probability of finding it.")] = 0.8,
    across: AcrossOption = None,
) -> None:
    """How many prompts a difference needs, by the spread of two runs: `flowopd-eval power A B --delta 2`."""
    from flowopd_eval import compare as comparing

    for requirement in comparing.prompts_for(runs, delta, power, across):
        for line in (*requirement.warnings, requirement.sentence):
            typer.echo(line)


@app.command()
def models() -> None:
    """List the models that are known by name."""
    from rich.console import Console
    from rich.table import Table

    from flowopd_eval.models import FAMILIES, REAL_MODEL_HELP

    for family in FAMILIES.values():
        r = family.record
        settings = f"{r.width}x{r.height}, {r.steps} steps, guidance {r.guidance:g}, shift {r.shift:g}, {r.dtype}"
        table = Table("model", "what it is", "adapter", title=f"{family.about}\n{settings}", title_justify="left")
        for name, member in family.members.items():
            guided = "" if member.guidance is None else f"; guidance {member.guidance:g}"
            adapter = (member.adapter or "-").replace("+", "\n+ ")
            table.add_row(f"{family.name}:{name}", member.about + guided, adapter)
        Console().print(table)
    typer.echo(REAL_MODEL_HELP)


@app.command()
def benches() -> None:
    """List the benches."""
    from rich.console import Console
    from rich.table import Table

    from flowopd_eval.benches import BENCHES, PAPER, PAPER_FLAGS

    table = Table("--bench", "for", "metric", "version", "what it measures", title="Benches", title_justify="left")
    for bench in BENCHES:
        table.add_row(bench.flag, bench.objects, bench.key, str(bench.version), f"{bench.title}: {bench.about}")
    columns = "; ".join(f"for {objects}: {', '.join(flags)}" for objects, flags in PAPER_FLAGS.items())
    table.add_row(PAPER, "", "", "", f"Table 2 of the paper, beside the paper's numbers: {columns}")
    Console().print(table)


@app.command()
def doctor(
    real: Annotated[
        bool, typer.Option("--real", help="Also draw and judge a few pictures with the real models.")
    ] = False,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
    model: Annotated[str, typer.Option(help="Family that --real draws with.")] = "flow-opd",
    bench: Annotated[str, typer.Option(help="Bench that --real judges by.")] = "geneval",
    steps: StepsOption = None,
    device: DeviceOption = None,
) -> None:
    """What is installed, which judges work, what the Hub grants: each tried, not guessed."""
    from rich.console import Console

    from flowopd_eval import doctor as examining
    from flowopd_eval.models import FAMILIES

    if model not in FAMILIES:
        raise RequestError(f"Unknown family {model!r}; known: {', '.join(FAMILIES)}.")
    with status("looking and trying"):
        findings = examining.examine()
    Console().print(examining.terminal_report(findings), crop=False)
    proof = None
    if real:
        with status(f"drawing with every member of {model}"):
            proof = examining.evidence(model, bench, steps, device_of(device))
    if save:
        examining.save(save, findings, proof)
        typer.echo(f"Written to {save}. To enter it into the README's verification table, open an issue with it.")
    examining.refuse_wrong(findings)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="LoRA: folder, file or hub:REPO@REV.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Backbone it was made for, tiny:base or flow-opd:base: --model OUT knows it."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha, where the file does not tell it.")] = None,
) -> None:
    """Write a LoRA so that it loads at full strength in diffusers, PEFT and ComfyUI."""
    from flowopd_eval.adapters import read_adapter, write_adapter
    from flowopd_eval.models import base_settings, pass_on_settings
    from flowopd_eval.records import record_of, write_settings

    adapter = read_adapter(source, alpha=alpha)
    settings = base_settings(base) if base else None
    place = Path(source).resolve()
    if (out / "recipe.json").is_file() and out.resolve() not in (place, place.parent):
        raise RequestError(
            f"{out} holds another adapter, whose recipe.json would be taken for this one's: name another."
        )
    write_adapter(adapter, out)
    record = pass_on_settings([source], out)
    if settings:
        write_settings(out, settings)
        record = record_of(settings, str(out))
    typer.echo(
        f"{source}: {len(adapter.factors)} modules, rank {adapter.rank}, alpha {adapter.alpha} ({adapter.alpha_from})"
    )
    typer.echo(f"Written to {out}, scale included: pytorch_lora_weights.safetensors (diffusers, ComfyUI), PEFT folder.")
    _tell_of_record(record, out)


@app.command()
def merge(
    parts: Annotated[list[str], typer.Argument(metavar="SOURCE=WEIGHT...", help="LoRAs or model names with weights.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the result (default: the largest of the parts).")
    ] = None,
    method: Annotated[str, typer.Option(help="exact: mean of the products; factors: as the public script.")] = "exact",
) -> None:
    """Merge LoRAs into one: `flowopd-eval merge A=0.5 B=0.5 --out DIR`."""
    from flowopd_eval import store
    from flowopd_eval.adapters import merge_adapters, read_adapter, write_adapter
    from flowopd_eval.models import pass_on_settings

    named = [_weighted_source(part) for part in parts]
    weighted = [(read_adapter(place), weight) for _, place, weight in named]
    merged, merge_report = merge_adapters(weighted, rank=rank, method=method)
    write_adapter(merged, out)
    record = pass_on_settings([source for source, _, _ in named], out)
    made: dict[str, object] = {"stage": "merge", "teachers": {adapter.source: weight for adapter, weight in weighted}}
    made |= {"rank": merged.rank, "method": method, "discarded_energy": merge_report.discarded_energy}
    store.write_json(out / "recipe.json", made)  # `push` puts it on the card
    size = f"{len(merged.factors)} modules at rank {merged.rank}"
    typer.echo(f"{size}; {merge_report.discarded_energy:.2%} of the energy discarded. Written to {out}.")
    _tell_of_record(record, out)


def _tell_of_record(record: SamplingRecord | None, out: Path) -> None:
    if record:
        typer.echo(f"Drawn with guidance {record.guidance:g} and {record.steps} steps, as {out / SETTINGS_FILE} says.")
    else:
        typer.echo(
            f"Nothing says how it is drawn: --model BASE --lora {out} draws it as the base is, unless --guidance."
        )


def _weighted_source(text: str) -> tuple[str, str, float]:
    """What is merged, where its adapter lies, and its weight."""
    from flowopd_eval.models import FAMILIES, MERGE, resolve

    source, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        raise RequestError(f"Expected SOURCE=WEIGHT, such as expert/=0.5, but got {text!r}.") from None
    if source.partition(":")[0] in FAMILIES:
        adapter = resolve(source).adapter
        if adapter is None or adapter.startswith(MERGE):
            raise RequestError(f"{source} has no adapter to merge of its own; name adapters.")
        return source, adapter, weight
    return source, source, weight


app.command()(push)
app.command()(verify)


def run() -> None:
    """Entry point: errors become one message on stderr and an exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="flowopd-eval: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still gets the table
    try:
        app()
    except RequestError as error:
        _fail(error, 2)
    except WorkError as error:
        _fail(error, 1)
    except SystemExit as end:
        _tell_of_interruption(end)
        raise


def _tell_of_interruption(end: BaseException | None) -> None:
    """Typer makes exit code 130 of Ctrl-C, and loses what the interrupted work said of how to go on."""
    while end is not None and not isinstance(end, KeyboardInterrupt):
        end = end.__cause__ or end.__context__
    if end is not None:
        _fail(end, 130)


def _fail(error: BaseException, code: int) -> None:
    said = str(error) or "Stopped before anything was drawn; the same command begins again."
    print(f"flowopd-eval: {said}", file=sys.stderr)
    sys.exit(code)
