"""The demo over the miniature with random adapters, served once a module; and a headless Chromium."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
CHROMIUM = Path("/usr/bin/chromium")
ARMS = ("student", "geneval", "ocr")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Folders of random adapters by name."""
    from random_adapters import random_adapter

    from flowopd_eval.adapters import write_adapter
    from flowopd_eval.models import Backbone, resolve

    folder = tmp_path_factory.mktemp("adapters")
    transformer = Backbone("builtin:tiny", [resolve("tiny:base")], "cpu", None).pipeline.transformer
    for seed, name in enumerate(ARMS):
        write_adapter(random_adapter(transformer, seed), folder / name)
    return {name: str(folder / name) for name in ARMS}


@pytest.fixture(scope="session")
def session(adapters):
    """Four arms: the base and three random adapters, in the places of those that ship."""
    from app.session import Lora, Session
    from flowopd_eval.models import FAMILIES

    family = FAMILIES["tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "tiny", replace(family, members={"base": family.members["base"]}))
        return Session("tiny", {name: Lora(folder) for name, folder in adapters.items()})


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory):
    """A folder with a run of two models that sometimes disagree."""
    from painting import RUN, Painter

    from flowopd_eval.harness import run_bench

    class Named(Painter):
        def __init__(self, name, shift):
            super().__init__(16)
            self.name, self.shift = name, shift

        def identity(self):
            return {**super().identity(), "model": self.name}

        def generate(self, prompts, seeds):
            return super().generate(prompts, [seed + self.shift for seed in seeds])

    root = tmp_path_factory.mktemp("runs")
    for name, shift in (("painter:base", 0), ("painter:student", 5)):
        run_bench(RUN, Named(name, shift), root / "deep" / "two", note="Evaluated: painters.")
    return root


@pytest.fixture(scope="module")
def server(session, runs_folder, tmp_path_factory):
    """Address of the demo's own server."""
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app import ui
    from app.runs import Runs
    from app.vote import Ballot

    ballot = Ballot(tmp_path_factory.mktemp("votes") / "votes.sqlite")
    blocks = ui.page(session, ballot, Runs(runs_folder))
    _, url, _ = ui.serve(blocks, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    yield url
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM} here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield running
        running.close()
