"""Blind votes: once each, from many processes at once, with intervals."""

import csv
import io
import multiprocessing
import sqlite3
from types import SimpleNamespace

import pytest
from PIL import Image

from app.session import Drawn
from app.vote import Ballot, titles
from app.wanted import wanted
from flowopd_eval.errors import RequestError
from flowopd_eval.statistics import mean_interval, wilson_interval

FAMILY = "tiny"


def asked(prompt="a star", left="a", right="b", seed=1):
    return wanted({"prompt": prompt, "seed": seed, "arms": [left, right]})


@pytest.fixture
def ballot(tmp_path):
    return Ballot(tmp_path / "deep" / "votes.sqlite")


def cast(ballot, choice, weights=("aa", "bb"), **pair):
    return ballot.cast(ballot.issue(FAMILY, asked(**pair), weights), choice)


def test_a_vote_reveals_who_drew_what(ballot):
    reveal = cast(ballot, "right", left="student", right="ocr")
    assert (reveal.left, reveal.right, reveal.choice) == ("student", "ocr", "right")


def test_a_pair_is_voted_on_once(ballot):
    ticket = ballot.issue(FAMILY, asked(), ("aa", "bb"))
    ballot.cast(ticket, "left")
    with pytest.raises(RequestError, match="has had its vote"):
        ballot.cast(ticket, "right")
    assert [(one.model, one.wins) for one in ballot.standings(FAMILY)] == [("a", 1), ("b", 0)]


@pytest.mark.parametrize(("ticket", "choice"), [(["made-up"], "left"), ("made-up", ["left"]), (None, {})])
def test_what_is_no_text_is_no_vote(ballot, ticket, choice):
    with pytest.raises(RequestError, match="are texts"):
        ballot.cast(ticket, choice)


@pytest.mark.parametrize(("ticket", "choice"), [("made-up", "left"), ("' OR 1=1 --", "tie")])
def test_a_ticket_nobody_issued_counts_for_nothing(ballot, ticket, choice):
    with pytest.raises(RequestError, match="no such pair"):
        ballot.cast(ticket, choice)
    assert ballot.standings(FAMILY) == []


def test_another_choice_is_refused_and_the_pair_stays_open(ballot):
    ticket = ballot.issue(FAMILY, asked(), ("aa", "bb"))
    with pytest.raises(RequestError, match="expected left, tie, right"):
        ballot.cast(ticket, "both")
    assert ballot.cast(ticket, "tie").choice == "tie"


def test_rates_are_the_statistics_of_the_points_by_prompt(ballot):
    for prompt, choice in (("p", "left"), ("p", "tie"), ("q", "right"), ("r", "left")):
        cast(ballot, choice, prompt=prompt)
    first, second = ballot.standings(FAMILY)
    assert (first.model, first.wins, first.ties, first.losses) == ("a", 2, 1, 1)
    assert (second.model, second.wins, second.ties, second.losses) == ("b", 1, 1, 2)
    assert first.rate == mean_interval([[1.0, 0.5], [0.0], [1.0]])
    assert first.rate.value == 0.625
    assert first.rate.value + second.rate.value == 1


def test_one_prompt_alone_is_not_certain(ballot):
    for _ in range(5):
        cast(ballot, "left")
    rate = ballot.standings(FAMILY)[0].rate
    assert (rate.low, rate.high) == pytest.approx(wilson_interval(1.0, 1))


def test_families_are_counted_apart(ballot):
    cast(ballot, "left")
    assert ballot.standings("flow-opd") == []


def test_the_csv_is_read_back_whole_and_starts_no_formula(ballot):
    cast(ballot, "left", prompt='=HYPERLINK("x"),\'"')
    cast(ballot, "tie", prompt="zwei Sterne, groß")
    header, first, second = csv.reader(io.StringIO(ballot.csv()))
    rows = [dict(zip(header, row, strict=True)) for row in (first, second)]
    assert rows[0]["prompt"] == '\'=HYPERLINK("x"),\'"'
    assert rows[1]["prompt"] == "zwei Sterne, groß"
    told = ("left_model", "right_model", "choice", "left_weights", "right_weights")
    assert [tuple(row[name] for name in told) for row in rows] == [
        ("a", "b", "left", "aa", "bb"),
        ("a", "b", "tie", "aa", "bb"),
    ]


MONDAY, TUESDAY = "base" * 16 + "+" + "monday" * 10, "base" * 16 + "+" + "tues" * 16


def test_two_models_of_one_name_are_counted_apart(ballot):
    cast(ballot, "left", ("aa", MONDAY), right="mine")
    cast(ballot, "left", ("aa", MONDAY), right="mine", prompt="q")
    cast(ballot, "right", ("aa", TUESDAY), right="mine")
    found = ballot.standings(FAMILY)
    assert [(one.model, one.weights, one.wins, one.losses) for one in found] == [
        ("mine", TUESDAY, 1, 0),
        ("a", "aa", 2, 1),
        ("mine", MONDAY, 0, 2),
    ]
    assert titles(found) == ["mine · basebase+tuestues", "a", "mine · basebase+mondaymo"]


OLDER = """
CREATE TABLE pairs (
    ticket TEXT PRIMARY KEY, issued_at REAL NOT NULL, family TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL,
    settings TEXT NOT NULL, left_model TEXT NOT NULL, right_model TEXT NOT NULL);
CREATE TABLE votes (
    ticket TEXT PRIMARY KEY REFERENCES pairs (ticket), cast_at REAL NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'tie', 'right')));
INSERT INTO pairs VALUES ('voted', 1.0, 'tiny', 'a star', 1, '{}', 'mine', 'b');
INSERT INTO pairs VALUES ('open', 2.0, 'tiny', 'a star', 1, '{}', 'mine', 'b');
INSERT INTO votes VALUES ('voted', 3.0, 'left');
"""


def test_a_file_of_before_the_hashes_were_kept_goes_on(tmp_path):
    with sqlite3.connect(tmp_path / "older.sqlite") as older:
        older.executescript(OLDER)
    for _ in range(2):
        ballot = Ballot(tmp_path / "older.sqlite")
    assert ballot.cast("open", "left").left == "mine"
    cast(ballot, "right", (MONDAY, "bb"), left="mine", prompt="q")
    found = ballot.standings(FAMILY)
    assert {name: (one.wins, one.losses) for name, one in zip(titles(found), found, strict=True)} == {
        "mine · hash not kept": (2, 0),
        "mine · basebase+mondaymo": (0, 1),
        "b · hash not kept": (0, 2),
        "b · bb": (1, 0),
    }
    rows = list(csv.DictReader(io.StringIO(ballot.csv())))
    assert [(row["left_weights"], row["right_weights"]) for row in rows] == [("", ""), ("", ""), (MONDAY, "bb")]


def test_the_file_outlives_the_process_and_is_in_wal_mode(ballot):
    cast(ballot, "left")
    assert Ballot(ballot.path).standings(FAMILY)[0].wins == 1
    with sqlite3.connect(ballot.path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def _vote_often(path, start, count, failed):
    try:
        ballot = Ballot(path)
        start.wait()
        for n in range(count):
            cast(ballot, "left", prompt=f"prompt {n}")
    except Exception as error:
        failed.put(repr(error))


def test_writers_at_the_same_moment_lose_nothing(ballot):
    spawn = multiprocessing.get_context("fork")
    start, failed = spawn.Event(), spawn.Queue()
    writers = [spawn.Process(target=_vote_often, args=(ballot.path, start, 25, failed)) for _ in range(6)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)
    assert failed.empty(), failed.get()
    assert ballot.standings(FAMILY)[0].wins == 150


def test_a_place_where_no_file_can_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="no votes can be kept there"):
        Ballot(tmp_path / "file" / "votes.sqlite")


class Painted:
    """A session whose models draw in its own order, whatever the order in which they are asked."""

    def __init__(self, names):
        self.ready = [SimpleNamespace(name=name) for name in names]
        self.family = SimpleNamespace(name=FAMILY, objects="shapes")

    def draw(self, request):
        for arm in self.ready:
            if arm.name in request.arms:
                yield Drawn(arm.name, Image.new("RGB", (8, 8)), identity={"base_sha256": f"of {arm.name}"})


def test_either_model_comes_to_stand_left(ballot):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app.vote_tab import Pair, Polling

    polling = Polling(Painted(["a", "b"]), ballot)
    sides = set()
    for _ in range(64):  # that one never stands left by chance: 2 ** -63
        (pair,) = [event for event in polling.pair(polling.request("a star", 1)) if isinstance(event, Pair)]
        reveal = ballot.cast(pair.ticket, "tie")
        assert (pair.left.arm, pair.right.arm) == (reveal.left, reveal.right)
        sides.add((pair.left.arm, pair.right.arm))
    assert sides == {("a", "b"), ("b", "a")}
    row = next(csv.DictReader(io.StringIO(ballot.csv())))
    assert row["left_weights"] == f"of {row['left_model']}"


def test_every_two_models_meet(ballot):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'flowopd-eval[app]'")
    from app.vote_tab import Polling

    polling = Polling(Painted(["a", "b", "c"]), ballot)
    assert (
        len({polling.request("a star", 1).arms for _ in range(256)}) == 6
    )  # one is missing by chance: 6 * (5/6) ** 256
