"""What this machine can do: packages, device, judges tried on pictures with known scores, the Hub, what is cached.

``flowopd-eval doctor`` looks and tries; ``doctor --real --save FILE`` draws a few pictures with the real models, judges
them, and writes down everything somebody else needs to see that they ran.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowopd_eval import store
from flowopd_eval.benches import BENCHES, Bench, bench_by_key, find_bench
from flowopd_eval.compbench import CLIP as COMPBENCH_CLIP
from flowopd_eval.errors import RequestError, WorkError, extra
from flowopd_eval.fetched import Source, cache_folder
from flowopd_eval.models import FAMILIES, Backbone, resolve
from flowopd_eval.records import Prompt, Score
from flowopd_eval.scorers.clip_model import ClipModel, Need
from flowopd_eval.scorers.mask2former import CHECKPOINT
from flowopd_eval.scorers.preference import WEIGHTS, preference_metrics

if TYPE_CHECKING:
    from rich.console import Group

State = Literal["ok", "absent", "wrong"]
OPTIONAL = {
    "rapidocr": f"OCR benches: {extra('ocr')}",
    "onnxruntime": f"OCR benches: {extra('ocr')}",
    "paddleocr": f"OCR benches by --ocr-engine paddle3: {extra('paddle')}",
    "accelerate": "training and offloading: `pip install accelerate`",
    "matplotlib": f"plots of the benchmarks: {extra('bench')}",
}
SELF_TEST = "data/selftest.json"  # in flowopd_eval.tiny
TOLERANCE = 0.02  # of a score: versions of OCR engines round differently


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``state`` is ok, absent (and nothing is wrong with that) or wrong.

    ``commands`` provide what is absent, where they are too long to be read in a table.
    """

    part: str
    name: str
    state: State
    text: str
    commands: tuple[str, ...] = ()


def examine() -> list[Finding]:
    """Everything that can be told without drawing; the network is asked once."""
    return [*_machine(), *_packages(), *_judges(), *_cached(), *_hub()]


# --------------------------------------------------------------------------------------------- machine and packages


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    memory = _memory_gb()
    yield Finding("machine", "cpu", "ok", f"{os.cpu_count()} cores" + (f", {memory:.0f} GB" if memory else ""))
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "machine", "cuda", "absent", f"torch {torch.__version__} finds no CUDA device: the miniature only"
        )
        return
    for index in range(torch.cuda.device_count()):
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info(index))
        enough = "enough for SD3.5 Medium" if total > 20 else "less than 20 GB: too little for SD3.5 Medium"
        text = f"{torch.cuda.get_device_name(index)}, {free:.0f} of {total:.0f} GB free; {enough}"
        yield Finding("machine", f"cuda:{index}", "ok", text)


def _memory_gb() -> float | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return None


def _packages() -> Iterator[Finding]:
    for package, version in store.provenance()["versions"].items():
        if package != "python":
            yield Finding("packages", package, "ok", version)
    for package, use in OPTIONAL.items():
        yield _optional(package, use)
    if _installed("torchvision"):
        problem = _import_error("torchvision")
        if problem:
            text = f"{problem}. Nothing here needs it and it breaks transformers: pip uninstall torchvision"
            yield Finding("packages", "torchvision", "wrong", text)


def _optional(package: str, use: str) -> Finding:
    if not _installed(package):
        return Finding("packages", package, "absent", use)
    if problem := _import_error(package):
        return Finding("packages", package, "wrong", f"installed, but does not import: {problem}")
    return Finding("packages", package, "ok", importlib.metadata.version(package))


def _installed(package: str) -> bool:
    with suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(package)
        return True
    return False


def _import_error(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch raises RuntimeError
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


# ------------------------------------------------------------------------------------------------------------ judges


SELF_TESTED = ("shapes_geneval", "sign_ocr", "shapes_quality")
_SAME_JUDGE = {"ocr": "sign_ocr"}  # metric -> the one whose stored scores it has to give, too


def self_test_pictures() -> list[tuple[Prompt, Any]]:
    """Scenes of the miniature's world, each with its prompt: drawn, so that they are the same everywhere."""
    import numpy as np
    from PIL import Image

    from flowopd_eval.tiny.scenes import draw_scene, sample_scene

    found = []
    for seed in range(24):
        scene = sample_scene(np.random.default_rng([2605, seed]))
        fields = {"include": list(scene.include), "exclude": list(scene.exclude)} if scene.include else {}
        prompt = Prompt(f"scene-{seed}", scene.caption, scene.task, fields)
        found.append((prompt, Image.fromarray(draw_scene(scene))))
    return found


def judged(bench: Bench) -> list[Score]:
    """The scores that a bench's judge gives to those of the pictures it can judge."""
    signs = bench.flag == "ocr"
    fitting = [(p, i) for p, i in self_test_pictures() if bench.flag == "quality" or (p.task == "ocr") == signs]
    return bench.scorer(bench.protocols[0]).score([image for _, image in fitting], [prompt for prompt, _ in fitting])


def self_test_values() -> dict[str, list[float | None]]:
    """What ``data/selftest.json`` holds: the scores of the miniature's own judges, by metric."""
    return {key: [score.value for score in judged(bench_by_key(key))] for key in SELF_TESTED}


def _judges() -> Iterator[Finding]:
    stored = json.loads(resources.files("flowopd_eval.tiny").joinpath(SELF_TEST).read_text())
    for bench in BENCHES:
        name = f"{bench.flag} ({bench.key})"
        known_scores = stored.get(_SAME_JUDGE.get(bench.key, bench.key))
        if known_scores is None:
            yield Finding("judges", name, *_unproven(bench))
            continue
        try:
            values = [score.value for score in judged(bench)]
        except RequestError as error:
            yield Finding("judges", name, "absent", str(error))
            continue
        pairs = list(zip(values, known_scores, strict=False))
        off = sum(value is None or abs(value - known) > TOLERANCE for value, known in pairs)
        if off or len(values) != len(known_scores):
            text = f"{off} of {len(pairs)} pictures with a known score are judged otherwise: its numbers do not compare"
            yield Finding("judges", name, "wrong", text)
        else:
            yield Finding(
                "judges", name, "ok", f"{len(pairs)} pictures with a known score are judged as they should be"
            )


def _unproven(bench: Bench) -> tuple[State, str, tuple[str, ...]]:
    """State of a judge of which no scores are stored, what it lacks, and what provides that; nothing is fetched."""
    if bench.key == "geneval":
        weights = cache_folder() / CHECKPOINT.replace(".pth", ".safetensors")
        there = f"converted weights in {weights}" if weights.is_file() else "weights are fetched at the first use"
        text = f"{there}; no scores are known yet to hold it against (`doctor --real --save FILE`)"
        return "ok" if weights.is_file() else "absent", text, ()
    if bench.flag == "preference":
        lacking = {m.name: _not_cached(m.needs) for m in preference_metrics(WEIGHTS).values()}
        absent = [name for name, commands in lacking.items() if commands]
        text = f"weights are not here: {', '.join(absent)} (commands below)" if absent else "weights are cached"
        every = tuple(dict.fromkeys(command for commands in lacking.values() for command in commands))
        return "absent" if absent else "ok", text, every
    if bench.flag == "compbench":
        commands = _not_cached(ClipModel(COMPBENCH_CLIP).needs)
        text = "weights are not here (commands below)" if commands else "weights are cached"
        return "absent" if commands else "ok", text, tuple(commands)
    try:
        bench.scorer(bench.protocols[0])
    except RequestError as error:  # it needs something that a user names
        return "absent", str(error), ()
    raise AssertionError(f"{bench.key} has a judge, but no stored scores")


def _not_cached(needs: Iterable[Need]) -> list[str]:
    """The commands that provide what has never been fetched."""
    return [need.command for need in needs if not _is_cached(need.source)]


def _is_cached(source: str | Source) -> bool:
    if isinstance(source, Source):
        return (cache_folder() / source.name).is_file()
    repo, _, revision = source.removeprefix("hub:").partition("@")
    return repo in (there := _cached_repos()) and revision in {one.commit_hash for one in there[repo].revisions}


# --------------------------------------------------------------------------------------------- Hub and what is cached


def _repositories() -> list[str]:
    family = FAMILIES["flow-opd"]
    sources = [family.base, *(member.adapter for member in family.members.values() if member.adapter)]
    single = [source for source in sources if not source.startswith("merge:")]
    return list(dict.fromkeys(source.removeprefix("hub:").partition("@")[0] for source in single))


def _cached_repos() -> dict[str, Any]:
    """Name -> what the Hub's cache on this machine has of it."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with suppress(CacheNotFound):
        return {repo.repo_id: repo for repo in scan_cache_dir().repos}
    return {}


def _cached() -> Iterator[Finding]:
    repos = _cached_repos()
    for name in _repositories():
        repo = repos.get(name)
        if repo is None:
            yield Finding("cached", name, "absent", "not downloaded")
            continue
        revisions = ", ".join(sorted(revision.commit_hash[:7] for revision in repo.revisions))
        yield Finding("cached", name, "ok", f"{repo.size_on_disk / 1e9:.2f} GB, revisions {revisions}")
    weights = cache_folder() / CHECKPOINT.replace(".pth", ".safetensors")
    if weights.is_file():
        yield Finding("cached", "GenEval's detector", "ok", f"sha256 {store.file_sha256(weights)}")
    free = shutil.disk_usage(next(p for p in (cache_folder(), *cache_folder().parents) if p.exists())).free
    yield Finding("cached", "disk", "ok", f"{free / 1e9:.0f} GB free; SD3.5 Medium takes 16")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError

    yield Finding("hub", "token", "ok" if get_token() else "absent", "there" if get_token() else "run `hf auth login`")
    api = HfApi()
    for name in _repositories():
        try:
            api.auth_check(name)
            yield Finding("hub", name, "ok", "may be downloaded")
        except GatedRepoError:
            text = f"gated: accept its licence at https://huggingface.co/{name}"
            yield Finding("hub", name, "absent", text)
        except HfHubHTTPError as error:
            yield Finding("hub", name, "wrong", f"{type(error).__name__}: {str(error).splitlines()[0]}")
        except (HTTPError, ConnectionError) as error:  # no network: the others would say the same
            yield Finding("hub", "network", "absent", f"the Hub is out of reach ({type(error).__name__})")
            return


# ---------------------------------------------------------------------------------------------------------- evidence


def evidence(family: str, bench: str, steps: int | None, device: str, members: Sequence[str] | None = None) -> dict:
    """Pictures of every member of a family on a few prompts of a bench, judged: hashes, scores, versions.

    Args:
        family: of :data:`flowopd_eval.models.FAMILIES`.
        bench: flag of a bench that fits it.
        steps: sampling steps; None: the record's.
        device: where it is drawn.
        members: those to draw with; None: all.

    Raises:
        RequestError: weights that cannot be had, or a judge that lacks something.
        WorkError: a model drew NaN.
    """
    names = [f"{family}:{member}" for member in members or FAMILIES[family].members]
    specs = [resolve(name) for name in names]
    kind = find_bench(bench, specs[0].objects)
    scorer = kind.scorer(kind.protocols[0])
    by_task = {prompt.task: prompt for prompt in kind.prompts()}
    prompts = list(by_task.values())
    backbone = Backbone(specs[0].base, specs, device, None)
    found: dict[str, Any] = {}
    for spec in specs:
        record = replace(spec.record, steps=steps or spec.record.steps)
        generator = backbone.generator(spec, record)
        pictures = generator.generate(prompts, [prompt.seed(0, 0) for prompt in prompts])
        scores = scorer.score(pictures, prompts)
        found[spec.name] = {
            **generator.identity(),
            "pictures": [
                {"id": p.id, "prompt": p.prompt, "pixels_sha256": _pixels_sha256(image), **asdict(score)}
                for p, image, score in zip(prompts, pictures, scores, strict=True)
            ],
        }
    return {"bench": kind.key, "version": kind.version, "scorer": dict(scorer.identity()), "models": found}


def _pixels_sha256(image: Any) -> str:
    import hashlib

    return hashlib.sha256(image.tobytes()).hexdigest()


def save(file: Path, findings: Sequence[Finding], proof: dict[str, Any] | None) -> None:
    """Write everything as JSON. Raises ``WorkError``."""
    everything = {"findings": [asdict(finding) for finding in findings], "evidence": proof, **store.provenance()}
    store.write_json(file, everything)


def terminal_report(findings: Sequence[Finding]) -> Group:
    """A table a part, and the commands that provide what is absent, a line each."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": ("ok", "green"), "absent": ("–", "dim"), "wrong": ("wrong", "bold red")}
    tables = []
    for part in dict.fromkeys(finding.part for finding in findings):
        table = Table(box=None, show_header=False, title=part, title_justify="left", title_style="bold")
        for _ in range(4):
            table.add_column(overflow="fold")
        for finding in findings:
            if finding.part == part:
                table.add_row("", Text(finding.name), Text(*styles[finding.state]), Text(finding.text))
        tables.append(table)
    if commands := dict.fromkeys(command for finding in findings for command in finding.commands):
        said = "To provide the weights that are not here (accept their licences on the Hub first, `hf auth login`):"
        return Group(*tables, "", said, *(Text(command, no_wrap=True, overflow="ignore") for command in commands))
    return Group(*tables)


def refuse_wrong(findings: Sequence[Finding]) -> None:
    """Raises ``WorkError`` when something found does not work."""
    wrong = [finding.name for finding in findings if finding.state == "wrong"]
    if wrong:
        raise WorkError(f"Something here does not work: {', '.join(wrong)} (marked above).")
