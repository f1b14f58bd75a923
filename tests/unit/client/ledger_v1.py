"""A ledger as version 1 wrote it: its own SQL, word for word, so that a change of today's cannot change the test."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from small_ledgers import STATEMENT

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE populations (
  name TEXT PRIMARY KEY, unit TEXT NOT NULL, public_size INTEGER NOT NULL,
  lifetime_epsilon REAL NOT NULL, lifetime_delta REAL NOT NULL, created_at TEXT NOT NULL) STRICT;
CREATE TABLE plans (
  digest TEXT PRIMARY KEY, run_id TEXT NOT NULL UNIQUE, population TEXT NOT NULL REFERENCES populations(name),
  body TEXT NOT NULL, signature BLOB, status TEXT NOT NULL, refusal TEXT, statement TEXT,
  received_at TEXT NOT NULL, decided_at TEXT) STRICT;
CREATE TABLE reservations (
  plan TEXT NOT NULL REFERENCES plans(digest), phase INTEGER NOT NULL, name TEXT NOT NULL,
  sample_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, clip_norm REAL NOT NULL, steps INTEGER NOT NULL,
  PRIMARY KEY (plan, phase), UNIQUE (plan, name)) STRICT;
CREATE TABLE charges (
  plan TEXT NOT NULL REFERENCES plans(digest), round INTEGER NOT NULL, phase TEXT NOT NULL,
  request_digest TEXT NOT NULL, sample_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, steps INTEGER NOT NULL,
  reserved_at TEXT NOT NULL, released_at TEXT, PRIMARY KEY (plan, round)) STRICT;
CREATE TABLE releases (
  plan TEXT NOT NULL, round INTEGER NOT NULL, payload BLOB NOT NULL, PRIMARY KEY (plan, round),
  FOREIGN KEY (plan, round) REFERENCES charges(plan, round)) STRICT;
"""
TIME = "2030-01-0{}T00:00:00+00:00"


def write_version_1(folder: Path) -> bytes:
    """A plan with one released and one running round, one that waits, one refused; returns the running one's secret."""
    stated = json.dumps(asdict(STATEMENT))
    with closing(sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        for statement in TABLES.split(";"):
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('schema_version', '1')")
        db.execute("INSERT INTO populations VALUES ('site', 'example', 40, 4.0, 1e-5, ?)", (TIME.format(1),))
        for digest, status, refusal, decided in (
            ("plan", "approved", None, TIME.format(2)),
            ("waiting", "waiting", None, None),
            ("no", "refused", "policy", None),
        ):
            db.execute(
                "INSERT INTO plans VALUES (?,?,?,?,NULL,?,?,?,?,?)",
                (digest, f"run of {digest}", "site", "{}", status, refusal, stated, TIME.format(1), decided),
            )
        db.execute("INSERT INTO reservations VALUES ('plan', 0, 'head', 1.0, 8.0, 1.0, 10)")
        db.execute("INSERT INTO reservations VALUES ('plan', 1, 'lora', 0.1, 2.0, 0.5, 20)")
        for round, request, released in ((1, "first", TIME.format(4)), (2, "second", None)):
            db.execute(
                "INSERT INTO charges VALUES ('plan', ?, 'head', ?, 1.0, 8.0, 1, ?, ?)",
                (round, request, TIME.format(3), released),
            )
        db.execute("INSERT INTO releases VALUES ('plan', 1, ?)", (b"an old release",))
    (folder / "secrets").mkdir()
    secret = bytes(range(32))
    (folder / "secrets" / "plan-2").write_bytes(secret)
    return secret
