"""A study on disk: SQLite in WAL mode. A vote that was acknowledged is on the disk, whatever happens next.

Tokens are kept as hashes: who reads the database cannot vote in anybody's name.
"""

from __future__ import annotations

import hashlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError
from lora_dae.study.plan import REFERENCE, Trial

VERSION = 1
APPLICATION = 0x4C444145  # "LDAE"
FILE = "study.db"
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (item INTEGER PRIMARY KEY, prompt TEXT NOT NULL);
CREATE TABLE pictures (name TEXT PRIMARY KEY, item INTEGER NOT NULL, method TEXT NOT NULL);
CREATE TABLE raters (rater INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, consented REAL, language TEXT);
CREATE TABLE trials (
    trial INTEGER PRIMARY KEY, rater INTEGER NOT NULL, number INTEGER NOT NULL, kind TEXT NOT NULL,
    question TEXT NOT NULL, item INTEGER NOT NULL, left TEXT NOT NULL, right TEXT, repeat_of INTEGER,
    UNIQUE (rater, number)
);
CREATE TABLE votes (trial INTEGER PRIMARY KEY, answer TEXT NOT NULL, ms INTEGER NOT NULL, at REAL NOT NULL);
"""
PAIR_ANSWERS = ("left", "tie", "right")
OPINION_ANSWERS = ("1", "2", "3", "4", "5")


@dataclass(frozen=True)
class VoteRow:
    """A vote as it was cast, for the report. ``left`` and ``right`` are methods."""

    rater: int
    number: int
    kind: str
    question: str
    item: int
    prompt: str
    left: str
    right: str | None
    repeat_of: int | None
    answer: str
    seconds: float
    at: float


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def connect(path: Path) -> sqlite3.Connection:
    """Open a study's database; ConfigError when it is missing, of another kind or version."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: make a study first (python -m lora_dae.study create ...).")
    db = sqlite3.connect(path, timeout=30, check_same_thread=False)
    try:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION:
            raise ConfigError(f"{path} is no study: give the folder that `create` made.")
        if version != VERSION:
            raise ConfigError(f"{path} is a study of version {version}, this program reads {VERSION}: use its own.")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")  # a commit waits for the disk: power may fail as well as the program
    except sqlite3.OperationalError as error:
        raise ConfigError(f"{path} cannot be opened ({error}): is there room, and may it be written?") from error
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{path} is no study database ({error}).") from error
    return db


def create_database(
    path: Path,
    meta: dict[str, Any],
    prompts: Sequence[str],
    pictures: dict[str, tuple[int, str]],
    tokens: Sequence[str],
    trials: Sequence[Sequence[Trial]],
) -> None:
    """Write a new study: ``pictures`` maps file name to (item, method), ``trials[r]`` are those of ``tokens[r]``."""
    db = sqlite3.connect(path)
    db.executescript(SCHEMA)
    db.execute(f"PRAGMA application_id={APPLICATION}")
    db.execute(f"PRAGMA user_version={VERSION}")
    names = {known: name for name, known in pictures.items()}
    with db:
        db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in meta.items()])
        db.executemany("INSERT INTO items VALUES (?, ?)", enumerate(prompts))
        db.executemany("INSERT INTO pictures VALUES (?, ?, ?)", [(n, i, m) for n, (i, m) in pictures.items()])
        for rater, (token, own) in enumerate(zip(tokens, trials, strict=True)):
            db.execute("INSERT INTO raters VALUES (?, ?, NULL, NULL)", (rater, hashed(token)))
            db.executemany(
                "INSERT INTO trials (rater, number, kind, question, item, left, right, repeat_of) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (rater, t.number, t.kind, t.question, t.item, names[t.item, t.left],
                     None if t.right is None else names[t.item, t.right], t.repeat_of)
                    for t in own
                ],
            )  # fmt: skip
    db.close()


class StudyStore:
    """Reads on the caller's thread; writes on one thread that commits whatever is waiting in one transaction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._db = connect(folder / FILE)
        self._read = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[str, tuple[Any, ...], Future[int]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, args=(connect(folder / FILE),), daemon=True)
        self._writer.start()
        self.pictures = {row[0] for row in self.rows("SELECT name FROM pictures")}
        self.meta = {k: json.loads(v) for k, v in self.rows("SELECT key, value FROM meta")}

    def rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._read:
            return self._db.execute(sql, values).fetchall()

    def rater(self, token: str) -> tuple[int, bool] | None:
        """(number, has consented) of a token, or None."""
        found = self.rows("SELECT rater, consented IS NOT NULL FROM raters WHERE token=?", (hashed(token),))
        return (found[0][0], bool(found[0][1])) if found else None

    def next_trial(self, rater: int) -> dict[str, Any] | None:
        """The rater's first trial without a vote, as the page gets it; None when all are done.

        Nothing in it tells methods, checks or repeats from one another.
        """
        rows = self.rows(
            "SELECT t.trial, t.number, t.kind, t.question, t.item, t.left, t.right, i.prompt FROM trials t JOIN "
            "items i USING (item) LEFT JOIN votes v USING (trial) WHERE t.rater=? AND v.trial IS NULL "
            "ORDER BY t.number LIMIT 1",
            (rater,),
        )
        if not rows:
            return None
        trial, number, kind, question, item, left, right, prompt = rows[0]
        total = self.rows("SELECT count(*) FROM trials WHERE rater=?", (rater,))[0][0]
        reference = self.rows("SELECT name FROM pictures WHERE item=? AND method=?", (item, REFERENCE))
        return {
            "trial": trial,
            "kind": "opinion" if kind == "opinion" else "pair",
            "question": question,
            "left": left,
            "right": right,
            "reference": reference[0][0] if reference and question == "truth" else None,
            "prompt": prompt,
            "number": number + 1,
            "total": total,
        }

    def language(self, rater: int) -> str | None:
        """The language that the rater chose last; None before consent."""
        language: str | None = self.rows("SELECT language FROM raters WHERE rater=?", (rater,))[0][0]
        return language

    def answers(self, rater: int, trial: int) -> tuple[str, ...]:
        """The answers that a trial takes; none when it is not this rater's."""
        rows = self.rows("SELECT kind FROM trials WHERE trial=? AND rater=?", (trial, rater))
        return () if not rows else OPINION_ANSWERS if rows[0][0] == "opinion" else PAIR_ANSWERS

    def vote(self, trial: int, answer: str, ms: int) -> Future[int]:
        """Done when the vote is on the disk; the first vote of a trial stands."""
        return self._put("INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?)", (trial, answer, ms, time.time()))

    def consent(self, rater: int, language: str) -> Future[int]:
        return self._put(
            "UPDATE raters SET consented=coalesce(consented, ?), language=? WHERE rater=?",
            (time.time(), language, rater),
        )

    def votes(self) -> list[VoteRow]:
        rows = self.rows(
            "SELECT t.rater, t.number, t.kind, t.question, t.item, i.prompt, l.method, r.method, t.repeat_of, "
            "v.answer, v.ms / 1000.0, v.at FROM votes v JOIN trials t USING (trial) JOIN items i USING (item) "
            "JOIN pictures l ON l.name=t.left LEFT JOIN pictures r ON r.name=t.right ORDER BY t.rater, t.number"
        )
        return [VoteRow(*row) for row in rows]

    def progress(self) -> list[tuple[int, int, int]]:
        """(rater, votes, trials) of every rater."""
        return self.rows(
            "SELECT t.rater, count(v.trial), count(*) FROM trials t LEFT JOIN votes v USING (trial) GROUP BY t.rater"
        )

    def close(self) -> None:
        """Write what waits, then close."""
        self._queue.put(None)
        self._writer.join()
        self._db.close()

    def _put(self, sql: str, values: tuple[Any, ...]) -> Future[int]:
        future: Future[int] = Future()
        self._queue.put((sql, values, future))
        return future

    def _write(self, db: sqlite3.Connection) -> None:
        while (first := self._queue.get()) is not None:
            batch, stop = [first], False
            while not self._queue.empty():
                job = self._queue.get()
                if job is None:
                    stop = True
                    break
                batch.append(job)
            try:
                with db:  # one commit, one wait for the disk, for all that came in meanwhile
                    counts = [db.execute(sql, values).rowcount for sql, values, _ in batch]
            except sqlite3.Error as error:  # e.g. a full disk: nobody is told that the vote was kept
                for _, _, future in batch:
                    future.set_exception(error)
            else:
                for (_, _, future), count in zip(batch, counts, strict=True):
                    future.set_result(count)
            if stop:
                break
        db.close()
