"""The Alembic environment: one transaction, and one process at a time."""

import asyncio
import logging
import os
from secrets import token_hex
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.autogenerate.rewriter import Rewriter
from alembic.operations.ops import AddColumnOp
from sqlmodel import SQLModel

import models  # noqa: F401 - adds the tables to SQLModel.metadata

rewriter = Rewriter()


@rewriter.rewrites(AddColumnOp)
def add_default(_context: object, _revision: object, op: AddColumnOp) -> AddColumnOp:
    """Add a new NOT NULL column's constant default to the database, for old rows."""
    default = getattr(op.column.default, "arg", None)
    if not op.column.nullable and type(default) in (bool, int, float, str):
        value = str(int(default) if isinstance(default, bool) else default)
        name, type_ = op.column.name, op.column.type
        op.column = sa.Column(name, type_, nullable=False, server_default=value)
    return op


def do_run_migrations(connection: sa.Connection) -> None:
    """Run the migrations in one transaction: an error undoes all of them."""
    is_sqlite = connection.dialect.name == "sqlite"
    driver: Any = connection.connection
    if is_sqlite:
        # To alter a table, Alembic copies and drops it, which must not delete the rows
        # that reference it. The pragma has no effect inside a transaction.
        driver.execute("PRAGMA foreign_keys = OFF").close()
    try:
        with connection.begin():
            if not is_sqlite:
                # Other processes wait here; on SQLite, at BEGIN IMMEDIATE.
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7265617)"))
            context.configure(
                connection,
                target_metadata=SQLModel.metadata,
                render_as_batch=True,  # for SQLite's limited ALTER TABLE
                process_revision_directives=rewriter,
            )
            context.run_migrations()
    finally:
        if is_sqlite:
            driver.execute("PRAGMA foreign_keys = ON").close()


async def run_async_migrations() -> None:
    os.environ["SECRET_KEY"] = token_hex(32)  # the app needs one to be imported
    from app import describe_error, migration_engine

    try:
        async with migration_engine.connect() as connection:
            await connection.run_sync(do_run_migrations)
    except (sa.exc.DBAPIError, OSError, ValueError) as error:
        raise SystemExit(f"Database error: {describe_error(error)}") from None
    finally:
        await migration_engine.dispose()


if connection := context.config.attributes.get("connection"):
    do_run_migrations(connection)
else:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asyncio.run(run_async_migrations())
