"""Answers on disk (SQLite): nothing is asked twice, and a killed run goes on where it stopped.

A key is (pictures, question, judge, prompt version); what is kept is the judge's raw text, so that a better reading of
answers needs no new question. Requests that failed are not kept; what a judge was paid for all of them is.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_dae.config import ConfigError

VERSION = 1


def image_hash(image: np.ndarray) -> str:
    """sha256 of a picture's size and pixels, uint8 (H, W, 3): the same for a PNG and the array it came from."""
    digest = hashlib.sha256(repr((image.shape, image.dtype.str)).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class AnswerCache:
    """Safe from several threads; every answer is committed before ``put`` returns."""

    def __init__(self, path: Path) -> None:
        """Open or create; ConfigError when the file is of another kind or version."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path.parent} cannot be written ({error.strerror}): name another folder.") from error
        self._lock, self._path = threading.Lock(), path
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=30)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version != VERSION and tables:
                raise ConfigError(f"{path} is a cache of version {version}, not {VERSION}: give another file.")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA user_version={VERSION}")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (pictures TEXT, question TEXT, judge TEXT, version TEXT, raw TEXT, "
                "PRIMARY KEY (pictures, question, judge, version))"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS costs (judge TEXT PRIMARY KEY, cost REAL)")
            self._db.commit()
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path} is no answer cache ({error}): give another file.") from error

    def get(self, pictures: Sequence[str], question: str, judge: str, version: str) -> str | None:
        with self._lock:
            row = self._db.execute(
                "SELECT raw FROM answers WHERE pictures=? AND question=? AND judge=? AND version=?",
                (" ".join(pictures), question, judge, version),
            ).fetchone()
        return None if row is None else row[0]

    def put(self, pictures: Sequence[str], question: str, judge: str, version: str, raw: str) -> None:
        """Raises ConfigError where the disk takes no more; what was put before stays."""
        self._write(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
            (" ".join(pictures), question, judge, version, raw),
        )

    def cost(self, judge: str) -> float:
        """What a judge was paid, by all commands that wrote into this cache."""
        with self._lock:
            row = self._db.execute("SELECT cost FROM costs WHERE judge=?", (judge,)).fetchone()
        return 0.0 if row is None else float(row[0])

    def put_cost(self, judge: str, cost: float) -> None:
        """Keeps the largest of what it is given: threads may be overtaken. Raises as ``put`` does."""
        self._write(
            "INSERT INTO costs VALUES (?, ?) ON CONFLICT (judge) DO UPDATE SET cost=max(cost, excluded.cost)",
            (judge, cost),
        )

    def _write(self, sql: str, values: Sequence[str | float]) -> None:
        with self._lock:
            try:
                self._db.execute(sql, values)
                self._db.commit()
            except sqlite3.OperationalError as error:
                self._db.rollback()
                raise ConfigError(
                    f"{self._path} takes no more answers ({error}): make room and run the same command to go on; "
                    "earlier answers stay."
                ) from error

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._db.close()
