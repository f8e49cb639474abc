"""Blind votes in SQLite: pairs are issued, each is voted on at most once, and win rates come with intervals."""

from __future__ import annotations

import csv
import io
import secrets
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.wanted import Wanted
from flowopd_eval.errors import RequestError
from flowopd_eval.records import Interval
from flowopd_eval.statistics import mean_interval

CHOICES = {"left": (1.0, 0.0), "tie": (0.5, 0.5), "right": (0.0, 1.0)}  # points of the left and the right picture
_WEIGHTS = ("left_weights", "right_weights")  # the hashes of what drew; empty in votes of before they were kept
COLUMNS = ("cast_at", "family", "prompt", "seed", "settings", "left_model", "right_model", "choice", *_WEIGHTS)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula
_WAIT = 30.0  # seconds a writer waits for its turn
_TABLES = """
CREATE TABLE IF NOT EXISTS pairs (
    ticket TEXT PRIMARY KEY, issued_at REAL NOT NULL, family TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL,
    settings TEXT NOT NULL, left_model TEXT NOT NULL, right_model TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
    ticket TEXT PRIMARY KEY REFERENCES pairs (ticket), cast_at REAL NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'tie', 'right')));
"""


@dataclass(frozen=True)
class Reveal:
    """Which models drew the pair that was voted on."""

    left: str
    right: str
    choice: str


@dataclass(frozen=True)
class Standing:
    """How often a model was preferred; a tie is half a win. ``rate`` is over votes, its interval by prompt.

    ``weights`` are the hashes of what drew under the name ``model``; empty where they were not kept.
    """

    model: str
    weights: str
    wins: int
    ties: int
    losses: int
    rate: Interval


class Ballot:
    """The votes in one file. Any number of threads and processes may use it at once."""

    def __init__(self, path: Path) -> None:
        """Raises ``RequestError`` where no database can be."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._connected() as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(_TABLES)
                _add_weights(connection)
        except (OSError, sqlite3.Error) as error:
            raise RequestError(f"--votes {path}: no votes can be kept there: {error}.") from error

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=_WAIT, isolation_level="IMMEDIATE")
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            with connection:
                yield connection
        finally:
            connection.close()

    def issue(self, family: str, request: Wanted, weights: Sequence[str]) -> str:
        """A ticket for the pair that ``request`` drew with ``weights``, both of them left and right."""
        left, right = request.arms
        ticket = secrets.token_urlsafe(16)
        with self._connected() as connection:
            connection.execute(
                "INSERT INTO pairs (ticket, issued_at, family, prompt, seed, settings, left_model, right_model, "
                "left_weights, right_weights) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    ticket,
                    time.time(),
                    family,
                    request.prompt,
                    request.seed,
                    request.model_dump_json(include={"steps", "guidance", "side"}, exclude_none=True),
                    left,
                    right,
                    *weights,
                ),
            )
        return ticket

    def cast(self, ticket: str, choice: str) -> Reveal:
        """Vote on a pair, once. Raises ``RequestError`` for no such pair or choice, or a second vote."""
        if not (isinstance(ticket, str) and isinstance(choice, str)):
            raise RequestError("Ticket and choice are texts.")
        if choice not in CHOICES:
            raise RequestError(f"Choice: expected {', '.join(CHOICES)}, but got {choice!r}.")
        with self._connected() as connection:
            pair = connection.execute(
                "SELECT left_model, right_model FROM pairs WHERE ticket = ?", (ticket,)
            ).fetchone()
            if pair is None:
                raise RequestError("There is no such pair to vote on; ask for a new one.")
            try:
                connection.execute("INSERT INTO votes VALUES (?, ?, ?)", (ticket, time.time(), choice))
            except sqlite3.IntegrityError:
                raise RequestError("This pair has had its vote; ask for a new one.") from None
        left, right = pair
        return Reveal(left, right, choice)

    def _rows(self) -> list[tuple]:
        with self._connected() as connection:
            return connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM votes JOIN pairs USING (ticket) ORDER BY cast_at, ticket"
            ).fetchall()

    def standings(self, family: str) -> list[Standing]:
        """Every model of a family that was voted on, the most preferred first."""
        points: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for _, of, prompt, _, _, left, right, choice, *weights in self._rows():
            if of == family:
                for model, point in zip(zip((left, right), weights), CHOICES[choice], strict=True):
                    points[model][prompt].append(point)
        found = []
        for model, prompts in points.items():
            each = [point for given in prompts.values() for point in given]
            rate = mean_interval(list(prompts.values()))
            found.append(Standing(*model, each.count(1.0), each.count(0.5), each.count(0.0), rate))
        return sorted(found, key=lambda one: (-one.rate.value, one.model, one.weights))

    def csv(self) -> str:
        """Every vote, a line each, oldest first; safe to open in a spreadsheet."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for cast_at, *rest in self._rows():
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(cast_at))
            writer.writerow([when, *(f"'{v}" if str(v).startswith(_FORMULA) else v for v in rest)])
        return text.getvalue()


def _add_weights(connection: sqlite3.Connection) -> None:
    """Give a file of before the hashes were kept its columns. Who opens it at the same moment waits."""
    connection.execute("BEGIN IMMEDIATE")
    there = [name for _, name, *_ in connection.execute("PRAGMA table_info(pairs)")]
    for column in _WEIGHTS:
        if column not in there:
            connection.execute(f"ALTER TABLE pairs ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")


def titles(found: Sequence[Standing]) -> list[str]:
    """What each is called: its name, with short hashes where different models bore it."""
    names = [one.model for one in found]
    return [one.model if names.count(one.model) == 1 else f"{one.model} · {_short(one.weights)}" for one in found]


def _short(weights: str) -> str:
    return "+".join(part[:8] for part in weights.split("+")) if weights else "hash not kept"
