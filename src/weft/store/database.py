"""The database of the index: SQLite or PostgreSQL, transactions that are tried again, migrations.

    database = Database.at("sqlite:////home/me/store/index.sqlite")
    with database.reading() as connection: ...
    number = database.write(lambda connection: ...)

SQLite runs in WAL mode, flushed at every commit; a transaction that writes takes the lock at its start, so that none has to
give up half-way. What PostgreSQL or a lost connection undoes is done again from the start. This module knows no adapters.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, OperationalError

from weft.errors import MissingDependencyError, StoreError
from weft.store.tables import HEAD

__all__ = ["Database", "sqlite_url"]

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds for which a busy database is asked again."""

_SQLITE_WAIT = 10.0
_CONNECT_SECONDS = 10
_LOCK = 0x77656674  # "weft": the advisory lock of PostgreSQL under which the schema changes
_AGAIN = (
    "40001",
    "40P01",
    "55P03",
    "57P01",
    "57P02",
    "57P03",
    "08",
)  # serialization, deadlock, lock, restart, connection


def sqlite_url(file: Path) -> URL:
    """The URL of an SQLite file."""
    return URL.create("sqlite", database=os.fspath(file))


@dataclass(frozen=True)
class Database:
    """A database with the tables of an index.

    Attributes:
        engine: SQLAlchemy's.
        shown: its URL without the password, for messages.
    """

    engine: Engine
    shown: str

    @classmethod
    def at(cls, url: str | URL) -> Database:
        """Open it; the tables are made or brought up to date, once, whoever else opens it at the same time.

        Raises:
            StoreError: no such kind of database, it can't be reached, or a later weft made it.
            MissingDependencyError: PostgreSQL without its driver.
        """
        parsed = _parsed(url)
        shown = parsed.render_as_string(hide_password=True)
        database = cls(_engine(parsed, shown), shown)
        database._bring_up_to_date()
        return database

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self.engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one moment.

        Raises:
            StoreError: the database can't be read.
        """
        with self._problems(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    def read(self, work: Callable[[Connection], T]) -> T:
        """Call ``work`` in a transaction that only reads, again where a lost connection is the only problem."""

        def once() -> T:
            with self.engine.connect() as connection:
                if not self.is_sqlite:
                    connection = connection.execution_options(
                        isolation_level="REPEATABLE READ", postgresql_readonly=True
                    )
                with connection.begin():
                    return work(connection)

        return self._patiently(once)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Call ``work`` in a transaction, again where others were in the way; what it returns is committed.

        Args:
            work: may be called more than once; an exception undoes all it did.

        Raises:
            StoreError: the database stays busy, can't be written, or is full.
        """

        def once() -> T:
            with self.engine.connect() as connection:
                if self.is_sqlite:
                    connection = connection.execution_options(weft_write=True)
                with connection.begin():
                    return work(connection)

        return self._patiently(once)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _patiently(self, once: Callable[[], T]) -> T:
        deadline = time.monotonic() + PATIENCE
        attempt = 0
        with self._problems():
            while True:
                try:
                    return once()
                except DBAPIError as problem:
                    if not _can_be_tried_again(problem) or time.monotonic() > deadline:
                        raise
                attempt += 1
                time.sleep(random.uniform(0.001, min(0.5, 0.005 * 2 ** min(attempt, 8))))

    @contextlib.contextmanager
    def _problems(self) -> Iterator[None]:
        """Errors of the database as errors of the store."""
        try:
            yield
        except DBAPIError as problem:
            reason = (str(problem.orig).strip().splitlines() or [""])[0]
            if _can_be_tried_again(problem):
                raise StoreError(
                    f"{self.shown}: the index can't be reached, or others keep it busy: {reason}; nothing was changed, try again"
                ) from problem
            if "full" in reason:
                raise StoreError(
                    f"{self.shown}: {reason}; nothing was changed. Free some space, weft store gc may help, and try again"
                ) from problem
            raise StoreError(f"{self.shown}: the index can't be used: {reason}; nothing was changed") from problem

    # the schema

    def _bring_up_to_date(self) -> None:
        found = self.read(_revision)
        self._check_revision(found)
        if found != HEAD:
            self.write(self._upgrade)

    def _upgrade(self, connection: Connection) -> None:
        """All missing steps in one transaction, under a lock; who comes second finds nothing to do."""
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        found = _revision(connection)
        self._check_revision(found)
        if found != HEAD:
            migrate(connection)

    def _check_revision(self, found: str | None) -> None:
        if found is not None and (not found.isdigit() or found > HEAD):
            raise StoreError(
                f"{self.shown}: this store has the schema {found!r}, this weft knows {HEAD}: a later weft made it. Update weft: pip install -U weft; "
                "nothing was changed"
            )


def migrate(connection: Connection, to: str = "head") -> None:
    """Run Alembic's steps in the transaction of a connection."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _revision(connection: Connection) -> str | None:
    """The last step that was done; None for an empty database.

    Raises:
        StoreError: tables of something else.
    """
    tables = set(sa.inspect(connection).get_table_names())
    if "alembic_version" in tables:
        found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all()
        if "meta" in tables or not found:
            return str(found[0]) if found else None
    if tables:
        raise StoreError(
            f"{connection.engine.url.render_as_string(hide_password=True)}: this database has tables of something else: {', '.join(sorted(tables)[:5])}. "
            "Give weft one of its own"
        )
    return None


def _parsed(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreError(
            "the index is no URL of a database; expected postgresql://user@host/name or sqlite:////path/index.sqlite"
        ) from None
    kind = parsed.get_backend_name()
    if kind == "postgres":
        parsed, kind = parsed.set(drivername="postgresql"), "postgresql"
    if kind not in ("sqlite", "postgresql"):
        raise StoreError(f"an index in {kind!r}; there are sqlite and postgresql")
    return parsed.set(drivername="postgresql+psycopg") if kind == "postgresql" else parsed


def _engine(url: URL, shown: str) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            engine = sa.create_engine(url, connect_args={"timeout": _SQLITE_WAIT, "check_same_thread": False})
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            seconds = {"connect_timeout": _CONNECT_SECONDS} if "connect_timeout" not in url.query else {}
            engine = sa.create_engine(url, pool_pre_ping=True, connect_args=seconds)
    except ModuleNotFoundError as problem:
        raise MissingDependencyError(
            f"{shown}: PostgreSQL needs a driver: pip install 'weft[postgres]' ({problem})"
        ) from None
    except (NoSuchModuleError, ArgumentError) as problem:
        raise StoreError(f"{shown}: {problem}") from None
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: engine.dispose(close=False))
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, not where Python's driver guesses
    cursor = connection.cursor()
    if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        deadline = time.monotonic() + _SQLITE_WAIT
        while True:
            try:
                cursor.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:  # this change doesn't wait for others by itself
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.001, 0.02))
    for setting in ("synchronous=FULL", "foreign_keys=ON", "temp_store=MEMORY", "cache_size=-16000"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("weft_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _can_be_tried_again(problem: DBAPIError) -> bool:
    """Whether somebody else, or a connection that was lost, was in the way."""
    if problem.connection_invalidated:
        return True
    state = getattr(problem.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_AGAIN) or (isinstance(problem, IntegrityError) and str(state) == "23505")
    text = str(problem.orig).lower()
    if isinstance(problem.orig, sqlite3.Error):
        return "locked" in text or "busy" in text or "schema has changed" in text
    return isinstance(problem, OperationalError) and "does not exist" not in text and "authentication" not in text
