"""Whose budget it is, what of it is gone, and which data are charged to it. All of it within a transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict

from client.privacy.budget import Balance
from client.privacy.ledger_entries import Population
from common.errors import LedgerError
from common.privacy.accounting import Segment


def declare(db: sqlite3.Connection, population: Population, now: str) -> None:
    """Makes a population known; of one that is known, only the limit can change."""
    known = _found(db, population.name)
    if known is None:
        db.execute("INSERT INTO populations VALUES (?,?,?,?,?,?)", (*asdict(population).values(), now))
        return
    for field in ("unit", "public_size", "lifetime_delta"):
        if (value := getattr(population, field)) != (fixed := getattr(known, field)):
            raise LedgerError(
                f"populations.{population.name}.{field} = {value}: the population was declared with {fixed}, which is "
                "fixed for its lifetime; put the old value back"
            )
    if population != known:
        limit = (population.lifetime_epsilon, population.name)
        db.execute("UPDATE populations SET lifetime_epsilon=? WHERE name=?", limit)


def bind(db: sqlite3.Connection, data: str, population: str, now: str) -> None:
    """Binds a data set to a population, or compares."""
    row = db.execute("SELECT population FROM data_sets WHERE name=?", (data,)).fetchone()
    if row is None:
        named(db, population)
        db.execute("INSERT INTO data_sets VALUES (?,?,?)", (data, population, now))
    elif row[0] != population:
        raise LedgerError(
            f"data.{data}.population = '{population}': its rows have been charged to '{row[0]}' from the beginning, "
            "and another budget would not know of that; put the old name back"
        )


def named(db: sqlite3.Connection, name: str) -> Population:
    """The population with this name.

    Raises:
        LedgerError: there is none.
    """
    found = _found(db, name)
    if found is None:
        raise LedgerError(f"population '{name}': was never declared at this site; declare it in site.toml")
    return found


def listed(db: sqlite3.Connection) -> list[Population]:
    """All populations in the order of their declaration."""
    return [named(db, name) for (name,) in db.execute("SELECT name FROM populations ORDER BY rowid").fetchall()]


def reserved(db: sqlite3.Connection, population: str) -> list[Segment]:
    """Everything ever reserved by approved plans of a population. Nothing leaves this list."""
    return _segments(db, "reservations", population)


def balance(db: sqlite3.Connection, population: str) -> Balance:
    """What is gone of a population's budget."""
    declared = named(db, population)
    return Balance(
        declared.lifetime_epsilon,
        declared.lifetime_delta,
        tuple(_segments(db, "charges", population)),
        tuple(reserved(db, population)),
    )


def _found(db: sqlite3.Connection, name: str) -> Population | None:
    row = db.execute(
        "SELECT name, unit, public_size, lifetime_epsilon, lifetime_delta FROM populations WHERE name=?", (name,)
    ).fetchone()
    return None if row is None else Population(*row)


def _segments(db: sqlite3.Connection, table: str, population: str) -> list[Segment]:
    rows = db.execute(
        f"SELECT sample_rate, noise_multiplier, steps FROM {table} JOIN plans ON plan = digest "
        "WHERE population=? AND noise_multiplier > 0",
        (population,),
    ).fetchall()
    return [Segment(*row) for row in rows]
