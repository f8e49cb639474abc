"""A user's own scorer, from a file, from an installed package and from the documentation's page."""

import hashlib
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowopd_eval.errors import RequestError
from flowopd_eval.records import Prompt, Score
from flowopd_eval.scorers.own import GROUP, own_scorer

PAGE = Path(__file__).parent.parent / "docs" / "scorers.md"


def blocks(language):
    """The code of one language on the documentation's page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def scorer(tmp_path):
    """Makes the own scorer of a class body; the file is a new one each time."""

    def make(body, name="Judge", file="judge.py"):
        (tmp_path / file).write_text(body)
        return own_scorer(f"{tmp_path / file}:{name}")

    return make


@pytest.fixture
def answering(scorer):
    """Scores of pictures by a scorer that answers with the value of an expression."""

    def score(expression, pictures=3):
        made = scorer(
            "import math, numpy, torch\nfrom fractions import Fraction\nfrom flowopd_eval.records import Score\n"
            f"class Judge:\n    def score(self, images, prompts):\n        return {expression}\n"
        )
        return made.score([Image.new("RGB", (4, 4))] * pictures, prompts_for(pictures))

    return score


def prompts_for(count):
    return [Prompt(f"p{n}", "a cat", "t", {"number": n}) for n in range(count)]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a distribution with one module and its entry points on ``sys.path``."""

    def make(name, version, points, module, source):
        place = tmp_path / f"site-{name}"
        info = place / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (place / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{key} = {value}" for key, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        monkeypatch.syspath_prepend(place)

    return make


# --- the page -------------------------------------------------------------------------------------------------------
def pictures():
    rng = np.random.default_rng(3)
    arrays = [rng.integers(0, high, (h, w, 3), dtype=np.uint8) for high, h, w in [(256, 9, 4), (9, 5, 5), (90, 3, 8)]]
    return [Image.fromarray(array) for array in arrays]


def luma(image):
    """Pillow's 16-bit luma of every pixel, from the formula."""
    return ((np.asarray(image).astype(np.int64) * [19595, 38470, 7471]).sum(-1) + 0x8000) >> 16


def check_brightness(scorer):
    scores = scorer.score(pictures(), prompts_for(3))
    assert [s.value for s in scores] == pytest.approx([luma(p).mean() / 255 for p in pictures()])
    assert [s.detail["also"]["contrast"] for s in scores] == pytest.approx([luma(p).std() / 255 for p in pictures()])
    assert [s.reason for s in scores] == ["", "too dark to see", ""]
    assert {s.error for s in scores} == {None}


def test_the_pages_example_works_as_it_stands(scorer):
    (example,) = blocks("python")
    made = scorer(example, "Brightness", "brightness.py")
    check_brightness(made)
    sha256 = hashlib.sha256(example.encode()).hexdigest()
    own = {"scorer": "own", "name": "brightness.py:Brightness", "sha256": sha256, "identity": {"version": 1}}
    assert made.identity() == own


def test_the_pages_package_offers_its_example(package):
    project = tomllib.loads(blocks("toml")[0])
    (points,) = project["project"]["entry-points"].values()
    assert list(project["project"]["entry-points"]) == [GROUP]
    package("brightness", project["project"]["version"], points, "brightness", blocks("python")[0])
    made = own_scorer("brightness")
    check_brightness(made)
    origin = {"class": "brightness:Brightness", "distribution": "brightness", "version": "1.0"}
    assert made.identity() == {"scorer": "own", "name": "brightness", **origin, "identity": {"version": 1}}


def test_the_page_names_one_scorer_in_all_ways():
    (name,) = tomllib.loads(blocks("toml")[1])["rewards"]
    assert name == "brightness.py:Brightness"
    lines = [line.split() for line in blocks("bash")[0].splitlines()]
    assert [line[line.index("--scorer") + 1] for line in lines] == [name] * 2


# --- answers --------------------------------------------------------------------------------------------------------
def test_pictures_and_prompts_arrive_in_order(scorer):
    made = scorer(
        "class Judge:\n    def score(self, images, prompts):\n"
        "        return [i.width * 10 + p.fields['number'] for i, p in zip(images, prompts, strict=True)]\n"
    )
    images = [Image.new("RGB", (width, 1)) for width in (3, 1, 2)]
    assert made.score(images, prompts_for(3)) == [Score(30.0), Score(11.0), Score(22.0)]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[2] * 3", 2.0),
        ("(0.5 for _ in images)", 0.5),
        ("[Fraction(1, 4)] * 3", 0.25),
        ("numpy.full(3, 0.5, 'float32')", 0.5),
        ("torch.full((3,), -1.5)", -1.5),
        ("[numpy.ones((1, 1))] * 3", 1.0),
        ("[Score(numpy.float32(0.5))] * 3", 0.5),
    ],
)
def test_numbers_of_any_library_become_floats(answering, expression, value):
    scores = answering(expression)
    assert scores == [Score(value)] * 3
    assert {type(score.value) for score in scores} == {float}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("None", "gave no score"),
        ("Score(None)", "gave no score"),
        ("math.nan", "finite number, but got nan"),
        ("-numpy.inf", "finite number, but got -inf"),
        ("torch.tensor(math.nan)", "finite number, but got nan"),
        ("10 ** 400", "too large"),
        ("'0.5'", "got a str"),
        ("True", "got a bool"),
        ("numpy.True_", "got a bool"),
        ("{'value': 1}", "got a dict"),
        ("numpy.zeros(2)", "size"),
        ("torch.zeros(2)", "Tensor"),
        ("Score('0.5', 'good')", "got a str"),
        ("Score(None, error='too dark')", "too dark"),
    ],
)
def test_what_is_no_score_leaves_its_picture_alone_unscored(answering, answer, reason):
    before, wrong, after = answering(f"[1.0, {answer}, 3.0]")
    assert (before, after) == (Score(1.0), Score(3.0))
    assert wrong.value is None
    assert re.search(reason, wrong.error)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("[1.0, 2.0]", "gave 2 answers for 3 pictures"),
        ("[1.0] * 4", "gave 4 answers for 3 pictures"),
        ("[]", "gave 0 answers"),
        ("1.0", "TypeError"),
        ("None", "TypeError"),
        ("[1 / 0]", "ZeroDivisionError: division by zero"),
        ("(1 / n for n in (1, 2, 0))", "ZeroDivisionError"),
        ("[].remove(object())", "ValueError"),
    ],
)
def test_a_batch_that_fails_is_unscored_with_the_reason(answering, expression, reason):
    scores = answering(expression)
    assert [score.value for score in scores] == [None] * 3
    assert all(reason in score.error for score in scores)


def test_a_reason_is_the_same_in_two_runs(answering):
    """An object's address would tell two runs of one request apart."""
    (thrown,) = answering("[(_ for _ in ()).throw(KeyError(repr(object())))]", 1)
    assert thrown.error == "KeyError: '<object object at 0x…>'"


def test_an_interrupt_passes(scorer):
    made = scorer("class Judge:\n    def score(self, images, prompts):\n        raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        made.score([Image.new("RGB", (4, 4))], prompts_for(1))


# --- names ----------------------------------------------------------------------------------------------------------
GOOD = "class Judge:\n    def score(self, images, prompts):\n        return [1.0 for _ in images]\n"


def test_the_identity_changes_with_the_file_and_not_with_its_folder(scorer, tmp_path):
    first = scorer(GOOD).identity()
    (tmp_path / "there").mkdir()
    assert scorer(GOOD, file="there/judge.py").identity() == first
    assert str(tmp_path) not in json.dumps(first)
    changed = scorer(GOOD + "# a word\n").identity()
    assert changed["sha256"] != first["sha256"]
    assert {**changed, "sha256": None} == {**first, "sha256": None}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("class Judge:\n    def __init__(self, device): pass\n    def score(self, i, p): pass\n", "device"),
        ("class Judge:\n    def __init__(self): self.x = {}['weights']\n", "KeyError: 'weights'"),
        ("class Judge:\n    score = 1.0\n", "no method `score"),
        ("class Judge:\n    pass\n", "no method `score"),
        ("Judge = 7\n", "is a int"),
        ("def Judge(images, prompts):\n    return []\n", "missing 2 required"),
        ("class Other:\n    pass\n", "has no Judge"),
        ("import no_such_package_here\n", "no_such_package_here"),
        ("class Judge(:\n", "SyntaxError"),
    ],
)
def test_a_class_that_cannot_judge_is_refused_by_name(scorer, tmp_path, body, words):
    with pytest.raises(RequestError, match=re.escape(words)) as refused:
        scorer(body)
    assert f"{tmp_path / 'judge.py'}:Judge" in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no file"):
        own_scorer(f"{tmp_path / 'nothing.py'}:Judge")


@pytest.mark.parametrize("said", ["{'seed': float('nan')}", "{1, 2}", "{'x': object()}", "1 / 0"])
def test_an_identity_that_is_no_json_is_refused_by_name(scorer, said):
    made = scorer(f"{GOOD}    def identity(self):\n        return {said}\n")
    with pytest.raises(RequestError, match=r"judge\.py:Judge.*identity"):
        made.identity()


def test_an_unknown_name_lists_those_that_are_there(package):
    with pytest.raises(RequestError, match=r"'smile'.*installed: "):
        own_scorer("smile")
    package("smiles", "0.3", {"smile": "smiling:Judge", "grin": "smiling:Grin", "torn": "torn_in_two"}, "smiling", GOOD)
    with pytest.raises(RequestError, match=r"'frown'.*\bgrin, .*\bsmile\b.*\btorn"):
        own_scorer("frown")
    assert own_scorer("smile").score(pictures(), prompts_for(3)) == [Score(1.0)] * 3
    assert own_scorer("smile").identity()["distribution"] == "smiles"
    with pytest.raises(RequestError, match=r"'grin'.*smiling:Grin.*AttributeError"):
        own_scorer("grin")
    with pytest.raises(RequestError, match=r"'torn'.*torn_in_two"):
        own_scorer("torn")


def test_two_packages_with_one_name_are_told_apart_by_nobody(package):
    package("left", "1", {"twin": "left_module:Judge"}, "left_module", GOOD)
    package("right", "1", {"twin": "right_module:Judge"}, "right_module", GOOD)
    with pytest.raises(RequestError, match=r"'twin'.*left, right"):
        own_scorer("twin")
