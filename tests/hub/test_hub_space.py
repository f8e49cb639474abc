"""The app's folder as a Space: front matter decides, an allow-list, and the package so that it is found there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flowopd_eval.errors import RequestError
from flowopd_eval.hub.push import kind_of
from flowopd_eval.hub.space import space_repository

README = "---\ntitle: Try it\nsdk: gradio\nsdk_version: 6.31.0\napp_file: {file}\n---\n# Try it\n"


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "app"
    for name in ("pages", "assets/icons", "__pycache__", ".gradio", "runs/mine/samples", "venv/lib", "build/lib/app"):
        (folder / name).mkdir(parents=True)
    for name in ("__main__.py", "pages/__init__.py", "pages/one.py", "style.css", "assets/icons/a.svg", "packages.txt"):
        (folder / name).write_text(f"# {name}")
    secret = "run.json report.html summary.json samples/0.png scores.csv"
    strange = (
        ".env votes.sqlite __pycache__/a.py .gradio/flagged.json weights.safetensors notes.txt picture.png keys.json"
    )
    strange += " venv/lib/a.py build/lib/app/__init__.py assets/.env assets/votes.sqlite pages/data.json"
    for name in [*strange.split(), *(f"runs/mine/{name}" for name in secret.split())]:
        (folder / name).write_text("secret")
    (folder / "link.py").symlink_to("/etc/hostname")
    (folder / "README.md").write_text(README.format(file="app/__main__.py"))
    return folder


def test_the_folder_is_published_as_it_is_named_with_the_package(machine, hub, app):
    answer = machine("push", app, "me/demo")
    assert answer.code == 0, answer.err
    repo = hub.repositories["spaces/me/demo"]
    assert (repo.private, repo.sdk) == (True, "gradio")
    ours = {name: content for name, content in repo.files.items() if not name.startswith((".git", "app/flowopd_eval"))}
    code = ["app/__main__.py", "app/pages/__init__.py", "app/pages/one.py", "app/style.css"]
    tops = ["README.md", "packages.txt", "pushed.json", "requirements.txt"]
    assert sorted(ours) == sorted([*tops, "app/assets/icons/a.svg", *code])
    assert b"secret" not in b"".join(ours.values())
    assert ours["app/pages/one.py"] == b"# pages/one.py"
    assert "app/flowopd_eval/cli.py" in repo.files


def test_what_an_earlier_version_of_the_package_had_is_removed_and_ones_own_is_not(machine, hub, app):
    assert machine("push", app, "me/demo").code == 0
    repo, stale = hub.repositories["spaces/me/demo"], "app/flowopd_eval/of_an_earlier_version.py"
    pushed = json.loads(repo.files["pushed.json"])
    pushed["files"].append(stale)
    before = {
        **repo.files,
        stale: b"",
        "app/theirs.py": b"",
        "README.md": b"mine",
        "pushed.json": json.dumps(pushed).encode(),
    }
    repo.revisions[repo.head] = before
    answer = machine("push", app, "me/demo")
    assert answer.code == 0, answer.err
    assert stale not in repo.files
    assert "app/theirs.py" in repo.files
    assert repo.files["README.md"] == (app / "README.md").read_bytes()  # a Space's card is the folder's own


def test_the_toolkits_own_app_is_whole():
    folder = Path(__file__).parents[2] / "app"
    code = {path.name for path in folder.glob("*.py")}
    files = {name for name in space_repository(folder).files if not name.startswith("flowopd_eval")}
    assert files == {*code, "style.css", "README.md", "requirements.txt"}


def test_an_app_file_of_its_own_lies_on_top(app):
    (app / "README.md").write_text(README.format(file="__main__.py"))
    assert "pages/one.py" in space_repository(app).files


@pytest.mark.parametrize("line", ["flowopd-eval[ocr] @ git+https://example.org/x", "flowopd_eval@https://x.org/x.whl"])
def test_requirements_that_say_where_the_package_is_stay_as_they_are(app, line):
    (app / "requirements.txt").write_text(f"plotly\n{line}\n")
    files = space_repository(app).files
    assert files["requirements.txt"] == app.resolve() / "requirements.txt"
    assert not [name for name in files if "flowopd_eval" in name]


@pytest.mark.parametrize(("own", "extra"), [("flowopd-eval[ocr]>=0.1", True), ("flowopd-eval", False), ("", False)])
def test_otherwise_requirements_name_what_the_package_needs(app, own, extra):
    (app / "requirements.txt").write_text(f"plotly\nflowopd-eval-extras\n{own}\n".strip())
    lines = bytes(space_repository(app).files["requirements.txt"]).decode().splitlines()
    assert lines[:2] == ["plotly", "flowopd-eval-extras"]
    needed = [Requirement(line) for line in lines[2:]]
    assert {"torch", "diffusers", "typer"} <= {one.name for one in needed}
    assert ("rapidocr" in {one.name for one in needed}) == extra
    assert "pytest" not in {one.name for one in needed}
    for one in needed:
        assert one.name != "flowopd-eval"
        assert version(one.name) in one.specifier


LOOK = """
import json, importlib.metadata, flowopd_eval
from flowopd_eval.models import FAMILIES, fetch_base
found = importlib.metadata.distribution("flowopd-eval")
print(json.dumps([flowopd_eval.__file__, str(fetch_base("builtin:tiny")), str(found.locate_file("")), found.version]))
"""


def test_the_package_that_goes_along_is_whole_and_found_first(tmp_path):
    root = Path(__file__).parents[2]
    files = space_repository(root / "app").files
    there = {path for path in (root / "flowopd_eval").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {root / name for name in files if name.startswith("flowopd_eval/")} == there
    assert {"flowopd_eval.dist-info/METADATA", "flowopd_eval.dist-info/licenses/LICENSE"} < set(files)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    (tmp_path / "look.py").write_text(LOOK)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run([sys.executable, "look.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    *places, found = json.loads(said.stdout)
    assert [Path(place).is_relative_to(tmp_path) for place in places] == [True] * 3
    assert found == version("flowopd-eval")


def test_an_app_that_is_not_there_is_refused(app):
    (app / "README.md").write_text(README.format(file="main.py"))
    with pytest.raises(RequestError, match=r"names app_file 'main\.py'"):
        space_repository(app)
    (app / "README.md").write_text("---\nsdk: gradio\n---\n")
    with pytest.raises(RequestError, match="does not say app_file"):
        space_repository(app)


def test_what_lies_there_decides_the_kind(app, trained, finished):
    assert kind_of(str(app)) == "space"
    assert kind_of(str(finished)) == "dataset"
    assert kind_of(str(trained / "adapter")) == kind_of("hub:a/b") == kind_of("tiny:base") == "model"
