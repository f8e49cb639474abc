"""The app's folder as a Space: front matter decides, an allow-list, requirements that name the package."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

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


def test_the_folder_is_published_as_it_is_named(machine, hub, app):
    answer = machine("push", app, "me/demo")
    assert answer.code == 0, answer.err
    repo = hub.repositories["spaces/me/demo"]
    assert (repo.private, repo.sdk) == (True, "gradio")
    ours = {name: content for name, content in repo.files.items() if name != ".gitattributes"}
    code = ["app/__main__.py", "app/pages/__init__.py", "app/pages/one.py", "app/style.css"]
    assert sorted(ours) == sorted(["README.md", "requirements.txt", "packages.txt", "app/assets/icons/a.svg", *code])
    assert b"secret" not in b"".join(ours.values())
    assert ours["requirements.txt"].decode() == f"flowopd-eval=={version('flowopd-eval')}\n"
    assert ours["app/pages/one.py"] == b"# pages/one.py"


def test_the_toolkits_own_app_is_whole():
    folder = Path(__file__).parents[2] / "app"
    code = {path.name for path in folder.glob("*.py")}
    assert space_repository(folder).files.keys() == {*code, "style.css", "README.md", "requirements.txt"}


def test_an_app_file_of_its_own_lies_on_top(app):
    (app / "README.md").write_text(README.format(file="__main__.py"))
    assert "pages/one.py" in space_repository(app).files


@pytest.mark.parametrize("line", ["flowopd-eval[ocr]>=0.1", "flowopd_eval @ https://example.org/x.whl"])
def test_requirements_that_name_the_package_stay_as_they_are(app, line):
    (app / "requirements.txt").write_text(f"plotly\n{line}\n")
    assert space_repository(app).files["requirements.txt"].decode() == f"plotly\n{line}\n"


def test_requirements_without_it_get_a_line(app):
    (app / "requirements.txt").write_text("flowopd-eval-extras\n")
    lines = space_repository(app).files["requirements.txt"].decode().splitlines()
    assert lines == ["flowopd-eval-extras", f"flowopd-eval=={version('flowopd-eval')}"]


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
