"""How the demo starts: from the command line, as a Space under any folder's name, and where the model cannot be had."""

import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from loopback_hub import hub

from flowopd_eval.hub.space import space_repository

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(tmp_path):
    """Starts the app as it is pushed to a Space, without a network; gives its address."""
    running = []

    def start(**variables):
        folder = tmp_path / "any-name"
        for name, content in space_repository(ROOT / "app").files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "PYTHONPATH")}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONUNBUFFERED": "1"}
        environment |= {"GRADIO_TEMP_DIR": str(tmp_path / "cache"), **variables}
        process = subprocess.Popen(
            [sys.executable, "space.py"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        running.append(process)
        said = ""
        for line in process.stdout:
            said += line.decode()
            if found := re.search(r"http://[\d.:]+", said):
                return found[0] + "/", said
        raise AssertionError(said)

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_without_the_gated_model_a_space_names_the_two_steps(started):
    url, said = started(FLOW_OPD_MODEL="flow-opd", SPACE_ID="somebody/demo", HF_TOKEN="hf_abcdefghijklmnopqrstuvwxyz")
    page = httpx.get(f"{url}config").text
    assert "Accept the licence" in page
    assert "HF_TOKEN" in page
    assert "Powered by Stability AI" in page
    for private in ("hf_abcdefghijklm", str(Path.home()) + os.sep, "Traceback"):
        assert private not in page
    assert "Traceback" not in said
    assert httpx.get(url).status_code == 200


def test_a_gated_model_without_a_token_is_named_with_its_licence_and_how_to_log_in(started):
    name = "stabilityai/stable-diffusion-3.5-medium"
    with hub({name: {"model_index.json": b"{}"}}, "c" * 40, gated=[name]) as endpoint:
        url, said = started(FLOW_OPD_MODEL="flow-opd", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, no_proxy="127.0.0.1")
    page = httpx.get(f"{url}config").text
    assert f"{name} is gated: accept its licence at https://huggingface.co/{name}" in page
    assert "hf auth login" in page
    assert "HF_TOKEN" in page
    for trace in ("Traceback", "Client Error", "GatedRepoError"):  # not "401": the page carries a random number
        assert trace not in page + said


def test_the_front_matter_is_a_spaces(tmp_path):
    _, front, text = (ROOT / "app" / "README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["sdk"] == "gradio"
    assert (ROOT / "app" / matter["app_file"]).is_file()
    assert re.fullmatch(r"6\.\d+\.\d+", matter["sdk_version"])
    assert f"gradio=={matter['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    assert len(matter["short_description"]) <= 60
    assert "Powered by Stability AI" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "huge"], "--model huge: the demo shows a family of models: flow-opd, tiny"),
        (["--lora", "nothing"], "expected NAME=FOLDER or NAME=FOLDER@GUIDANCE"),
        (["--lora", "mine=x@much"], "expected a guidance scale from 0 to 20"),
        (["--dtype", "int8"], "--dtype int8: expected float32, bfloat16 or float16."),
        (["--port", "99999999"], "app: --port 99999999: expected a number from 1 to 65535.\n"),
        (["--port", "0"], "app: --port 0: expected a number from 1 to 65535.\n"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7: this machine cannot listen there"),
        (["--lora", "mine=/does/not/exist"], "--lora mine=/does/not/exist"),
        (["--runs", "/does/not/exist"], "there is no such folder"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(arguments, said, monkeypatch, capsys, tmp_path):
    from app import __main__ as command

    monkeypatch.setattr(sys, "argv", ["app", "--votes", str(tmp_path / "votes.sqlite"), *arguments])
    with pytest.raises(SystemExit) as end:
        command.run()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("checked", [True, False], ids=["before the model is loaded", "afterwards"])
def test_a_port_that_is_taken_is_one_line_and_exit_code_2(checked, monkeypatch, capsys, tmp_path):
    from app import __main__ as command

    if not checked:
        monkeypatch.setattr(command, "_listen", lambda *given: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["app", "--votes", str(tmp_path / "votes.sqlite"), "--port", port])
        with pytest.raises(SystemExit) as end:
            command.run()
    assert end.value.code == 2
    assert f"app: --port {port} is taken; leave --port out or choose another.\n" in capsys.readouterr().err


def test_what_a_visitor_asked_for_is_no_warning_of_the_servers_and_others_are(session, monkeypatch, capsys):
    from app import __main__ as command
    from app.wanted import wanted
    from flowopd_eval import pipeline

    asked = wanted({"prompt": "a star", "seed": 1, "arms": ["base"], "steps": 1, "guidance": 2.0})

    def serve(start):
        pipeline._warn_once.cache_clear()
        assert len(list(session.draw(asked))) > 1
        logging.getLogger("app.session").warning("student could not draw")

    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(command.typer, "run", serve)
    command.run()
    assert capsys.readouterr().err == "app: student could not draw\n"


def test_votes_on_a_space_are_said_to_be_temporary(session, tmp_path, monkeypatch):
    from app import ui
    from app.vote import Ballot

    def words():
        return str(ui.page(session, Ballot(tmp_path / "votes.sqlite"), None).get_config_file()["components"])

    assert "votes are temporary" not in words()
    monkeypatch.setenv("SPACE_ID", "somebody/demo")
    assert "votes are temporary" in words()


def test_one_model_and_no_runs_are_explained_not_empty(session, tmp_path, monkeypatch):
    from app import ui
    from app.vote import Ballot

    monkeypatch.setattr(session, "arms", {"base": session.arms["base"]})
    words = str(ui.page(session, Ballot(tmp_path / "votes.sqlite"), None).get_config_file()["components"])
    assert "A vote takes two models" in words
    assert "--lora NAME=FOLDER" in words
    assert "No finished runs here" in words


def test_nothing_is_reported_and_no_font_is_fetched():
    from app import ui

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert ui.theme()._stylesheets == []
