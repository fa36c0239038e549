"""Statements run over many rows: compiled once, fed with plain tuples, which costs a fifth of what mappings cost.

Inserts take many rows at a time. The driver lets go of the interpreter for each statement and each row of an
``executemany``, and a thread that wants it back from a busy event loop waits for its turn: row by row, it could not
keep up with the loop's traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from sqlalchemy import ColumnElement, Connection, Dialect, Executable, Table, bindparam, or_, select
from sqlalchemy.dialects.sqlite import insert

Row = tuple[Any, ...]
_AT_ONCE = (256, 64, 16, 4)
"""Rows in one statement: few sizes, so that statements are prepared once. 256 rows of the ledger are 10,000 parameters,
of which SQLite takes 32,766."""


@lru_cache(maxsize=64)
def _compiled(statement: Executable, dialect: Dialect, names: tuple[str, ...]) -> tuple[str, tuple[int, ...] | None]:
    compiled = statement.compile(dialect=dialect, column_keys=list(names))  # type: ignore[attr-defined]
    order = tuple(names.index(name) for name in compiled.positiontup)
    return str(compiled), None if order == tuple(range(len(names))) else order


def run_many(connection: Connection, statement: Executable, names: tuple[str, ...], rows: Sequence[Row]) -> None:
    """Run a statement for each row; ``names`` of its parameters, in the order of the rows' values."""
    if not rows:
        return
    text, order = _compiled(statement, connection.dialect, names)
    if order is not None:
        rows = [tuple(row[index] for index in order) for row in rows]
    done = 0
    for size in _AT_ONCE:
        wide = _for_rows(text, len(names), size) if len(rows) - done >= size else None
        while wide is not None and len(rows) - done >= size:
            connection.exec_driver_sql(wide, tuple(chain.from_iterable(rows[done : done + size])))
            done += size
    if done < len(rows):
        connection.exec_driver_sql(text, list(rows[done:]))


@lru_cache(maxsize=256)
def _for_rows(text: str, columns: int, rows: int) -> str | None:
    """Return an insert of one row as one of many; None for what is no insert of values."""
    row = f"({', '.join('?' * columns)})"
    before, values, after = text.partition(f"VALUES {row}")
    return f"{before}VALUES {', '.join([row] * rows)}{after}" if values else None


def find_one(connection: Connection, statement: Executable, names: tuple[str, ...], values: Row) -> Any:
    """Return the first row of a query, or None; ``names`` of its parameters, in the order of ``values``."""
    text, order = _compiled(statement, connection.dialect, names)
    return connection.exec_driver_sql(text, values if order is None else tuple(values[i] for i in order)).first()


def find_among(connection: Connection, column: ColumnElement[Any], values: Sequence[Any]) -> set[Any]:
    """Return those of some values that a column has."""
    found: set[Any] = set()
    for start in range(0, len(values), _AT_ONCE[0]):
        part = values[start : start + _AT_ONCE[0]]
        size = next(size for size in (1, *reversed(_AT_ONCE)) if size >= len(part))  # the last again, to fill up
        text, _ = _compiled(_any_of(column, size), connection.dialect, tuple(f"value_{n}" for n in range(size)))
        rows = connection.exec_driver_sql(text, (*part, *[part[-1]] * (size - len(part))))
        found.update(row[0] for row in rows)
    return found


@lru_cache(maxsize=16)
def _any_of(column: ColumnElement[Any], size: int) -> Executable:
    return select(column).where(or_(*(column == bindparam(f"value_{number}") for number in range(size))))


def find_where(found: tuple[ColumnElement[Any], ...], *columns: ColumnElement[Any]) -> Executable:
    """Return a query by the values of columns, which are its parameters."""
    return select(*found).where(*(column == bindparam(column.key) for column in columns))


def insert_into(table: Table) -> Executable:
    """Return a plain insert."""
    return insert(table)


def add_into(table: Table, keys: tuple[str, ...], sums: tuple[str, ...]) -> Executable:
    """Return an insert that adds to the row where there is one."""
    statement = insert(table)
    added = {name: table.c[name] + statement.excluded[name] for name in sums}
    return statement.on_conflict_do_update(index_elements=list(keys), set_=added)


def put_into(table: Table, keys: tuple[str, ...], values: tuple[str, ...], *, only_greater: bool = False) -> Executable:
    """Return an insert that takes the place of the row where there is one; ``only_greater``: of a lesser value."""
    statement = insert(table)
    put = {name: statement.excluded[name] for name in values}
    is_greater = table.c[values[0]] < statement.excluded[values[0]] if only_greater else None
    return statement.on_conflict_do_update(index_elements=list(keys), set_=put, where=is_greater)


def add_where_id(table: Table, column: str) -> Executable:
    """Return an update that adds ``amount`` to a column of the row ``key``."""
    return table.update().where(table.c.id == bindparam("key")).values({column: table.c[column] + bindparam("amount")})
