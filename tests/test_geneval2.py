"""Soft-TIFA against the official rule written out again, and the judge's client against a real loopback server."""

import base64
import io
import json
import math
import random
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy.stats import gmean

from flowopd_eval import geneval2_prompts as source
from flowopd_eval.errors import RequestError
from flowopd_eval.fetched import Source
from flowopd_eval.geneval2_prompts import geneval2_prompts, parse_geneval2
from flowopd_eval.records import Prompt, Sample
from flowopd_eval.scorers.geneval2 import (
    GenEval2Scorer,
    answer_probability,
    geneval2_metrics,
    picture_score,
    probability_at_most,
)
from flowopd_eval.scorers.vlm import VLMClient, picture_url

JUDGE = "judge-8b"
KITES = Prompt(
    "kites",
    "three green kites above a lake",
    "atoms-4",
    {
        "atom_count": 4,
        "vqa_list": [
            ["How many kites are there?", "three"],
            ["Are the kites green?", "Yes"],
            ["Is there a lake?", "Yes"],
        ],
        "skills": ["count", "attribute", "object"],
    },
)


# --- a server that answers like vLLM --------------------------------------------------------------------------------
def completion(tokens, model=JUDGE):
    """A chat completion whose only token had these candidates: token -> probability."""
    top = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in tokens.items()]
    content = [{**top[0], "top_logprobs": top}] if top else None
    message = {"role": "assistant", "content": next(iter(tokens), "Yes")}
    choice = {"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "length"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": model, "choices": [choice]}


class Server:
    """``first``: replies (status, body, headers) given before all others; ``replies``: question -> body."""

    def __init__(self, url):
        self.url, self.first, self.replies, self.requests = url, [], {}, []

    def reply(self, request):
        if self.first:
            return self.first.pop(0)
        text = request["messages"][0]["content"][1]["text"].removesuffix(" Answer in one word.")
        return 200, self.replies.get(text, completion({"Yes": 0.9, "No": 0.1})), {}


@contextmanager
def serve():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append((self.path, dict(self.headers), json.loads(body)))
            status, answer, headers = server.reply(json.loads(body))
            self.answer(status, answer if isinstance(answer, bytes) else json.dumps(answer).encode(), headers)

        def do_GET(self):
            server.requests.append((self.path, dict(self.headers), None))
            self.answer(200, server.replies.get(self.path, b""), {})

        def answer(self, status, body, headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{listening.server_port}")
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with serve() as server:
        yield server


def client_of(server, **settings):
    return VLMClient(server.url + "/v1/", JUDGE, **{"backoff": 0.0, "timeout": 10, **settings})


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8))


# --- the rule -------------------------------------------------------------------------------------------------------
OFFICIAL = {  # the variants as the official script lists them
    "four": ["four", "Four", " four", " Four", "4", " 4"],
    "seven": ["seven", "Seven", " seven", " Seven", "7", " 7"],
    "Yes": ["Yes", "yes", " yes", " Yes"],
}
WORDS = [
    space + form
    for word in ("four", "seven", "yes", "no", "dog")
    for form in (word, word.title())
    for space in ("", " ")
]
VOCABULARY = [*WORDS, *"0123456789", " ", "FOUR", "fourth", "ye", "s"]


def first_token(text):
    """Of Qwen's tokenizer: a word takes the space before it along, a figure stands alone."""
    return re.match(r" ?[A-Za-z]+|[0-9]|\s+", text)[0]


def distribution(seed):
    logits = np.random.default_rng(seed).normal(0, 3, len(VOCABULARY))
    probabilities = np.exp(logits) / np.exp(logits).sum()
    return dict(zip(VOCABULARY, probabilities.tolist()))


@pytest.mark.parametrize("answer", OFFICIAL)
@pytest.mark.parametrize("seed", range(10))
def test_the_probability_is_the_official_sum_and_a_short_list_brackets_it(answer, seed):
    all_tokens = distribution(seed)
    official = sum(all_tokens[first_token(variant)] for variant in OFFICIAL[answer])
    listed = sorted(((token, math.log(p)) for token, p in all_tokens.items()), key=lambda each: -each[1])
    assert answer_probability(listed, answer) == pytest.approx(official)
    assert probability_at_most(listed, answer) == pytest.approx(official)
    for length in (1, 5, 20):
        short = listed[:length]
        assert answer_probability(short, answer) <= official + 1e-12
        assert official <= probability_at_most(short, answer) + 1e-12 <= 1 + 1e-9


def test_the_bound_uses_what_is_left_and_what_is_last():
    assert probability_at_most([("No", math.log(0.7)), ("Nope", math.log(0.2))], "Yes") == pytest.approx(
        0.1
    )  # the rest
    few = [("No", math.log(0.7)), ("Nope", math.log(0.01))]
    assert probability_at_most(few, "Yes") == pytest.approx(0.04)  # four forms, each at most as likely as "Nope"


@pytest.mark.parametrize("numbers", [[("Yes", 12.5), ("No", 3.0)], [("Yes", 0.0), ("No", 0.0)], [("Yes", math.nan)]])
def test_numbers_that_are_no_log_probabilities_are_refused(numbers):
    with pytest.raises(RequestError, match="no log-probabilities"):
        answer_probability(numbers, "Yes")


def atom(skill, probability):
    return {"question": "Is it?", "answer": "Yes", "skill": skill, "probability": probability, "at_most": probability}


def test_metrics_equal_a_slow_independent_computation():
    rng = random.Random(3)
    samples, lists = [], []
    for n in range(30):
        skills = [rng.choice(["object", "count", "verb"]) for _ in range(rng.randint(1, 6))]
        values = [rng.choice([0.0, 1.0, rng.random()]) for _ in skills]
        score = picture_score([atom(*each) for each in zip(skills, values)], 3 + n % 3)
        unscored = n % 10 == 9
        samples.append(
            Sample(f"p{n}", 0, "atoms", "…", 0, "f", "s", None if unscored else score.value, detail=score.detail)
        )
        if not unscored:
            lists.append((skills, values, 3 + n % 3))
    metrics = geneval2_metrics(samples, None)

    def agrees(entry, values):
        assert entry["value"] == pytest.approx(sum(values) / len(values))
        assert entry["low"] < entry["value"] < entry["high"]
        assert entry["level"] == 0.95

    def gm(values):
        with np.errstate(divide="ignore"):
            return float(gmean(values))

    agrees(metrics["overall"], [sum(values) / len(values) for _, values, _ in lists])
    agrees(metrics["also"]["gm"], [gm(values) for _, values, _ in lists])
    assert metrics["images"] == metrics["overall"]
    assert 0 < metrics["also"]["gm"]["value"] < metrics["overall"]["value"]
    assert set(metrics["tasks"]) == {"object", "count", "verb"}
    for skill, entry in metrics["tasks"].items():
        mine = [v for skills, values, _ in lists for s, v in zip(skills, values) if s == skill]
        agrees(entry, mine)
        everything = [a for s in samples for a in s.detail["answers"] if a["skill"] == skill]
        assert (entry["n"], entry["unscored"]) == (len(mine), len(everything) - len(mine))
        assert entry["prompts"] == sum(any(a["skill"] == skill for a in s.detail["answers"]) for s in samples)
    assert list(metrics["atomicity"]) == ["3", "4", "5"]
    for count, entry in metrics["atomicity"].items():
        agrees(entry, [gm(values) for _, values, atoms in lists if atoms == int(count)])
        assert (entry["n"], entry["unscored"], entry["prompts"]) == (9, 1, 10)


def test_atoms_of_one_prompt_are_one_cluster():
    """Ten equal atoms in one prompt say as much as one: the interval must not shrink."""
    rng = random.Random(0)
    values = [rng.random() for _ in range(12)]

    def interval(copies):
        scores = [picture_score([atom("object", value)] * copies, 3) for value in values]
        samples = [Sample(f"p{n}", 0, "t", "…", 0, "f", "s", s.value, detail=s.detail) for n, s in enumerate(scores)]
        return geneval2_metrics(samples, None)["tasks"]["object"]

    once, tenfold = interval(1), interval(10)
    assert (once["n"], tenfold["n"]) == (12, 120)
    assert tenfold["low"] == pytest.approx(once["low"])
    assert tenfold["high"] == pytest.approx(once["high"])


def test_metrics_of_pictures_nobody_has_scored():
    metrics = geneval2_metrics([Sample("p", 0, "t", "…", 0, "f", "s", error="not scored yet")], None)
    assert metrics["overall"] is None
    assert metrics["also"] == {}
    assert metrics["tasks"] == {}


# --- the judge ------------------------------------------------------------------------------------------------------
def test_pictures_are_scored_with_what_the_server_says(server):
    server.replies = {
        "How many kites are there?": completion({"3": 0.5, "Three": 0.25, "Four": 0.15, " ": 0.05}),
        "Are the kites green?": completion({"No": 0.75, "Yes": 0.2, "yes": 0.05}),
        "Is there a lake?": completion({"Yes": 0.95, "No": 0.05}),
    }
    scorer = GenEval2Scorer(client_of(server))
    first, second = scorer.score([picture(1), picture(2)], [KITES, KITES])
    assert first == second
    assert [a["probability"] for a in first.detail["answers"]] == pytest.approx([0.8, 0.25, 0.95])
    assert [a["skill"] for a in first.detail["answers"]] == KITES.fields["skills"]
    assert first.value == pytest.approx((0.8 + 0.25 + 0.95) / 3)
    assert first.detail["gm"] == pytest.approx((0.8 * 0.25 * 0.95) ** (1 / 3))
    assert first.detail["atom_count"] == 4
    assert first.reason == "Are the kites green? Yes: 0.25"
    assert scorer.identity()["judge"] == JUDGE

    path, _, body = server.requests[1]  # the first asked whether the judge is fit
    assert path == "/v1/chat/completions"
    assert {k: body[k] for k in ("model", "temperature", "max_tokens", "logprobs", "top_logprobs")} == {
        "model": JUDGE,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }
    (message,) = body["messages"]
    assert message["content"][1]["text"].endswith("? Answer in one word.")
    kind, data = message["content"][0]["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert any(np.array_equal(sent, np.asarray(picture(seed))) for seed in (1, 2))


def test_a_busy_server_is_asked_again(server):
    server.first = [(429, {"error": "slow down"}, {"Retry-After": "0.3"}), (503, b"", {"Retry-After": "Mon"})]
    start = time.monotonic()
    reply = client_of(server).ask(picture_url(picture()), "Is it?")
    assert time.monotonic() - start > 0.3
    assert dict(reply.tokens)["Yes"] == pytest.approx(math.log(0.9))
    assert len(server.requests) == 3


def test_what_will_not_change_is_not_asked_again(server):
    server.first = [(404, {"error": "no such model"}, {})] * 3
    with pytest.raises(RequestError, match=r"404 .*no such model.*--judge-model"):
        client_of(server).ask(picture_url(picture()), "Is it?")
    assert len(server.requests) == 1


def test_patience_has_an_end(server):
    server.first = [(500, b"out of memory", {})] * 9
    with pytest.raises(RequestError, match="HTTP 500 out of memory"):
        client_of(server, attempts=3).ask(picture_url(picture()), "Is it?")
    assert len(server.requests) == 3


def test_nobody_listens():
    with serve() as gone:
        pass
    with pytest.raises(
        RequestError, match=rf"{gone.url}/v1/chat/completions: .*refused.*vllm serve {JUDGE}.*--judge-url"
    ):
        client_of(gone, attempts=2).ask(picture_url(picture()), "Is it?")


@pytest.mark.parametrize("logprobs", [None, {"content": None}, {"content": []}, {"content": [{"token": "Yes"}]}])
def test_an_answer_without_logprobs_is_refused_and_never_a_zero(server, logprobs):
    bare = completion({"Yes": 0.9})
    bare["choices"][0]["logprobs"] = logprobs
    server.replies["Is there a lake?"] = bare
    scorer = GenEval2Scorer(client_of(server))
    (score,) = scorer.score([picture()], [KITES])
    assert score.value is None
    assert "no log-probs" in score.error
    server.replies["Is the image white?"] = bare
    with pytest.raises(RequestError, match="no log-probs"):
        GenEval2Scorer(client_of(server)).identity()


def test_one_malformed_answer_leaves_its_picture_unscored_and_no_other(server):
    tents = Prompt(
        "tents", "a tent", "atoms-3", {"atom_count": 3, "vqa_list": [["A tent?", "Yes"]], "skills": ["object"]}
    )
    server.replies["Is there a lake?"] = b'{"choices": ['
    broken, whole = GenEval2Scorer(client_of(server)).score([picture(), picture()], [KITES, tents])
    assert broken.value is None
    assert "no chat completion" in broken.error
    assert whole.value == pytest.approx(0.9)
    pairs = [(KITES, broken), (tents, whole)]
    samples = [Sample(p.id, 0, p.task, p.prompt, 0, "f", "s", s.value, detail=s.detail) for p, s in pairs]
    metrics = geneval2_metrics(samples, None)
    assert metrics["overall"]["n"] == 1
    assert (metrics["tasks"]["object"]["n"], metrics["tasks"]["object"]["unscored"]) == (1, 1)
    assert metrics["tasks"]["count"]["value"] is None
    assert metrics["atomicity"]["4"]["unscored"] == 1


def test_an_unfit_judge_is_refused_before_anything_is_drawn(server):
    server.replies["Is the image white?"] = completion({"<think>": 0.98, "Yes": 0.02})
    with pytest.raises(RequestError, match="begins with '<think>'"):
        GenEval2Scorer(client_of(server)).identity()


def test_another_model_may_not_answer_in_the_judges_place(server):
    server.replies["Is there a lake?"] = completion({"Yes": 1.0}, model="understudy")
    (score,) = GenEval2Scorer(client_of(server)).score([picture()], [KITES])
    assert score.value is None
    assert "understudy answered in place of judge-8b" in score.error


def test_credentials_are_sent_and_stand_nowhere(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    host = server.url.removeprefix("http://")
    plain = GenEval2Scorer(client_of(server))
    secret = GenEval2Scorer(VLMClient(f"http://me:pass%21@{host}/v1?key=hush", JUDGE, attempts=1))
    assert plain.identity() == secret.identity()
    assert plain.identity()["url"] == f"{server.url}/v1"
    (_, ours, _), (path, theirs, _) = server.requests
    assert ours["Authorization"] == "Bearer sk-of-the-environment"
    assert theirs["Authorization"] == "Basic " + base64.b64encode(b"me:pass!").decode()
    assert path == "/v1/chat/completions?key=hush"
    for scorer, known in ((plain, "sk-of-the-environment"), (secret, "me:pass%21 and key=hush")):
        server.first = [(401, {"error": f"wrong: {known}"}, {})] * 3
        (score,) = scorer.score([picture()], [KITES])
        assert "401" in score.error
        for word in ("sk-of", "me:", "pass", "hush"):
            assert word not in json.dumps([scorer.identity(), score.error, score.detail])


def test_the_key_does_not_follow_a_redirection(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serve() as elsewhere:
        server.first = [(302, b"", {"Location": f"{elsewhere.url}/v1/chat/completions"})]
        with pytest.raises(RequestError, match="HTTP 302"):
            client_of(server).ask(picture_url(picture()), "Is it?")
        assert elsewhere.requests == []


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://me:secret@host/v1", "http://", ""])
def test_what_is_no_base_url_is_refused_without_repeating_it(url):
    with pytest.raises(RequestError, match="--judge-url") as refusal:
        VLMClient(url, JUDGE)
    assert "secret" not in str(refusal.value)


# --- the prompts ----------------------------------------------------------------------------------------------------
LINE = {
    "prompt": "two tents beside a red canoe",
    "atom_count": 5,
    "vqa_list": [["How many tents are in the image?", "two"], ["Is the canoe red?", "Yes"]],
    "skills": ["count", "attribute"],
}


def test_lines_become_prompts():
    other = {**LINE, "prompt": "a tent\u2028and a canoe", "atom_count": 3}
    text = json.dumps(LINE) + "\n\n" + json.dumps(other, ensure_ascii=False) + "\n"
    first, second = parse_geneval2(text)
    assert (first.id, first.prompt, first.task) == ("geneval2-00000", LINE["prompt"], "atoms-5")
    assert dict(first.fields) == {key: LINE[key] for key in ("atom_count", "vqa_list", "skills")}
    assert (second.id, second.prompt, second.task) == ("geneval2-00001", other["prompt"], "atoms-3")


@pytest.mark.parametrize(
    "change",
    [
        {"skills": ["count"]},
        {"skills": [], "vqa_list": []},
        {"atom_count": "5"},
        {"atom_count": True},
        {"prompt": ""},
        {"prompt": 3},
        {"vqa_list": [["How many?"], ["Is it?", "Yes"]]},
        {"vqa_list": [["How many?", 2], ["Is it?", "Yes"]]},
        {"vqa_list": None},
    ],
)
def test_a_line_that_is_not_as_in_the_official_file_is_named(change):
    with pytest.raises(RequestError, match=r"file\.jsonl:2"):
        parse_geneval2(json.dumps(LINE) + "\n" + json.dumps(LINE | change), "file.jsonl")


def test_lines_that_lack_a_key_or_are_no_json():
    for line in ('{"prompt": "a tent"}', "tent", "[]"):
        with pytest.raises(RequestError, match=r"geneval2_data\.jsonl:1"):
            parse_geneval2(line)
    with pytest.raises(RequestError, match="no prompt"):
        parse_geneval2("\n")


def test_the_file_is_fetched_once_and_its_licence_shown_once(server, tmp_path, capsys):
    source._print_licence.cache_clear()
    data = (json.dumps(LINE) + "\n").encode()
    server.replies["/file"] = data
    arguments = (tmp_path / "new", Source("file.jsonl", server.url + "/file", sha256(data).hexdigest()))
    once, again = geneval2_prompts(*arguments), geneval2_prompts(*arguments)
    assert once == again == parse_geneval2(data.decode())
    assert len(server.requests) == 1
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [data]
    shown = capsys.readouterr()
    assert shown.err.count("CC BY-NC 4.0") == 1
    assert "non-commercial" in shown.err
    assert shown.out == ""


def test_another_file_is_refused_wherever_it_comes_from(server, tmp_path):
    server.replies["/file"] = (json.dumps(LINE) + "\n").encode()
    meant = replace(source.SOURCE, url=server.url + "/file")
    with pytest.raises(RequestError, match=rf"{server.url}/file is not the file that was meant.*sha256"):
        geneval2_prompts(tmp_path, meant)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "geneval2_data.jsonl").write_bytes(b"{}\n")
    with pytest.raises(RequestError, match=rf"{tmp_path}/geneval2_data.jsonl is not the file that was meant"):
        geneval2_prompts(tmp_path, meant)


def test_without_a_network_the_file_may_be_put_there(tmp_path):
    with serve() as gone:
        pass
    with pytest.raises(RequestError, match=rf"Cannot fetch .*put it at {tmp_path}/geneval2_data.jsonl"):
        geneval2_prompts(tmp_path, replace(source.SOURCE, url=gone.url + "/file"))
