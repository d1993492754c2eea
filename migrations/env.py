"""How Alembic reaches the database: in one transaction, one process at a time.

The app's start hands its connection over; `uv run alembic …` opens one of its own.
"""

import asyncio
import logging
import os
import traceback
from pathlib import Path
from secrets import token_hex
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from migrations.portable import OPTIONS, locked

config = context.config


def migrate(connection: Connection) -> None:
    """Do all that the command asks for or, after an error, nothing."""
    with locked(connection):
        context.configure(connection, **OPTIONS)
        if config.attributes.get("only_if_empty") and is_behind():
            return
        try:
            context.run_migrations()
        except Exception as error:
            for frame in traceback.extract_tb(error.__traceback__):
                file = Path(frame.filename)
                if file.parent.name == "versions":  # a migration has failed
                    cause = getattr(error, "orig", None) or error
                    reason = str(cause).partition("\n")[0]  # a DETAIL would show a row
                    place = f"migrations/versions/{file.name}:{frame.lineno}"
                    raise CommandError(f"{place}: {reason}") from error
            raise


def is_behind() -> bool:
    """Tell whether a database that is not empty lacks migrations, and log which."""
    state: Any = context.get_context()
    current = state.get_current_heads()
    state.script.get_revisions(current)  # an error if the database is newer than we are
    pending = [*state.script.iterate_revisions("heads", current)] if current else []
    if pending:
        names = ", ".join(f"{script.revision} ({script.doc})" for script in pending)
        log = logging.getLogger("uvicorn.error")  # the server's own
        log.warning("Not migrated yet: %s. Run: uv run alembic upgrade head", names)
    return bool(pending)


async def connect_and_migrate() -> None:
    os.environ["SECRET_KEY"] = token_hex(32)  # the app asks for one; it signs nothing
    from app import migrating, reason

    try:
        async with migrating.connect() as connection:
            await connection.run_sync(migrate)
    except (DBAPIError, OSError) as error:  # one line instead of a page of traceback
        raise CommandError(f"The database: {reason(error)}") from None
    finally:
        await migrating.dispose()


if connection := config.attributes.get("connection"):
    migrate(connection)
else:
    for name in ("alembic.runtime.migration", "alembic.autogenerate", "alembic.ext"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(logging.StreamHandler())
    asyncio.run(connect_and_migrate())
