"""An adapter of the miniature with its run, a Hub, and a machine that talks to it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import SD3Transformer2DModel
from loopback_hub import Hub, hub_environment, serving
from machine import Machine
from random_adapters import random_adapter

from flowopd_eval.adapters import Adapter, Factors, read_adapter, write_adapter
from flowopd_eval.benches import bench_by_key
from flowopd_eval.harness import BenchRun, run_bench
from flowopd_eval.models import Backbone, fetch_base, resolve

TOKEN = "hf_" + "t" * 34
GENTLE = "me/gentle"
RECIPE = {
    "stage": "distill", "base": "tiny:base", "start": "none", "steps": 7, "batch_size": 3, "objective": "direct",
    "lora": {"rank": 4, "alpha": 8.0}, "optimizer": {"learning_rate": 1e-4}, "cache": "/home/someone/cache/embeddings",
    "out": "runs/private/first", "log": "private/log",
    "rollout": {"steps": 4, "sampler": "sde", "a": 0.7, "guidance": 2.0}, "teachers": {"own": {"source": "base"}},
    "tasks": [{"name": "a|b <i>", "prompts": "/home/someone/lists/mine.jsonl", "rewards": {"shapes_quality": 1.0}}],
}  # fmt: skip


@pytest.fixture(scope="session")
def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(fetch_base("builtin:tiny"), subfolder="transformer")


@pytest.fixture(scope="session")
def gentle(transformer) -> Adapter:
    """Changes every picture plainly, and leaves something to be seen."""
    loud = random_adapter(transformer, 7)
    return replace(loud, factors={name: Factors(f.A, 0.6 * f.B) for name, f in loud.factors.items()})


@pytest.fixture(scope="session")
def trained(gentle, tmp_path_factory) -> Path:
    """What a training run leaves; its adapter lies in ``adapter``, with a stray file and a secret beside it."""
    out = tmp_path_factory.mktemp("train")
    write_adapter(gentle, out / "adapter", base_model="tiny:base")
    (out / "recipe.json").write_text(json.dumps(RECIPE))
    identity = {"identity": {"recipe": RECIPE, "base_sha256": "ab", "experts": {"own": "cd"}}, "steps": 7}
    (out / "run.json").write_text(json.dumps(identity))
    (out / "adapter" / ".env").write_text("SECRET=opensesame")
    (out / "adapter" / "optimizer.pt").write_bytes(b"opensesame")
    (out / "adapter" / "notes.txt").write_text("opensesame")
    return out


@pytest.fixture(scope="session")
def finished(trained, tmp_path_factory) -> Path:
    """A whole bench drawn with the adapter, two steps a picture."""
    out = tmp_path_factory.mktemp("run")
    spec = resolve("tiny:base", str(trained / "adapter"))
    backbone = Backbone(spec.base, [spec], "cpu", None)
    generator = backbone.generator(spec, replace(spec.record, steps=2, guidance=1.0))
    bench = bench_by_key("shapes_quality")
    run = BenchRun(
        bench.flag, bench.key, 1, tuple(bench.prompts()), bench.scorer("official"), 1, batch_size=16, correct_at=None
    )
    run_bench(run, generator, out, note="The built-in miniature.")
    return out


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Iterator[SimpleNamespace]:
    with serving(Hub(token=TOKEN)) as hub:
        folder = tmp_path_factory.mktemp("machine")
        machine = Machine(hub_environment(hub.endpoint, folder / "home") | {"COLUMNS": "200"}, folder)
        yield SimpleNamespace(hub=hub, machine=machine)
        machine.end()


@pytest.fixture
def hub(place, request) -> Hub:
    """The Hub, as at the beginning but for its address."""
    if "pushed" in request.fixturenames:
        request.getfixturevalue("published")  # first, as it uses the same Hub
    fresh = Hub(token=TOKEN)
    vars(place.hub).update(vars(fresh) | {"endpoint": place.hub.endpoint})
    return place.hub


@pytest.fixture
def machine(place, hub) -> Machine:
    place.machine.token = TOKEN
    return place.machine


@pytest.fixture(scope="session")
def published(place, trained, finished) -> Hub:
    """A Hub's state after the adapter was pushed with its run."""
    vars(place.hub).update(vars(Hub(token=TOKEN)) | {"endpoint": place.hub.endpoint})
    place.machine.token = TOKEN
    answer = place.machine("push", trained / "adapter", GENTLE, "--run", finished)
    assert answer.code == 0, answer.err
    kept = ("repositories", "objects", "log", "bodies")
    return Hub(**{name: copy.deepcopy(getattr(place.hub, name)) for name in kept})


@pytest.fixture
def pushed(machine, hub, published) -> str:
    """The adapter with its run, published; its name."""
    for name in ("repositories", "objects", "log", "bodies"):
        setattr(hub, name, copy.deepcopy(getattr(published, name)))
    return GENTLE


@pytest.fixture(scope="session")
def adapter_sha256(trained) -> str:
    return read_adapter(trained / "adapter").sha256
