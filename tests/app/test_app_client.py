"""The demo as a program sees it: gradio_client, and plain HTTP where a client would not go by itself."""

import base64
import csv
import io
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
from gradio_client import Client
from gradio_client.exceptions import AppError

ROOT = Path(__file__).parents[2]
NAMES = {
    *("/models", "/limits", "/examples", "/compare", "/restore", "/vote_pair", "/vote", "/standings", "/votes_csv"),
    *("/runs", "/run", "/run_csv", "/run_comparison", "/run_pictures", "/run_picture"),
}


@pytest.fixture(scope="module")
def client(server):
    return Client(server, verbose=False)


def picture(address):
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def compare(client, **asked):
    return client.predict(**{"prompt": "a photo of a red circle", "seed": 5, "steps": 1, **asked}, api_name="/compare")


def test_exactly_the_promised_names_are_offered(client):
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == NAMES


def test_every_name_says_what_it_does_and_what_each_of_its_parameters_is(client):
    for name, told in client.view_api(return_format="dict", print_info=False)["named_endpoints"].items():
        assert told["description"], name
        unsaid = {one["parameter_name"] for one in told["parameters"]} - set(re.findall(r"\w+", told["description"]))
        assert unsaid == set(), name


def test_models_limits_and_examples_are_told(client, session):
    models = client.predict(api_name="/models")
    assert [one["name"] for one in models] == list(session.arms)
    assert models[0]["record"]["steps"] == 20
    assert client.predict(api_name="/limits")["sides"] == [64]
    assert 'a sign that says "OPEN"' in client.predict(api_name="/examples")["Sign"]


def test_a_comparison_is_the_sessions_own_and_its_png_restores_it(client, session):
    from app.session import Drawn
    from app.wanted import wanted

    answer = compare(client, arms=["ocr", "base"], steps=2)
    request = wanted({"prompt": "a photo of a red circle", "seed": 5, "arms": ["base", "ocr"], "steps": 2})
    expected = [event for event in session.draw(request) if isinstance(event, Drawn)]
    assert [one["model"] for one in answer["pictures"]] == ["base", "ocr"]
    for one, other in zip(answer["pictures"], expected, strict=True):
        assert np.array_equal(np.asarray(picture(one["picture"])), np.asarray(other.picture))
        assert one["scores"]["geneval"]["value"] == other.scores["geneval"].value
        assert one["provenance"] == dict(other.identity)
    restored = client.predict(answer["comparison"], api_name="/restore")
    assert {name: restored[name] for name in ("prompt", "seed", "arms", "steps", "guidance")} == {
        "prompt": "a photo of a red circle",
        "seed": 5,
        "arms": ["base", "ocr"],
        "steps": 2,
        "guidance": None,
    }
    assert restored["changed"] == []


def test_steps_are_told_on_the_way(client):
    job = client.submit("a star", 1, ["base"], 3, api_name="/compare")
    job.result()
    told = [one for one in job.outputs() if "step" in one]
    assert told[-1] == {"model": "base", "step": 3, "of": 3}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": ""}, "Prompt: write something"),
        ({"prompt": "x" * 5000}, "at most 400 characters"),
        ({"steps": 10**6}, "expected 100 or less"),
        ({"side": 4096}, "Side"),
        ({"seed": -3}, "Seed: expected 0 or more"),
        ({"arms": ["../../etc"]}, "no model"),
        ({"arms": []}, "choose at least one"),
    ],
)
def test_requests_beyond_the_limits_are_refused_in_words(client, asked, said):
    with pytest.raises(AppError, match=said):
        compare(client, **asked)


@pytest.mark.parametrize("png", ["", "no address", "data:image/png;base64,???", "data:image/png;base64,AAAA"])
def test_what_is_no_saved_comparison_is_refused_in_words(client, png):
    with pytest.raises(AppError, match=r"saved comparison|base64|PNG"):
        client.predict(png, api_name="/restore")


def test_one_arm_that_fails_leaves_the_others_theirs(client, session, monkeypatch):
    real = session._picture

    def failing(name, *rest):
        if name == "ocr":
            raise RuntimeError("/home/joe/secret")
        return real(name, *rest)

    monkeypatch.setattr(session, "_picture", failing)
    answer = compare(client, arms=["base", "ocr"])
    assert answer["pictures"][0]["picture"]
    assert answer["pictures"][1]["picture"] is None
    assert "could not draw" in answer["pictures"][1]["error"]
    assert "joe" not in json.dumps(answer)


def test_a_cancelled_comparison_stops_being_drawn(client):
    job = client.submit("a star", 1, ["base", "ocr"], 100, api_name="/compare")
    while not job.outputs():
        time.sleep(0.02)
    assert [thread for thread in threading.enumerate() if thread.name == "drawing"]
    job.cancel()
    until = time.monotonic() + 10
    while any(thread.name == "drawing" for thread in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "drawing"]
    assert len(job.outputs()) < 50
    assert compare(client, arms=["base"])["pictures"]


def test_twenty_clients_at_once_are_all_answered(server):
    def ask(seed):
        client = Client(server, verbose=False, httpx_kwargs={"timeout": 60})  # seconds: also on a loaded machine
        return compare(client, seed=seed, arms=["base"])["pictures"][0]["picture"]

    with ThreadPoolExecutor(20) as pool:
        pictures = list(pool.map(ask, range(20)))
    assert len(set(pictures)) == 20


def test_a_vote_is_blind_counted_once_and_revealed(client):
    pair = client.predict("a photo of a star", 3, api_name="/vote_pair")
    assert set(pair) == {"ticket", "prompt", "seed", "left", "right"}
    assert not re.search("base|student|geneval|ocr", json.dumps({**pair, "left": "", "right": "", "ticket": ""}))
    assert pair["left"] != pair["right"]
    reveal = client.predict(pair["ticket"], "left", api_name="/vote")
    assert {reveal["left"], reveal["right"]} < {"base", "student", "geneval", "ocr"}
    drawn = compare(client, prompt=pair["prompt"], seed=3, arms=[reveal["left"]], steps=None)["pictures"][0]
    assert drawn["picture"] == pair["left"]
    with pytest.raises(AppError, match="has had its vote"):
        client.predict(pair["ticket"], "right", api_name="/vote")
    standing = {one["model"]: one for one in client.predict(api_name="/standings")}
    assert standing[reveal["left"]]["wins"] == 1
    provenance = drawn["provenance"]
    drew = "+".join(filter(None, (provenance["base_sha256"], provenance["adapter_sha256"])))
    assert standing[reveal["left"]]["weights"] == drew
    row = next(csv.DictReader(io.StringIO(client.predict(api_name="/votes_csv"))))
    assert [row[name] for name in ("left_model", "right_model", "choice")] == [reveal["left"], reveal["right"], "left"]
    assert row["left_weights"] == drew


def test_runs_are_read_through_names_and_addresses(client):
    assert client.predict(api_name="/runs") == ["deep/two"]
    summaries = client.predict("deep/two", api_name="/run")["summaries"]
    assert {one["model"] for one in summaries} == {"painter:base", "painter:student"}
    listed = client.predict("deep/two", verdict="wrong", disagree=True, api_name="/run_pictures")
    assert 0 < listed["count"] == len(listed["pictures"]) < 20
    one = listed["pictures"][0]
    full = client.predict("deep/two", one["model"], one["key"], one["id"], one["k"], api_name="/run_picture")
    assert picture(full["picture"]).size == (16, 16)
    assert full["provenance"]["prompt"] == one["prompt"]
    assert "painter:student" in client.predict("deep/two", api_name="/run_comparison")[0]["sentence"]
    assert client.predict("deep/two", api_name="/run_csv").startswith("model,bench")


def test_a_verdict_that_does_not_exist_is_refused_in_words(client):
    with pytest.raises(AppError, match=r"Verdict: expected right, wrong, scored, unscored, .* but got 'fine'"):
        client.predict("deep/two", verdict="fine", api_name="/run_pictures")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "nobody"}, "Model: expected painter:base, painter:student, or null for any, but got 'nobody'."),
        ({"model": "x" * 200}, f"but got '{'x' * 58}…."),
        ({"key": "geneval"}, "Key: expected red_squares, or null for any, but got 'geneval'."),
        ({"task": "/home/joe/x"}, "Task: expected counting, colors, or null for any, but got '…/x'."),
        ({"page": 1}, "Page: expected a whole number from 0 to 0, but got 1."),
        ({"page": -1}, "Page: expected a whole number from 0 to 0, but got -1."),
    ],
)
def test_a_name_that_no_picture_bears_is_refused_with_those_that_are_there(client, asked, said):
    with pytest.raises(AppError, match=re.escape(said)):
        client.predict("deep/two", **asked, api_name="/run_pictures")


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "deep/../deep/two"])
def test_no_other_run_can_be_named(client, name):
    for api in ("/run", "/run_csv", "/run_comparison", "/run_pictures"):
        with pytest.raises(AppError, match="There is no run"):
            client.predict(name, api_name=api)


def test_no_file_of_this_machine_can_be_had_by_its_path(server, runs_folder, adapters):
    secret = runs_folder / "secret.txt"
    secret.write_text("a secret")
    picture = next(runs_folder.rglob("*.png"))
    files = ["/etc/passwd", secret, picture, ROOT / "README.md", ROOT / "app" / "ui.py", Path.home() / ".bashrc"]
    files += [
        f"{Path('/tmp/gradio')}/../../etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "/proc/self/environ",
    ]
    for file in files:
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            answer = httpx.get(f"{server}{route}{file}")
            assert answer.status_code in (403, 404, 422), (route, file, answer.status_code)
            assert "a secret" not in answer.text
            assert "root:" not in answer.text


def test_no_event_takes_a_path_for_an_uploaded_file(server):
    """The page's own drop zone, called as a client might with a path of the server's."""
    config = httpx.get(f"{server}config").json()
    for at in [one["id"] for one in config["dependencies"]]:
        data = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]
        body = {"data": data, "fn_index": at, "session_hash": f"h{at}"}
        answer = httpx.post(f"{server}gradio_api/queue/join", json=body)
        assert answer.status_code < 600
        assert "root:" not in answer.text
        if answer.status_code == 200:
            with httpx.stream("GET", f"{server}gradio_api/queue/data", params={"session_hash": f"h{at}"}) as events:
                for line in events.iter_lines():
                    assert "root:" not in line
                    assert "Traceback" not in line
                    if "process_completed" in line or "close_stream" in line:
                        break


def test_neither_home_nor_checkout_nor_trace_is_told(server):
    for place in ("", "config", "gradio_api/info", "gradio_api/startup-events", "nothing-here", "gradio_api/call/x"):
        text = httpx.get(f"{server}{place}").text
        for private in (str(Path.home()) + os.sep, str(ROOT), "Traceback", os.environ.get("HF_TOKEN") or "hf_token_x"):
            assert private not in text, (place, private)


def test_broken_requests_leave_the_server_standing(server, client):
    for body in (b"", b"{", b'{"data": null}', b'{"data": [1e999], "fn_index": 99999, "session_hash": "x"}'):
        answer = httpx.post(f"{server}gradio_api/queue/join", content=body)
        assert "Traceback" not in answer.text
    assert client.predict(api_name="/limits")


def test_every_public_name_answers_wrong_types_in_words(client):
    for api in ("/compare", "/restore", "/vote", "/run_picture"):
        arguments = [{"a": [1]}] * {"/compare": 6, "/restore": 1, "/vote": 2, "/run_picture": 5}[api]
        with pytest.raises(AppError) as error:
            client.predict(*arguments, api_name=api)
        assert "Traceback" not in str(error.value)
        assert str(ROOT) not in str(error.value)
