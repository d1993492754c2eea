"""A complete backend to read in a sitting: users, items and logins.

FastAPI and SQLModel, on SQLite or PostgreSQL. Start it, then open /docs:

    uv run fastapi dev app.py

Read on from top to bottom: settings, database, passwords and tokens, who is calling,
the application, the routes. What is stored is in models.py, how the schema changes in
migrations/.
"""

import ipaddress
import logging
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any, Literal, NoReturn, Self
from urllib.parse import parse_qsl, unquote, urlencode
from weakref import WeakValueDictionary

import anyio
import asyncpg
import bcrypt
import jwt
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from fastapi.security import OAuth2PasswordBearer
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import aliased
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlmodel import SQLModel, bindparam, col, delete, func, insert, or_, select, update
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from models import (
    AccessToken,
    Email,
    Id,
    Item,
    ItemCreate,
    ItemPublic,
    ItemUpdate,
    Login,
    LoginAttempt,
    NonEmpty,
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
    digest,
    utc_now,
)

log = logging.getLogger("uvicorn.error")  # the server's own log: shown wherever it runs
HERE = Path(__file__).parent


# --- Settings: from the environment (upper case) or .env, checked once, at the start


def stop(problem: str) -> NoReturn:
    """End the start with one message instead of a page of traceback."""
    sys.tracebacklimit = 0
    log.critical("Cannot start. %s", problem)
    raise SystemExit(3) from None  # tells uvicorn that another try is of no use


DATABASE_URLS = r"sqlite(\+\w+)?://(/(?!.*%00)[^?]*)?$|postgres(ql)?(\+\w+)?://"
DEVELOPMENT_KEY = "a key that everybody knows: for development only"
# `fastapi dev` sets the variable. Under any other command it does not count.
IS_DEVELOPMENT = os.getenv("FASTAPI_ENV") == "development" and "dev" in sys.argv[1:2]
# As browsers send them: lower case, no path, no port that is the scheme's default
HOST = r"([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:[1-9]\d{0,4})?"
ORIGIN = rf"\*|(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://{HOST}"


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
    secret_key: str = Field(default=DEVELOPMENT_KEY, repr=False)
    database_url: str = Field(default="sqlite:///app.db", repr=False)
    database_pool_size: int = Field(default=10, ge=1)  # connections a worker
    database_timeout: float = Field(default=5, gt=0)  # seconds
    database_startup_timeout: float = Field(default=30, ge=0)  # seconds
    database_statement_cache_size: int = Field(default=100, ge=0)  # statements
    migrate_on_startup: bool = True
    access_token_expire_minutes: int = Field(default=30, ge=1, le=60 * 24 * 365)
    refresh_token_expire_days: int = Field(default=30, ge=1, le=3650)
    bcrypt_rounds: int = Field(default=12, ge=4, le=31)  # 1 more: twice the time
    max_failed_logins: int = Field(default=10, ge=0, le=1000)  # in 15 minutes; 0: off
    max_body_size: int = Field(default=2**18, ge=1)  # bytes
    cors_origins: str = "*"
    first_superuser_email: Email | None = None
    first_superuser_password: Password | None = Field(default=None, repr=False)

    @property
    def origins(self) -> list[str]:
        """The CORS_ORIGINS one by one; a slash behind one does no harm."""
        parts = self.cors_origins.split(",")
        return [part.strip().removesuffix("/") for part in parts]

    @model_validator(mode="after")
    def check(self) -> Self:
        """Refuse what would be unsafe, or could never work."""
        is_public = self.secret_key == DEVELOPMENT_KEY and not IS_DEVELOPMENT
        if is_public or len(os.fsencode(self.secret_key)) < 32:
            raise ValueError(
                "SECRET_KEY must have at least 32 bytes that nobody knows. Make one "
                "with: python -c 'import secrets; print(secrets.token_hex(32))'"
            )
        if not re.match(DATABASE_URLS, self.database_url):
            raise ValueError(
                "DATABASE_URL must look like sqlite:///file.db or "
                "postgresql://user@host/db"
            )
        if not all(re.fullmatch(ORIGIN, origin) for origin in self.origins):
            raise ValueError("CORS_ORIGINS: each must look like https://a.example:8000")
        if bool(self.first_superuser_email) != bool(self.first_superuser_password):
            raise ValueError(
                "FIRST_SUPERUSER_EMAIL and FIRST_SUPERUSER_PASSWORD need one another"
            )
        return self


try:
    settings = Settings()
except ValidationError as error:
    wrong = [[*(str(p).upper() for p in e["loc"]), e["msg"]] for e in error.errors()]
    stop("; ".join(": ".join(parts) for parts in wrong).replace("Value error, ", ""))
except UnicodeDecodeError:
    stop(f"{HERE / '.env'} is not UTF-8")
SECRET_KEY = os.fsencode(settings.secret_key)  # its bytes, whatever they are
if settings.secret_key == DEVELOPMENT_KEY:
    log.warning("SECRET_KEY is the development key, which everybody knows")


# --- Database: one transaction a request, or one round trip for a lone statement

# These log values: of statements, hashes of passwords among them, and of broken forms.
logging.getLogger("aiosqlite").setLevel(logging.INFO)
logging.getLogger("python_multipart").setLevel(logging.ERROR)


# asyncpg sends each word of a URL that it does not know to the server, as a setting.
# These, of libpq and of hosting services, are left out: it does well without.
LEFT_OUT = """
    channel_binding client_encoding connect_timeout fallback_application_name
    gssdelegation gssencmode keepalives keepalives_count keepalives_idle
    keepalives_interval load_balance_hosts max_protocol_version pgbouncer
    sslcompression sslkeylogfile sslsni supa tcp_user_timeout
"""
# These are refused: without them the connection would be less safe, or go elsewhere.
REFUSED = """
    gssencmode=require hostaddr load_balance_hosts=random min_protocol_version
    oauth_client_id oauth_client_secret oauth_issuer oauth_scope replication
    require_auth requirepeer requiressl scram_client_key scram_server_key service
    servicefile ssl= sslcertmode sslcrldir sslmode= sslsni=0
    target_session_attrs=prefer-standby
"""
TLS_FILES = ("sslcert", "sslcrl", "sslkey", "sslrootcert")
# How libpq's words are known to asyncpg; and how others write a `sslmode`
SAME = {"ssl": "sslmode", "dbname": "database"}
SSLMODES = {"true": "require", "no-verify": "require", "false": "disable"}
NOT_VALID = "DATABASE_URL is not valid: its port, or a password not percent-encoded"


def postgresql_hosts() -> list[dict[str, Any]]:
    """Return what asyncpg is told of each host that DATABASE_URL names.

    Raises ValueError where it cannot be read.
    """
    address, _, query = settings.database_url.replace("#", "%23").partition("?")
    login, _, place = address.partition("://")[2].rpartition("@")
    user, _, password = login.partition(":")
    place, _, database = place.partition("/")
    who = {"user": user, "password": password, "database": database}
    words = {name: unquote(value) for name, value in who.items()}
    words |= {"host": place, "port": ""}  # all of these may stand in the query, too
    query = query.strip("&").replace("+", "%2B")  # to libpq, "+" is no space
    given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    is_system = ("sslrootcert", "system") in given
    for name, value in given:
        # With the system's certificates, asyncpg reads no other words on TLS.
        ignored = is_system and name.startswith(("ssl_", "sslc", "sslk", "sslp"))
        if ignored or {name, f"{name}={value}"} & {*REFUSED.split()}:
            stop(f"DATABASE_URL asks for what the driver cannot do: {name}")
        if name in TLS_FILES and not (is_system or Path(value).is_file()):
            stop(f"DATABASE_URL: {name} is not the path of a file")
        known = SAME.get(name, name)
        words[known] = SSLMODES.get(value, value) if known == "sslmode" else value
    who = {name: words.pop(name) for name in who}
    places, ports = words.pop("host").split(","), words.pop("port").split(",")
    ports *= len(places) if len(ports) == 1 else 1  # one may be that of all
    rest = urlencode({name: words[name] for name in words.keys() - LEFT_OUT.split()})
    hosts = []
    for place, port in zip(places, ports, strict=True):
        [(host, own)] = re.findall(r"^(/.*|\[.*\]|[^:]*|.*:.*:.*)(?::(\d*))?$", place)
        at = {"host": unquote(host).strip("[]"), "port": port or own}
        told = {name: value for name, value in (who | at).items() if value}
        hosts.append({"dsn": f"postgresql://?{rest}", "ssl": is_system or None} | told)
    return hosts


async def connect(hosts: list[dict[str, Any]], **options: Any) -> asyncpg.Connection:
    """Return a connection to the first host that will do.

    Each has its share of the time, or one that is silent would use up all of it.
    """
    for host in hosts.copy():
        try:
            timeout = settings.database_timeout / len(hosts)
            return await asyncpg.connect(**host, timeout=timeout, **options)
        except (OSError, asyncpg.PostgresError, asyncpg.InternalClientError) as failure:
            error = failure
            hosts.sort(key=lambda other: other is host)  # next time, it is the last
        except (ArithmeticError, ValueError) as wrong:  # it may show the password
            named = isinstance(wrong, asyncpg.ClientConfigurationError)
            stop(f"DATABASE_URL: {wrong}" if named else NOT_VALID)
    raise error


IS_SQLITE = settings.database_url.startswith("sqlite")
if IS_SQLITE:
    engine_url = sa.make_url(settings.database_url).set(drivername="sqlite+aiosqlite")
    in_memory = engine_url.database in (None, "", ":memory:")
    if not in_memory:  # beside the app, wherever it is started from
        engine_url = engine_url.set(database=str(HERE / str(engine_url.database)))
    connect_args: dict[str, Any] = {
        "timeout": settings.database_timeout,
        "isolation_level": None,  # the driver begins nothing by itself
    }
else:
    engine_url = sa.make_url("postgresql+asyncpg://")
    try:
        hosts = postgresql_hosts()
    except ValueError:
        stop(NOT_VALID)
    connect_args = {
        "async_creator_fn": connect,
        "hosts": hosts,
        "command_timeout": settings.database_timeout,
        "statement_cache_size": settings.database_statement_cache_size,
        "prepared_statement_cache_size": settings.database_statement_cache_size,
    }

held: ContextVar[sa.PoolProxiedConnection | None] = ContextVar("held", default=None)


class OnePerRequest(sa.AsyncAdaptedQueuePool):
    """A pool that gives a request one connection at a time.

    Under load, requests that wait for a second one would all wait for each other.
    """

    def connect(self) -> sa.PoolProxiedConnection:
        if (other := held.get()) and other.is_valid:
            raise RuntimeError("This request has a connection: use or end its session")
        connection = super().connect()
        held.set(connection)
        return connection


pool: dict[str, Any] = {  # of connections; requests wait for one in line
    "echo": settings.debug,
    "hide_parameters": True,  # in the log and in errors
    "connect_args": connect_args,
    "poolclass": OnePerRequest,
    "pool_size": settings.database_pool_size,
    "max_overflow": 0,
    "pool_timeout": settings.database_timeout,
}
# For lone statements, each a transaction of its own: BEGIN, COMMIT and ROLLBACK around
# it would be round trips for nothing.
autocommit = create_async_engine(
    engine_url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True, **pool
)

if IS_SQLITE:
    # SQLite has one writer at a time. Transactions wait in line for this connection;
    # other processes wait for the file's lock, in no order.
    engine = migrating = create_async_engine(engine_url, **pool | {"pool_size": 1})
    if in_memory:  # the database is its one connection
        autocommit = engine

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        # A deferred BEGIN fails at once, without waiting, if it reads before it writes.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    @sa.event.listens_for(engine.sync_engine, "checkin")
    def end(connection: Any, _: object) -> None:
        # A COMMIT that fails leaves its transaction open, and the file locked.
        if connection and connection.driver_connection.in_transaction:
            connection.rollback()

    @sa.event.listens_for(engine.sync_engine, "connect")
    @sa.event.listens_for(autocommit.sync_engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL").close()
        connection.execute("PRAGMA foreign_keys = ON").close()  # off by default

else:
    engine = autocommit.execution_options(isolation_level="READ COMMITTED")  # one pool
    migrating = create_async_engine(  # a migration may take its time
        engine_url,
        poolclass=sa.NullPool,
        hide_parameters=True,
        connect_args=connect_args | {"command_timeout": None},
    )

    @sa.event.listens_for(autocommit.sync_engine, "checkout")
    def replace_closed(connection: Any, *_: object) -> None:
        # asyncpg noticed if the server hung up: to ask it first costs a round trip.
        if connection.driver_connection.is_closed():
            raise sa.exc.DisconnectionError


async def get_session() -> AsyncGenerator[AsyncSession]:
    """Yield the request's transaction: committed if the route returns, else undone."""
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session
        await session.commit()


reading = autocommit.execution_options()  # the same pool, for `get_reader`


@sa.event.listens_for(reading.sync_engine, "before_execute")
def refuse_changes(_: object, statement: Any, *__: object) -> None:
    if statement.is_dml:
        raise RuntimeError("A ReaderDep stores nothing: use SessionDep for changes")


async def get_reader() -> AsyncGenerator[AsyncSession]:
    """Yield a session that reads outside of any transaction; it refuses to flush."""
    async with AsyncSession(reading) as session:
        yield session
        await session.flush()  # changes are refused here, rather than lost


# For changes; not for a lone read, which `fetch` does at half the cost.
# "function": the commit comes before the answer, so that a 2xx means stored.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
# For reads of objects with their relations: waits for no writer. Not for changes.
ReaderDep = Annotated[AsyncSession, Depends(get_reader, scope="function")]


# What databases call an error: SQLSTATEs of PostgreSQL, or their beginnings, and names
# of SQLite. An outage passes: no connection, no room, a lock, a conflict of
# transactions, a shutdown, a standby, a failing disk.
OUTAGES: tuple[str, ...] = ("08", "25006", "40", "53", "55P03", "57", "58")
OUTAGES += ("SQLITE_BUSY", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_LOCKED")
# To wait for these at the start is in vain: a wrong password, no folder, no right.
HOPELESS = ("28", "SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_READONLY")
TAKEN = ("23505", "SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY")
DANGLING = ("23503", "23001", "SQLITE_CONSTRAINT_FOREIGNKEY")
UNFIT = ("22", "SQLITE_TOOBIG", "SQLITE_MISMATCH")  # NUL in a text, a huge number


def error_code(error: Exception) -> str:
    """Return the database's own code for an error, "" if it has none."""
    cause = getattr(error, "orig", None)
    return str(getattr(cause, "sqlstate", getattr(cause, "sqlite_errorname", "")) or "")


def is_outage(error: Exception) -> bool:
    """Tell a database that cannot serve just now from a mistake of ours."""
    if not isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, OSError | sa.exc.TimeoutError)  # Python's is OSError
    if isinstance(error, sa.exc.IntegrityError):
        return False
    lost = error.statement is None or error.connection_invalidated  # or never had
    # A migration changed a table meanwhile: the next time, the statement is read anew.
    stale = type(error.orig).__name__ == "InvalidCachedStatementError"
    return lost or stale or error_code(error).startswith(OUTAGES + HOPELESS)


def reason(error: Exception) -> str:
    """Return the first line of what an error says: PostgreSQL's next may show a row."""
    cause = getattr(error, "orig", None) or error
    return str(cause).partition("\n")[0] or type(cause).__name__


# --- Passwords and tokens: slow hashes in threads, short-lived proofs, one-time secrets

EMAIL = TypeAdapter(Email)
GUESS_WINDOW = timedelta(minutes=15)
REFRESH_LIFETIME = timedelta(days=settings.refresh_token_expire_days)
# bcrypt is made to take long: more threads than cores would only slow the rest down.
CORES = os.cpu_count() or 1
hashing = anyio.CapacityLimiter(CORES)
queues: WeakValueDictionary[str, anyio.CapacityLimiter] = WeakValueDictionary()
HASHING_PATIENCE = 15  # seconds for a hash and the wait for a core, then 503
# A hash that no password has, of the usual cost: an unknown email takes as long.
NO_HASH = f"$2b${settings.bcrypt_rounds:02}${'.' * 53}"


async def get_address(request: Request) -> str:
    """Return the client's address; of IPv6 the /64, which is usually one client's."""
    host = request.client.host if request.client else ""  # none on a Unix socket
    with suppress(ValueError):
        network = ipaddress.IPv6Network(f"{host}/64", strict=False)
        return str(ipaddress.IPv6Address(host).ipv4_mapped or network)
    return host


AddressDep = Annotated[str, Depends(get_address)]


async def hash_in_turn[T](address: str, function: Callable[..., T], *args: Any) -> T:
    """Run a function of bcrypt in a thread, once a core is free; return its result.

    An address gets all cores but one, so that its flood keeps nobody else waiting.
    Raises TimeoutError after HASHING_PATIENCE. Call it outside of transactions: those
    who wait would hold every connection.
    """
    queue = queues.setdefault(address, anyio.CapacityLimiter(max(1, CORES - 1)))
    with anyio.fail_after(HASHING_PATIENCE):
        async with queue:
            return await anyio.to_thread.run_sync(function, *args, limiter=hashing)


async def hash_password(password: str, address: str = "") -> str:
    """Return the bcrypt hash of a password of at most 72 bytes."""
    salt = bcrypt.gensalt(settings.bcrypt_rounds)
    hashed = await hash_in_turn(address, bcrypt.hashpw, password.encode(), salt)
    return hashed.decode()


class OAuth2Error(HTTPException):
    """An error with the code that OAuth2 clients know it by (RFC 6749, section 5.2)."""

    def __init__(self, code: str, *args: Any) -> None:
        super().__init__(*args)
        self.code = code


FAILURES = select(func.count(), func.min(LoginAttempt.created_at)).where(
    LoginAttempt.pair_hash == bindparam("pair"),
    col(LoginAttempt.created_at) > bindparam("since"),
)


async def refuse_too_many(session: AsyncSession, pair: str) -> int:
    """Return how many guesses were wrong within the window; raise 429 if too many."""
    since = utc_now() - GUESS_WINDOW
    query = await session.exec(FAILURES, params={"pair": pair, "since": since})
    failed, first = query.one()
    if 0 < settings.max_failed_logins <= failed:
        wait = int((first - since).total_seconds()) + 1
        detail = "Too many failed logins, try again later"
        raise OAuth2Error("invalid_grant", 429, detail, {"Retry-After": str(wait)})
    return failed


async def check_password(
    session: AsyncSession, pair: str, address: str, password: str, hashed: str
) -> bool:
    """Tell whether a password fits a hash; for NO_HASH it takes as long, and is wrong.

    `pair`: the digest of what wrong guesses are counted by; too many raise 429. Call it
    outside of a transaction; after a right password, the session is in one.
    """
    guess = password.encode()
    await refuse_too_many(session, pair)
    await clean_up(session)  # before any lock that another login may wait for
    await session.commit()  # no connection is held while it is hashed
    right = await hash_in_turn(address, bcrypt.checkpw, guess[:72], hashed.encode())
    # Many may have been hashed at once. Now they are counted one after another. Beyond
    # the limit a right guess is refused like a wrong one, so that it tells nothing.
    if not IS_SQLITE:  # which has one transaction at a time anyway
        await session.exec(select(func.pg_advisory_xact_lock(int(pair[:15], 16))))
    failed = await refuse_too_many(session, pair)
    # bcrypt reads 72 bytes: a longer guess is wrong, however it begins.
    if right and len(guess) <= 72:
        mine = col(LoginAttempt.pair_hash) == pair
        await session.exec(delete(LoginAttempt).where(mine))
        return True
    session.add(LoginAttempt(pair_hash=pair))
    await session.commit()
    if failed + 1 == settings.max_failed_logins:
        log.warning("Too many wrong passwords: 429 for %s", GUESS_WINDOW)
    return False


async def clean_up(session: AsyncSession) -> None:
    """Delete some of what no longer counts: a little at each login, to be quick.

    What another login is deleting just now is left to it, not waited for.
    """
    now = utc_now()
    for model, past in (
        (LoginAttempt, col(LoginAttempt.created_at) < now - GUESS_WINDOW),
        (Login, col(Login.expires_at) < now),
    ):
        old = select(model.id).where(past).limit(100).with_for_update(skip_locked=True)
        await session.exec(delete(model).where(col(model.id).in_(old)))


def make_token(user_id: int, family: str, secret: str) -> Token:
    """Return the token endpoint's answer for a login (RFC 6749, section 5.1)."""
    now, lifetime = int(time.time()), settings.access_token_expire_minutes * 60
    claims = {"sub": str(user_id), "sid": family, "iat": now, "exp": now + lifetime}
    return Token(
        access_token=jwt.encode(claims, SECRET_KEY, "HS256"),
        expires_in=lifetime,
        refresh_token=f"{family}.{secret}",
    )


def read_access_token(token: str, *, expired: bool = False) -> AccessToken | None:
    """Return a token's claims; None if it is forged, expired or of another kind.

    `expired`: accept it after its time too, to revoke the login behind it.
    """
    options: Any = {"require": ["iat", "exp"], "verify_exp": not expired}
    options["verify_iat"] = False  # the clock of the host that issued it may be ahead
    try:
        claims = jwt.decode(token, SECRET_KEY, ["HS256"], options)
        return AccessToken.model_validate(claims)
    except (jwt.InvalidTokenError, ValueError):
        return None


# --- Who is calling: one condition in every query says who may see the row


def unauthorized() -> HTTPException:
    """Return the error for every token that does not count (RFC 6750)."""
    headers = {"WWW-Authenticate": "Bearer"}
    return HTTPException(401, "Log in: no valid access token was sent", headers)


AUTH_PATH = f"{settings.api_v1_prefix}/auth"
TOKEN_URL = f"{AUTH_PATH}/token".removeprefix("/")  # relative: right under a root path
oauth2 = OAuth2PasswordBearer(TOKEN_URL, refreshUrl=TOKEN_URL, auto_error=False)
BearerDep = Annotated[str | None, Depends(oauth2)]


async def get_token(request: Request, bearer: BearerDep) -> AccessToken:
    """Return the verified claims of the request's bearer token, else raise 401."""
    claims = read_access_token(bearer or "")
    if claims is None:
        raise unauthorized()
    request.state.token = claims
    return claims


async def get_optional_token(request: Request, bearer: BearerDep) -> AccessToken | None:
    """Return the claims of a live login; None if no token is sent; else raise 401."""
    if "Authorization" not in request.headers:
        return None
    token = await get_token(request, bearer)
    await fetch(CALLER, token)
    return token


# The signature is right; whether the login still exists is for the query to find out.
TokenDep = Annotated[AccessToken, Depends(get_token)]
# For what the public may see, too.
OptionalTokenDep = Annotated[AccessToken | None, Depends(get_optional_token)]

# The user whose login is alive, or no row. By aliases, to be a condition in queries for
# users or logins, too.
Caller = aliased(User, name="caller")
CallersLogin = aliased(Login, name="callers_login")
CALLER = select(Caller).where(
    Caller.id == bindparam("caller_sub"),
    col(Caller.is_active),
    CallersLogin.user_id == Caller.id,
    CallersLogin.family_hash == bindparam("caller_sid"),
    col(CallersLogin.expires_at) > func.now(),
)
CALLER_ID = CALLER.with_only_columns(col(Caller.id)).scalar_subquery()
IS_SUPERUSER = CALLER.where(col(Caller.is_superuser)).exists()  # like any right


def visible(owner_id: Any) -> sa.ColumnElement[bool]:
    """Return the SQL condition that the caller owns a row, or is a superuser.

    `owner_id`: the column with the owner's id. Combine the condition with `&` and `|`.
    It is false where nobody calls: without a token, or when the login has ended.
    """
    return or_(owner_id == CALLER_ID, IS_SUPERUSER)


def insert_own(table: type[SQLModel], body: type[SQLModel], owner_id: Any) -> Any:
    """Return the statement that stores a row of the caller's, and returns it.

    The fields of `body` are its parameters; the column `owner_id` gets the caller's id.
    Where nobody calls, it stores nothing.
    """
    columns = [getattr(table, name) for name in body.model_fields]
    values = [bindparam(column.key, type_=column.type) for column in columns]
    row = CALLER.with_only_columns(*values, col(Caller.id))
    return insert(table).from_select([*columns, owner_id], row).returning(table)


def callers_parameters(token: AccessToken | None) -> dict[str, Any]:
    """Return the values of CALLER's parameters; without a token it is nobody."""
    return {"caller_sub": token and token.sub, "caller_sid": token and token.sid}


type Rows = Sequence[sa.Row[Any]]


async def fetch(
    statement: sa.Executable, token: AccessToken | None, /, **values: Any
) -> Rows:
    """Run one statement as a transaction of its own and return its rows.

    `values` are for its parameters. Raises 401 if it finds nothing for a token whose
    login has ended. Without a session, and with one greenlet to connect, execute and
    fetch, it costs half as much.
    """

    def run() -> Rows:
        with autocommit.sync_engine.connect() as connection:
            rows = connection.execute(statement, values).all()
            if not rows and token and not connection.execute(CALLER, values).first():
                raise unauthorized()
            if not statement.is_select:
                connection.commit()  # where the engine is not autocommit: in memory
            return rows

    values |= callers_parameters(token)
    return await greenlet_spawn(run)


async def fetch_one(
    statement: sa.Executable, token: AccessToken | None, /, **values: Any
) -> Any:
    """Return the one row that `fetch` finds; what the caller may not see is 404."""
    rows = await fetch(statement, token, **values)
    if not rows:
        raise HTTPException(404, "Not found")
    return rows[0]


async def load[T: SQLModel](
    session: AsyncSession,
    statement: SelectOfScalar[T],
    token: AccessToken | None,
    /,
    **values: Any,
) -> T:
    """Return what a statement finds as an object of the session; raise 401 or 404.

    In a session for changes its row is locked: of two changes at once, one waits.
    """
    values |= callers_parameters(token)
    if session.bind is engine:
        row = statement.column_descriptions[0]["entity"]
        statement = statement.with_for_update(key_share=True, of=row)
    statement = statement.execution_options(populate_existing=True)
    found = (await session.exec(statement, params=values)).first()
    if found is None:
        if token and not (await session.exec(CALLER, params=values)).first():
            raise unauthorized()
        raise HTTPException(404, "Not found")
    return found


PageDep = Annotated[Page, Query()]


@lru_cache(maxsize=256)  # to build a statement costs half as much as to run it
def page_of(statement: sa.Select[Any], sort: str, *, first: bool) -> sa.Select[Any]:
    """Return a statement for a page of another's rows, and one row more.

    `sort`: a column's name, with `-` for descending; rows of equal values go by id.
    """
    columns = statement.selected_columns
    column, id_ = columns[sort.removeprefix("-")], columns["id"]
    if getattr(column, "nullable", False):
        raise RuntimeError(f"A page cannot be sorted by {column}, which may be NULL")
    keys = [column, id_] if column is not id_ else [id_]
    is_descending = sort.startswith("-")
    if not first:
        after = bindparam("after", type_=sa.BigInteger)
        start = statement.with_only_columns(column).where(id_ == after).correlate(None)
        values = [start.scalar_subquery(), after] if column is not id_ else [after]
        row, last = sa.tuple_(*keys), sa.tuple_(*values)
        statement = statement.where(row < last if is_descending else row > last)
    order = [key.desc() if is_descending else key for key in keys]
    skip, limit = (bindparam(name, type_=sa.BigInteger) for name in ("skip", "limit"))
    return statement.order_by(*order).offset(skip).limit(limit + 1)


async def fetch_page(
    statement: sa.Select[Any],
    token: AccessToken | None,
    page: Page,
    request: Request,
    response: Response,
    /,
    **values: Any,
) -> Rows:
    """Return a page of a statement's rows and set `Link` to the next one (RFC 8288)."""
    query = page_of(statement, page.sort, first=page.after is None)
    values |= {"skip": page.skip, "limit": page.limit, "after": page.after}
    rows = await fetch(query, token, **values)
    if not rows and page.after and page.sort not in ("id", "-id"):
        # Not the end, but a 404, if the row to start behind has gone.
        id_ = statement.selected_columns["id"]
        await fetch_one(statement.where(id_ == page.after), token, **values)
    if len(rows) > page.limit:
        rows = rows[: page.limit]
        url = request.url.remove_query_params("skip")
        url = url.include_query_params(after=rows[-1].id)
        response.headers["Link"] = f'<{url}>; rel="next"'
    return rows


# --- The application: what happens at start-up, around every request and on errors


async def migrate() -> None:
    """Run the migrations that the database has not seen: see migrations/env.py."""
    async with migrating.connect() as connection:
        sync = connection.sync_connection
        config = Config(
            attributes={"connection": sync, "only_if_empty": IS_DEVELOPMENT}
        )
        folder = str(HERE / "migrations").replace("%", "%%")
        config.set_main_option("script_location", folder)
        try:
            await greenlet_spawn(command.upgrade, config, "head")
        except CommandError as error:
            stop(f"The migrations: {error}")


async def create_first_superuser() -> None:
    """Make the superuser that the settings name, where there is none yet."""
    email, password = settings.first_superuser_email, settings.first_superuser_password
    if not (email and password):
        return
    query = select(User.is_superuser).where(or_(User.is_superuser, User.email == email))
    found = await fetch(query, None)
    if not found:
        hashed = await hash_password(password)
        values = {"email": email, "hashed_password": hashed, "is_superuser": True}
        with suppress(sa.exc.IntegrityError):  # another worker was faster
            await fetch(insert(User).values(values).returning(col(User.id)), None)
            log.warning("The first superuser was made, as the settings say")
    elif not any(is_superuser for [is_superuser] in found):
        log.warning("FIRST_SUPERUSER_EMAIL is a user's who is no superuser")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Wait for the database, bring its schema up to date, make the first superuser."""
    give_up = time.monotonic() + settings.database_startup_timeout
    try:
        while True:
            try:
                if settings.migrate_on_startup:
                    await migrate()
                await create_first_superuser()
                break
            except (sa.exc.DBAPIError, OSError) as error:
                where = engine_url.database or "see DATABASE_URL"
                problem = f"The database, {where}: {reason(error)}"
                in_vain = not is_outage(error) or error_code(error).startswith(HOPELESS)
                if in_vain or time.monotonic() > give_up:
                    stop(problem)
                log.warning("Trying again. %s", problem)
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
    swagger_ui_parameters={"persistAuthorization": True},
    generate_unique_id_function=lambda route: route.name,
    lifespan=lifespan,
    redirect_slashes=False,  # a redirect would be built from the client's Host
)


def problems(*codes: int, model: type = Problem) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of errors."""
    return {code: {"model": model} for code in codes}


# Starlette's own answer, before the body is read, is text.
TOO_LARGE: Any = {413: {"model": Problem, "content": {"text/plain": {}}}}
LINK: Any = {200: {"headers": {"Link": {"schema": {"type": "string"}}}}}


def new_router(name: str, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """Return a router for `/api/v1/{name}`, whose routes may answer these errors."""
    router = APIRouter(
        prefix=f"{settings.api_v1_prefix}/{name}",
        tags=[name],
        responses=problems(503) | TOO_LARGE | errors,
        max_body_size=settings.max_body_size,
    )
    app.include_router(router)  # FastAPI finds the routes that it gets later
    return router


def is_oauth2(request: Request) -> bool:
    """Tell whether the client expects errors in the form of OAuth2."""
    return request.url.path.endswith((f"{AUTH_PATH}/token", f"{AUTH_PATH}/revoke"))


@app.exception_handler(StarletteHTTPException)
async def http_error(request: Request, error: StarletteHTTPException) -> Response:
    """Answer an HTTPException, of a route or of FastAPI itself, such as 404 and 405."""
    content, headers = {"detail": error.detail}, dict(error.headers or {})
    if error.status_code == 405:  # each route knows its own methods only (RFC 9110)
        routes = iter_route_contexts(app.routes)
        matching = (r for r in routes if r.matches(request.scope)[0].value)
        methods = {method for route in matching for method in route.methods or ()}
        methods |= {"HEAD"} if "GET" in methods else set()
        headers["Allow"] = ", ".join(sorted(methods))
    if is_oauth2(request):  # RFC 6749, section 5.2
        code = getattr(error, "code", "invalid_request")
        content |= {"error": code, "error_description": error.detail}
        headers["Cache-Control"] = "no-store"
    return JSONResponse(content, error.status_code, headers)


@app.exception_handler(RequestValidationError)
async def invalid_input(request: Request, error: RequestValidationError) -> Response:
    """Say what is wrong with the input, without repeating it: it may be a password."""
    if is_oauth2(request):
        first = error.errors()[0]
        name = "grant_type" if first["loc"] == ("body",) else first["loc"][-1]
        wrong = HTTPException(400, f"{name} is missing or not valid")
        if first["type"] == "union_tag_invalid" and first["ctx"]["tag"]:
            wrong = OAuth2Error("unsupported_grant_type", 400, f"{name} is not known")
        return await http_error(request, wrong)
    errors: list[dict[str, Any]] = []
    for e in error.errors():
        # The name of an unknown field, too, is what was sent.
        loc = e["loc"][:-1] if e["type"] == "extra_forbidden" else e["loc"]
        kept = {"type": e["type"], "loc": loc, "msg": e["msg"]}
        if kept not in errors:  # a thousand unknown fields are one mistake
            errors.append(kept)
    return await http_error(request, HTTPException(422, errors))


def taken(error: Exception) -> str:
    """Return in words which columns must be unique, and have the value already."""
    # PostgreSQL says "Key (a, b)=(1, 2) …", SQLite "… failed: table.a, table.b".
    text = getattr(error, "detail", None) or str(error)
    found = re.search(r"^[^(]*\(([^()]+)\)=|failed: ([^']+)$", text)
    names = re.sub(r'\w+\.|"', "", found[1] or found[2]) if found else "it is"
    return names.replace(", ", " and ").replace("_", " ").capitalize()


@app.exception_handler(sa.exc.IntegrityError)
async def failure(request: Request, error: Exception) -> Response:
    """Answer what the database refused or could not do, and mistakes of ours."""
    code, cause = error_code(error), getattr(error, "orig", error)
    answer: HTTPException
    if is_outage(error):
        log.warning("Answered 503: %s", reason(error))
        detail, wait = "The service is busy, try again", {"Retry-After": "1"}
        answer = OAuth2Error("temporarily_unavailable", 503, detail, wait)
    elif code in TAKEN:
        answer = HTTPException(400, f"{taken(cause)} already registered")
    elif code in DANGLING:
        if token := getattr(request.state, "token", None):
            await fetch(CALLER, token)  # the caller's own row may be gone: 401
        answer = HTTPException(
            400, "It refers to what is not there, or is still in use"
        )
    elif isinstance(error, sa.exc.IntegrityError):
        answer = HTTPException(400, "It breaks a rule of the database")
    elif code.startswith(UNFIT) or isinstance(cause, ValueError | OverflowError):
        answer = HTTPException(400, "It has a text or a number that cannot be stored")
    elif isinstance(error, sa.orm.exc.StaleDataError):  # deleted meanwhile
        answer = HTTPException(404, "Not found")
    else:
        log.exception("Unforeseen error at %s %s", request.method, request.url.path)
        answer = OAuth2Error("server_error", 500, "Internal server error")
    return await http_error(request, answer)


def head_as_get(app: ASGIApp) -> ASGIApp:
    """Answer HEAD as GET (RFC 9110, 9.3.2); the server leaves out the body."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope.get("method") == "HEAD"
        await app({**scope, "method": "GET"} if is_head else scope, receive, send)

    return answer


# FastAPI's own handler of Exception raises it again, and the server hangs up. What a
# handler raises, such as a 401, is answered here, too.
HANDLERS: Any = {Exception: failure, StarletteHTTPException: http_error}
app.add_middleware(ExceptionMiddleware, handlers=HANDLERS)
app.add_middleware(
    CORSMiddleware,
    allow_origins=settings.origins,
    allow_credentials="*" not in settings.origins,
    allow_methods=["*"],
    allow_headers=["*"],
    expose_headers=["Link", "Retry-After"],
)
app.add_middleware(head_as_get)


# --- Routes: auth

auth = new_router("auth", problems(400, 429, 503, model=OAuth2Problem))


@auth.post("/token")
async def create_token(
    grant: Annotated[PasswordGrant | RefreshGrant, Form(discriminator="grant_type")],
    session: SessionDep,
    address: AddressDep,
    response: Response,
) -> Token:
    """Log in with email and password, or renew a login with its refresh token.

    OAuth2's token endpoint (RFC 6749). A refresh token works once; shown again, it
    ends its login (RFC 9700).
    """
    response.headers["Cache-Control"] = "no-store"
    if isinstance(grant, RefreshGrant):
        return await renew(session, grant.refresh_token)
    return await log_in(session, grant, address)


ACTIVE_USER = select(User).where(User.email == bindparam("email"), col(User.is_active))


async def log_in(session: AsyncSession, grant: PasswordGrant, address: str) -> Token:
    """Return the tokens of a new login, or raise `invalid_grant`."""
    email = grant.username  # if it is none, nobody's, and answered in the same time
    with suppress(ValidationError):
        email = EMAIL.validate_python(email)
    user = next(iter(await fetch(ACTIVE_USER, None, email=email)), None)
    known = user.hashed_password if user else NO_HASH
    pair = digest(f"login {email} {address}")
    right = await check_password(session, pair, address, grant.password, known)
    if not user or not right:
        raise OAuth2Error("invalid_grant", 400, "Wrong email or password")
    hashed = known
    if hashed[:7] != NO_HASH[:7]:  # BCRYPT_ROUNDS has changed since it was made
        await session.commit()
        hashed = await hash_password(grant.password, address)
    # Locked until the login is stored: a password change meanwhile would miss it.
    unchanged = select(User).where(User.id == user.id, User.hashed_password == known)
    locked = unchanged.where(col(User.is_active)).with_for_update(key_share=True)
    stored = (await session.exec(locked)).first()
    if stored is None:  # changed while it was hashed: once more, as it is now
        await session.rollback()
        return await log_in(session, grant, address)
    stored.hashed_password = hashed
    family, secret = token_urlsafe(16), token_urlsafe(32)
    login = Login(
        user_id=user.id,
        family_hash=digest(family),
        secret_hash=digest(secret),
        expires_at=utc_now() + REFRESH_LIFETIME,
    )
    session.add(login)
    return make_token(user.id, family, secret)


async def renew(session: AsyncSession, refresh_token: str) -> Token:
    """Return new tokens for a login, or raise `invalid_grant`, having ended it."""
    family, _, shown = refresh_token.partition(".")
    secret, now = token_urlsafe(32), utc_now()
    login = col(Login.family_hash) == digest(family)
    # One statement decides: of several uses at once, one finds the secret unspent.
    rotated = await session.exec(
        update(Login)
        .where(
            login,
            col(Login.secret_hash) == digest(shown),
            col(Login.expires_at) > now,
            col(Login.user_id).in_(select(User.id).where(User.is_active)),
        )
        .values(secret_hash=digest(secret), expires_at=now + REFRESH_LIFETIME)
        .returning(col(Login.user_id))
    )
    if owner := rotated.scalar():
        return make_token(owner, family, secret)
    ended = await session.exec(delete(Login).where(login).returning(col(Login.user_id)))
    if owner := ended.scalar():
        log.warning("A spent refresh token was shown: a login of user %s ended", owner)
    await session.commit()  # the error below would undo it
    detail = "Log in again: the refresh token is not valid"
    raise OAuth2Error("invalid_grant", 400, detail)


@auth.post("/revoke", response_class=Response)
async def revoke_token(
    token: Annotated[NonEmpty, Form(examples=["mdfW.2fwu"])], session: SessionDep
) -> Response:
    """Log out: end the login behind an access or refresh token (RFC 7009).

    Unknown tokens are answered alike; expired and spent ones end their login too.
    """
    claims = read_access_token(token, expired=True)
    family_hash = claims.sid if claims else digest(token.partition(".")[0])
    await session.exec(delete(Login).where(col(Login.family_hash) == family_hash))
    return Response(headers={"Cache-Control": "no-store"})


# --- Routes: users

users = new_router("users", problems(400, 401, 403, 404, 429))
UserId = Id | Literal["me"]
USER = select(User).where(User.id == bindparam("id"), visible(User.id))
USERS = select(User).where(IS_SUPERUSER)
# What only a superuser may change: all that nobody may choose when they register.
RIGHTS = UserUpdate.model_fields.keys() - {*UserCreate.model_fields, "current_password"}
# The rows that go with a user, some at a time: all at once could take too long. Logins
# go last, with the user: the caller's may be among them.
SOME = 1000  # rows
DELETE_SOME = [
    delete(table)
    .where(
        sa.tuple_(*table.primary_key).in_(
            select(*table.primary_key)
            .where(column == bindparam("id"), visible(column))
            .limit(SOME)
        )
    )
    .returning(column)
    for table in User.metadata.sorted_tables
    for column in table.columns
    for key in column.foreign_keys
    if (key.target_fullname, key.ondelete) == ("users.id", "CASCADE")
    and table.name != "logins"
]


def id_of(user_id: UserId, token: AccessToken) -> int:
    """Return the id that a path means: `me` is the caller's own."""
    return token.sub if user_id == "me" else user_id


@users.post("", response_model=UserPublic, status_code=201)
async def create_user(
    body: UserCreate, session: SessionDep, address: AddressDep
) -> User:
    """Register. The email is kept in lower case; one email, one user."""
    hashed = {"hashed_password": await hash_password(body.password, address)}
    user = User.model_validate(body, update=hashed)
    session.add(user)
    await session.flush()  # a taken email shows here, even in a race
    return user


@users.get("", response_model=list[UserPublic], responses=LINK)
async def list_users(
    token: TokenDep, page: PageDep, request: Request, response: Response
) -> Any:
    """List all users, page by page; for superusers."""
    caller = await fetch_one(CALLER, token)
    if not caller.is_superuser:
        raise HTTPException(403, "Only a superuser may list users")
    return await fetch_page(USERS, token, page, request, response)


@users.get("/{user_id}", response_model=UserPublic)
async def read_user(user_id: UserId, token: TokenDep) -> Any:
    """Return a user: oneself, as `me` or by id, or anybody for a superuser."""
    return await fetch_one(USER, token, id=id_of(user_id, token))


@users.patch("/{user_id}", response_model=UserPublic)
async def update_user(
    user_id: UserId,
    changes: UserUpdate,
    token: TokenDep,
    session: SessionDep,
    address: AddressDep,
) -> User:
    """Change what is sent of a user: of oneself, or of anybody for a superuser.

    To change one's own email or password takes `current_password`. A new password
    ends the user's logins, but for the one that made this call.
    """
    id_ = id_of(user_id, token)
    own = id_ == token.sub
    sent = changes.model_dump(exclude_unset=True)
    guess, password = sent.pop("current_password", None), sent.pop("password", None)
    old = await fetch_one(USER, token, id=id_)
    if sent.get("email") == old.email:
        del sent["email"]  # not written: it could undo a change that is being made
    if own and (denied := RIGHTS & sent.keys()):
        names = " or ".join(sorted(denied))
        raise HTTPException(403, f"You cannot change your own {names}")
    needs_proof = own and (password or "email" in sent)
    wrong = HTTPException(403, "current_password is missing or wrong")
    if needs_proof:
        # Counted by login: a thief of one cannot lock the owner out of another.
        pair, known = digest(f"password {token.sid}"), old.hashed_password
        if not guess or not await check_password(session, pair, address, guess, known):
            raise wrong
        await session.commit()
    if password:
        sent["hashed_password"] = await hash_password(password, address)
    # Hashing took its time: who is calling, and what they may, is asked again.
    user = await lock_user(session, token, id_)
    if needs_proof and user.hashed_password != old.hashed_password:
        raise wrong
    user.sqlmodel_update(sent)
    await session.flush()
    if password or not user.is_active:  # after the row is locked: see `log_in`
        ended = delete(Login).where(col(Login.user_id) == id_)
        await session.exec(ended.where(col(Login.family_hash) != token.sid))
    return user


@users.delete("/{user_id}", status_code=204)
async def delete_user(user_id: UserId, token: TokenDep, session: SessionDep) -> None:
    """Delete a user with all items and logins: oneself, or anybody for a superuser.

    Superusers cannot delete themselves.
    """
    id_ = id_of(user_id, token)
    own_row = HTTPException(403, "A superuser cannot delete themself")
    user = await fetch_one(USER, token, id=id_)
    if user.is_superuser and id_ == token.sub:
        raise own_row
    for statement in DELETE_SOME:
        while len(await fetch(statement, token, id=id_)) == SOME:
            pass
    # Much may have changed meanwhile: who may do this is asked again.
    user = await lock_user(session, token, id_)
    if user.is_superuser and id_ == token.sub:
        raise own_row
    await session.delete(user)


async def lock_user(session: AsyncSession, token: AccessToken, id_: int) -> User:
    """Return a user to change, locked with the caller: no two demote each other."""
    both = select(User.id).where(col(User.id).in_((token.sub, id_)))
    await session.exec(both.order_by(col(User.id)).with_for_update(key_share=True))
    return await load(session, USER, token, id=id_)


# --- Routes: items

items = new_router("items", problems(400, 401, 404))
ITEM = select(Item).where(Item.id == bindparam("id"), visible(Item.owner_id))
ITEMS = select(Item).where(IS_SUPERUSER)
OWNER = bindparam("owner_id", type_=sa.BigInteger)
OWNED_ITEMS = select(Item).where(Item.owner_id == OWNER, visible(OWNER))
CREATE_ITEM = insert_own(Item, ItemCreate, Item.owner_id)


@items.post("", response_model=ItemPublic, status_code=201)
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
    caller = await fetch_one(CALLER, token)
    everybodys = caller.is_superuser and owner_id is None
    statement, owner = ITEMS if everybodys else OWNED_ITEMS, owner_id or caller.id
    return await fetch_page(statement, token, page, request, response, owner_id=owner)


@items.get("/{item_id}", response_model=ItemPublic)
async def read_item(item_id: Id, token: TokenDep) -> Any:
    """Return an item of one's own; any for a superuser."""
    return await fetch_one(ITEM, token, id=item_id)


@items.patch("/{item_id}", response_model=ItemPublic)
async def update_item(
    item_id: Id, changes: ItemUpdate, token: TokenDep, session: SessionDep
) -> Item:
    """Change what is sent of an item of one's own; of any for a superuser."""
    item = await load(session, ITEM, token, id=item_id)
    item.sqlmodel_update(changes.model_dump(exclude_unset=True))
    await session.flush()  # or the answer would have the old `updated_at`
    return item


@items.delete("/{item_id}", status_code=204)
async def delete_item(item_id: Id, token: TokenDep, session: SessionDep) -> None:
    """Delete an item of one's own; any for a superuser."""
    await session.delete(await load(session, ITEM, token, id=item_id))


# --- Routes: health, at the root and without a login


@app.get("/health", tags=["health"])
async def read_health() -> dict[str, str]:
    """Tell that the process is up; asks no database."""
    return {"status": "healthy"}


@app.get("/ready", tags=["health"], responses=problems(503))
async def read_readiness() -> dict[str, str]:
    """Tell that the database answers; 503 while it does not."""
    await fetch(select(1), None)
    return {"status": "ready"}
