"""The OCR rule against an independent edit distance, and the engine on signs it can read."""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowopd_eval import job
from flowopd_eval.benches import OCR_SIDE, find_bench
from flowopd_eval.errors import RequestError, Unavailable
from flowopd_eval.fetched import Source
from flowopd_eval.prompts import ocr_prompts
from flowopd_eval.records import Prompt
from flowopd_eval.scorers.ocr import OCRScorer, error_rate, levenshtein, ocr_reward, target_text
from flowopd_eval.scorers.ocr_engines import ENGINES, PaddleOCR3Engine, RapidOCREngine, lines_of, model_of
from flowopd_eval.tiny.scenes import draw_scene, sample_scene

SHORT = st.text("ab C!", max_size=7)


def slow_distance(a: str, b: str) -> int:
    """The textbook recursion, on its own."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return slow_distance(a[1:], b[1:])
    return 1 + min(slow_distance(a[1:], b), slow_distance(a, b[1:]), slow_distance(a[1:], b[1:]))


@given(SHORT, SHORT)
def test_levenshtein_equals_the_recursion(a, b):
    assert levenshtein(a, b) == slow_distance(a, b)


@pytest.mark.parametrize(
    ("recognised", "target", "reward"),
    [  # computed with Flow-GRPO's ocr.py
        ("xx hello world yy", "Hello World", 1.0),
        ("Hell World", "Hello World", 0.9),
        ("", "abc", 0.0),
        ("a" * 50, "abc", 0.0),
        ("open", "OPEN!", 0.8),
        ("Hello,World", "Hello World", 0.9),
        ("OPENOPEN", "open", 1.0),
    ],
)
def test_golden_rewards(recognised, target, reward):
    assert ocr_reward(recognised, target) == pytest.approx(reward)


@given(SHORT, SHORT.filter(lambda t: t.replace(" ", "")))
def test_reward_is_bounded_and_blind_to_case_and_spaces(recognised, target):
    reward = ocr_reward(recognised, target)
    assert 0 <= reward <= 1
    assert reward == ocr_reward(f" {recognised.upper()} ", target.lower())
    assert ocr_reward(target, target) == 1


@pytest.mark.parametrize("prompt", ["no quotes", 'one " only', 'empty "" quotes', 'blank "  " quotes'])
def test_a_prompt_without_a_target_is_an_error(prompt):
    with pytest.raises(RequestError, match=re.escape(repr(prompt))):
        target_text(prompt)


def test_only_the_first_quotation_counts():
    assert target_text('a "first" and a "second"') == "first"


def test_clean_signs_are_read_and_wrong_ones_are_told():
    scenes = [sample_scene(np.random.default_rng([99, i]), "ocr") for i in range(24)]
    pictures = [Image.fromarray(draw_scene(scene)) for scene in scenes]
    prompts = [Prompt(str(i), scene.caption, "ocr") for i, scene in enumerate(scenes)]
    scorer = OCRScorer(RapidOCREngine(OCR_SIDE))
    assert scorer.identity()["side"] == OCR_SIDE
    scores = scorer.score(pictures, prompts)
    assert np.mean([score.value for score in scores]) >= 0.95
    (wrong,) = scorer.score(pictures[:1], [Prompt("x", 'a sign that says "XYZXYZXYZ"', "ocr")])
    assert wrong.value is not None
    assert wrong.value < 0.5
    assert "XYZXYZXYZ" in wrong.reason


@given(SHORT, SHORT.filter(lambda t: t.replace(" ", "")))
def test_the_error_rate_has_no_cap_and_forgives_nothing_around_the_target(recognised, target):
    found, wanted = (text.replace(" ", "").lower() for text in (recognised, target))
    assert error_rate(recognised, target) == slow_distance(found, wanted) / len(wanted)
    assert error_rate("abc" * 5, "abc") == 4.0


def test_exact_match_and_error_rate_stand_beside_the_rule():
    class Reader:
        def __init__(self, texts):
            self.texts = iter(texts)

        def identity(self):
            return {"engine": "given"}

        def read(self, image):
            return next(self.texts)

    prompts = [Prompt(str(n), 'a sign that says "CAT"', "ocr") for n in range(3)]
    scores = OCRScorer(Reader(["cat", "thecats", "car"])).score([Image.new("RGB", (8, 8))] * 3, prompts)
    assert [score.value for score in scores] == [1.0, 1.0, pytest.approx(2 / 3)]
    assert [score.detail["also"]["exact_match"] for score in scores] == [1.0, 0.0, 0.0]
    assert [score.detail["also"]["cer"] for score in scores] == pytest.approx([0.0, 4 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("bench", "prompt"),
    [("ocr", {"prompt": "a sign without words", "task": "ocr"}), ("geneval", {"prompt": "a cat", "task": "colors"})],
)
def test_a_prompt_that_nobody_could_judge_is_refused_before_anything_is_drawn(bench, prompt, tmp_path, command):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": "p", **prompt}))
    code, _, errors = command("--bench", bench, "--prompts", file, "--out", tmp_path / "run")
    assert code == 2
    assert prompt["prompt"] in errors or "'p'" in errors
    assert not (tmp_path / "run").exists()


def test_own_prompts_need_no_network(tmp_path, monkeypatch):
    """The bench's own cannot be had: that these are others is all there is to know."""
    monkeypatch.setenv("FLOWOPD_CACHE", str(tmp_path))
    monkeypatch.setattr("flowopd_eval.fetched.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert not job._are_of(find_bench("ocr", "coco"), [Prompt("p", 'a sign that says "A"', "ocr")])
    signs = find_bench("ocr", "shapes")
    assert job._are_of(signs, signs.prompts())


def test_the_public_prompts_are_fetched_once_and_become_prompts(tmp_path):
    """From a file: URL, as the checksum and not the way decides; each line quotes one text."""
    lines = b'A board that says "One"\nA cup with "Two words" on it\n'
    (tmp_path / "there.txt").write_bytes(lines)
    source = Source("ocr.txt", (tmp_path / "there.txt").as_uri(), hashlib.sha256(lines).hexdigest())
    prompts = ocr_prompts(tmp_path / "cache", source)
    assert [(prompt.task, target_text(prompt.prompt)) for prompt in prompts] == [("ocr", "One"), ("ocr", "Two words")]
    assert (tmp_path / "cache" / "ocr.txt").read_bytes() == lines
    (tmp_path / "there.txt").unlink()
    assert ocr_prompts(tmp_path / "cache", source) == prompts
    assert find_bench("ocr", "coco").key == "ocr"


def test_a_blank_picture_reads_as_nothing():
    (score,) = OCRScorer(RapidOCREngine(OCR_SIDE)).score([Image.new("RGB", (64, 64))], [Prompt("x", '"A"', "ocr")])
    assert (score.value, score.detail["recognised"], score.error) == (0.0, "", None)


# --- in several processes -------------------------------------------------------------------------------------------
# What a picture shows is the red of its first pixel; workers import this file by name.
ENGINE = """
import os, pathlib, time
from flowopd_eval.errors import Unavailable

class Red:
    def __init__(self, folder, how=""):
        self.folder, self.how = pathlib.Path(folder), how

    def identity(self):
        return {"engine": "red"}

    def load(self):
        with open(self.folder / f"loads-{os.getpid()}", "a") as log:
            log.write("x")
        if self.how == "absent":
            raise Unavailable("no reader: `pip install red`")

    def read(self, image):
        red = image.getpixel((0, 0))[0]
        if self.how == "absent":
            raise Unavailable("no reader: `pip install red`")
        if self.how == "dies" and red == 13:
            os._exit(3)
        if self.how == "dies once" and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(3)
        if red == 14:
            raise MemoryError("too red")
        time.sleep(60 if self.how == "hangs" else 0.1 if red % 2 else 0.01)
        return f"{red} {os.getpid()}" if self.how == "names itself" else str(red)
"""


@pytest.fixture
def red(tmp_path, monkeypatch):
    """Makes scorers on the engine above, with that many processes; they are closed at the end."""
    (tmp_path / "red_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "red_engine", raising=False)
    made = []

    def make(how="", workers=2):
        from red_engine import Red

        made.append(OCRScorer(Red(tmp_path, how), workers))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()
    for child in multiprocessing.active_children():  # a scorer that was merely forgotten waits for nobody
        child.join(60)  # a child of a busy machine may still be importing when it is told to end
    assert not multiprocessing.active_children()


def scores_of(scorer, *reds):
    images = [Image.new("RGB", (2, 2), (red, 0, 0)) for red in reds]
    return scorer.score(images, [Prompt(str(n), f'"{red}"', "ocr") for n, red in enumerate(reds)])


def texts(scores):
    return [score.detail.get("recognised") for score in scores]


def gone(pid):
    """Whether the process ends within a few seconds; one that nobody has waited for yet counts as ended."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_two_processes_read_what_one_reads(tmp_path):
    """The real engine; among the pictures one of another mode, one of another size, and one cut short."""
    scenes = [sample_scene(np.random.default_rng([7, i]), "ocr") for i in range(4)]
    pictures = [Image.fromarray(draw_scene(scene)) for scene in scenes]
    pictures[1].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-900])
    cut = Image.open(tmp_path / "cut.png")
    pictures = [pictures[0].convert("RGBA"), cut, pictures[2].resize((90, 200)), pictures[3]]
    pictures[3].info["of mine"] = lambda: None  # cannot travel, need not
    prompts = [Prompt(str(n), scene.caption, "ocr") for n, scene in enumerate(scenes)]
    here = OCRScorer(RapidOCREngine(OCR_SIDE)).score(pictures, prompts)
    with closing(OCRScorer(RapidOCREngine(OCR_SIDE), workers=2)) as scorer:
        assert scorer.identity() == OCRScorer(RapidOCREngine(OCR_SIDE)).identity()  # also: the reader may be there
        assert scorer.score(pictures, prompts) == here
    assert [score.value is None for score in here] == [False, True, False, False]
    assert "OSError" in here[1].error
    assert here[3].value == 1


def test_answers_keep_the_order_and_come_from_as_many_processes_as_asked_for(red, tmp_path):
    reds = [5, 2, 4, 1, 3, 8, 6, 7] * 2
    scorer = red("names itself")
    answers = [text.split() for text in texts(scores_of(scorer, *reds))]
    assert [int(number) for number, _ in answers] == reds
    workers = {int(pid) for _, pid in answers}
    assert len(workers) == 2
    assert os.getpid() not in workers
    again = {int(text.split()[1]) for text in texts(scores_of(scorer, *reds))}
    assert again == workers  # they stay
    loads = {int(path.name.split("-")[1]): path.read_text() for path in tmp_path.glob("loads-*")}
    assert loads == dict.fromkeys(workers, "x")  # one reader each
    scorer.close()
    assert all(gone(pid) for pid in workers)
    assert texts(scores_of(scorer, 2, 4))[0].split()[0] == "2"  # closed is not broken


def test_processes_start_when_there_is_something_to_share_and_end_with_the_scorer(red, tmp_path):
    from red_engine import Red  # put there by the fixture's first use

    scorer = OCRScorer(Red(tmp_path, "names itself"), 3)
    (alone,) = texts(scores_of(scorer, 2))
    assert alone == f"2 {os.getpid()}"
    assert not multiprocessing.active_children()
    pids = {int(text.split()[1]) for text in texts(scores_of(scorer, 2, 4))}
    del scorer
    assert all(gone(pid) for pid in pids)


def test_a_picture_that_an_engine_fails_on_is_unscored_alone(red):
    for workers in (1, 2):
        scores = scores_of(red(workers=workers), 2, 14, 4)
        assert [score.value for score in scores] == [1.0, None, 1.0]
        assert scores[1].error == "MemoryError: too red"


def test_a_batch_is_read_again_when_a_process_dies(red):
    assert texts(scores_of(red("dies once"), 2, 4, 6, 8)) == ["2", "4", "6", "8"]


def test_a_batch_on_which_processes_die_twice_is_unscored_and_the_next_is_not(red):
    scorer = red("dies")
    scores = scores_of(scorer, 2, 13, 4)
    assert [score.value for score in scores] == [None] * 3
    assert all("died on this batch" in score.error for score in scores)
    assert texts(scores_of(scorer, 2, 4)) == ["2", "4"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_reader_is_no_fault_of_the_pictures(red, workers):
    with pytest.raises(Unavailable, match="pip install red"):
        scores_of(red("absent", workers), 2, 4)


@pytest.mark.parametrize("workers", [0, -1])
def test_no_process_at_all_is_refused(workers):
    with pytest.raises(RequestError, match=str(workers)):
        OCRScorer(RapidOCREngine(OCR_SIDE), workers)


WAITING = """
import sys
from PIL import Image
from flowopd_eval.records import Prompt
from flowopd_eval.scorers.ocr import OCRScorer
from red_engine import Red

if __name__ == "__main__":
    print("ready", flush=True)
    OCRScorer(Red(sys.argv[1], "hangs" if sys.argv[2] == "hangs" else ""), 2).score(
        [Image.new("RGB", (2, 2))] * 60, [Prompt("p", '"0"', "ocr")] * 60
    )
"""


@pytest.fixture
def waiting(tmp_path, red):
    """A process group of its own in which pictures are read by two processes; killed at the end."""
    (tmp_path / "waiting.py").write_text(WAITING)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    started = []

    def start(how):
        command = [sys.executable, str(tmp_path / "waiting.py"), str(tmp_path), how]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(
            subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONPATH": path}, **pipes)
        )
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    def workers():
        for _ in range(200):
            if len(found := [int(path.name.split("-")[1]) for path in tmp_path.glob("loads-*")]) == 2:
                return found
            time.sleep(0.05)
        raise AssertionError("no workers within ten seconds")

    yield start, workers
    for process in started:
        with suppress(ProcessLookupError):  # what is left of its group; workers hold its pipes open
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("moment", ["while they start", "while they read"])
def test_ctrl_c_is_the_parents_alone(waiting, moment):
    start, workers = waiting
    process = start("reads")
    if moment == "while they read":
        workers()
    else:
        time.sleep(0.15)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to everyone
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_workers_end_with_a_parent_that_was_killed(waiting):
    start, workers = waiting
    process = start("hangs")
    pids = workers()
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in pids)


# --- engines --------------------------------------------------------------------------------------------------------
def test_an_engine_travels_small_and_without_its_reader():
    engine = RapidOCREngine(OCR_SIDE)
    before = engine.identity()
    travelled = pickle.dumps(engine)
    assert len(travelled) < 200
    assert pickle.loads(travelled).identity() == before
    assert set(ENGINES) == {"rapidocr", "paddle3"}
    assert all(pickle.loads(pickle.dumps(make(96))).side == 96 for make in ENGINES.values())


@given(st.lists(st.tuples(SHORT, st.sampled_from([-0.1, 0.0, float("nan"), 1e-9, 0.4, 1.0])), max_size=5))
def test_paddles_lines_are_those_with_some_confidence(lines):
    page = {"rec_texts": [text for text, _ in lines], "rec_scores": [score for _, score in lines], "rec_polys": []}
    kept = lines_of(page)
    assert kept == [lines[n][0] for n in range(len(lines)) if not (lines[n][1] <= 0 or np.isnan(lines[n][1]))]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ({"error": "invalid"}, "error"),
        ({"rec_texts": ["a"]}, "rec_texts"),
        (None, "NoneType"),
        ({"rec_texts": ["a", "b"], "rec_scores": [1.0]}, "shorter"),
    ],
)
def test_a_page_of_another_kind_is_an_error_and_no_empty_text(page, words):
    with pytest.raises(ValueError, match=words):
        lines_of(page)


def test_paddles_pages_are_read_blue_first_enlarged_and_joined_without_a_separator(monkeypatch):
    """A stand-in for the pipeline alone; that it means BGR is in the engine's source."""
    seen = []

    class Pipeline:
        def predict(self, array):
            seen.append(array)
            return [
                {"rec_texts": ["Ab", "no", " c"], "rec_scores": [0.9, 0.0, 0.1]},
                {"rec_texts": [], "rec_scores": []},
            ]

    monkeypatch.setattr(PaddleOCR3Engine, "_build", lambda self: Pipeline())
    assert PaddleOCR3Engine(32).read(Image.new("RGBA", (16, 8), (255, 128, 0))) == "Ab c"
    (array,) = seen
    assert array.shape == (32, 64, 3)
    assert array.flags.c_contiguous
    assert array[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("engine", "package"), [(RapidOCREngine, "rapidocr"), (PaddleOCR3Engine, "paddleocr")])
def test_a_missing_package_is_unavailable_with_the_command(monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there: importing it fails
    extra = "ocr" if package == "rapidocr" else "paddle"
    with pytest.raises(Unavailable, match=re.escape(f'`pip install -c constraints.txt -e ".[{extra}]"`')):
        engine(OCR_SIDE).identity()


def test_a_model_folder_says_which_model_it_is(tmp_path):
    pytest.importorskip("yaml")
    with pytest.raises(RequestError, match=re.escape(str(tmp_path))):
        model_of(tmp_path)
    (tmp_path / "inference.yml").write_text("Global:\n  model_name: PP-OCRv6_small_det\nPreProcess: {}\n")
    assert model_of(tmp_path) == "PP-OCRv6_small_det"
    for other in ("Global: {}\n", "[1, 2", "7\n"):
        (tmp_path / "inference.yml").write_text(other)
        with pytest.raises(RequestError, match=r"inference\.yml"):
            model_of(str(tmp_path))
