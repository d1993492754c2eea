"""The Alembic environment: one transaction, and one process at a time."""

import asyncio
import logging
import os
from contextlib import suppress
from secrets import token_hex
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.autogenerate.rewriter import Rewriter
from alembic.operations.ops import AddColumnOp
from sqlalchemy import exc
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateTable
from sqlmodel import SQLModel

import models  # noqa: F401 - adds the tables to SQLModel.metadata


@compiles(CreateTable, "sqlite")
def create_table(create: CreateTable, compiler: Any, **options: Any) -> str:
    """Create a table that never reuses an id, if its key is an INTEGER."""
    sqlite = create.element.dialect_options["sqlite"]
    keys = [key.type.compile(compiler.dialect) for key in create.element.primary_key]
    sqlite["autoincrement"] = keys == ["INTEGER"] and sqlite["with_rowid"]
    return str(compiler.visit_create_table(create, **options))


rewriter = Rewriter()


@rewriter.rewrites(AddColumnOp)
def add_default(_context: object, _revision: object, op: AddColumnOp) -> AddColumnOp:
    """Add a new NOT NULL column's constant default to the database, for old rows."""
    default: Any = op.column.default
    if not op.column.nullable and default is not None and default.is_scalar:
        value = getattr(default.arg, "value", default.arg)  # of an enumeration
        value = str(int(value) if isinstance(value, bool) else value)
        name, type_ = op.column.name, op.column.type
        op.column = sa.Column(name, type_, nullable=False, server_default=value)
    return op


def do_run_migrations(connection: sa.Connection) -> None:
    """Run the migrations in one transaction: an error undoes all of them."""
    is_sqlite = connection.dialect.name == "sqlite"
    driver: Any = connection.connection
    last_ids: Any = []
    if is_sqlite:
        # To alter a table, Alembic copies and drops it, which must not delete the rows
        # that reference it. The pragma has no effect inside a transaction.
        driver.execute("PRAGMA foreign_keys = OFF").close()
    try:
        with connection.begin():
            if is_sqlite:
                with suppress(exc.OperationalError):  # a new database has no such table
                    sequences = sa.text("SELECT name, seq FROM sqlite_sequence")
                    last_ids = connection.execute(sequences).mappings().all()
            else:
                # Other processes wait here; on SQLite, at BEGIN IMMEDIATE.
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7265617)"))
                # A statement that waits for a table blocks the requests behind it.
                connection.execute(sa.text("SET LOCAL lock_timeout = '2s'"))
            context.configure(
                connection,
                target_metadata=SQLModel.metadata,
                render_as_batch=True,  # for SQLite's limited ALTER TABLE
                process_revision_directives=rewriter,
            )
            context.run_migrations()
            if last_ids:  # the copy of a table starts from its highest row
                keep = "SET seq = max(seq, :seq) WHERE name = :name"
                connection.execute(sa.text(f"UPDATE sqlite_sequence {keep}"), last_ids)
    finally:
        if is_sqlite:
            driver.execute("PRAGMA foreign_keys = ON").close()


async def run_async_migrations() -> None:
    os.environ["SECRET_KEY"] = token_hex(32)  # the app needs one to be imported
    from app import describe_error, migration_engine

    try:
        async with migration_engine.connect() as connection:
            await connection.run_sync(do_run_migrations)
    except (exc.DBAPIError, OSError, ValueError) as error:
        raise SystemExit(describe_error(error)) from None
    finally:
        await migration_engine.dispose()


if connection := context.config.attributes.get("connection"):
    do_run_migrations(connection)
else:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asyncio.run(run_async_migrations())
