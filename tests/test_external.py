"""Judges in processes of their own: real subprocesses, well-behaved and not."""

import fcntl
import hashlib
import importlib.util
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowopd_eval.errors import RequestError
from flowopd_eval.harness import BenchRun, judge, run_bench
from flowopd_eval.records import Prompt
from flowopd_eval.scorers.external import ExternalScorer
from flowopd_eval.scorers.ocr import ocr_reward

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "external_scorers"

# Does what the first picture's prompt says; "ok" scores each picture with its field "number".
AWKWARD = """
import fcntl, json, os, stat, subprocess, sys, time
folder, start = sys.argv[1], sys.argv[2]
with open(os.path.join(folder, "starts"), "a+") as log:
    log.write("x")
    log.seek(0)
    starts = len(log.read())
if start == "dies":
    sys.exit("no module named nobody")
if start == "mute":
    time.sleep(60)
version = str(starts) if start == "changes" else "7"
first = {"protocol": 2 if start == "future" else 1, "name": "awkward", "version": version, "weights": "abc"}
print("hello" if start == "chats" else json.dumps(first), flush=True)

def hold(name):
    lock = open(os.path.join(folder, name), "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock

lock = hold("alive")
if start == "deaf":
    time.sleep(60)
for line in sys.stdin:
    request = json.loads(line)
    items, reply = request["items"], {"id": request["id"]}
    wish = items[0]["prompt"]
    if wish == "crash" or wish == "crash once" and starts == 1:
        print("loading\\nout of memory", file=sys.stderr)
        os._exit(3)
    if wish == "kill":
        os.kill(os.getpid(), 9)
    if wish == "hang":
        with hold("grandchild") as other:
            subprocess.Popen(["sleep", "60"], pass_fds=[other.fileno()])
        time.sleep(60)
    mode = stat.S_IMODE(os.stat(os.path.dirname(items[0]["picture"])).st_mode)
    reply["scores"] = [
        {"value": item["fields"].get("number"), "detail": {"picture": item["picture"], "mode": mode}} for item in items
    ]
    if wish == "values":
        reply["scores"] = [item["fields"]["score"] for item in items]
    text = json.dumps(reply)
    if wish == "garbage":
        text = "<html>"
    if wish == "deep":
        text = "[" * 200000
    if wish == "other id":
        text = json.dumps({**reply, "id": request["id"] - 1})
    if wish == "few":
        text = json.dumps({**reply, "scores": reply["scores"][1:]})
    if wish == "a list":
        text = json.dumps(reply["scores"])
    if wish == "long":
        text = json.dumps({**reply, "padding": "x" * 10_000_000})
    print(text, flush=True)
open(os.path.join(folder, "bye"), "w").close()
"""


@pytest.fixture
def awkward(tmp_path):
    """Makes scorers on the awkward process; they are closed at the end."""
    script = tmp_path / "awkward.py"
    script.write_text(AWKWARD)
    made = []

    def make(start="", **settings):
        command = (sys.executable, "-I", "-S", str(script), str(tmp_path), start)
        made.append(ExternalScorer(command, **{"batch": 2, "timeout": 20, **settings}))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


def ask(scorer, *wishes):
    """Scores of small pictures with these prompts, each with a number of its own: 0, 1, 2 …"""
    prompts = [Prompt(f"p{n}", wish, "t", {"number": n}) for n, wish in enumerate(wishes)]
    return judge(scorer, [Image.new("RGB", (4, 4))] * len(prompts), prompts)


def values(scores):
    return [score.value for score in scores]


def starts(folder):
    return len((folder / "starts").read_text())


def released(path):
    """Whether whoever held the lock is gone within a few seconds."""
    with path.open("a") as file:
        for _ in range(100):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                return True
    return False


# --- the whole way --------------------------------------------------------------------------------------------------
def luma(image):
    """Mean of Pillow's 16-bit ITU-R 601 luma over 255, from the formula."""
    rgb = np.asarray(image.convert("RGB")).astype(np.int64)
    return float((((rgb * [19595, 38470, 7471]).sum(-1) + 0x8000) >> 16).mean() / 255)


def brightness():
    return ExternalScorer((sys.executable, str(EXAMPLES / "brightness" / "scorer.py")), batch=3)


def test_brightness_is_that_of_an_independent_computation_in_order():
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, high, (h, w, 3), dtype=np.uint8))
        for high, h, w in [(256, 8, 5), (30, 6, 9), (120, 7, 7), (256, 1, 1), (9, 3, 4)]
    ]
    images += [images[0].convert("L"), images[2].convert("RGBA")]
    prompts = [Prompt(str(n), f'Zoë\'s "sign"\n{n}', "t") for n in range(len(images))]
    with brightness() as scorer:
        scores = judge(scorer, images, prompts)
    assert values(scores) == pytest.approx([luma(image) for image in images], abs=1e-12)
    assert len(set(values(scores))) > 4
    assert [score.reason for score in scores] == ["" if luma(i) >= 0.05 else "too dark to see" for i in images]
    assert {score.error for score in scores} == {None}


def test_a_run_is_judged_in_the_harness_thread(tmp_path):
    class Grey:
        def identity(self):
            return {"model": "grey"}

        def generate(self, prompts, seeds):
            return [Image.new("RGB", (8, 8), (seed % 256,) * 3) for seed in seeds]

    prompts = tuple(Prompt(str(n), "grey", "t") for n in range(5))
    with brightness() as scorer:
        run = BenchRun("brightness", "brightness", 1, prompts, scorer, 1, batch_size=2, correct_at=None)
        summary = run_bench(run, Grey(), tmp_path)
    mean = sum(prompt.seed(0, 0) % 256 for prompt in prompts) / 255 / 5
    assert summary["metrics"]["overall"]["value"] == pytest.approx(mean)
    assert summary["unscored"] == 0
    assert summary["scorer"]["name"] == "brightness"


# --- processes that fail --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("wish", "ending"), [("crash", r"\(exit code 3\)"), ("kill", r"\(SIGKILL\)")])
def test_a_batch_that_kills_the_process_twice_is_unscored_and_no_other(awkward, tmp_path, wish, ending):
    scores = ask(awkward(), "ok", "ok", wish, "ok", "ok")
    assert values(scores) == [0, 1, None, None, 4]
    assert starts(tmp_path) == 3  # the first, a second try, and one for what came after
    for score in scores[2:4]:
        assert re.search(ending, score.error)
    if wish == "crash":
        assert "Its last words: loading | out of memory" in scores[2].error


def test_a_crash_that_does_not_repeat_costs_nothing(awkward, tmp_path):
    assert values(ask(awkward(), "ok", "ok", "crash once", "ok", "ok")) == [0, 1, 2, 3, 4]
    assert starts(tmp_path) == 2


def test_a_process_that_hangs_is_killed_in_time_with_what_it_started(awkward, tmp_path):
    scorer = awkward(timeout=1.5)
    scorer.identity()
    start = time.monotonic()
    first, second = ask(scorer, "hang"), ask(scorer, "ok")
    assert 1.5 < time.monotonic() - start < 15
    assert values(first) == [None]
    assert "no answer within 1.5 seconds" in first[0].error
    assert values(second) == [0]
    assert starts(tmp_path) == 2
    assert released(tmp_path / "grandchild")


def test_a_process_that_does_not_listen_is_killed_in_time(awkward):
    scorer = awkward("deaf", timeout=0.5)
    prompt = Prompt("p", "ok", "t", {"much": "x" * 1_000_000})  # more than a pipe holds
    (score,) = scorer.score([Image.new("RGB", (4, 4))], [prompt])
    assert score.value is None
    assert "no answer within 0.5 seconds" in score.error


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("garbage", "no JSON: '<html>"),
        ("deep", "no JSON: '[[["),
        ("other id", "answered request 1, of 2 pictures, with {'id': 0"),
        ("few", "answered request 1, of 2 pictures, with {'id': 1, 'scores': "),
        ("a list", "answered request 1, of 2 pictures, with [{"),
        ("long", "a line of over 4 MiB"),
    ],
)
def test_an_improper_answer_leaves_its_batch_unscored_and_the_next_is_answered(awkward, tmp_path, wish, said):
    scores = ask(awkward(), wish, "ok", "ok")
    assert values(scores) == [None, None, 2]
    assert said in scores[0].error
    assert len(scores[0].error) < 500
    assert starts(tmp_path) == 2  # not asked a second time, and nothing of the old answer is read


SCORES = [  # what the process gives for a picture; what is made of it; what the error says
    ({"value": 0.25, "reason": "dark", "detail": {"also": {"x": 1}}, "error": None}, 0.25, None),
    ({"value": float("nan")}, None, "NaN"),
    ({"value": float("-inf")}, None, "-Infinity"),
    ({"value": 10**400}, None, "1000"),
    ({"value": "0.5"}, None, "'0.5'"),
    ({"value": True}, None, "True"),
    ({"value": None}, None, "None"),
    ({"value": 0.5, "error": "no face found"}, None, "no face found"),
    ({"value": float("nan"), "error": ""}, None, "NaN"),
    ({"value": 0.5, "detail": [1]}, None, "[1]"),
    ("fine", None, "fine"),
    ({}, None, "{}"),
    ({"value": -3}, -3, None),
]


def test_each_value_that_is_no_number_leaves_its_picture_unscored(awkward, tmp_path):
    prompts = [Prompt(str(n), "values", "t", {"score": said}) for n, (said, _, _) in enumerate(SCORES)]
    scores = judge(awkward(batch=99), [Image.new("RGB", (4, 4))] * len(SCORES), prompts)
    assert values(scores) == [value for _, value, _ in SCORES]
    for score, (_, value, says) in zip(scores, SCORES):
        assert score.error is None if value is not None else says in score.error
    assert (scores[0].reason, scores[0].detail) == ("dark", {"also": {"x": 1}})
    assert starts(tmp_path) == 1


# --- who it is ------------------------------------------------------------------------------------------------------
def test_the_identity_is_what_the_process_says_and_the_files_and_nothing_else(awkward, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    executable = Path(sys.executable)
    files = [(executable.name, executable), ("awkward.py", tmp_path / "awkward.py")]
    assert awkward("--key=hush").identity() == {
        "name": "awkward",
        "version": "7",
        "weights": "abc",
        "scorer": "external",
        "files": [[name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in files],
    }


def test_asking_who_it_is_starts_it_once(awkward, tmp_path):
    scorer = awkward()
    assert scorer.identity() == scorer.identity()
    assert values(ask(scorer, "ok", "ok", "ok")) == [0, 1, 2]
    assert starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("dies", r"python\S* ended \(exit code 1\). Its last words: no module named nobody$"),
        ("mute", "no answer within 0.3 seconds"),
        ("chats", "no JSON: 'hello"),
        ("future", "begins with {'protocol': 2, .*, not with protocol 1, name and version"),
    ],
)
def test_a_process_that_does_not_introduce_itself_is_refused(awkward, start, says):
    scorer = awkward(start, startup=0.3 if start == "mute" else 20)
    with pytest.raises(RequestError, match=f"^--scorer-command: .*{says}"):
        scorer.identity()


def test_commands_that_are_none():
    with pytest.raises(RequestError, match="nowhere-to-be-found cannot be started: No such file"):
        ExternalScorer(["/nowhere-to-be-found"]).identity()
    for words in ([], "python scorer.py"):
        with pytest.raises(RequestError, match="expected a program and its arguments"):
            ExternalScorer(words)


def test_another_process_may_not_go_on_in_the_first_ones_place(awkward):
    scores = ask(awkward("changes"), "ok", "ok", "crash once", "ok")
    assert values(scores) == [0, 1, None, None]
    assert "begins with {'protocol': 1, 'name': 'awkward', 'version': '2'" in scores[2].error


# --- order, pictures, ends ------------------------------------------------------------------------------------------
def test_two_threads_get_their_own_scores(awkward, tmp_path):
    scorer, found = awkward(batch=1, timeout=3), {}

    def work(base):
        prompts = [Prompt(str(n), "ok", "t", {"number": base + n}) for n in range(10)]
        found[base] = values(scorer.score([Image.new("RGB", (4, 4))] * 10, prompts))

    threads = [threading.Thread(target=work, args=(base,)) for base in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {base: [base + n for n in range(10)] for base in (0, 100)}
    assert starts(tmp_path) == 1


def test_pictures_are_private_and_gone_afterwards(awkward):
    (score,) = ask(awkward(), "ok")
    assert score.detail["mode"] == 0o700
    assert not Path(score.detail["picture"]).parent.exists()


def test_closing_lets_the_process_end_by_itself_and_another_request_starts_it_again(awkward, tmp_path):
    with awkward() as scorer:
        scorer.identity()
    assert (tmp_path / "bye").exists()
    assert released(tmp_path / "alive")
    assert values(ask(scorer, "ok")) == [0]
    assert starts(tmp_path) == 2


def test_nothing_is_left_when_the_program_ends_without_closing(awkward, tmp_path):
    command = awkward("deaf").command  # it would not notice that its input has ended
    code = f"from flowopd_eval.scorers.external import ExternalScorer; print(ExternalScorer({command!r}).identity())"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert released(tmp_path / "alive")


# --- the other examples, on stand-ins for libraries that are not here ------------------------------------------------
PADDLEOCR = """
print("download https://paddleocr.bj.bcebos.com/…")  # libraries talk
class PaddleOCR:
    def __init__(self, *, use_angle_cls, lang, use_gpu, show_log):
        assert (use_angle_cls, lang, use_gpu, show_log) == (False, "en", False, False)
    def ocr(self, img, cls):
        assert cls is False and img.shape == (4, 4, 3)
        red = int(img[0, 0, 0])
        if red == 3:
            raise RuntimeError("no memory")
        box = [[0, 0]] * 4
        lines = {1: [("OP", 0.9), ("xx", 0.0), ("en", 0.8)], 2: [("Opne", 1.0)]}
        return [[[box, line] for line in lines[red]] if red else None]
"""
IMAGE_REWARD = """
class Model:
    def score(self, prompt, path):
        assert isinstance(prompt, str) and isinstance(path, str)
        if prompt == "broken":
            raise RuntimeError("no memory")
        return len(prompt) / 2
def load(name, download_root):
    print("load checkpoint from", download_root)
    assert name == "ImageReward-v1.0"
    return Model()
"""


DEQA = """
class Model:
    def score(self, images):
        (image,) = images
        red = image.getpixel((0, 0))[0]
        if red == 13:
            raise RuntimeError("no memory")
        return [float(red)]
class AutoModelForCausalLM:
    @staticmethod
    def from_pretrained(name, *, revision, trust_remote_code, attn_implementation):
        assert (revision, trust_remote_code, attn_implementation) == ("a" * 40, True, "eager")
        print("loading", name)
        return Model()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts modules and their versions where processes find them."""

    def put(modules, versions):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        for name, version in versions.items():
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


def example(name):
    return ExternalScorer((sys.executable, str(EXAMPLES / name / "scorer.py")), timeout=20)


def test_the_paddleocr_example_speaks_the_protocol(stand_in):
    stand_in({"paddleocr": PADDLEOCR}, {"paddleocr": "2.9.1", "paddlepaddle": "2.6.2"})
    images = [Image.new("RGB", (4, 4), (red, 0, 200)) for red in (0, 1, 2, 3, 1)]
    asked = [Prompt(str(n), text, "ocr") for n, text in enumerate(['a sign "Open"'] * 4 + ["no quotes"])]
    with example("paddleocr2") as scorer:
        scores = judge(scorer, images, asked)
        identity = scorer.identity()
    assert values(scores) == [0, 1, 0.5, None, None]
    assert scores[2].reason == 'reads "Opne", not "Open"'
    assert "no memory" in scores[3].error
    assert "IndexError" in scores[4].error
    said = {key: identity[key] for key in ("name", "rule", "version", "paddlepaddle", "lang")}
    assert said == {"name": "paddleocr", "rule": "flow-grpo", "version": "2.9.1", "paddlepaddle": "2.6.2", "lang": "en"}


def test_the_paddleocr_example_has_the_toolkits_rule():
    spec = importlib.util.spec_from_file_location("paddleocr2_scorer", EXAMPLES / "paddleocr2" / "scorer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = random.Random(0)
    pairs = [
        ("".join(rng.choices("aAb ", k=rng.randint(0, 7))), rng.choice(["ab", "A b a", "bbaA"])) for _ in range(300)
    ]
    assert {round(ocr_reward(*pair), 3) for pair in pairs} >= {0.0, 0.5, 0.75, 1.0}
    for pair in pairs:
        assert module.reward(*pair) == pytest.approx(ocr_reward(*pair), abs=1e-12)


def test_the_imagereward_example_speaks_the_protocol(stand_in, tmp_path, monkeypatch):
    no_grad = "from contextlib import nullcontext as no_grad\n"
    stand_in({"ImageReward": IMAGE_REWARD, "torch": no_grad}, {"image-reward": "1.5"})
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = tmp_path / ".cache" / "ImageReward" / "ImageReward.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    asked = [Prompt(text, text, "quality") for text in ("a cat", "broken", "a dog!")]
    with example("imagereward") as scorer:
        scores = judge(scorer, [Image.new("RGB", (4, 4))] * 3, asked)
        identity = scorer.identity()
    assert values(scores) == [2.5, None, 3.0]
    assert "no memory" in scores[1].error
    assert identity["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert identity["version"] == "1.5"


def test_the_deqa_example_runs_foreign_code_of_a_named_commit_only(stand_in):
    torch = (
        "from contextlib import nullcontext as no_grad\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    stand_in({"transformers": DEQA, "torch": torch}, {"transformers": "4.36.1"})
    script, flags = str(EXAMPLES / "deqa" / "scorer.py"), ("--trust-remote-code", "--revision", "a" * 40)
    with ExternalScorer((sys.executable, script, *flags), timeout=20) as scorer:
        pictures = [Image.new("RGB", (4, 4), (red, 0, 0)) for red in (1, 13, 4)]
        scores = judge(scorer, pictures, [Prompt(str(n), "a cat", "quality") for n in range(3)])
        assert values(scores) == [1.0, None, 4.0]
        assert scorer.identity()["model"] == "zhiyuanyou/DeQA-Score-Mix3"
        assert scorer.identity()["revision"] == "a" * 40
    for refused in (("--trust-remote-code", "--revision", "main"), ("--revision", "a" * 40)):
        with pytest.raises(RequestError), ExternalScorer((sys.executable, script, *refused), timeout=20) as scorer:
            scorer.identity()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/scorer.py")), ids=lambda path: path.parent.name)
def test_examples_are_short_and_need_nothing_of_the_toolkit(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert "import flowopd_eval" not in text
    assert "from flowopd_eval" not in text


def test_the_command_line_names_the_judge_and_nothing_else_may(tmp_path, command):
    judge = f"{sys.executable} {EXAMPLES / 'brightness' / 'scorer.py'}"
    words = ("--limit", 2, "--steps", 2, "--out", tmp_path / "run")
    code, said, errors = command("--bench", "ocr", *words, "--scorer-command", judge)
    assert code == 0, errors
    assert "sign_ocr" in said
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (entry,) = run["runs"].values()
    assert entry["request"]["scorer"]["name"] == "brightness"
    code, _, errors = command("--bench", "geneval", *words, "--scorer-command", judge)
    assert code == 2
    assert "geneval: --scorer-command cannot take" in errors
