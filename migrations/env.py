"""How Alembic reaches the database: by the app's own connection and models.

At the app's start it runs inside the app, on the connection that it is handed; by
`uv run alembic …` it opens one itself.
"""

import asyncio
import os
from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection

from models import User

config = context.config


def migrate(connection: Connection) -> None:
    """Run the command's migrations on a connection that is in a transaction."""
    context.configure(
        connection=connection,
        target_metadata=User.metadata,  # of all tables
        # SQLite can alter little: Alembic then copies the table (batch mode).
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


async def migrate_alone() -> None:
    """Run the command's migrations from the command line."""
    # No token is signed here, so that the development key will do.
    os.environ.setdefault("FASTAPI_ENV", "development")
    from app import migration_connection

    async with migration_connection() as connection:
        await connection.run_sync(migrate)


if connection := config.attributes.get("connection"):
    migrate(connection)
else:
    if config.config_file_name:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    asyncio.run(migrate_alone())
