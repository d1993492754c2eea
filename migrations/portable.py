"""What makes migrations run on both databases, and with rows in the tables."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from alembic import context
from alembic.autogenerate.rewriter import Rewriter
from alembic.ddl.sqlite import SQLiteImpl
from alembic.operations.ops import AddColumnOp, CreateCheckConstraintOp, DropColumnOp
from alembic.util import CommandError
from sqlalchemy.dialects import sqlite
from sqlmodel import SQLModel

import models  # noqa: F401 - its tables become known to SQLModel.metadata

LOCK = 7_265_617  # PostgreSQL's lock for migrations: a number that nothing else uses


# --- While migrations run


@contextmanager
def locked(connection: sa.Connection) -> Iterator[None]:
    """Hold a transaction in which no other process migrates."""
    if connection.dialect.name != "sqlite":
        with connection.begin():
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
            yield
        return
    # On SQLite a copy takes the place of an altered table: no row that refers to one of
    # its rows may go. Foreign keys turn off only outside of a transaction: by a cursor
    # of the driver, since SQLAlchemy would begin one.
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA foreign_keys = OFF")
    try:
        with connection.begin():
            driver: Any = connection.connection.driver_connection
            if not driver.in_transaction:  # the app's own engine begins by itself
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield
    finally:
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()


def check_references(ctx: Any, step: Any, **_: object) -> None:
    """Check the foreign keys after a migration: they were off on SQLite."""
    check = "PRAGMA foreign_key_check"
    if ctx.dialect.name == "sqlite" and ctx.connection.exec_driver_sql(check).first():
        name = step.up_revision_id
        raise CommandError(f"Migration {name}: rows refer to rows that are not there")


class KeepIds(SQLiteImpl):
    """Alembic's part for SQLite, which would forget what ids a table has given."""

    __dialect__ = "sqlite"  # Alembic uses the last class that says so

    def prep_table_for_batch(self, batch_impl: Any, table: sa.Table) -> None:
        """Let the copy of a table number its rows as the table did, and go on."""
        connection: Any = self.connection
        names = {"copy": batch_impl.temp_table_name, "table": table.name}
        ddl = sa.text("SELECT sql FROM sqlite_master WHERE name = :table")
        if "AUTOINCREMENT" in connection.execute(ddl, names).scalar_one():
            batch_impl.new_table.kwargs["sqlite_autoincrement"] = True
            last = "SELECT :copy, seq FROM sqlite_sequence WHERE name = :table"
            connection.execute(sa.text(f"INSERT INTO sqlite_sequence {last}"), names)


# --- While one is generated


def is_compared(name: str | None, kind: str, _: object) -> bool:
    """Leave a table alone that no model has, but for `alembic -x drop revision …`."""
    known = kind != "table" or name in SQLModel.metadata.tables
    return known or "drop" in context.get_x_argument(as_dictionary=True)


def render_type(kind: str, item: Any, _: object) -> str | Literal[False]:
    """Write a type as the database knows it, without SQLModel and our enums."""
    if kind == "type" and isinstance(item, sa.types.TypeDecorator):
        return f"sa.{item.impl!r}"
    if kind == "type" and isinstance(item, sa.Enum):
        return f"sa.String(length={item.length})"
    return False


rewriter = Rewriter()


@rewriter.rewrites(AddColumnOp)
def fill_rows(_context: object, _revision: object, op: AddColumnOp) -> AddColumnOp:
    """Let a new column that is NOT NULL have a value in the rows that are there."""
    column = op.column
    if column.table.metadata is not SQLModel.metadata:
        # Dropped, and brought back by a downgrade: its values are lost, and its default
        # is written in one database's own words.
        op.column = sa.Column(column.name, column.type, nullable=True)
    elif not column.nullable and column.server_default is None:
        default = constant_default(column)
        if default is None:
            raise CommandError(
                f"{op.table_name}.{column.name}: the rows that are there need a value. "
                "Give the field a default; or let it be None, generate, fill it by an "
                "op.execute(...) there, make the field required, and generate again"
            )
        options: Any = {"server_default": default, "comment": column.comment}
        # Another column: the model's stays as it is.
        op.column = sa.Column(column.name, column.type, nullable=False, **options)
    return op


@rewriter.rewrites(DropColumnOp)
def keep_values(_context: object, _revision: object, op: DropColumnOp) -> DropColumnOp:
    """Drop no column with its values unless asked to: it may have been renamed."""
    of_downgrade = op.to_column().table.metadata is SQLModel.metadata
    if not (of_downgrade or "drop" in context.get_x_argument(as_dictionary=True)):
        name = f"{op.table_name}.{op.column_name}"
        raise CommandError(
            f"{name} would be dropped with its values. Was it renamed? Then generate "
            "without --autogenerate, and write batch_op.alter_column(old, "
            "new_column_name=new). Is it to go? Then: alembic -x drop revision …"
        )
    return op


@rewriter.rewrites(CreateCheckConstraintOp)
def without_casts(
    _context: object, _revision: object, op: CreateCheckConstraintOp
) -> CreateCheckConstraintOp:
    """Write a CHECK that a downgrade brings back without PostgreSQL's own words."""
    if isinstance(op.condition, sa.TextClause):
        condition = re.sub(r"::[a-z ]+(\[\])?", "", op.condition.text)
        condition = re.sub(r"= ANY \(+ARRAY\[(.*)\]\)+", r" IN (\1)", condition)
        op.condition = sa.text(condition)
    return op


def constant_default(column: sa.Column[Any]) -> str | None:
    """Return a default as SQLite stores it, and PostgreSQL reads it, if it is fixed."""
    default: Any = column.default
    value = getattr(default, "arg", None)
    if callable(value):
        value = value(None)
        if value not in ([], {}):  # of every row its own, such as the time
            return None
    if value is None or isinstance(value, datetime):  # stored without its offset
        return None
    dialect = sqlite.dialect()
    store = column.type.dialect_impl(dialect).bind_processor(dialect)
    return str(store(value) if store else value)


def complete(ctx: Any, revision: Any, directives: Any) -> None:
    """Complete what autogenerate found, which compares no AUTOINCREMENT."""
    rewriter(ctx, revision, directives)
    if ctx.dialect.name == "sqlite":
        ddl = sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'table'")
        made = {row.name: row.sql for row in ctx.connection.execute(ddl)}
        for name, table in SQLModel.metadata.tables.items():
            asked = table.dialect_options["sqlite"]["autoincrement"]
            if asked and "AUTOINCREMENT" not in made.get(name, "AUTOINCREMENT"):
                raise CommandError(f"{name}: lacks AUTOINCREMENT, copy it in batch")


OPTIONS: Any = {
    "target_metadata": SQLModel.metadata,
    # SQLite can alter little: Alembic copies the table there (batch mode). What is
    # generated on PostgreSQL must be able to run on SQLite.
    "render_as_batch": True,
    "autogenerate_plugins": [
        "alembic.autogenerate.*",
        "alembic.ext.checkconstraint_byname",
    ],
    "include_name": is_compared,
    "render_item": render_type,
    "process_revision_directives": complete,
    "on_version_apply": check_references,
}
