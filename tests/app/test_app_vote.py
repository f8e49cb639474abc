"""Blind votes: once each, from many processes at once, with intervals."""

import csv
import io
import multiprocessing
import sqlite3

import pytest

from app.vote import Ballot
from app.wanted import wanted
from flowopd_eval.errors import RequestError
from flowopd_eval.statistics import mean_interval, wilson_interval

FAMILY = "tiny"


def asked(prompt="a star", left="a", right="b", seed=1):
    return wanted({"prompt": prompt, "seed": seed, "arms": [left, right]})


@pytest.fixture
def ballot(tmp_path):
    return Ballot(tmp_path / "deep" / "votes.sqlite")


def cast(ballot, choice, **pair):
    return ballot.cast(ballot.issue(FAMILY, asked(**pair)), choice)


def test_a_vote_reveals_who_drew_what(ballot):
    reveal = cast(ballot, "right", left="student", right="ocr")
    assert (reveal.left, reveal.right, reveal.choice) == ("student", "ocr", "right")


def test_a_pair_is_voted_on_once(ballot):
    ticket = ballot.issue(FAMILY, asked())
    ballot.cast(ticket, "left")
    with pytest.raises(RequestError, match="has had its vote"):
        ballot.cast(ticket, "right")
    assert [(one.model, one.wins) for one in ballot.standings(FAMILY)] == [("a", 1), ("b", 0)]


@pytest.mark.parametrize(("ticket", "choice"), [("made-up", "left"), ("' OR 1=1 --", "tie")])
def test_a_ticket_nobody_issued_counts_for_nothing(ballot, ticket, choice):
    with pytest.raises(RequestError, match="no such pair"):
        ballot.cast(ticket, choice)
    assert ballot.standings(FAMILY) == []


def test_another_choice_is_refused_and_the_pair_stays_open(ballot):
    ticket = ballot.issue(FAMILY, asked())
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
    assert [(row["left_model"], row["right_model"], row["choice"]) for row in rows] == [
        ("a", "b", "left"),
        ("a", "b", "tie"),
    ]


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
