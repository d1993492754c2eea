"""A complete backend to read in a sitting: users, items and logins.

FastAPI and SQLModel, on SQLite or PostgreSQL. Start it, then open /docs:

    uv run fastapi dev app.py

Read on from top to bottom: settings, database, passwords and tokens, who is
calling, the application, then the routes. What is stored is in models.py.
"""

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any, NoReturn, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from weakref import WeakValueDictionary

import anyio
import asyncpg
import bcrypt
import jwt
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    Form,
    HTTPException,
    Query,
    Request,
    Response,
)
from fastapi import Path as PathParameter
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from fastapi.security import OAuth2PasswordBearer
from opentelemetry import trace
from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import (
    BigInteger,
    Connection,
    Executable,
    Row,
    column,
    event,
    func,
    insert,
    make_url,
    table,
    true,
)
from sqlalchemy.exc import DBAPIError, DisconnectionError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import aliased
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.sql.elements import Label
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlmodel import bindparam, col, delete, select, update
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import Select
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models import (
    MAX_ID,
    AccessToken,
    Email,
    Health,
    Invalid,
    Item,
    ItemCreate,
    ItemPublic,
    ItemUpdate,
    Login,
    LoginAttempt,
    OAuth2Problem,
    Page,
    Password,
    PasswordGrant,
    Problem,
    RefreshGrant,
    Revocation,
    Token,
    User,
    UserCreate,
    UserPublic,
    UserUpdate,
    normal_email,
    utc_now,
)

log = logging.getLogger("uvicorn.error")  # the server's own log: shown wherever it runs
HERE = Path(__file__).parent


# --- Settings: from the environment (upper case) or .env, checked once, at the start


def stop(problem: str) -> NoReturn:
    """End the start with one message instead of a page of traceback."""
    sys.tracebacklimit = 0
    raise SystemExit(f"Cannot start. {problem}") from None


def comma_separated(value: str | list[str]) -> list[str]:
    """Return the parts of a setting that lists several, as `a, b`."""
    return [v.strip() for v in value.split(",")] if isinstance(value, str) else value


DEVELOPMENT_KEY = "a key that everybody knows: for development only"
IS_DEVELOPMENT = os.environ.get("FASTAPI_ENV") == "development"  # by `fastapi dev`


class Settings(BaseSettings):
    """What differs between installations; the README explains each."""

    model_config = SettingsConfigDict(
        env_file=HERE / ".env",
        extra="ignore",
        hide_input_in_errors=True,  # a wrong value may be a password
    )

    app_name: str = "My API"
    debug: bool = False  # log SQL statements, without values
    api_v1_prefix: str = Field(default="/api/v1", pattern=r"^(/[\w.-]+)*$")
    secret_key: SecretStr = SecretStr(DEVELOPMENT_KEY if IS_DEVELOPMENT else "")
    database_url: SecretStr = SecretStr(f"sqlite:///{HERE / 'app.db'}")
    database_pool_size: int = Field(default=10, ge=1)  # connections a worker
    database_timeout: float = Field(default=5, gt=0)  # seconds
    database_startup_timeout: float = Field(default=30, ge=0)  # seconds
    database_statement_cache_size: int = Field(default=100, ge=0)  # statements
    migrate_on_startup: bool = True
    access_token_expire_minutes: int = Field(default=30, ge=1, le=60 * 24 * 365)
    refresh_token_expire_days: int = Field(default=30, ge=1, le=3650)
    bcrypt_rounds: int = Field(default=12, ge=4, le=31)  # 1 more: twice the time
    max_failed_logins: int = Field(default=10, ge=0)  # in 15 minutes; 0: no limit
    max_body_size: int = Field(default=2**20, ge=0)  # bytes
    cors_origins: Annotated[list[str], NoDecode, BeforeValidator(comma_separated)] = [
        "*"
    ]
    first_superuser_email: Email | None = None
    first_superuser_password: Password | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        """Refuse what would be unsafe or unusable."""
        if len(self.secret_key.get_secret_value().encode()) < 32:
            raise ValueError(
                "SECRET_KEY must have at least 32 bytes. Make one with: "
                "python -c 'import secrets; print(secrets.token_hex(32))'"
            )
        try:
            scheme = urlsplit(self.database_url.get_secret_value()).scheme
        except ValueError:  # whose message may show the URL
            scheme = ""
        if not re.fullmatch(r"(sqlite|postgres|postgresql)(\+\w+)?", scheme):
            raise ValueError(
                "DATABASE_URL must look like sqlite:///file.db "
                "or postgresql://user:password@host/database"
            )
        if bool(self.first_superuser_email) != bool(self.first_superuser_password):
            raise ValueError(
                "FIRST_SUPERUSER_EMAIL and FIRST_SUPERUSER_PASSWORD need one another"
            )
        return self


try:
    settings = Settings()
except ValidationError as error:
    stop(
        "; ".join(
            ": ".join([*(str(part).upper() for part in e["loc"]), e["msg"]])
            for e in error.errors()
        ).replace("Value error, ", "")
    )
SECRET_KEY = settings.secret_key.get_secret_value()


# --- Database: one transaction a request, or one round trip for a lone statement

# What hosting services write for libpq and asyncpg would hand on to the server.
LIBPQ_ONLY = {"channel_binding", "connect_timeout", "gssencmode", "pgbouncer"}
# What it logs at DEBUG has the values of statements, hashes of passwords among them.
logging.getLogger("aiosqlite").setLevel(logging.INFO)


def make_engines(statement_timeout: float | None) -> tuple[AsyncEngine, AsyncEngine]:
    """Return an engine for transactions and one for lone statements (AUTOCOMMIT).

    A lone statement is a transaction of its own: BEGIN, COMMIT and ROLLBACK around it
    would be round trips for nothing. `statement_timeout`: seconds, None for no limit.
    """
    options: dict[str, Any] = {
        "echo": settings.debug,
        "hide_parameters": True,  # in the log and in errors
        "pool_size": settings.database_pool_size,
        "max_overflow": 0,
        "pool_timeout": settings.database_timeout,
    }
    url = settings.database_url.get_secret_value()
    if url.startswith("sqlite"):
        return sqlite_engines(url, options)
    options["connect_args"] = {
        "async_creator_fn": connect,
        "hosts": postgresql_urls(url),
        "command_timeout": statement_timeout,
        "statement_cache_size": settings.database_statement_cache_size,
        "prepared_statement_cache_size": settings.database_statement_cache_size,
    }
    autocommit = create_async_engine(
        "postgresql+asyncpg://", isolation_level="AUTOCOMMIT", **options
    )

    @event.listens_for(autocommit.sync_engine, "checkout")
    def replace_closed(connection: Any, *_: object) -> None:
        # asyncpg noticed if the server hung up: to ask it first costs a round trip.
        if connection.driver_connection.is_closed():
            raise DisconnectionError

    @event.listens_for(autocommit.sync_engine, "handle_error")
    def drop_silent(context: Any) -> None:
        # The late answer of a server that did not answer in time must meet nobody.
        if isinstance(context.original_exception, TimeoutError):
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
            # at once: to close it in order would be to wait for an answer again
            context.connection.connection.driver_connection.terminate()

    return autocommit.execution_options(isolation_level="READ COMMITTED"), autocommit


def postgresql_urls(url: str) -> list[str]:
    """Return what asyncpg reads as libpq does (sslmode and so on), one URL a host."""
    parts = urlsplit(url)
    query = [
        ("sslmode" if name == "ssl" else name, value)  # as SQLAlchemy's users write it
        for name, value in parse_qsl(parts.query)
        if name not in LIBPQ_ONLY
    ]
    user, at, hosts = parts.netloc.rpartition("@")
    return [
        urlunsplit(("postgresql", user + at + host, parts.path, urlencode(query), ""))
        for host in hosts.split(",")
    ]


async def connect(hosts: list[str], **options: Any) -> asyncpg.Connection:
    """Return a connection to the first host that will do.

    Each has its share of the time, or one that is silent would use up all of it.
    """
    error: Exception = OSError("DATABASE_URL names no host")
    for host in hosts.copy():
        try:
            timeout = settings.database_timeout / len(hosts)
            return await asyncpg.connect(host, timeout=timeout, **options)
        except (OSError, asyncpg.PostgresError, asyncpg.InternalClientError) as failure:
            error = failure
            hosts.sort(key=host.__eq__)  # to the end: next time, begin with another
    raise error


def sqlite_engines(
    url: str, options: dict[str, Any]
) -> tuple[AsyncEngine, AsyncEngine]:
    """Return the same for SQLite: one connection for transactions, a pool for the rest.

    SQLite has one writer at a time. Here transactions wait in line for the connection;
    the file's lock, where who waits longest may lose, is for other processes.
    """
    file = make_url(url).set(drivername="sqlite+aiosqlite")
    options["poolclass"] = AsyncAdaptedQueuePool
    options["connect_args"] = {
        "isolation_level": None,  # the driver begins nothing by itself
        "timeout": settings.database_timeout,
    }
    transactions = create_async_engine(file, **options | {"pool_size": 1})
    autocommit = create_async_engine(
        file, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True, **options
    )

    @event.listens_for(transactions.sync_engine, "begin")
    def begin(connection: Any) -> None:
        if connection.connection.driver_connection.in_transaction:
            connection.exec_driver_sql("ROLLBACK")  # what a failed COMMIT left
        # A deferred BEGIN fails at once, without waiting, if it reads before it writes.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    for either in (transactions, autocommit):

        @event.listens_for(either.sync_engine, "connect")
        def configure(connection: Any, _: object) -> None:
            connection.execute("PRAGMA journal_mode = WAL").close()
            connection.execute("PRAGMA foreign_keys = ON").close()  # off by default

    in_memory = file.database in (None, "", ":memory:")  # it is its one connection
    return transactions, transactions if in_memory else autocommit


engine, autocommit = make_engines(settings.database_timeout)
IS_SQLITE = engine.dialect.name == "sqlite"


async def get_session() -> AsyncGenerator[AsyncSession]:
    """Yield the request's transaction: committed if the route returns, else undone."""
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session
        await session.commit()


# "function": the commit comes before the answer, so that a 2xx is never a lie.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]


async def take_turns(connection: AsyncConnection, key: int) -> None:
    """Let one transaction at a time pass that has the same 64-bit key."""
    if not IS_SQLITE:  # which lets one transaction at a time pass anyway
        await connection.execute(select(func.pg_advisory_xact_lock(key)))


# SQLSTATE classes and SQLite errors that pass: no connection, no room, shut down, lock.
SQLITE_OUTAGES = ("SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_FULL")
OUTAGES = ("08", "25006", "40", "53", "55P03", "57", *SQLITE_OUTAGES)


def is_outage(error: Exception) -> bool:
    """Tell a database that cannot serve just now from a mistake of ours."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError | PoolTimeoutError)  # TimeoutError is OSError
    code = getattr(error.orig, "sqlstate", getattr(error.orig, "sqlite_errorname", ""))
    connecting = error.statement is None
    return connecting or error.connection_invalidated or str(code).startswith(OUTAGES)


# --- Passwords and tokens: slow hashes in threads, short-lived proofs, one-time secrets

ATTEMPT_WINDOW = timedelta(minutes=15)
# bcrypt is made to take long: more threads than cores would only slow the rest down.
hashing = anyio.CapacityLimiter(os.cpu_count() or 1)
HASHING_PATIENCE = 15  # seconds to wait in line for a core, then 503
pairs_in_turn: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
# A hash that no password has, of the usual cost: an unknown email takes as long.
NO_HASH = f"$2b${settings.bcrypt_rounds:02}${'.' * 53}"


@asynccontextmanager
async def hashing_turn(pair: str = "") -> AsyncGenerator[None]:
    """Wait in line for a core to hash on, and for others of the same `pair`.

    Wait before the transaction, never inside: the line would hold every connection.
    One guess of a pair at a time, or a burst of right ones would look like failures.
    """
    async with AsyncExitStack() as turn:
        with anyio.fail_after(HASHING_PATIENCE):
            if pair:
                lock = pairs_in_turn.setdefault(pair, asyncio.Lock())
                await turn.enter_async_context(lock)
            await turn.enter_async_context(hashing)
        yield


async def hash_password(password: str) -> str:
    """Return the bcrypt hash of a password of at most 72 bytes."""
    async with hashing_turn():
        salt = bcrypt.gensalt(settings.bcrypt_rounds)
        hashed = await anyio.to_thread.run_sync(bcrypt.hashpw, password.encode(), salt)
        return hashed.decode()


class OAuth2Error(HTTPException):
    """An error in the form that OAuth2 clients read (RFC 6749, section 5.2)."""

    def __init__(
        self,
        error: str,
        detail: str,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, headers)
        self.error = error


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal: enough for a random secret."""
    return sha256(text.encode()).hexdigest()


async def count_attempt(session: AsyncSession, pair: str) -> None:
    """Store an attempt; raise 429 if too many of the pair have failed of late."""
    now = utc_now()
    since = now - ATTEMPT_WINDOW
    for model, condition in (
        (LoginAttempt, col(LoginAttempt.created_at) < since),
        (Login, col(Login.expires_at) < now),
    ):  # what no longer counts goes, a little at each login, never waiting for a lock
        old = select(model.id).where(condition).limit(100)
        old = old.with_for_update(skip_locked=True)
        await session.exec(delete(model).where(col(model.id).in_(old)))
    if settings.max_failed_logins == 0:
        return
    await take_turns(await session.connection(), int(pair[:15], 16))
    newest = (
        select(LoginAttempt.created_at)
        .where(LoginAttempt.pair_hash == pair, LoginAttempt.created_at > since)
        .order_by(col(LoginAttempt.created_at).desc())
        .limit(settings.max_failed_logins)
    )
    failed = (await session.exec(newest)).all()
    if len(failed) == settings.max_failed_logins:
        wait = (failed[-1] - since).total_seconds()
        headers = {"Retry-After": str(int(wait) + 1)}
        detail = "Too many failed logins, try again later"
        raise OAuth2Error("invalid_grant", detail, 429, headers)
    session.add(LoginAttempt(pair_hash=pair))


async def check_password(
    session: AsyncSession, pair: str, password: str, hashed: str | None
) -> bool:
    """Tell whether a password is the hash's, in the same time if there is none.

    `pair`: the digest of what attempts are counted by, of the email and the client's
    address for logins; too many raise 429. The session must be outside a transaction,
    and is inside one afterwards if the password is right.
    """
    guess = password.encode()
    async with hashing_turn(pair):
        await count_attempt(session, pair)
        # Counted before it is hashed, so that a burst gets no more guesses than the
        # limit, and committed: no connection is held while it is hashed.
        await session.commit()
        right = await anyio.to_thread.run_sync(
            bcrypt.checkpw, guess[:72], (hashed or NO_HASH).encode()
        )
    # bcrypt reads 72 bytes: a longer guess is wrong, however it begins.
    if not right or hashed is None or len(guess) > 72:
        return False
    await session.exec(delete(LoginAttempt).where(col(LoginAttempt.pair_hash) == pair))
    return True


def make_token(login_id: int, user_id: int, refresh_token: str) -> Token:
    """Return the token endpoint's answer for a login (RFC 6749, section 5.1)."""
    now = int(time.time())
    lifetime = settings.access_token_expire_minutes * 60
    claims = {
        "sub": str(user_id),
        "sid": str(login_id),
        "iat": now,
        "exp": now + lifetime,
    }
    return Token(
        access_token=jwt.encode(claims, SECRET_KEY, "HS256"),
        expires_in=lifetime,
        refresh_token=refresh_token,
    )


def refresh_expiry() -> datetime:
    """Return when a refresh token made now expires."""
    return utc_now() + timedelta(days=settings.refresh_token_expire_days)


def read_access_token(token: str, *, expired: bool = False) -> AccessToken | None:
    """Return a token's claims; None if it is forged, expired or of another kind.

    `expired`: accept it after its time too, to revoke the login behind it.
    """
    try:
        claims = jwt.decode(
            token,
            SECRET_KEY,
            algorithms=["HS256"],
            # iat is not checked: the clock of the host that issued it may be ahead
            options={
                "require": ["sub", "iat", "exp", "sid"],
                "verify_iat": False,
                "verify_exp": not expired,
            },
        )
        return AccessToken.model_validate(claims)
    except (jwt.InvalidTokenError, ValueError):
        return None


# --- Who is calling: every statement starts from the login behind the access token


def not_found() -> HTTPException:
    """Return the error for what is not there or not the caller's to see: the same."""
    return HTTPException(404, "Not found")


def unauthorized() -> HTTPException:
    """Return the error for every token that does not count (RFC 6750)."""
    return HTTPException(
        401, "Log in: no valid access token was sent", {"WWW-Authenticate": "Bearer"}
    )


AUTH_PATH = f"{settings.api_v1_prefix}/auth"
TOKEN_URL = f"{AUTH_PATH}/token".removeprefix("/")  # relative: right under a root path
oauth2 = OAuth2PasswordBearer(TOKEN_URL, refreshUrl=TOKEN_URL, auto_error=False)


async def get_access_token(
    token: Annotated[str | None, Depends(oauth2)],
) -> AccessToken:
    """Return the verified claims of the request's bearer token, else raise 401."""
    if token and (claims := read_access_token(token)):
        return claims
    raise unauthorized()


# The signature is right; whether the login still exists is for `fetch` to find out.
TokenDep = Annotated[AccessToken, Depends(get_access_token)]


def by_login[*Ts](statement: Select[*Ts]) -> Select[*Ts]:
    """Make a statement start from the caller's live login and active user.

    Then it finds a row if, and only if, there is such a caller: 401 or an answer is
    decided by the same query. Outer-join what the caller may see.
    """
    return (
        statement.select_from(Login)
        .join(User, col(User.id) == Login.user_id)
        .where(
            col(Login.id) == bindparam("sid"),
            col(Login.user_id) == bindparam("sub"),
            col(User.is_active),
        )
    )


async def fetch(
    statement: Executable, token: AccessToken, **values: object
) -> Sequence[Row[Any]]:
    """Run one statement made with `by_login`, alone, and return its rows; none: 401.

    No session, whose objects are made to be changed, and one greenlet for all three
    steps: it halves the cost of a short query.
    """

    def run() -> Sequence[Row[Any]]:
        with autocommit.sync_engine.connect() as connection:
            rows = connection.execute(statement, params).all()
            if not statement.is_select:
                connection.commit()
            return rows

    params = {"sid": token.sid, "sub": token.sub, **values}
    if rows := await greenlet_spawn(run):
        return rows
    raise unauthorized()


async def fetch_one(
    statement: Executable, token: AccessToken, **values: object
) -> Row[Any]:
    """Return the one row of a statement; what the caller may not see is not there."""
    [row] = await fetch(statement, token, **values)
    if row.id is None:
        raise not_found()
    return row


async def load[T](
    session: AsyncSession,
    statement: Select[T, bool],
    token: AccessToken,
    **values: object,
) -> T:
    """Return what such a statement finds as an object for the session to change."""
    params = {"sid": token.sid, "sub": token.sub, **values}
    row = (await session.exec(statement, params=params)).first()
    if row is None:
        raise unauthorized()
    if row[0] is None:
        raise not_found()
    return row[0]


# Built once: to build a statement costs a fifth of running it.
Target = aliased(User)  # the user that is asked for, beside the one who asks
SEES_ALL: Label[bool] = col(User.is_superuser).label("sees_all")
READ_ME = by_login(select(User, SEES_ALL))
READ_USER = by_login(select(Target, SEES_ALL)).outerjoin(
    Target,
    (col(Target.id) == bindparam("user_id"))
    & ((col(Target.id) == User.id) | col(User.is_superuser)),
)
READ_ITEM = by_login(select(Item, SEES_ALL)).outerjoin(
    Item,
    (col(Item.id) == bindparam("item_id"))
    & ((col(Item.owner_id) == User.id) | col(User.is_superuser)),
)
CREATE_ITEM = (
    insert(Item)
    .from_select(
        ["title", "description", "owner_id"],
        by_login(select(bindparam("title"), bindparam("description"), User.id)),
    )
    .returning(Item)
)


PageDep = Annotated[Page, Query()]
Id = Annotated[int, PathParameter(ge=1, le=MAX_ID)]


def page_of(statement: Any, id_: Any) -> Any:
    """Return one page of a statement as a table to join the caller to.

    It asks for one row more than the page holds, to tell whether there is a next page.
    """
    return (
        statement.where(id_ > bindparam("after"))
        .order_by(id_)
        .offset(bindparam("skip", type_=BigInteger))
        .limit(bindparam("limit", type_=BigInteger) + 1)
        .subquery()
    )


# An index on (owner_id, id) serves the owner's page, the primary key that of all. The
# right is asked inside: what the caller may not see is not even looked at.
Caller = aliased(User)
SUB = bindparam("sub", type_=BigInteger)
IS_SUPERUSER = select(Caller.is_superuser).where(Caller.id == SUB).scalar_subquery()
OWNER = func.coalesce(bindparam("owner_id", type_=BigInteger), SUB)
OwnedItem = aliased(
    Item,
    page_of(
        select(Item).where(Item.owner_id == OWNER, (OWNER == SUB) | IS_SUPERUSER),
        Item.id,
    ),
)
AnyItem = aliased(Item, page_of(select(Item).where(IS_SUPERUSER), Item.id))
AnyUser = aliased(User, page_of(select(User).where(IS_SUPERUSER), User.id))
OWNED_ITEMS = (
    by_login(select(OwnedItem, SEES_ALL))
    .outerjoin(OwnedItem, true())
    .order_by(col(OwnedItem.id))
)
ALL_ITEMS = (
    by_login(select(AnyItem, SEES_ALL))
    .outerjoin(AnyItem, true())
    .order_by(col(AnyItem.id))
)
ALL_USERS = (
    by_login(select(AnyUser, SEES_ALL))
    .outerjoin(AnyUser, true())
    .order_by(col(AnyUser.id))
)


def one_page(
    rows: Sequence[Row[Any]], page: Page, request: Request, response: Response
) -> Sequence[Row[Any]]:
    """Return a page's rows and set `Link` to the next page, if any (RFC 8288)."""
    if rows[0].id is None:  # only the caller: nothing to list
        return []
    if len(rows) > page.limit:
        rows = rows[: page.limit]
        url = request.url.remove_query_params("skip")
        url = url.include_query_params(after=rows[-1].id)
        response.headers["Link"] = f'<{url}>; rel="next"'
    return rows


# --- The application: what happens at start-up, around every request and on errors

MIGRATIONS = 7_265_617  # the lock's key; any number that nothing else uses


@asynccontextmanager
async def migration_connection() -> AsyncGenerator[AsyncConnection]:
    """Yield a transaction to migrate in: one at a time, however many workers start."""
    patient = engine if IS_SQLITE else make_engines(statement_timeout=None)[0]
    async with patient.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if IS_SQLITE:  # to alter a table is to drop its old copy: that must not cascade
            await driver.execute("PRAGMA foreign_keys = OFF")
        async with connection.begin():
            await take_turns(connection, MIGRATIONS)
            yield connection
        if IS_SQLITE:
            await driver.execute("PRAGMA foreign_keys = ON")
    if not IS_SQLITE:
        await patient.dispose()


async def schema_is_current() -> bool:
    """Tell whether the database has seen every migration; False if in doubt.

    Without Alembic: to import it takes as long as to import FastAPI.
    """
    files = (HERE / "migrations" / "versions").glob("*.py")
    scripts = "\n".join(file.read_text() for file in files)
    revisions = set(re.findall(r'^revision\b.* = "(\w+)"', scripts, re.M))
    replaced = set(re.findall(r'^down_revision\b.* = "(\w+)"', scripts, re.M))
    query: Any = select(column("version_num")).select_from(table("alembic_version"))
    with suppress(DBAPIError):
        async with autocommit.connect() as connection:
            seen = (await connection.execute(query)).scalars().all()
            return set(seen) == revisions - replaced
    return False


def upgrade(connection: Connection) -> None:
    """Run the migrations that the database has not seen."""
    from alembic import command, config

    options = config.Config(HERE / "alembic.ini", attributes={"connection": connection})
    command.upgrade(options, "head")


async def create_first_superuser() -> None:
    """Make the superuser that the settings name, unless a user has that email."""
    email, password = settings.first_superuser_email, settings.first_superuser_password
    if email is None or password is None:
        return
    async with AsyncSession(autocommit) as session:
        if (await session.exec(select(User.id).where(User.email == email))).first():
            return
    hashed = await hash_password(password)
    with suppress(IntegrityError):  # another worker was faster
        async with AsyncSession(engine) as session:
            session.add(User(email=email, hashed_password=hashed, is_superuser=True))
            await session.commit()


def describe(error: Exception) -> str:
    """Return what went wrong in a line; of a URL that cannot be read, show nothing."""
    cause = getattr(error, "driver_exception", None) or error
    if isinstance(cause, ValueError):
        return "DATABASE_URL is not valid. Is the password percent-encoded?"
    return f"The database, see DATABASE_URL: {str(cause) or type(cause).__name__}"


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Wait for the database, bring its schema up to date, make the first superuser."""
    give_up = time.monotonic() + settings.database_startup_timeout
    while True:
        try:
            if settings.migrate_on_startup and not await schema_is_current():
                async with migration_connection() as connection:
                    await connection.run_sync(upgrade)
            await create_first_superuser()
            break
        except (DBAPIError, OSError, ValueError) as error:
            reason = describe(error)
            if not is_outage(error) or time.monotonic() > give_up:
                stop(reason)
            log.warning("Trying again: %s", reason)
        await anyio.sleep(1)
    yield
    with anyio.move_on_after(2):  # seconds: a frozen database would not say goodbye
        await engine.dispose()
        await autocommit.dispose()


class ErrorMiddleware:
    """Answer in JSON what no handler of FastAPI's can.

    An unforeseen error: FastAPI's handler raises it again, and the server then closes
    the connection, losing the client's next request. A body that is declared too large:
    Starlette's answer is plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size = Headers(scope=scope).get("content-length", "")
        if size.isdecimal() and int(size[:20]) > settings.max_body_size:
            answer = JSONResponse({"detail": "Content Too Large"}, 413)
            return await answer(scope, receive, send)
        try:
            await self.app(scope, receive, watch)
        except Exception as error:
            if started:
                raise
            log.exception("Unforeseen error at %s %s", scope["method"], scope["path"])
            trace.get_current_span().record_exception(error)
            answer = JSONResponse({"detail": "Internal server error"}, 500)
            await answer(scope, receive, send)


PROBLEMS = {
    400: "The request cannot be done as it is",
    401: "No valid access token",
    403: "Not yours to do",
    404: "Nothing there that you may see",
    413: "The body is larger than `MAX_BODY_SIZE`",
    422: "The input is not valid; `detail` says where and why",
    429: "Too many failed logins: wait for `Retry-After` seconds",
    503: "The service cannot do it just now: try again after `Retry-After` seconds",
}


def problems(*codes: int, model: type = Problem) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of the errors of a route."""
    return {
        code: {
            "model": Invalid if code == 422 else model,
            "description": PROBLEMS[code],
        }
        for code in codes
    }


LINK: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {
            "Link": {
                "description": 'The next page, `rel="next"` (RFC 8288), if any',
                "schema": {"type": "string"},
            }
        }
    }
}


app = FastAPI(
    title=settings.app_name,
    version="1.0.0",
    summary="Users, items and logins.",
    description="Register by `create_user`, then log in by **Authorize**.",
    openapi_url=f"{settings.api_v1_prefix}/openapi.json",
    openapi_tags=[
        {"name": "auth", "description": "Logins: OAuth2 tokens, got and given back."},
        {"name": "users", "description": "Accounts: one's own; a superuser's, all."},
        {"name": "items", "description": "What a user owns; nobody else sees it."},
        {"name": "health", "description": "For load balancers and orchestrators."},
    ],
    generate_unique_id_function=lambda route: route.name,
    lifespan=lifespan,
    redirect_slashes=False,  # a redirect would be built from the client's Host
)
app.add_middleware(ErrorMiddleware)
app.add_middleware(
    CORSMiddleware,
    allow_origins=settings.cors_origins,
    allow_credentials="*" not in settings.cors_origins,
    allow_methods=["*"],
    allow_headers=["*"],
    expose_headers=["Link", "Retry-After"],
)


GRANT_TYPES = "grant_type must be password or refresh_token"


def is_oauth2(request: Request) -> bool:
    """Tell whether the client expects errors in the form of OAuth2."""
    return request.url.path.endswith((f"{AUTH_PATH}/token", f"{AUTH_PATH}/revoke"))


@app.exception_handler(RequestValidationError)
async def invalid_input(request: Request, error: RequestValidationError) -> Response:
    """Say what is wrong with the input, without repeating it: it may be a password."""
    errors: list[dict[str, Any]] = []
    for e in error.errors():
        kept = {"type": e["type"], "loc": e["loc"], "msg": e["msg"]}
        if e["type"] == "extra_forbidden":  # its name, too, is what was sent
            body = request.scope["route"].body_field.field_info.annotation
            allowed = ", ".join(body.model_fields)
            kept |= {"loc": e["loc"][:-1], "msg": f"Unknown field: send only {allowed}"}
        if kept not in errors:  # a thousand unknown fields are one mistake
            errors.append(kept)
    if is_oauth2(request):
        first = error.errors()[0]
        if first["type"] == "union_tag_invalid" and first["ctx"]["tag"]:
            mistake = OAuth2Error("unsupported_grant_type", GRANT_TYPES)
        else:
            name = "grant_type" if first["loc"] == ("body",) else first["loc"][-1]
            mistake = OAuth2Error("invalid_request", f"{name} is missing or not valid")
        return await oauth2_error(request, mistake)
    return JSONResponse({"detail": errors}, 422)


@app.exception_handler(405)
async def method_not_allowed(request: Request, error: HTTPException) -> Response:
    """Say which methods there are (RFC 9110): each route knows its own only."""
    allowed = {
        method
        for route in iter_route_contexts(app.routes)
        if route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    error.headers = {"Allow": ", ".join(sorted(allowed))}
    return await http_exception_handler(request, error)


@app.exception_handler(400)
async def unreadable_body(request: Request, error: HTTPException) -> Response:
    """Answer for a body that cannot be read in the form that the client expects."""
    if not is_oauth2(request):
        return await http_exception_handler(request, error)
    if not isinstance(error, OAuth2Error):
        error = OAuth2Error("invalid_request", "The form cannot be read")
    return await oauth2_error(request, error)


@app.exception_handler(OAuth2Error)
async def oauth2_error(_: Request, error: OAuth2Error) -> Response:
    """Answer in the form of RFC 6749, section 5.2."""
    content = {
        "error": error.error,
        "error_description": error.detail,
        "detail": error.detail,
    }
    headers = {**(error.headers or {}), "Cache-Control": "no-store"}
    return JSONResponse(content, error.status_code, headers)


@app.exception_handler(IntegrityError)
async def refused_by_database(request: Request, error: IntegrityError) -> Response:
    """Answer what the database refused: no SELECT beforehand can know, in a race."""
    if "foreign key" in str(error.orig).lower():  # the caller was deleted meanwhile
        return await http_exception_handler(request, unauthorized())
    taken = "email" in str(error.orig)
    detail = "Email already registered" if taken else "It conflicts with what is stored"
    return JSONResponse({"detail": detail}, 400)


@app.exception_handler(StaleDataError)
async def gone_meanwhile(_: Request, __: StaleDataError) -> Response:
    """Answer for a row that another request deleted while this one changed it."""
    return JSONResponse({"detail": "Not found"}, 404)


@app.exception_handler(DBAPIError)
@app.exception_handler(PoolTimeoutError)
@app.exception_handler(OSError)
async def unavailable(request: Request, error: Exception) -> Response:
    """Answer for a database that is away, frozen or overloaded: come back later."""
    if not is_outage(error):
        raise error
    log.warning("Answered 503 for %s", type(error).__name__)
    detail, headers = "The service is busy, try again", {"Retry-After": "1"}
    if is_oauth2(request):
        problem = OAuth2Error("temporarily_unavailable", detail, 503, headers)
        return await oauth2_error(request, problem)
    return JSONResponse({"detail": detail}, 503, headers)


# --- Routes: auth

auth = APIRouter(
    prefix=AUTH_PATH,
    tags=["auth"],
    max_body_size=settings.max_body_size,
    responses=problems(400, 503, model=OAuth2Problem) | problems(413),
)


@auth.post("/token", responses=problems(429, model=OAuth2Problem))
async def create_token(
    grant: Annotated[PasswordGrant | RefreshGrant, Form(discriminator="grant_type")],
    session: SessionDep,
    request: Request,
    response: Response,
) -> Token:
    """Log in with email and password, or renew a login with its refresh token.

    OAuth2's token endpoint (RFC 6749). A refresh token works once; shown again, it
    ends its login (RFC 9700).
    """
    response.headers["Cache-Control"] = "no-store"
    if isinstance(grant, RefreshGrant):
        return await renew(session, grant.refresh_token)
    client = request.client.host if request.client else ""
    return await log_in(session, grant.username, grant.password, client)


async def log_in(
    session: AsyncSession, username: str, password: str, client: str
) -> Token:
    """Return the tokens of a new login, or raise `invalid_grant`."""
    refused = OAuth2Error("invalid_grant", "Wrong email or password")
    try:
        email = normal_email(username)
    except PydanticCustomError:
        email = username  # nobody's, and answered in the same time
    user = (await session.exec(select(User).where(User.email == email))).first()
    await session.commit()
    known = user.hashed_password if user else None
    right = await check_password(session, digest(f"{email} {client}"), password, known)
    if not (user and right):
        raise refused
    # Locked until the login is stored: a password change meanwhile would miss it.
    unchanged = select(User).where(
        User.id == user.id, User.hashed_password == known, col(User.is_active)
    )
    if not (await session.exec(unchanged.with_for_update(read=True))).first():
        raise refused
    family, secret = token_urlsafe(16), token_urlsafe(32)
    login = Login(
        user_id=user.id,
        family_hash=digest(family),
        secret_hash=digest(secret),
        expires_at=refresh_expiry(),
    )
    session.add(login)
    await session.flush()
    return make_token(login.id, user.id, f"{family}.{secret}")


async def renew(session: AsyncSession, refresh_token: str) -> Token:
    """Return new tokens for a login, or raise `invalid_grant`, having ended it."""
    family, _, spent = refresh_token.partition(".")
    secret = token_urlsafe(32)
    # One statement decides: of several uses at once, one finds the secret unspent.
    rotated = await session.exec(
        update(Login)
        .where(
            col(Login.family_hash) == digest(family),
            col(Login.secret_hash) == digest(spent),
            col(Login.expires_at) > utc_now(),
            col(Login.user_id).in_(select(User.id).where(User.is_active)),
        )
        .values(secret_hash=digest(secret), expires_at=refresh_expiry())
        .returning(col(Login.id), col(Login.user_id))
    )
    if row := rotated.first():
        return make_token(row[0], row[1], f"{family}.{secret}")
    await session.exec(delete(Login).where(col(Login.family_hash) == digest(family)))
    await session.commit()  # the error below would undo it
    raise OAuth2Error("invalid_grant", "Log in again: the refresh token is not valid")


@auth.post("/revoke", response_class=Response)
async def revoke_token(
    form: Annotated[Revocation, Form()], session: SessionDep
) -> Response:
    """Log out: end the login behind an access or refresh token (RFC 7009).

    Unknown tokens are answered alike; expired and spent ones end their login too.
    """
    family = digest(form.token.partition(".")[0])
    claims = read_access_token(form.token, expired=True)
    await session.exec(
        delete(Login).where(
            (col(Login.family_hash) == family)
            | (col(Login.id) == (claims.sid if claims else None))
        )
    )
    return Response(headers={"Cache-Control": "no-store"})


app.include_router(auth)


# --- Routes: users

users = APIRouter(
    prefix=f"{settings.api_v1_prefix}/users",
    tags=["users"],
    max_body_size=settings.max_body_size,
    responses=problems(413, 503),
)


@users.post(
    "", response_model=UserPublic, status_code=201, responses=problems(400, 422)
)
async def create_user(body: UserCreate, session: SessionDep) -> User:
    """Register. The email is kept in lower case; one email, one user."""
    fields = body.model_dump(exclude={"password"})
    user = User(**fields, hashed_password=await hash_password(body.password))
    session.add(user)
    await session.flush()  # a taken email shows here, even in a race
    return user


@users.get(
    "", response_model=list[UserPublic], responses=problems(401, 403, 422) | LINK
)
async def list_users(
    token: TokenDep, page: PageDep, request: Request, response: Response
) -> Any:
    """List all users, page by page; for superusers."""
    rows = await fetch(ALL_USERS, token, **page.model_dump())
    if not rows[0].sees_all:
        raise HTTPException(403, "Only a superuser may list users")
    return one_page(rows, page, request, response)


@users.get("/me", response_model=UserPublic, responses=problems(401))
async def read_me(token: TokenDep) -> Any:
    """Return the user who is logged in."""
    return await fetch_one(READ_ME, token)


@users.get("/{user_id}", response_model=UserPublic, responses=problems(401, 404, 422))
async def read_user(user_id: Id, token: TokenDep) -> Any:
    """Return a user: oneself, or anybody for a superuser."""
    return await fetch_one(READ_USER, token, user_id=user_id)


@users.patch(
    "/me", response_model=UserPublic, responses=problems(400, 401, 403, 422, 429)
)
async def update_me(changes: UserUpdate, token: TokenDep, session: SessionDep) -> User:
    """Change what is sent of oneself; email and password need `current_password`."""
    return await change_user(token.sub, changes, token, session)


@users.patch(
    "/{user_id}",
    response_model=UserPublic,
    responses=problems(400, 401, 403, 404, 422, 429),
)
async def update_user(
    user_id: Id, changes: UserUpdate, token: TokenDep, session: SessionDep
) -> User:
    """Change what is sent of a user: oneself, or anybody for a superuser.

    A new password ends the user's logins, but for the one that made this call.
    """
    return await change_user(user_id, changes, token, session)


async def change_user(
    user_id: int, changes: UserUpdate, token: AccessToken, session: AsyncSession
) -> User:
    """Return a user, changed as the caller may; raise 401, 403 or 404 otherwise."""
    sent = changes.model_dump(exclude_unset=True)
    guess, password = sent.pop("current_password", None), sent.pop("password", None)
    old = await fetch_one(READ_USER, token, user_id=user_id)
    own = user_id == token.sub
    if {"is_active", "is_superuser"} & sent.keys() and own:  # nobody else, but by right
        raise HTTPException(
            403, "Only a superuser may change is_active and is_superuser, of others"
        )
    proven = own and (password or sent.get("email", old.email) != old.email)
    if proven:
        pair = digest(f"password of {user_id}")
        if not guess or not await check_password(
            session, pair, guess, old.hashed_password
        ):
            raise HTTPException(403, "current_password is missing or wrong")
        await session.commit()
    if password:
        sent["hashed_password"] = await hash_password(password)
    # Only now the transaction: none is open while a password is hashed. That took its
    # time, so that who is calling, and what they may, is asked again.
    await lock_users(session, token.sub, user_id)
    user = await load(session, READ_USER, token, user_id=user_id)
    if proven and user.hashed_password != old.hashed_password:
        raise HTTPException(403, "current_password is missing or wrong")
    user.sqlmodel_update(sent)
    await session.flush()
    if password or not user.is_active:  # after the row is locked: see `log_in`
        ended = delete(Login).where(col(Login.user_id) == user_id)
        await session.exec(ended.where(col(Login.id) != token.sid))
    return user


@users.delete("/me", status_code=204, responses=problems(401, 403))
async def delete_me(token: TokenDep, session: SessionDep) -> None:
    """Delete oneself, with all items and logins; not for superusers."""
    await remove_user(token.sub, token, session)


@users.delete("/{user_id}", status_code=204, responses=problems(401, 403, 404, 422))
async def delete_user(user_id: Id, token: TokenDep, session: SessionDep) -> None:
    """Delete a user with all items and logins: oneself, or anybody for a superuser."""
    await remove_user(user_id, token, session)


async def lock_users(session: AsyncSession, *ids: int) -> None:
    """Let one request at a time change users: two superusers cannot end each other."""
    users = select(User.id).where(col(User.id).in_(ids)).order_by(col(User.id))
    await session.exec(users.with_for_update(key_share=True))


async def remove_user(user_id: int, token: AccessToken, session: AsyncSession) -> None:
    """Delete a user as the caller may; raise 401, 403 or 404 otherwise."""
    await lock_users(session, token.sub, user_id)
    user = await load(session, READ_USER, token, user_id=user_id)
    if user.id == token.sub and user.is_superuser:
        raise HTTPException(403, "A superuser cannot delete themself")
    await session.delete(user)  # the database deletes what is theirs


app.include_router(users)


# --- Routes: items

items = APIRouter(
    prefix=f"{settings.api_v1_prefix}/items",
    tags=["items"],
    max_body_size=settings.max_body_size,
    responses=problems(401, 413, 503),
)


@items.post(
    "", response_model=ItemPublic, status_code=201, responses=problems(400, 422)
)
async def create_item(body: ItemCreate, token: TokenDep) -> Any:
    """Make an item of one's own."""
    return await fetch_one(CREATE_ITEM, token, **body.model_dump())


@items.get("", response_model=list[ItemPublic], responses=problems(422) | LINK)
async def list_items(
    token: TokenDep,
    page: PageDep,
    request: Request,
    response: Response,
    owner_id: Annotated[
        int | None, Query(ge=1, le=MAX_ID, description="Of this user only")
    ] = None,
) -> Any:
    """List one's own items, page by page; a superuser sees all, or one owner's."""
    values = page.model_dump()
    rows = await fetch(OWNED_ITEMS, token, **values, owner_id=owner_id)
    if rows[0].sees_all and owner_id is None:
        rows = await fetch(ALL_ITEMS, token, **values)
    return one_page(rows, page, request, response)


@items.get("/{item_id}", response_model=ItemPublic, responses=problems(404, 422))
async def read_item(item_id: Id, token: TokenDep) -> Any:
    """Return an item of one's own; any for a superuser."""
    return await fetch_one(READ_ITEM, token, item_id=item_id)


@items.patch("/{item_id}", response_model=ItemPublic, responses=problems(400, 404, 422))
async def update_item(
    item_id: Id, changes: ItemUpdate, token: TokenDep, session: SessionDep
) -> Item:
    """Change what is sent of an item of one's own; of any for a superuser."""
    item = await load(session, READ_ITEM, token, item_id=item_id)
    item.sqlmodel_update(changes.model_dump(exclude_unset=True))
    await session.flush()
    return item


@items.delete("/{item_id}", status_code=204, responses=problems(404, 422))
async def delete_item(item_id: Id, token: TokenDep, session: SessionDep) -> None:
    """Delete an item of one's own; any for a superuser."""
    item = await load(session, READ_ITEM, token, item_id=item_id)
    await session.delete(item)


app.include_router(items)


# --- Routes: health, at the root and without a login

health = APIRouter(tags=["health"])


@health.get("/health")
async def read_health() -> Health:
    """Tell that the process is up; asks no database."""
    return Health(status="healthy")


@health.get("/ready", responses=problems(503))
async def read_readiness() -> Health:
    """Tell that the database answers; 503 while it does not."""
    async with autocommit.connect() as connection:
        await connection.execute(select(1))
    return Health(status="ready")


app.include_router(health)
