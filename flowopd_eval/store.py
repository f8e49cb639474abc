"""A run on disk, written so that a kill at any moment loses nothing that was finished.

::

    OUT/run.json                         requests, identities, versions, sessions (all that may vary between two runs)
    OUT/<model>/<bench>/prompts.jsonl    the prompts as asked for
    OUT/<model>/<bench>/samples/         NNNNN-KK.png: picture KK of prompt NNNNN, counted from zero
    OUT/<model>/<bench>/samples.jsonl    one line a picture (samples.<i>-of-<n>.jsonl while shards are at work)
    OUT/<model>/<bench>/summary.json

Whole files are replaced, never edited: a reader sees the old one or the new one. A journal only grows, by whole
batches.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.quiet import printable
from flowopd_eval.records import Prompt, Sample

SCHEMA = 1
_PACKAGES = ("flowopd-eval", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
_MOST_PICTURES = 10_000_000  # a run from elsewhere may ask for a plan that fills the memory
_MOST_PIXELS = 64_000_000  # of a picture
_REQUEST: dict[str, type] = {
    "model": str,
    "bench": str,
    "key": str,
    "version": int,
    "prompts": int,
    "prompts_sha256": str,
    "samples": int,
    "seed": int,
    "batch_size": int,
    "generator": dict,
}
_ENTRY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")


# ------------------------------------------------------------------------------------------------ files and pictures


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write ``path`` into a ``WorkError`` that names the space that is left."""
    try:
        yield
    except OSError as error:
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 2**20
        raise WorkError(
            f"Could not write {path}: {error.strerror or error}. {free:,.0f} MiB are free there. Nothing was left half "
            "written: make room (or see to the permissions) and give the same command again, it continues."
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` or leave it untouched; on the disk when this returns. Raises ``WorkError``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # others write it, too
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def json_line(value: Any) -> bytes:
    """One line of JSON. ASCII, so that no character of a hostile prompt can break a line."""
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` indented, keys in the order given. Raises ``WorkError``."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")


def write_picture(path: Path, picture: Image.Image) -> str:
    """Write an RGB picture as PNG whose bytes depend on its pixels only; returns their sha256. Raises ``WorkError``."""
    bare = picture.copy()
    bare.info = {}  # colour profiles and dates would be written along
    buffer = io.BytesIO()
    bare.save(buffer, format="PNG", compress_level=6)
    write_atomic(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_picture(path: Path) -> Image.Image:
    """The picture in ``path``, upright and RGB.

    Raises what Pillow raises when there is none to be read, and ``ValueError`` for one of more than 64 million pixels,
    which a small file may hold and which would fill the memory.
    """
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    raise ValueError(f"{path.name} has {picture.width} x {picture.height} pixels")
                return ImageOps.exif_transpose(picture).convert("RGB")
    except bombs as error:
        raise ValueError(f"{path.name} has too many pixels") from error


def file_sha256(path: Path) -> str | None:
    """sha256 of the file's bytes, None when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


# ----------------------------------------------------------------------------------------------------------- samples


@lru_cache(maxsize=1)
def _sample_reader() -> Callable[..., Sample]:
    from pydantic import TypeAdapter

    return TypeAdapter(Sample).validate_json


def parse_sample(line: bytes, where: str) -> Sample:
    """One line of a ``samples.jsonl``, types checked. Raises ``RequestError`` naming ``where``.

    ``file`` must lie below the bench's folder: a path that is absolute, climbs with ``..`` or names a drive is refused.
    """
    try:
        sample = _sample_reader()(line, strict=True)
    except ValueError as error:
        raise RequestError(f"{where} is not a sample: {' '.join(str(error).split()[:40])}") from error
    file = PurePosixPath(sample.file)
    if file.is_absolute() or ".." in file.parts or not file.name or any(c in sample.file for c in "\\:\0"):
        raise RequestError(f"{where} names the picture {sample.file!r}, which does not lie inside the run: refused.")
    if sample.score is not None and not isfinite(sample.score):
        raise RequestError(f"{where} has the score {sample.score}: expected a finite number or null.")
    return sample


def whole_lines(path: Path) -> list[bytes]:
    """The lines of ``path`` that end in a newline: a torn last one is left out. Empty when there is no file."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def read_samples(path: Path) -> list[Sample]:
    """The samples of a journal, a torn last line left out. Raises ``RequestError`` naming file and line."""
    return [parse_sample(line, f"{path}, line {number}") for number, line in enumerate(whole_lines(path), 1)]


class Journal:
    """A ``samples`` file that grows by whole batches, each on the disk before the next one starts."""

    def __init__(self, path: Path, samples: Sequence[Sample]) -> None:
        """Open ``path`` so that it holds exactly ``samples``. Raises ``WorkError``."""
        self.path = path
        kept = b"".join(json_line(sample.to_json()) for sample in samples)
        if not path.exists() or path.read_bytes() != kept:
            write_atomic(path, kept)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def append(self, samples: Sequence[Sample]) -> None:
        """Add the lines of a batch, all or none. Raises ``WorkError``."""
        rest = memoryview(b"".join(json_line(sample.to_json()) for sample in samples))
        size = os.fstat(self._file.fileno()).st_size
        with _explained(self.path):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except BaseException:
                self._file.truncate(size)
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


# ----------------------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count``: batch b of the plan belongs to shard ``b % count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"0/3"``, ``"1/3"``, ``"2/3"`` are the three shards of three. Raises ``RequestError``."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise RequestError(f"Expected --shard i/n with i from 0 to n-1 (0/3, 1/3, 2/3), but got {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def journal(self) -> str:
        """Name of the file in which this shard writes its lines."""
        return "samples.jsonl" if self.count == 1 else f"samples.{self.index}-of-{self.count}.jsonl"


WHOLE = Shard()


def folder_name(name: str) -> str:
    """A model's or bench's name as a folder: ``tiny:base`` -> ``tiny-base``. Colons break Windows and links."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"


@dataclass(frozen=True)
class BenchFolder:
    """``OUT/<model>/<bench>``. ``entry`` is its name in ``run.json``: ``<model>/<bench>``."""

    out: Path
    entry: str

    @classmethod
    def of(cls, out: Path, model: str, bench: str) -> BenchFolder:
        """The folder of a model on a bench, by their names."""
        return cls(out, f"{folder_name(model)}/{folder_name(bench)}")

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.out / self.entry

    @property
    def samples(self) -> Path:
        """``samples.jsonl``."""
        return self.path / WHOLE.journal

    @property
    def summary(self) -> Path:
        """``summary.json``."""
        return self.path / "summary.json"

    def picture(self, file: str) -> Path:
        """Where a sample's picture lies. Raises ``RequestError`` when a link leads out of the folder."""
        path = self.path / file
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise RequestError(f"{path} leads outside the run: refused. Put the picture itself there.")
        return path

    def shards(self) -> list[tuple[Shard, Path]]:
        """The shards that have written here, in order."""
        found = []
        for path in sorted(self.path.glob("samples.*-of-*.jsonl")):
            if match := re.fullmatch(r"samples\.(\d+)-of-(\d+)\.jsonl", path.name):
                found.append((Shard(int(match[1]), int(match[2])), path))
        return found

    def journals(self) -> list[Path]:
        """Every file with lines of this bench: first the shards', then ``samples.jsonl`` if there is one."""
        return [path for _, path in self.shards()] + [self.samples] * self.samples.exists()

    def prompts(self) -> list[Prompt]:
        """The prompts of the request. Raises ``RequestError``, also when they are not those that were asked for."""
        path = self.path / "prompts.jsonl"
        if file_sha256(path) != self.request()["prompts_sha256"]:
            raise RequestError(f"{path} is missing or not the file of this run's request: restore it.")
        return [_prompt(line, f"{path}, line {number}") for number, line in enumerate(whole_lines(path), 1)]

    def request(self) -> dict[str, Any]:
        """The request this folder answers. Raises ``RequestError`` when there is none."""
        runs = read_run(self.out)["runs"]
        if self.entry not in runs:
            has = ", ".join(runs) or "nothing"
            raise RequestError(f"{self.out / 'run.json'} knows no {self.entry}. It has: {has}.")
        request = runs[self.entry]["request"]
        for field, kind in _REQUEST.items():
            if not isinstance(request, dict) or not isinstance(request.get(field), kind):
                raise RequestError(f"Expected {kind.__name__} as {field} of {self.entry} in {self.out / 'run.json'}.")
        for field, kinds in (("partial", str), ("correct_at", int | float), ("scorer", dict)):
            if field not in request or not isinstance(request[field], kinds | None):
                raise RequestError(f"{self.entry} in {self.out / 'run.json'} lacks a valid {field}.")
        if not 0 < request["samples"] * request["prompts"] <= _MOST_PICTURES:
            raise RequestError(f"{self.entry} in {self.out / 'run.json'} lists an impossible number of pictures.")
        return request

    @contextmanager
    def alone(self, journal: str) -> Iterator[None]:
        """Holds ``journal`` for this process. Raises ``RequestError`` while another one has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / f".{journal}.lock", timeout=0)
        with _explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                raise RequestError(
                    f"Another process is writing {self.path / journal}: wait for it to end, or give another --out."
                ) from error
        try:
            yield
        finally:
            lock.release()


def prompt_lines(prompts: Sequence[Prompt]) -> bytes:
    """``prompts.jsonl``, whose sha256 stands in every result."""
    return b"".join(json_line(prompt.to_json()) for prompt in prompts)


def _prompt(line: bytes, where: str) -> Prompt:
    try:
        value = json.loads(line)
        prompt = Prompt(value.pop("id"), value.pop("prompt"), value.pop("task"), value)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise RequestError(f"{where} is not a prompt with id, prompt and task: {error}") from error
    if not all(isinstance(text, str) for text in (prompt.id, prompt.prompt, prompt.task)):
        raise RequestError(f"{where}: id, prompt and task must be texts.")
    return prompt


# ---------------------------------------------------------------------------------------------------------- run.json


def read_run(out: Path) -> dict[str, Any]:
    """``OUT/run.json``, its shape checked. Raises ``RequestError``."""
    path = out / "run.json"
    try:
        run = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RequestError(f"{out} holds no run: there is no {path}. Give the --out folder of a run.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}. Restore it, or start again with another --out.") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise RequestError(f"Expected schema {SCHEMA} in {path}: it was written by another version of flowopd-eval.")
    runs = run.get("runs")
    if not isinstance(runs, dict) or not all(isinstance(entry, dict) and "request" in entry for entry in runs.values()):
        raise RequestError(f"{path} does not list its runs. Restore it, or start again with another --out.")
    for name in runs:
        if not _ENTRY.fullmatch(name):
            raise RequestError(f"{path} lists {name!r}, which is not a <model>/<bench> folder: refused.")
    return run


@contextmanager
def changing_run(out: Path) -> Iterator[dict[str, Any]]:
    """``run.json`` as a dictionary to change, written back at the end; other processes wait meanwhile."""
    from filelock import FileLock

    lock = FileLock(out / ".run.json.lock")
    with _explained(out):
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        run = read_run(out) if (out / "run.json").exists() else {"schema": SCHEMA, "note": "", "runs": {}}
        before = json.dumps(run)
        yield run
        if json.dumps(run) != before:
            write_json(out / "run.json", run)
    finally:
        lock.release()


def note_unavailable(out: Path, lacking: Mapping[str, str | None]) -> None:
    """Enter in ``run.json`` what the judge of each metric key lacks; None takes back what was said before."""
    with changing_run(out) as run:
        known = {**unavailable(run), **lacking}
        run["unavailable"] = {key: why for key, why in known.items() if why}


def unavailable(run: Mapping[str, Any]) -> dict[str, str]:
    """Metric key -> why it could not be judged, as ``run.json`` says; anything else there is left out."""
    said = run.get("unavailable")
    return {str(key): why for key, why in said.items() if isinstance(why, str)} if isinstance(said, dict) else {}


def bench_folders(out: Path) -> list[BenchFolder]:
    """The folders of a run, in the order in which they were asked for. Raises ``RequestError``."""
    return [BenchFolder(out, entry) for entry in read_run(out)["runs"]]


def provenance() -> dict[str, Any]:
    """Versions and platform of this session, without names of people, hosts or folders; ``gpu`` is the one in use."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_initialized() else None
    machine = f"{platform.system()} {platform.machine()}"
    return {"versions": versions, "platform": machine, "cpus": os.cpu_count(), "gpu": gpu}


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """``seed: 1 there, 2 asked for`` for every field in which two requests differ, nested fields dotted."""
    old, new = dict(flat(there)), dict(flat(asked))
    return [
        f"{field}: {_readable(old.get(field))} there, {_readable(new.get(field))} asked for"
        for field in {**old, **new}
        if old.get(field) != new.get(field)
    ]


def _readable(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
