"""The pack as a tree of its own: complete, filled in, importable without the toolkit."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.comfy_release import PACK, release

PUBLISHER, REPOSITORY = "some-publisher", "https://github.com/someone/flow-opd-nodes"


@pytest.fixture
def released(tmp_path: Path) -> Path:
    release(tmp_path / "out", PUBLISHER, REPOSITORY)
    return tmp_path / "out"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", ".git"} & set(path.parts)
    }


def test_a_release_is_the_pack_with_three_fields_filled_in(released: Path) -> None:
    ours, theirs = files(PACK), files(released)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"pyproject.toml"}
    meta = tomllib.loads((released / "pyproject.toml").read_text())
    assert meta["tool"]["comfy"]["PublisherId"] == PUBLISHER
    assert meta["project"]["urls"]["Repository"] == REPOSITORY
    icon = meta["tool"]["comfy"]["Icon"].removeprefix("https://raw.githubusercontent.com/someone/flow-opd-nodes/HEAD/")
    assert ET.parse(released / icon).getroot().get("viewBox") == "0 0 64 64"


def test_a_release_stands_alone(released: Path, tmp_path: Path) -> None:
    """Loaded from a folder with a hyphen in its name, as ComfyUI does it, in a process that cannot see the toolkit."""
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('a.b-c', {str(released / '__init__.py')!r},"
        f" submodule_search_locations=[{str(released)!r}]);"
        "pack = importlib.util.module_from_spec(spec); sys.modules['a.b-c'] = pack; spec.loader.exec_module(pack);"
        "import importlib; route = importlib.import_module('.logic.route', 'a.b-c');"
        "print(route.route('two dogs').expert, 'flowopd_eval' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["geneval", "False"]


def test_a_second_release_brings_the_first_up_to_date_and_keeps_its_git(released: Path) -> None:
    (released / ".git").mkdir()
    (released / ".git" / "HEAD").write_text("theirs")
    (released / "nodes" / "gone.py").write_text("")
    first = files(released).keys() - {"nodes/gone.py"}
    release(released, PUBLISHER, REPOSITORY)
    assert files(released).keys() == first
    assert (released / ".git" / "HEAD").read_text() == "theirs"


@pytest.mark.parametrize(
    ("publisher", "repository"),
    [("", REPOSITORY), ("Some One", REPOSITORY), (PUBLISHER, ""), (PUBLISHER, "git@github.com:someone/nodes.git")],
)
def test_nothing_is_released_without_a_publisher_and_a_repository(
    tmp_path: Path, publisher: str, repository: str
) -> None:
    with pytest.raises(ValueError, match="Expected a"):
        release(tmp_path / "out", publisher, repository)
    assert not (tmp_path / "out").exists()


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="no release of flow-opd"):
        release(tmp_path, PUBLISHER, REPOSITORY)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_the_command_asks_for_both() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.comfy_release", "somewhere"], capture_output=True, text=True, cwd=PACK.parent
    )
    assert done.returncode == 2
    assert "--publisher" in done.stderr
    assert "--repository" in done.stderr
