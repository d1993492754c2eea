"""A complete backend to read in a sitting: users, items and logins.

FastAPI and SQLModel, on SQLite or PostgreSQL. Start it, then open /docs:

    uv run fastapi dev app.py

Read on from top to bottom: settings, database, passwords and tokens, who is
calling, the application, then the routes. What is stored is in models.py.
"""

import logging
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import parse_qsl, urlencode
from weakref import WeakValueDictionary

import anyio
import asyncpg
import bcrypt
import jwt
import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from fastapi.security import OAuth2PasswordBearer
from pydantic import Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.exc import DBAPIError, DisconnectionError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import aliased
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlmodel import bindparam, col, delete, func, insert, select, update
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Match

from models import (
    AccessToken,
    Email,
    Filled,
    Id,
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
    Token,
    User,
    UserCreate,
    UserPublic,
    UserUpdate,
    utc_now,
)

log = logging.getLogger("uvicorn.error")  # the server's own log: shown wherever it runs
HERE = Path(__file__).parent


# --- Settings: from the environment (upper case) or .env, checked once, at the start


def stop(problem: str) -> NoReturn:
    """End the start with one message instead of a page of traceback."""
    sys.tracebacklimit = 0
    raise SystemExit(f"Cannot start. {problem}") from None


DEVELOPMENT_KEY = "a key that everybody knows: for development only"
IS_DEVELOPMENT = os.environ.get("FASTAPI_ENV") == "development"  # by `fastapi dev`


class Settings(BaseSettings):
    """What differs between installations; the README explains each."""

    model_config = SettingsConfigDict(
        env_file=HERE / ".env",
        extra="ignore",
        hide_input_in_errors=True,  # a wrong value may be a password
    )

    app_name: str = Field(default="My API", min_length=1)
    debug: bool = False  # log SQL statements, without values
    api_v1_prefix: str = Field(default="/api/v1", pattern=r"^(/\w[\w.-]*)*$")
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
    max_failed_logins: int = Field(default=10, ge=0, le=1000)  # in 15 minutes; 0: off
    max_body_size: int = Field(default=2**20, ge=1)  # bytes
    cors_origins: str = "*"  # several: separated by commas
    first_superuser_email: Email | None = None
    first_superuser_password: Password | None = None


try:
    settings = Settings()
except ValidationError as error:
    wrong = [[*(str(p).upper() for p in e["loc"]), e["msg"]] for e in error.errors()]
    stop("; ".join(": ".join(parts) for parts in wrong))
SECRET_KEY = os.fsencode(settings.secret_key.get_secret_value())
DATABASE_URL = settings.database_url.get_secret_value()
IS_SQLITE = DATABASE_URL.startswith("sqlite")
ORIGINS = [origin.strip() for origin in settings.cors_origins.split(",")]
if len(SECRET_KEY) < 32:
    make = "python -c 'import secrets; print(secrets.token_hex(32))'"
    stop(f"SECRET_KEY must have at least 32 bytes. Make one with: {make}")
if not re.match(r"sqlite(\+\w+)?://(/|$)|postgres(ql)?(\+\w+)?://", DATABASE_URL):
    stop("DATABASE_URL must look like sqlite:///file.db or postgresql://user@host/db")
if bool(settings.first_superuser_email) != bool(settings.first_superuser_password):
    stop("FIRST_SUPERUSER_EMAIL and FIRST_SUPERUSER_PASSWORD need one another")


# --- Database: one transaction a request, or one round trip for a lone statement

# What clients of libpq write, and asyncpg would hand on to the server as a setting.
LIBPQ_ONLY = ("channel_", "connect_timeout", "gssencmode", "keepalive", "pgbouncer")
# These log values: of statements, hashes of passwords among them, and of broken forms.
logging.getLogger("aiosqlite").setLevel(logging.INFO)
logging.getLogger("python_multipart").setLevel(logging.ERROR)


def postgresql_urls() -> list[str]:
    """Return what asyncpg reads as libpq does (sslmode and so on), one URL a host."""
    address, _, query = DATABASE_URL.partition("?")
    user, at, place = address.partition("://")[2].rpartition("@")
    hosts, slash, database = place.partition("/")
    query = re.sub(r"\bssl=", "sslmode=", query)  # as SQLAlchemy's users write it
    query = urlencode([p for p in parse_qsl(query) if not p[0].startswith(LIBPQ_ONLY)])
    rest = f"{slash}{database}?{query}"
    return [f"postgresql://{user}{at}{host}{rest}" for host in hosts.split(",")]


async def connect(hosts: list[str], **options: Any) -> asyncpg.Connection:
    """Return a connection to the first host that will do.

    Each has its share of the time, or one that is silent would use up all of it.
    """
    for host in hosts.copy():
        try:
            timeout = settings.database_timeout / len(hosts)
            return await asyncpg.connect(host, timeout=timeout, **options)
        except (OSError, asyncpg.PostgresError, asyncpg.InternalClientError) as failure:
            error = failure
            hosts.remove(host)  # for all who connect: next time, begin with another
            hosts.append(host)
    raise error


if IS_SQLITE:
    engine_url = sa.make_url(DATABASE_URL).set(drivername="sqlite+aiosqlite")
    connect_args: dict[str, Any] = {
        "timeout": settings.database_timeout,
        "isolation_level": None,  # the driver begins nothing by itself
    }
else:
    engine_url = sa.make_url("postgresql+asyncpg://")
    connect_args = {
        "async_creator_fn": connect,
        "hosts": postgresql_urls(),
        "command_timeout": settings.database_timeout,
        "statement_cache_size": settings.database_statement_cache_size,
        "prepared_statement_cache_size": settings.database_statement_cache_size,
    }


def make_engine(**options: Any) -> AsyncEngine:
    """Return an engine with a pool of connections; requests wait for one in line."""
    defaults = {
        "echo": settings.debug,
        "hide_parameters": True,  # in the log and in errors
        "connect_args": connect_args,
        "poolclass": sa.AsyncAdaptedQueuePool,
        "pool_size": settings.database_pool_size,
        "max_overflow": 0,
        "pool_timeout": settings.database_timeout,
    }
    return create_async_engine(engine_url, **defaults | options)


# For lone statements, each a transaction of its own: BEGIN, COMMIT and ROLLBACK around
# it would be round trips for nothing.
autocommit = make_engine(isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)

if IS_SQLITE:
    # SQLite has one writer at a time. Here transactions wait in line for a connection;
    # the file's lock, where who waits longest may lose, is for other processes.
    engine = make_engine(pool_size=1)
    if engine_url.database in (None, "", ":memory:"):  # it is its one connection
        autocommit = engine

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        if connection.connection.driver_connection.in_transaction:
            connection.exec_driver_sql("ROLLBACK")  # what a failed COMMIT left
        # A deferred BEGIN fails at once, without waiting, if it reads before it writes.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    @sa.event.listens_for(engine.sync_engine, "connect")
    @sa.event.listens_for(autocommit.sync_engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL").close()
        connection.execute("PRAGMA foreign_keys = ON").close()  # off by default

else:
    engine = autocommit.execution_options(isolation_level="READ COMMITTED")  # one pool

    @sa.event.listens_for(autocommit.sync_engine, "checkout")
    def replace_closed(connection: Any, *_: object) -> None:
        # asyncpg noticed if the server hung up: to ask it first costs a round trip.
        if connection.driver_connection.is_closed():
            raise DisconnectionError

    @sa.event.listens_for(autocommit.sync_engine, "handle_error")
    def drop_silent(context: Any) -> None:
        # A server that did not answer in time may be silent for good: on to another.
        if isinstance(context.original_exception, TimeoutError):
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
            # at once: to close it in order would be to wait for an answer again
            context.connection.connection.driver_connection.terminate()


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


# SQLSTATE classes and SQLite errors that pass: no connection, no room, shut down, lock,
# a conflict of transactions, a standby that only reads.
SQLITE_OUTAGES = ("SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_FULL")
OUTAGES = ("08", "25006", "40", "53", "55P03", "57", *SQLITE_OUTAGES)


def is_outage(error: Exception) -> bool:
    """Tell a database that cannot serve just now from a mistake of ours."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError | sa.exc.TimeoutError)  # Python's is OSError
    code = getattr(error.orig, "sqlstate", getattr(error.orig, "sqlite_errorname", ""))
    connecting = error.statement is None
    return connecting or error.connection_invalidated or str(code).startswith(OUTAGES)


# --- Passwords and tokens: slow hashes in threads, short-lived proofs, one-time secrets

EMAIL = TypeAdapter(Email)
ATTEMPT_WINDOW = timedelta(minutes=15)
REFRESH_LIFETIME = timedelta(days=settings.refresh_token_expire_days)
# bcrypt is made to take long: more threads than cores would only slow the rest down.
hashing = anyio.CapacityLimiter(os.cpu_count() or 1)
HASHING_PATIENCE = 15  # seconds to wait in line for a core, then 503
# A pair is what guesses are counted by: a digest of email and address, or of a user.
pairs_in_turn: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()
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
                lock = pairs_in_turn.setdefault(pair, anyio.Lock())
                await turn.enter_async_context(lock)
            await turn.enter_async_context(hashing)
        yield


async def hash_password(password: str) -> str:
    """Return the bcrypt hash of a password of at most 72 bytes."""
    salt = bcrypt.gensalt(settings.bcrypt_rounds)
    async with hashing_turn():
        hashed = await anyio.to_thread.run_sync(bcrypt.hashpw, password.encode(), salt)
    return hashed.decode()


class OAuth2Error(HTTPException):
    """An error with the code that OAuth2 clients know it by (RFC 6749, section 5.2)."""

    def __init__(self, code: str, *args: Any) -> None:
        super().__init__(*args)
        self.code = code


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return sha256(text.encode()).hexdigest()


async def count_attempt(session: AsyncSession, pair: str) -> None:
    """Store an attempt; raise 429 if too many of the pair have failed of late.

    And delete some of what is too old to count: nothing piles up.
    """
    now, made, expires = utc_now(), col(LoginAttempt.created_at), col(Login.expires_at)
    since = now - ATTEMPT_WINDOW
    # A little at each login, never waiting for a lock.
    for model, past in ((LoginAttempt, made < since), (Login, expires < now)):
        old = select(model.id).where(past).limit(100).with_for_update(skip_locked=True)
        await session.exec(delete(model).where(col(model.id).in_(old)))
    if settings.max_failed_logins == 0:
        return
    await take_turns(await session.connection(), int(pair[:15], 16))  # 60 bits
    attempts = select(made).where(LoginAttempt.pair_hash == pair, made > since)
    newest = attempts.order_by(made.desc()).limit(settings.max_failed_logins)
    failed = (await session.exec(newest)).all()
    if len(failed) == settings.max_failed_logins:
        headers = {"Retry-After": str(int((failed[-1] - since).total_seconds()) + 1)}
        detail = "Too many failed logins, try again later"
        raise OAuth2Error("invalid_grant", 429, detail, headers)
    session.add(LoginAttempt(pair_hash=pair))


async def check_password(
    session: AsyncSession, pair: str, password: str, hashed: str | None
) -> bool:
    """Tell whether a password is the hash's, in the same time if there is none.

    `pair`: the digest of what attempts are counted by, of the email and the client's
    address for logins; too many raise 429. The session must be outside a transaction,
    and is inside one afterwards if the password is right.
    """
    guess, known = password.encode(), (hashed or NO_HASH).encode()
    async with hashing_turn(pair):
        await count_attempt(session, pair)
        # Counted before it is hashed, so that a burst gets no more guesses than the
        # limit, and committed: no connection is held while it is hashed.
        await session.commit()
        right = await anyio.to_thread.run_sync(bcrypt.checkpw, guess[:72], known)
    # bcrypt reads 72 bytes: a longer guess is wrong, however it begins.
    if not right or hashed is None or len(guess) > 72:
        return False
    await session.exec(delete(LoginAttempt).where(col(LoginAttempt.pair_hash) == pair))
    return True


def make_token(login_id: int, user_id: int, refresh_token: str) -> Token:
    """Return the token endpoint's answer for a login (RFC 6749, section 5.1)."""
    now, lifetime = int(time.time()), settings.access_token_expire_minutes * 60
    claims = {"sub": str(user_id), "sid": str(login_id)}
    times = {"iat": now, "exp": now + lifetime}
    access = jwt.encode(claims | times, SECRET_KEY, "HS256")
    return Token(access_token=access, expires_in=lifetime, refresh_token=refresh_token)


def read_access_token(token: str, *, expired: bool = False) -> AccessToken | None:
    """Return a token's claims; None if it is forged, expired or of another kind.

    `expired`: accept it after its time too, to revoke the login behind it.
    """
    options: Any = {
        "require": ["sub", "iat", "exp", "sid"],
        "verify_iat": False,  # the clock of the host that issued it may be ahead
        "verify_exp": not expired,
    }
    try:
        claims = jwt.decode(token, SECRET_KEY, ["HS256"], options)
        return AccessToken.model_validate(claims)
    except (jwt.InvalidTokenError, ValueError):
        return None


# --- Who is calling: every statement starts from the login behind the access token


def unauthorized() -> HTTPException:
    """Return the error for every token that does not count (RFC 6750)."""
    headers = {"WWW-Authenticate": "Bearer"}
    return HTTPException(401, "Log in: no valid access token was sent", headers)


AUTH_PATH = f"{settings.api_v1_prefix}/auth"
TOKEN_URL = f"{AUTH_PATH}/token".removeprefix("/")  # relative: right under a root path
oauth2 = OAuth2PasswordBearer(TOKEN_URL, refreshUrl=TOKEN_URL)


async def get_access_token(token: Annotated[str, Depends(oauth2)]) -> AccessToken:
    """Return the verified claims of the request's bearer token, else raise 401."""
    if claims := read_access_token(token):
        return claims
    raise unauthorized()


# The signature is right; whether the login still exists is for `fetch` to find out.
TokenDep = Annotated[AccessToken, Depends(get_access_token)]


def by_login[S: sa.Select[*tuple[Any, ...]]](statement: S) -> S:
    """Make a statement start from the caller's live login and active user.

    Then it finds a row if, and only if, there is such a caller: 401 or an answer is
    decided by the same query. Outer-join what the caller may see.
    """
    joined = statement.select_from(Login).join(User, col(User.id) == Login.user_id)
    claims = (col(Login.id) == bindparam("sid")) & (col(User.id) == bindparam("sub"))
    return joined.where(claims, col(User.is_active), col(Login.expires_at) > func.now())


type Rows = Sequence[sa.Row[Any]]


async def fetch(statement: sa.Executable, token: AccessToken, **values: Any) -> Rows:
    """Run one statement made with `by_login`, alone, and return its rows; none: 401.

    No session, whose objects are made to be changed, and one greenlet to connect,
    execute and fetch: it halves the cost of a short query.
    """

    def run() -> Rows:
        with autocommit.sync_engine.connect() as connection:
            rows = connection.execute(statement, params).all()
            if not statement.is_select:
                connection.commit()  # where the engine is not autocommit: in memory
            return rows

    params = {"sid": token.sid, "sub": token.sub, **values}
    try:
        rows = await greenlet_spawn(run)
    except DBAPIError as error:
        if not (error.connection_invalidated and statement.is_select):
            raise
        rows = await greenlet_spawn(run)  # the server had just hung up: nothing is done
    if not rows:
        raise unauthorized()
    return rows


async def fetch_one(statement: sa.Executable, token: AccessToken, **values: Any) -> Any:
    """Return the one row of a statement; what the caller may not see is not there."""
    [row] = await fetch(statement, token, **values)
    if row.id is None:
        raise HTTPException(404, "Not found")
    return row


async def load[T](
    session: AsyncSession, query: SelectOfScalar[T], token: AccessToken, **values: Any
) -> T:
    """Return what a query by `row_by_id` finds, as an object for the session to change.

    It raises 401 and 404 as `fetch_one` does.
    """
    params = {"sid": token.sid, "sub": token.sub, **values}
    found = (await session.exec(query, params=params)).all()
    if not found:
        raise unauthorized()
    if found[0] is None:
        raise HTTPException(404, "Not found")
    return found[0]


# Statements are built once: to build one costs a fifth of running it.


def row_by_id[T](model: type[T], owner: str) -> SelectOfScalar[T]:
    """Return the statement for a row by `id`: the caller's, or any for a superuser.

    `owner`: the column that has the id of the user whose row it is.
    """
    row: Any = aliased(model)
    visible = (getattr(row, owner) == User.id) | col(User.is_superuser)
    return by_login(select(row)).outerjoin(row, (row.id == bindparam("id")) & visible)


def page_of(model: Any, *conditions: Any) -> sa.Select[*tuple[Any, ...]]:
    """Return the statement for a page of the rows that meet some conditions.

    They stand inside, so that rows which the caller may not see are never read. One row
    more than the page holds tells whether there is a next page.
    """
    skip, limit = (bindparam(name, type_=sa.BigInteger) for name in ("skip", "limit"))
    page = select(model).where(*conditions, model.id > bindparam("after"))
    page = page.order_by(model.id).offset(skip).limit(limit + 1)
    row: Any = aliased(model, page.subquery())
    sees_all: Any = col(User.is_superuser).label("sees_all")
    return by_login(sa.select(row, sees_all)).outerjoin(row, sa.true()).order_by(row.id)


READ_ME = by_login(select(User))
READ_USER, READ_ITEM = row_by_id(User, "id"), row_by_id(Item, "owner_id")
CALLER = bindparam("sub", type_=sa.BigInteger)
OWNER = func.coalesce(bindparam("owner_id", type_=sa.BigInteger), CALLER)
RIGHT = select(User.is_superuser).where(User.id == CALLER).correlate(None)
IS_SUPERUSER = RIGHT.scalar_subquery()
# An index on (owner_id, id) serves the owner's page, the primary key that of all.
OWNED_ITEMS = page_of(Item, Item.owner_id == OWNER, (OWNER == CALLER) | IS_SUPERUSER)
ALL_ITEMS, ALL_USERS = page_of(Item, IS_SUPERUSER), page_of(User, IS_SUPERUSER)
ITEM_FIELDS = ["title", "description", "owner_id"]
NEW_ITEM: Any = sa.select(bindparam("title"), bindparam("description"), col(User.id))
CREATE_ITEM = insert(Item).from_select(ITEM_FIELDS, by_login(NEW_ITEM)).returning(Item)


PageDep = Annotated[Page, Query()]


def one_page(rows: Rows, page: Page, request: Request, response: Response) -> Rows:
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

MIGRATIONS = 7_265_617  # their lock's key: any number that nothing else uses


@asynccontextmanager
async def migration_connection() -> AsyncGenerator[AsyncConnection]:
    """Yield a transaction to migrate in: one at a time, however many workers start."""
    unlimited = connect_args | {"command_timeout": None}
    alone = {"connect_args": unlimited, "poolclass": sa.NullPool}
    patient = engine if IS_SQLITE else create_async_engine(engine_url, **alone)
    async with patient.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        try:
            if IS_SQLITE:  # to alter a table drops its old copy: that must not cascade
                await driver.execute("PRAGMA foreign_keys = OFF")
            async with connection.begin():
                await take_turns(connection, MIGRATIONS)
                yield connection
        finally:
            if IS_SQLITE:
                await driver.execute("PRAGMA foreign_keys = ON")


async def schema_is_current() -> bool:
    """Tell whether the database has seen every migration; False if in doubt.

    Without Alembic: to import it takes as long as to import FastAPI.
    """
    text = "\n".join(f.read_text() for f in HERE.glob("migrations/versions/*.py"))
    made = set(re.findall(r'^revision\b.* = "(\w+)"', text, re.M))
    followed = set(re.findall(r'^down_revision\b.* = "(\w+)"', text, re.M))
    with suppress(DBAPIError):
        async with autocommit.connect() as connection:
            query = sa.text("SELECT version_num FROM alembic_version")
            return set(await connection.scalars(query)) == made - followed
    return False


def upgrade(connection: sa.Connection) -> None:
    """Run the migrations that the database has not seen."""
    from alembic import command, config, util

    options = config.Config(HERE / "alembic.ini", attributes={"connection": connection})
    try:
        command.upgrade(options, "head")
    except util.CommandError as error:  # such as a schema newer than the code
        stop(f"The migrations: {error}")


async def create_first_superuser() -> None:
    """Make the superuser that the settings name, unless a user has that email."""
    email, password = settings.first_superuser_email, settings.first_superuser_password
    if email is None or password is None:
        return
    async with AsyncSession(autocommit) as session:
        query = select(User.is_superuser).where(User.email == email)
        is_superuser = (await session.exec(query)).first()
    if is_superuser is False:
        log.warning("FIRST_SUPERUSER_EMAIL is a user's who is no superuser")
    if is_superuser is not None:
        return
    hashed = await hash_password(password)
    with suppress(IntegrityError):  # another worker was faster
        async with AsyncSession(engine) as session:
            session.add(User(email=email, hashed_password=hashed, is_superuser=True))
            await session.commit()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Wait for the database, bring its schema up to date, make the first superuser."""
    give_up = time.monotonic() + settings.database_startup_timeout
    try:
        while True:
            try:
                if settings.migrate_on_startup and not await schema_is_current():
                    async with migration_connection() as connection:
                        await connection.run_sync(upgrade)
                await create_first_superuser()
                break
            except (DBAPIError, OSError, ValueError) as error:
                cause = getattr(error, "driver_exception", None) or error
                # A URL's may show its password; a certificate's is an OSError, too.
                if isinstance(cause, ValueError) and not isinstance(cause, OSError):
                    stop("DATABASE_URL is not valid. Is the password percent-encoded?")
                reason = " ".join(str(cause).split()) or type(cause).__name__
                if not is_outage(error) or time.monotonic() > give_up:
                    stop(f"The database, see DATABASE_URL: {reason}")
                log.warning("Trying again: the database, see DATABASE_URL: %s", reason)
            await anyio.sleep(1)
        yield
    finally:
        with anyio.move_on_after(2):  # seconds: a frozen database says no goodbye
            await engine.dispose()
            await autocommit.dispose()


app = FastAPI(
    title=settings.app_name,
    version="1.0.0",
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


def problems(*codes: int, model: type = Problem) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of the errors of a route."""
    return {code: {"model": model} for code in codes}


# Starlette's own answer, before the body is read, is text.
TOO_LARGE: Any = {413: {"model": Problem, "content": {"text/plain": {}}}}
LINK: Any = {200: {"headers": {"Link": {"schema": {"type": "string"}}}}}

# A router is included as it is made: FastAPI finds the routes that it gets later.
api = APIRouter(
    prefix=settings.api_v1_prefix,
    max_body_size=settings.max_body_size,
    responses=problems(503) | TOO_LARGE,
)
app.include_router(api)


def is_oauth2(request: Request) -> bool:
    """Tell whether the client expects errors in the form of OAuth2."""
    return request.url.path.endswith((f"{AUTH_PATH}/token", f"{AUTH_PATH}/revoke"))


@app.exception_handler(StarletteHTTPException)
async def refused(request: Request, error: StarletteHTTPException) -> Response:
    """Answer an HTTPException, of a route or of FastAPI itself, such as 404 and 405."""
    content, headers = {"detail": error.detail}, dict(error.headers or {})
    if error.status_code == 405:  # each route knows its own methods only (RFC 9110)
        routes = iter_route_contexts(app.routes)
        matching = (r for r in routes if r.matches(request.scope)[0] is not Match.NONE)
        methods = {method for route in matching for method in route.methods or ()}
        headers["Allow"] = ", ".join(sorted(methods))
    if is_oauth2(request):  # RFC 6749, section 5.2
        code = getattr(error, "code", "invalid_request")
        content |= {"error": code, "error_description": error.detail}
        headers["Cache-Control"] = "no-store"
    return JSONResponse(content, error.status_code, headers)


@app.exception_handler(RequestValidationError)
async def invalid(request: Request, error: RequestValidationError) -> Response:
    """Say what is wrong with the input, without repeating it: it may be a password."""
    if is_oauth2(request):
        first = error.errors()[0]
        unknown = first["type"] == "union_tag_invalid" and first["ctx"]["tag"]
        code = "unsupported_grant_type" if unknown else "invalid_request"
        name = "grant_type" if first["loc"] == ("body",) else first["loc"][-1]
        detail = f"{name} is {'not known' if unknown else 'missing or not valid'}"
        return await refused(request, OAuth2Error(code, 400, detail))
    errors: list[dict[str, Any]] = []
    for e in error.errors():
        # The name of an unknown field, too, is what was sent.
        loc = e["loc"][:-1] if e["type"] == "extra_forbidden" else e["loc"]
        kept = {"type": e["type"], "loc": loc, "msg": e["msg"]}
        if kept not in errors:  # a thousand unknown fields are one mistake
            errors.append(kept)
    return await refused(request, HTTPException(422, errors))


@app.exception_handler(IntegrityError)
@app.exception_handler(StaleDataError)
async def clash(request: Request, error: IntegrityError | StaleDataError) -> Response:
    """Answer what the database refused: no SELECT beforehand can know, in a race."""
    if isinstance(error, StaleDataError):  # the row was deleted meanwhile
        return await refused(request, HTTPException(404, "Not found"))
    if "foreign key" in str(error.orig).lower():  # the caller was
        return await refused(request, unauthorized())
    taken = re.search("users[._]email", str(error.orig))  # the constraint or column
    detail = "Email already registered" if taken else "It conflicts with what is stored"
    return await refused(request, HTTPException(400, detail))


async def failed(request: Request, error: Exception) -> Response:
    """Answer for a database that is away or overloaded, and for mistakes of ours."""
    if is_outage(error):
        log.warning("Answered 503 for %s", type(error).__name__)
        reason, wait = "The service is busy, try again", {"Retry-After": "1"}
        busy = OAuth2Error("temporarily_unavailable", 503, reason, wait)
        return await refused(request, busy)
    log.exception("Unforeseen error at %s %s", request.method, request.url.path)
    mistake = OAuth2Error("server_error", 500, "Internal server error")
    return await refused(request, mistake)


# FastAPI's own handler of Exception raises it again, and the server then closes the
# connection, losing the client's next request.
app.add_middleware(ExceptionMiddleware, handlers={Exception: failed})
app.add_middleware(
    CORSMiddleware,
    allow_origins=ORIGINS,
    allow_credentials="*" not in ORIGINS,
    allow_methods=["*"],
    allow_headers=["*"],
    expose_headers=["Link", "Retry-After"],
)


# --- Routes: auth

OAUTH2_PROBLEMS = problems(400, 503, model=OAuth2Problem)
auth = APIRouter(prefix="/auth", tags=["auth"], responses=OAUTH2_PROBLEMS)
api.include_router(auth)


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
    return await log_in(session, grant, client)


async def log_in(session: AsyncSession, grant: PasswordGrant, client: str) -> Token:
    """Return the tokens of a new login, or raise `invalid_grant`."""
    wrong = OAuth2Error("invalid_grant", 400, "Wrong email or password")
    email = grant.username  # if it is none, nobody's, and answered in the same time
    with suppress(ValidationError):
        email = EMAIL.validate_python(email)
    user = (await session.exec(select(User).where(User.email == email))).first()
    await session.commit()  # no transaction while a password is hashed
    known = user.hashed_password if user else None
    pair = digest(f"login {email} {client}")
    right = await check_password(session, pair, grant.password, known)
    if not (user and right):
        raise wrong
    # Locked until the login is stored: a password change meanwhile would miss it.
    unchanged = select(User).where(User.id == user.id, User.hashed_password == known)
    locked = unchanged.where(col(User.is_active)).with_for_update(read=True)
    if not (await session.exec(locked)).first():
        raise wrong
    family, secret = token_urlsafe(16), token_urlsafe(32)
    login = Login(
        user_id=user.id,
        family_hash=digest(family),
        secret_hash=digest(secret),
        expires_at=utc_now() + REFRESH_LIFETIME,
    )
    session.add(login)
    await session.flush()
    return make_token(login.id, user.id, f"{family}.{secret}")


async def renew(session: AsyncSession, refresh_token: str) -> Token:
    """Return new tokens for a login, or raise `invalid_grant`, having ended it."""
    family, _, shown = refresh_token.partition(".")
    secret, now = token_urlsafe(32), utc_now()
    # One statement decides: of several uses at once, one finds the secret unspent.
    rotated = await session.exec(
        update(Login)
        .where(
            col(Login.family_hash) == digest(family),
            col(Login.secret_hash) == digest(shown),
            col(Login.expires_at) > now,
            col(Login.user_id).in_(select(User.id).where(User.is_active)),
        )
        .values(secret_hash=digest(secret), expires_at=now + REFRESH_LIFETIME)
        .returning(col(Login.id), col(Login.user_id))
    )
    if row := rotated.first():
        return make_token(row[0], row[1], f"{family}.{secret}")
    await session.exec(delete(Login).where(col(Login.family_hash) == digest(family)))
    await session.commit()  # the error below would undo it
    detail = "Log in again: the refresh token is not valid"
    raise OAuth2Error("invalid_grant", 400, detail)


@auth.post("/revoke", response_class=Response)
async def revoke_token(
    token: Annotated[Filled, Form(examples=["mdfW.2fwu"])], session: SessionDep
) -> Response:
    """Log out: end the login behind an access or refresh token (RFC 7009).

    Unknown tokens are answered alike; expired and spent ones end their login too.
    """
    claims = read_access_token(token, expired=True)
    is_sid = col(Login.id) == (claims.sid if claims else None)
    is_family = col(Login.family_hash) == digest(token.partition(".")[0])
    await session.exec(delete(Login).where(is_sid | is_family))
    return Response(headers={"Cache-Control": "no-store"})


# --- Routes: users

users = APIRouter(prefix="/users", tags=["users"])
api.include_router(users)
UserId = Id | Literal["me"]


@users.post("", response_model=UserPublic, status_code=201, responses=problems(400))
async def create_user(body: UserCreate, session: SessionDep) -> User:
    """Register. The email is kept in lower case; one email, one user."""
    hashed = {"hashed_password": await hash_password(body.password)}
    user = User.model_validate(body, update=hashed)
    session.add(user)
    await session.flush()  # a taken email shows here, even in a race
    return user


@users.get("", response_model=list[UserPublic], responses=problems(401, 403) | LINK)
async def list_users(
    token: TokenDep, page: PageDep, request: Request, response: Response
) -> Any:
    """List all users, page by page; for superusers."""
    rows = await fetch(ALL_USERS, token, **page.model_dump())
    if not rows[0].sees_all:
        raise HTTPException(403, "Only a superuser may list users")
    return one_page(rows, page, request, response)


@users.get("/{user_id}", response_model=UserPublic, responses=problems(401, 404))
async def read_user(user_id: UserId, token: TokenDep) -> Any:
    """Return a user: oneself, as `me` or by id, or anybody for a superuser."""
    if user_id == "me":
        return await fetch_one(READ_ME, token)
    return await fetch_one(READ_USER, token, id=user_id)


@users.patch(
    "/{user_id}", response_model=UserPublic, responses=problems(400, 401, 403, 404, 429)
)
async def update_user(
    user_id: UserId, changes: UserUpdate, token: TokenDep, session: SessionDep
) -> User:
    """Change what is sent of a user: of oneself, or of anybody for a superuser.

    To change one's own email or password takes `current_password`. A new password
    ends the user's logins, but for the one that made this call.
    """
    id_ = token.sub if user_id == "me" else user_id
    own = id_ == token.sub
    sent = changes.model_dump(exclude_unset=True)
    guess, password = sent.pop("current_password", None), sent.pop("password", None)
    old = await fetch_one(READ_USER, token, id=id_)
    if own and {"is_active", "is_superuser"} & sent.keys():
        raise HTTPException(403, "You cannot change your own is_active or is_superuser")
    needs_proof = own and (password or sent.get("email", old.email) != old.email)
    wrong = HTTPException(403, "current_password is missing or wrong")
    if needs_proof:
        pair, known = digest(f"password of {id_}"), old.hashed_password
        if not guess or not await check_password(session, pair, guess, known):
            raise wrong
        await session.commit()
    if password:
        sent["hashed_password"] = await hash_password(password)
    # Only now the transaction: none is open while a password is hashed. That took its
    # time, so that who is calling, and what they may, is asked again.
    user = await lock_user(session, token, id_)
    if needs_proof and user.hashed_password != old.hashed_password:
        raise wrong
    user.sqlmodel_update(sent)
    await session.flush()
    if password or not user.is_active:  # after the row is locked: see `log_in`
        ended = delete(Login).where(col(Login.user_id) == id_)
        await session.exec(ended.where(col(Login.id) != token.sid))
    return user


@users.delete("/{user_id}", status_code=204, responses=problems(401, 403, 404))
async def delete_user(user_id: UserId, token: TokenDep, session: SessionDep) -> None:
    """Delete a user with all items and logins: oneself, or anybody for a superuser.

    Superusers cannot delete themselves.
    """
    id_ = token.sub if user_id == "me" else user_id
    await fetch_one(READ_USER, token, id=id_)  # before a lock that others wait for
    user = await lock_user(session, token, id_)
    if user.id == token.sub and user.is_superuser:
        raise HTTPException(403, "A superuser cannot delete themself")
    await session.delete(user)  # the database deletes what is theirs


async def lock_user(session: AsyncSession, token: AccessToken, id_: int) -> User:
    """Return a user to change, locked with the caller: no two demote each other."""
    both = select(User.id).where(col(User.id).in_((token.sub, id_)))
    await session.exec(both.order_by(col(User.id)).with_for_update(key_share=True))
    return await load(session, READ_USER, token, id=id_)


# --- Routes: items

items = APIRouter(prefix="/items", tags=["items"], responses=problems(401))
api.include_router(items)


@items.post("", response_model=ItemPublic, status_code=201, responses=problems(400))
async def create_item(body: ItemCreate, token: TokenDep) -> Any:
    """Make an item of one's own."""
    return await fetch_one(CREATE_ITEM, token, **body.model_dump())


@items.get("", response_model=list[ItemPublic], responses=LINK)
async def list_items(
    token: TokenDep,
    page: PageDep,
    request: Request,
    response: Response,
    owner_id: Id | None = None,
) -> Any:
    """List one's own items, page by page; a superuser sees all, or one owner's."""
    values = page.model_dump()
    rows = await fetch(OWNED_ITEMS, token, **values, owner_id=owner_id)
    if rows[0].sees_all and owner_id is None:
        rows = await fetch(ALL_ITEMS, token, **values)
    return one_page(rows, page, request, response)


@items.get("/{item_id}", response_model=ItemPublic, responses=problems(404))
async def read_item(item_id: Id, token: TokenDep) -> Any:
    """Return an item of one's own; any for a superuser."""
    return await fetch_one(READ_ITEM, token, id=item_id)


@items.patch("/{item_id}", response_model=ItemPublic, responses=problems(400, 404))
async def update_item(
    item_id: Id, changes: ItemUpdate, token: TokenDep, session: SessionDep
) -> Item:
    """Change what is sent of an item of one's own; of any for a superuser."""
    item = await load(session, READ_ITEM, token, id=item_id)
    item.sqlmodel_update(changes.model_dump(exclude_unset=True))
    await session.flush()
    return item


@items.delete("/{item_id}", status_code=204, responses=problems(404))
async def delete_item(item_id: Id, token: TokenDep, session: SessionDep) -> None:
    """Delete an item of one's own; any for a superuser."""
    item = await load(session, READ_ITEM, token, id=item_id)
    deleted = await session.exec(delete(Item).where(col(Item.id) == item.id))
    if not deleted.rowcount:  # another request was faster
        raise HTTPException(404, "Not found")


# --- Routes: health, at the root and without a login


@app.get("/health", tags=["health"])
async def read_health() -> dict[str, str]:
    """Tell that the process is up; asks no database."""
    return {"status": "healthy"}


@app.get("/ready", tags=["health"], responses=problems(503))
async def read_readiness() -> dict[str, str]:
    """Tell that the database answers; 503 while it does not."""
    async with autocommit.connect() as connection:
        await connection.execute(select(1))
    return {"status": "ready"}
