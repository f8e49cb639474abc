"""Judges that write, against a real loopback server that misbehaves."""

import base64
import io
import json
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from flowopd_eval.errors import RequestError
from flowopd_eval.harness import judge
from flowopd_eval.records import Prompt
from flowopd_eval.scorers.judges import QWENVL, QWENVL_QUALITY, RUBRICS, UNIFIED_REWARD, JudgeScorer, read_points
from flowopd_eval.scorers.vlm import VLMClient

JUDGE = "judge-7b"
WHITE = "a plain white picture"  # what the judge is tried with


def completion(text, model=JUDGE, finish="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": model, "choices": [choice]}


class Server:
    """``replies``: prompt -> (status, body, headers), one after the other, the last for good; ``delays`` in seconds."""

    def __init__(self):
        self.replies, self.delays, self.asked, self.bodies = {}, {}, Counter(), []
        self.at_once, self.most_at_once, self.lock = 0, 0, threading.Lock()

    def reply(self, body):
        question = body["messages"][0]["content"][1]["text"]
        prompt = found[1] if (found := re.search(r"\[(.*)\]", question)) else ""
        with self.lock:
            self.bodies.append(body)
            replies = self.replies.get(prompt, [(200, completion("Final Score: 3"), {})])
            answer = replies[min(self.asked[prompt], len(replies) - 1)]
            self.asked[prompt] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delays.get(prompt, 0))
        with self.lock:
            self.at_once -= 1
        return answer


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            status, body, headers = state.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    class Listening(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that has hung up

    listening = Listening(("127.0.0.1", 0), Handler)
    state = Server()
    state.url = f"http://127.0.0.1:{listening.server_port}/v1"
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    listening.shutdown()
    listening.server_close()


def scorer_on(server, rubric=UNIFIED_REWARD, **settings):
    client = VLMClient(server.url, JUDGE, **{"backoff": 0.0, "timeout": 10, "attempts": 3, **settings})
    return JudgeScorer(client, rubric)


def ask(scorer, *prompts):
    return judge(scorer, [Image.new("RGB", (8, 8))] * len(prompts), [Prompt(p, p, "quality") for p in prompts])


OK = (200, completion("It is fine.\nFinal Score: 4.5"), {})
MISBEHAVIOUR = {  # replies; value; what the error says; how often the server is asked
    "busy, then fine": ([(429, {"error": "slow down"}, {"Retry-After": "0"}), OK], 0.9, None, 2),
    "broken": ([(500, b"CUDA error", {})], None, "HTTP 500 CUDA error", 3),
    "refused": ([(400, {"error": "picture too large"}, {})], None, "picture too large", 1),
    "html": ([(200, b"<html>Bad gateway</html>", {})], None, "no chat completion came back, but '<html>Bad", 1),
    "no choices": ([(200, {"model": JUDGE, "choices": []}, {})], None, "no chat completion came back", 1),
    "no text": ([(200, completion(None), {})], None, "the answer has no text, but None", 1),
    "a list": ([(200, completion([{"type": "text"}]), {})], None, "the answer has no text, but [{", 1),
    "no score": ([(200, completion("I like it " * 99), {})], None, "the answer has no score: 'I like it", 1),
    "too high": ([(200, completion("Final Score: 10"), {})], None, "the score 10 is not between 1 and 5", 1),
    "a bit high": ([(200, completion("Final Score: 5.01"), {})], None, "the score 5.01 is not between", 1),
    "zero": ([(200, completion("Final Score: 0"), {})], None, "the score 0 is not between", 1),
    "negative": ([(200, completion("Final Score: -4"), {})], None, "the score -4 is not between", 1),
    "two scores": ([(200, completion("Final Score: 2. No: Final Score: 4"), {})], None, "the scores 2 and 4", 1),
    "one score twice": ([(200, completion("Final Score: 2.\nFinal Score: 2.0"), {})], 0.4, None, 1),
    "cut": ([(200, completion("Final Score: 4", finish="length"), {})], None, "longer than 4096 tokens", 1),
    "another model": (
        [(200, completion("Final Score: 4", "other"), {})],
        None,
        "other answered in place of judge-7b",
        1,
    ),
}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_each_misbehaviour_has_its_outcome_and_touches_no_other_picture(server, name):
    replies, value, says, asked = MISBEHAVIOUR[name]
    server.replies = {name: replies, "well": [OK]}
    before, score, after = ask(scorer_on(server), "well", name, "well")
    assert score.value == value
    assert score.error is None if says is None else says in score.error
    assert score.error is None or len(score.error) < 450
    assert server.asked[name] == asked
    assert before == after
    assert before.value == pytest.approx(0.9)
    assert (before.reason, before.detail["also"]) == ("4.5 of 5", {"points": 4.5})


def test_a_slow_server_is_given_up(server):
    server.delays = {"slow": 5}
    scorer = scorer_on(server, timeout=0.3, attempts=2)
    scorer.identity()
    start = time.monotonic()
    slow, well = ask(scorer, "slow", "well")
    assert time.monotonic() - start < 4
    assert slow.value is None
    assert "timed out" in slow.error
    assert server.asked["slow"] == 2
    assert well.value == 0.6


def test_answers_keep_their_order_however_they_arrive(server):
    points = [1, 5, 2, 4, 3, 1.5, 2.5, 4.5]
    server.replies = {f"p{n}": [(200, completion(f"Final Score: {p}"), {})] for n, p in enumerate(points)}
    server.delays = {f"p{n}": 0.3 - 0.03 * n for n in range(8)}  # the last is the first to come
    scores = ask(scorer_on(server), *(f"p{n}" for n in range(8)))
    assert [score.value for score in scores] == pytest.approx([p / 5 for p in points])
    assert server.most_at_once > 3


def test_what_the_judge_is_sent(server):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    prompt = Prompt("p", "a {curly} sign", "quality")
    for rubric, tag, side in ((UNIFIED_REWARD, "Final Score:", 512), (QWENVL, "<OverallScore>", None)):
        server.replies = {WHITE: [(200, completion("Final Score: 1 <OverallScore>1</OverallScore>"), {})]}
        scorer_on(server, rubric).score([image], [prompt])
        body = server.bodies[-1]
        assert (body["model"], body["temperature"], body["max_tokens"]) == (JUDGE, 0, rubric.max_tokens)
        assert "logprobs" not in body
        picture, text = body["messages"][0]["content"]
        assert "[a {curly} sign]" in text["text"]
        assert tag in text["text"]
        kind, data = picture["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        wanted = image.resize((side, side), Image.Resampling.BICUBIC) if side else image
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(wanted))
    assert (UNIFIED_REWARD.max_tokens, QWENVL.max_tokens) == (4096, 2048)


def tags(**numbers):
    return completion("<Thought>hm</Thought>\n" + "\n".join(f"<{k}> {v} </{k}>" for k, v in numbers.items()))


def test_qwenvl_counts_the_overall_score_with_decimals_and_keeps_the_others(server):
    white = (200, tags(OverallScore=1), {})
    server.replies = {
        WHITE: [white],
        "all": [(200, tags(QualityScore=2, InstructionScore=4.5, OverallScore=3.5), {})],
        "odd": [(200, tags(QualityScore=50, OverallScore=4), {})],
        "none": [(200, tags(QualityScore=2, InstructionScore=4), {})],
        "words": [(200, tags(OverallScore="4 of 5"), {})],
    }
    every, odd, none, words = ask(scorer_on(server, QWENVL), "all", "odd", "none", "words")
    assert every.value == pytest.approx(0.7)
    assert every.detail["also"] == {"points": 3.5, "quality": 2.0, "instruction": 4.5}
    assert odd.detail["also"] == {"points": 4.0}
    for score in (none, words):
        assert score.value is None
        assert "the answer has no score: '<Thought>hm</Thought>" in score.error
        assert score.detail["answer"].startswith("<Thought>")


def test_qwenvl_quality_does_not_show_the_prompt(server):
    server.replies = {"": [(200, tags(Score=2), {})]}
    (score,) = ask(scorer_on(server, QWENVL_QUALITY), "a secret prompt")
    assert score.value == 0.4
    assert "secret" not in json.dumps(server.bodies)


def test_an_unfit_judge_is_refused_before_anything_is_drawn(server):
    server.replies = {WHITE: [(200, completion("I cannot see pictures."), {})]}
    with pytest.raises(RequestError, match=r"judge-7b is no judge for unified-reward; .*cannot see pictures"):
        scorer_on(server).identity()


def test_the_identity_tells_judges_and_questions_apart(server):
    identity = scorer_on(server).identity()
    assert identity == {
        "scorer": "unified-reward",
        "rule": "points-1",
        "question_sha256": sha256(UNIFIED_REWARD.question.encode()).hexdigest(),
        "judge": JUDGE,
        "url": server.url,
        "side": 512,
    }
    official = replace(UNIFIED_REWARD, question="Caption: [{prompt}]. Put it after 'Final Score:'.")
    assert scorer_on(server, official).identity()["question_sha256"] != identity["question_sha256"]
    assert list(RUBRICS) == ["unified-reward", "qwenvl", "qwenvl-quality"]


def test_every_score_the_official_pattern_reads_right_is_read_the_same():
    official = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
    for number in ["1", "2", "5", "1.0", "3.25", "4.9", "5.0"]:
        for text in (f"Final Score: {number}", f"x Final Score:\n{number}.", f"Final Score:{number}/5"):
            assert read_points(text, UNIFIED_REWARD.points) == float(official.search(text)[1])
    assert official.search("Final Score: 10")[1] == "1"  # which is why the pattern here is another
