"""The server named by COMFYUI_URL; without one these tests skip and say so."""

import os
from pathlib import Path

import pytest

from .client import Server

HERE = Path(__file__).parent
REASON = "no COMFYUI_URL: `python -m tests.comfy_server` says how to test inside a real ComfyUI"


def pytest_collection_modifyitems(items):
    if not os.environ.get("COMFYUI_URL"):
        for item in items:
            if item.path.parent == HERE:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def server():
    """The running ComfyUI, with the base directory that ``prepare`` wrote."""
    found = Server(os.environ["COMFYUI_URL"])
    assert "FlowOPDTestLoadMiniature" in found.json("/object_info"), "the tests' pack is missing: prepare the server"
    return found


@pytest.fixture(scope="session")
def base():
    """The base directory, where the server runs on this machine."""
    folder = os.environ.get("COMFYUI_BASE")
    if not folder:
        pytest.skip("no COMFYUI_BASE: the folder that `prepare` wrote, on this machine")
    return Path(folder)


@pytest.fixture(scope="session")
def scores(server):
    """Skips where the server's Python has no flowopd-eval."""
    if not server.about()["packages"]["flowopd_eval"]:
        pytest.skip("the server's Python has no flowopd-eval")


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """``FlowOPDPipeline`` with the experts that the server has, read by the toolkit from files of its own."""
    from .files import EXPERTS, miniature, write_loras

    folder = tmp_path_factory.mktemp("loras")
    write_loras(folder)
    pipe = miniature()
    pipe.add_experts({name: folder / place for name, place in EXPERTS.items()})
    return pipe
