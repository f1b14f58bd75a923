"""The tables of the ledger's file, and how a file of an earlier version becomes one of today.

==============  ====================================================================================================
meta            the file's identity, sequence number, rows, clock, and why the site is blocked, if it is
populations     who the budget belongs to, and its lifetime limit
data_sets       which population each data set's rows belong to, for ever
plans           every plan ever shown, its decision and its calibrated statement
reservations    per plan and phase: q, σ, C and steps reserved at approval, all of them at once
charges         per round: which request was funded, and whether its release is stored
releases        the exact bytes that left, to be sent again unchanged; gone once their plan is closed
residuals       per plan: what rounding took away from the releases of its open phase; never sent, gone with the plan
==============  ====================================================================================================
"""

from __future__ import annotations

import secrets
import sqlite3

FIRST = """
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
INSERT INTO meta VALUES ('schema_version', '1');
"""

SECOND = """
CREATE TABLE data_sets (
  name TEXT PRIMARY KEY, population TEXT NOT NULL REFERENCES populations(name), bound_at TEXT NOT NULL) STRICT;
ALTER TABLE plans ADD COLUMN fingerprint TEXT;
ALTER TABLE plans ADD COLUMN closed_at TEXT;
ALTER TABLE plans ADD COLUMN closed_because TEXT;
ALTER TABLE releases ADD COLUMN head TEXT NOT NULL DEFAULT '';
ALTER TABLE releases ADD COLUMN digest TEXT NOT NULL DEFAULT '';
INSERT INTO meta VALUES ('ledger', NEW_IDENTITY()), ('sequence', '0');
INSERT INTO meta SELECT 'clock', MAX(time) FROM (
  SELECT created_at AS time FROM populations UNION ALL SELECT received_at FROM plans
  UNION ALL SELECT decided_at FROM plans UNION ALL SELECT reserved_at FROM charges
  UNION ALL SELECT released_at FROM charges) HAVING MAX(time) IS NOT NULL;
UPDATE meta SET value='2' WHERE key='schema_version';
"""

THIRD = """
CREATE TABLE residuals (
  plan TEXT PRIMARY KEY REFERENCES plans(digest), phase TEXT NOT NULL, payload BLOB NOT NULL) STRICT;
UPDATE meta SET value='3' WHERE key='schema_version';
"""

STEPS = (FIRST, SECOND, THIRD)
"""What leads from each version to the next; an empty file has version 0."""
VERSION = len(STEPS)


def version_of(db: sqlite3.Connection) -> int:
    """The version of an open file; 0: it is empty."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
        return 0
    return int(read_meta(db, "schema_version") or 0)


def migrate(db: sqlite3.Connection) -> None:
    """Takes the steps that are missing, inside the caller's transaction."""
    db.create_function("NEW_IDENTITY", 0, lambda: secrets.token_hex(16))
    missing = STEPS[version_of(db) :]
    for step in missing:
        for statement in step.split(";"):
            db.execute(statement)
    if missing:
        write_meta(db, "rows", rows_of(db))


def rows_of(db: sqlite3.Connection) -> str:
    """How many rows speak of budget. If it is not what ``meta`` says, the file was put together from different copies.

    That happens where an older file is put beside the journal of a newer one: SQLite then mixes the pages of both.
    """
    return " ".join(
        f"{table} {db.execute(f'SELECT COUNT(*) FROM {table}').fetchone()[0]}" for table in ("reservations", "charges")
    )


def read_meta(db: sqlite3.Connection, key: str) -> str | None:
    """A fact about the whole file."""
    row = db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
    return None if row is None else str(row[0])


def write_meta(db: sqlite3.Connection, key: str, value: str | None) -> None:
    """Sets it; ``None`` removes it."""
    if value is None:
        db.execute("DELETE FROM meta WHERE key=?", (key,))
    else:
        db.execute("INSERT INTO meta VALUES (?,?) ON CONFLICT (key) DO UPDATE SET value=excluded.value", (key, value))


def sequence_of(db: sqlite3.Connection) -> int:
    """How many transactions have spent or decided something."""
    return int(read_meta(db, "sequence") or 0)


def count(db: sqlite3.Connection) -> None:
    """Ends a transaction that spends or decides something: a copy of the file from before it is an older one."""
    write_meta(db, "sequence", str(sequence_of(db) + 1))
    write_meta(db, "rows", rows_of(db))
