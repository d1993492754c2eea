"""The application: users, items and logins.

FastAPI and SQLModel, on SQLite or PostgreSQL. Start it, then open /docs:

    uv run fastapi dev app.py

Read it from top to bottom. The tables and schemas are in models.py, the database
migrations in migrations/.
"""

import hmac
import ipaddress
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn
from urllib.parse import parse_qsl, urlencode

import anyio
import bcrypt
import jwt
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Query, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import OAuth2PasswordBearer
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlmodel import SQLModel, bindparam, col, delete, func, insert, or_, select, update
from sqlmodel.ext.asyncio.session import AsyncSession
from sqlmodel.sql.expression import SelectOfScalar
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.exceptions import ExceptionMiddleware

from models import (
    MAX_ID,
    Email,
    ErrorResponse,
    Id,
    Item,
    ItemCreate,
    ItemPublic,
    ItemUpdate,
    Login,
    LoginAttempt,
    OAuth2ErrorResponse,
    PageParams,
    Password,
    PasswordGrant,
    RefreshGrant,
    Token,
    TokenClaims,
    User,
    UserCreate,
    UserPermissions,
    UserPublic,
    UserUpdate,
    digest,
    utc_now,
)

log = logging.getLogger("uvicorn.error")  # the server's own log
HERE = Path(__file__).parent


# --- Settings: from environment variables or .env


def abort_startup(problem: str) -> NoReturn:
    """Log why the app cannot start, and exit."""
    sys.tracebacklimit = 0
    log.critical("Cannot start. %s", problem)
    raise SystemExit(3) from None  # uvicorn stops if a worker exits with 3


DEVELOPMENT_KEY = "not a secret: the key for development only"
IS_DEVELOPMENT = os.getenv("FASTAPI_ENV") == "development"  # set by `fastapi dev`


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=HERE / ".env",
        extra="ignore",
        hide_input_in_errors=True,  # an invalid value may be a password
        validate_default=True,
    )

    app_name: str = "My API"
    debug: bool = False  # log SQL statements, without values
    api_v1_prefix: str = Field(default="/api/v1", pattern=r"^(/[a-zA-Z0-9_.-]+)*$")
    secret_key: str = Field(default=DEVELOPMENT_KEY, max_length=1000, repr=False)
    database_url: str = Field(
        default="sqlite:///app.db",
        repr=False,
        pattern=r"^(sqlite.*://(/|$)|postgres.*://)",
    )
    database_pool_size: int = Field(default=10, ge=1)  # connections per worker
    database_timeout: float = Field(default=5, gt=0)  # seconds
    database_startup_timeout: float = Field(default=30, ge=0)  # seconds
    database_statement_cache_size: int = Field(default=100, ge=0)
    migrate_on_startup: bool = True
    access_token_expire_minutes: int = Field(default=30, ge=1, le=60 * 24 * 365)
    refresh_token_expire_days: int = Field(default=30, ge=1, le=3650)
    bcrypt_rounds: int = Field(default=12, ge=4, le=31)
    max_failed_logins: int = Field(default=10, ge=0)  # in 15 minutes; 0: no limit
    max_body_size: int = Field(default=2**18, ge=1)  # bytes
    cors_origins: str = "*"  # separated by commas
    first_superuser_email: Email | Literal[""] = ""
    first_superuser_password: Password | Literal[""] = Field(default="", repr=False)

    @field_validator("secret_key")
    @classmethod
    def check_secret_key(cls, key: str) -> str:
        if len(key.encode()) < 32 or (key == DEVELOPMENT_KEY and not IS_DEVELOPMENT):
            raise ValueError("set it to at least 32 random bytes: openssl rand -hex 32")
        return key


try:
    settings = Settings()
except ValidationError as error:
    problems = [f"{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors()]
    abort_startup("; ".join(problems))
except (OSError, UnicodeDecodeError) as error:
    abort_startup(f"Cannot read .env: {error}")
if settings.secret_key == DEVELOPMENT_KEY:
    log.warning("SECRET_KEY is the built-in development key, which is public")


# --- Database: two engines, one for transactions and one for single statements

# At lower levels, these loggers show the values of rows, such as password hashes.
logging.getLogger("aiosqlite").setLevel(logging.INFO)
logging.getLogger("sqlalchemy.engine.Engine").setLevel(logging.WARNING)
engine_options: dict[str, Any] = {
    "echo": settings.debug,
    "hide_parameters": True,  # in logs and error messages
    "poolclass": sa.AsyncAdaptedQueuePool,  # also for SQLite in memory
    "pool_size": settings.database_pool_size,
    "max_overflow": 0,
    "pool_timeout": settings.database_timeout,
}
# BEGIN, COMMIT and ROLLBACK around a single statement would cost three round trips.
AUTOCOMMIT: Any = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}

if settings.database_url.startswith("sqlite"):
    url = sa.make_url(settings.database_url).set(drivername="sqlite+aiosqlite")
    in_memory = url.database in (None, "", ":memory:")
    if not in_memory:  # a relative path is relative to this file
        url = url.set(database=str(HERE / str(url.database)))
    location = url.database  # for the log
    engine_options["connect_args"] = {
        "timeout": settings.database_timeout,
        "isolation_level": None,  # the driver must not begin transactions by itself
    }
    # SQLite allows one writer at a time: transactions queue for a single connection.
    engine = create_async_engine(url, **engine_options | {"pool_size": 1})
    autocommit_engine = migration_engine = engine
    if not in_memory:  # in memory, only one connection sees the database
        autocommit_engine = create_async_engine(url, **engine_options | AUTOCOMMIT)

    @event.listens_for(engine.sync_engine, "begin")
    def begin_immediate(connection: Any) -> None:
        # IMMEDIATE waits for the write lock. With BEGIN alone, a later write can fail.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    @event.listens_for(engine.sync_engine, "checkin")
    def roll_back_failed_commit(connection: Any, _: object) -> None:
        # A COMMIT that fails leaves the transaction open and the file locked.
        if connection and connection.driver_connection.in_transaction:
            connection.rollback()

    @event.listens_for(engine.sync_engine, "connect")
    @event.listens_for(autocommit_engine.sync_engine, "connect")
    def set_pragmas(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL").close()
        connection.execute("PRAGMA foreign_keys = ON").close()  # off by default

else:
    address, _, query = settings.database_url.partition("://")[2].partition("?")
    # Hosting services add these to URLs; asyncpg would send them on to the server.
    unknown = "channel_binding", "connect_timeout", "gssencmode", "pgbouncer"
    parameters = {k: v for k, v in parse_qsl(query) if k not in unknown}
    # Host, port and database for the log. A "?" in a password hides where they begin.
    location = address.rpartition("@")[2] if "@" not in query else "?"
    engine_options["connect_args"] = connect_args = {
        "dsn": f"postgresql://{address}?{urlencode(parameters)}",
        "timeout": settings.database_timeout,
        "command_timeout": settings.database_timeout,
        "statement_cache_size": settings.database_statement_cache_size,
        "prepared_statement_cache_size": settings.database_statement_cache_size,
    }
    url = sa.make_url("postgresql+asyncpg://")
    autocommit_engine = create_async_engine(url, **engine_options | AUTOCOMMIT)
    # The same connection pool, with transactions
    engine = autocommit_engine.execution_options(isolation_level="READ COMMITTED")
    migration_args = connect_args | {"command_timeout": None}  # migrations may be slow
    migration_engine = create_async_engine(
        url, poolclass=sa.NullPool, hide_parameters=True, connect_args=migration_args
    )

    @event.listens_for(autocommit_engine.sync_engine, "checkout")
    def replace_closed_connection(connection: Any, *_: object) -> None:
        # asyncpg knows if the server hung up: pool_pre_ping would cost a round trip.
        if connection.driver_connection.is_closed():
            raise exc.DisconnectionError  # the pool connects again


async def get_session() -> AsyncGenerator[AsyncSession]:
    """Yield a session; commit if the route returns, roll back if it raises."""
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session
        await session.commit()


# scope="function" commits before the response is sent; the default would commit after.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]


# How codes of errors begin: SQLSTATEs of PostgreSQL, names of SQLite, Python's classes
OUTAGES = re.compile(
    "08|25006|28|3D|40|53|55|57|58|OSError|TimeoutError|NotSupportedError|"
    "SQLITE_(BUSY|CANTOPEN|FULL|IOERR|LOCKED|READONLY|SCHEMA)"
)
INVALID = re.compile("22|23514|23P01|SQLITE_CONSTRAINT_CHECK|OverflowError|ValueError")


def get_error_code(error: Exception) -> str:
    """Return the code of a database error, or "" for any other error."""
    cause: Any = (isinstance(error, exc.StatementError) and error.orig) or error
    code = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None)
    if code or getattr(error, "connection_invalidated", False):
        return code or "08"
    # Drivers also raise errors of Python. Did one raise this, and not our code?
    packages = [
        str(frame.f_globals.get("__name__")).partition(".")[0]
        for frame, _ in traceback.walk_tb(cause.__traceback__)
    ]
    ignored = {*sys.stdlib_module_names, "uvloop"}  # what drivers call
    raised_by = next((p for p in reversed(packages) if p not in ignored), "")
    is_wrapped = isinstance(error, exc.SQLAlchemyError)
    drivers = ("sqlalchemy", "sqlmodel") if is_wrapped else ("aiosqlite", "asyncpg")
    names = [c.__name__ for c in type(cause).__mro__ if raised_by in drivers]
    return next((n for n in names if OUTAGES.match(n) or INVALID.match(n)), "")


def describe_error(error: Exception) -> str:
    """Return an error in one line, without values and passwords."""
    if get_error_code(error) == "ValueError":  # may contain a part of the password
        return "DATABASE_URL is not valid. Is its password percent-encoded?"
    text = str(getattr(error, "orig", None) or error).partition("\n")[0]
    return f"{type(error).__name__}: {text} (database: {location})"


# --- Queries: run a single statement, get a page of a list, load an object to change
# Keep statements as constants beside their routes, with `bindparam` for parameters:
# building one for every request would take about half as long as running it.

if TYPE_CHECKING:

    class Caller(User):  # for editors: the columns of the row, see `get_caller`
        login: str
else:
    Caller = sa.Row

# The caller in a statement. An INSERT or UPDATE would set columns with these names.
CALLER_ID: sa.BindParameter[int] = bindparam("caller.id", type_=sa.BigInteger)
IS_SUPERUSER: Any = bindparam("caller.is_superuser", type_=sa.Boolean)
NO_CALLER: Any = ()  # in place of None, which is a caller who is not logged in


def caller_values(caller: Caller | None) -> dict[str, Any]:
    """Return the values of CALLER_ID and IS_SUPERUSER."""
    if caller is NO_CALLER:
        return {}
    is_superuser = bool(caller and caller.is_superuser)
    return {"caller.id": caller and caller.id, "caller.is_superuser": is_superuser}


def visible(owner_id: Any) -> sa.ColumnElement[bool]:
    """Return the SQL condition that the caller owns the row or is a superuser."""
    return or_(owner_id == CALLER_ID, IS_SUPERUSER)


async def fetch(
    statement: sa.Executable, caller: Caller | None = NO_CALLER, /, **values: Any
) -> Sequence[Any]:
    """Run a single statement with these parameter values, commit, and return its rows.

    This takes half the time of a session. Do not use it after the request's session was
    used: the request would hold one connection while it waits for another.
    """

    def run() -> Sequence[Any]:
        with autocommit_engine.sync_engine.connect() as connection:
            result = connection.execute(statement, values | caller_values(caller))
            rows = result.all() if result.returns_rows else []
            if not statement.is_select:
                connection.commit()  # SQLite in memory has no AUTOCOMMIT engine
            return rows

    # An AsyncConnection would start a greenlet for every call; `run` needs only one.
    return await greenlet_spawn(run)


async def fetch_one(
    statement: sa.Executable, caller: Caller | None = NO_CALLER, /, **values: Any
) -> Any:
    """Return the first row that `fetch` returns, else raise 404."""
    if not (rows := await fetch(statement, caller, **values)):
        raise HTTPException(404, "Not found")
    return rows[0]


async def load[T: SQLModel](
    session: AsyncSession,
    statement: SelectOfScalar[T],
    caller: Caller | None = NO_CALLER,
    /,
    **values: Any,
) -> T:
    """Return an object to change, its row locked until the commit, else raise 404.

    The caller is locked first: no login or permission can end before the commit.
    Lock parents before children, such as users before items: requests that lock rows in
    different orders can deadlock. Use subqueries: joins would lock more rows. The lock
    does not keep others from inserting rows that reference this one.
    """
    values |= caller_values(caller)
    options: Any = {"params": values, "execution_options": {"populate_existing": True}}
    not_found = HTTPException(404, "Not found")
    if caller:
        names = ("id", *UserPermissions.model_fields)
        alive = select(User.id).where(
            *(getattr(User, n) == getattr(caller, n) for n in names)
        )
        if login := getattr(caller, "login", None):  # none without an access token
            alive = alive.join(Login).where(
                Login.family_hash == login, col(Login.expires_at) > func.now()
            )
        if not (await session.exec(alive.with_for_update(key_share=True))).first():
            raise not_found
    locked = statement.with_for_update(key_share=True)
    found = (await session.exec(locked, **options)).first()
    # A statement that waited for a lock sees other rows as they were before: ask again.
    if found is None or (await session.exec(statement, **options)).first() is None:
        raise not_found
    return found


def paginate(query: Any, id_: Any = None) -> dict[str, Any]:
    """Return the statements of a page by `id_` or the id, one for each `sort`."""
    id_ = query.selected_columns["id"] if id_ is None else id_
    after, skip = (bindparam(n, type_=sa.BigInteger) for n in ("after", "skip"))
    # The last column is the value of `after` for the next page.
    page = query.add_columns(id_.label("after")).offset(skip).limit(bindparam("limit"))
    return {
        "id": page.where(id_ > func.coalesce(after, 0)).order_by(id_),
        "-id": page.where(id_ < func.coalesce(after, MAX_ID)).order_by(id_.desc()),
    }


class Page:
    def __init__(self, query: PageParams, request: Request, response: Response) -> None:
        self.query, self.url, self.headers = query, request.url, response.headers

    async def fetch(
        self, statements: Any, caller: Caller | None = NO_CALLER, /, **values: Any
    ) -> Sequence[Any]:
        """Return the rows of the page; set `Link` to the next page (RFC 8288)."""
        query = self.query
        # One row more than the limit shows that there is a next page.
        values |= {"after": query.after, "skip": query.skip, "limit": query.limit + 1}
        rows = await fetch(statements[query.sort], caller, **values)
        if len(rows) > query.limit:
            url = self.url.remove_query_params("skip")
            url = url.include_query_params(after=rows[-2][-1])
            self.headers["Link"] = f'<{url}>; rel="next"'
        return rows[: query.limit]


# An async function, because FastAPI would call the class itself in a thread.
async def get_page(
    query: Annotated[PageParams, Query()], request: Request, response: Response
) -> Page:
    return Page(query, request, response)


PageDep = Annotated[Page, Depends(get_page)]


# --- Passwords and tokens

ATTEMPT_WINDOW = timedelta(minutes=15)
# bcrypt is slow by design: more threads than cores would only slow down the rest.
bcrypt_limiter = anyio.CapacityLimiter(os.cpu_count() or 1)


def get_client_ip(request: Request) -> str:
    """Return the client's IP address, or for IPv6 the /64 network of one client."""
    host = request.client.host if request.client else ""  # none on a Unix socket
    with suppress(ValueError):  # an IPv4 address
        network = ipaddress.IPv6Network(f"{host}/64", strict=False)
        return str(ipaddress.IPv6Address(host).ipv4_mapped or network)
    return host


async def run_bcrypt[T](function: Callable[..., T], *args: Any) -> T:
    """Run a bcrypt function in a thread; raise 503 if none is free in 15 s.

    Call it before the session is used, so that no connection is held meanwhile.
    """
    with anyio.move_on_after(15):  # a thread that has started is not cancelled
        return await anyio.to_thread.run_sync(function, *args, limiter=bcrypt_limiter)
    log.warning("Responded with 503: no thread for hashing was free in time")
    raise OAuth2Error("temporarily_unavailable", "Too many logins", 503, RETRY)


async def hash_password(password: str) -> str:
    salt = bcrypt.gensalt(settings.bcrypt_rounds)
    return (await run_bcrypt(bcrypt.hashpw, password.encode(), salt)).decode()


# No password has this hash. It is checked for unknown emails: they must take as long.
DUMMY_HASH = f"$2b${settings.bcrypt_rounds:02}${'.' * 53}"


def verify_password(password: str, hashed: str) -> bool:
    """Return whether a password matches a hash. An invalid hash takes as long."""
    encoded = password.encode()
    try:
        # bcrypt rejects over 72 bytes; no stored password is longer.
        return bcrypt.checkpw(encoded[:72], hashed.encode()) and len(encoded) <= 72
    except ValueError:  # not a bcrypt hash: no password matches
        return verify_password(password, DUMMY_HASH)


RETRY = {"Retry-After": "1"}


class OAuth2Error(HTTPException):
    """An error with an OAuth2 error code (RFC 6749, section 5.2)."""

    def __init__(self, code: str, detail: str, status: int = 400, *args: Any) -> None:
        super().__init__(status, detail, *args)
        self.code = code


FAILED_ATTEMPTS = select(func.count(), func.min(LoginAttempt.created_at)).where(
    LoginAttempt.key == bindparam("key"),
    col(LoginAttempt.created_at) > bindparam("since"),
)


async def check_attempt_limit(key: str) -> None:
    since = utc_now() - ATTEMPT_WINDOW
    [(failures, first)] = await fetch(FAILED_ATTEMPTS, key=key, since=since)
    if 0 < settings.max_failed_logins <= failures:
        wait = {"Retry-After": str(int((first - since).total_seconds()) + 1)}
        raise OAuth2Error("invalid_grant", "Too many failed attempts", 429, wait)


async def check_password(password: str, hashed: str, throttle_key: str) -> bool:
    """Return whether a password matches a hash; raise 429 after too many failures.

    Failures are counted by `throttle_key`, such as an email and a client's address.
    """
    key = digest(throttle_key)
    await check_attempt_limit(key)
    matches = await run_bcrypt(verify_password, password, hashed)
    await check_attempt_limit(key)  # concurrent attempts may have reached it
    no_longer_counted = col(LoginAttempt.created_at) < utc_now() - ATTEMPT_WINDOW
    if matches:
        no_longer_counted |= col(LoginAttempt.key) == key
    else:
        await fetch(insert(LoginAttempt), key=key)
    await fetch(delete(LoginAttempt).where(no_longer_counted))
    return matches


def make_token(user_id: int, family: str, secret: str) -> Token:
    """Return the token endpoint's response for a login (RFC 6749, section 5.1)."""
    now, lifetime = int(time.time()), settings.access_token_expire_minutes * 60
    claims = {"sub": str(user_id), "sid": family, "iat": now, "exp": now + lifetime}
    return Token(
        access_token=jwt.encode(claims, settings.secret_key, "HS256"),
        expires_in=lifetime,
        refresh_token=f"{family}.{secret}",
    )


@lru_cache(maxsize=1000)  # checking a token takes longer than a query
def decode_access_token(token: str) -> TokenClaims | None:
    """Return the claims of an access token, which may have expired, or None."""
    options: Any = {"require": ["exp"], "verify_exp": False, "verify_iat": False}
    try:
        return TokenClaims.model_validate(
            jwt.decode(token, settings.secret_key, ["HS256"], options)
        )
    except (jwt.InvalidTokenError, ValueError):
        return None


# --- The caller: the user who makes the request

TOKEN_URL = f"{settings.api_v1_prefix}/auth/token".removeprefix("/")  # relative
oauth2_scheme = OAuth2PasswordBearer(TOKEN_URL, refreshUrl=TOKEN_URL, auto_error=False)
BearerDep = Annotated[str | None, Depends(oauth2_scheme)]
CALLER: Any = select(User, col(Login.family_hash).label("login")).where(
    User.id == bindparam("sub"),
    User.id == Login.user_id,
    Login.family_hash == bindparam("sid"),
    col(Login.expires_at) > func.now(),
    col(User.is_active),
)


async def get_caller(token: BearerDep) -> Any:
    """Return the columns of the user, and `login`, the login's hash; else raise 401."""
    rows: Sequence[Any] = []
    claims = decode_access_token((token or "")[:1000])  # the cache keeps the key
    if claims and claims.exp > time.time():
        rows = await fetch(CALLER, sub=claims.sub, sid=claims.sid)
    if not rows:
        headers = {"WWW-Authenticate": "Bearer"}  # RFC 6750
        raise HTTPException(401, "Missing or invalid access token", headers)
    return rows[0]


CallerDep = Annotated[Caller, Depends(get_caller)]


# --- The application: startup, middleware, error handlers


def upgrade_schema(connection: sa.Connection) -> None:
    """Run the pending migrations; in development, only on an empty database."""
    config = Config(HERE / "alembic.ini", attributes={"connection": connection})
    script = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_heads()
    connection.rollback()  # end the transaction that the query began
    try:
        if not (current and IS_DEVELOPMENT):
            command.upgrade(config, "head")
        elif set(script.get_revisions(current)) != {script.get_revision("head")}:
            log.warning("Migrations are pending. Run: uv run alembic upgrade head")
    except CommandError as error:
        if not isinstance(error.__cause__, ResolutionError):
            raise
        # Newer code has migrated the database: it runs beside this, or was rolled back.
        log.warning("The database is newer than the code. %s", error)


async def create_first_superuser() -> None:
    """Create the superuser of the settings, unless there is a superuser already."""
    email, password = settings.first_superuser_email, settings.first_superuser_password
    superusers = select(User.id).where(User.is_superuser).limit(1)
    if email and password and not await fetch(superusers):
        values = {"email": email, "hashed_password": await hash_password(password)}
        try:
            await fetch(insert(User), **values, is_superuser=True)
            log.warning("Created the first superuser")
        except exc.IntegrityError:
            log.warning("Did not create the first superuser: the email is registered")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Wait for the database, run migrations and create the first superuser."""
    deadline = time.monotonic() + settings.database_startup_timeout
    while True:
        try:
            if settings.migrate_on_startup:
                async with migration_engine.connect() as connection:
                    await connection.run_sync(upgrade_schema)
            await create_first_superuser()
            break
        except Exception as error:
            if not OUTAGES.match(get_error_code(error)) or time.monotonic() > deadline:
                abort_startup(describe_error(error))
            log.warning("Retrying. %s", describe_error(error))
            await anyio.sleep(1)
    yield
    with anyio.move_on_after(2):  # seconds: do not wait for an unresponsive database
        await engine.dispose()
        await autocommit_engine.dispose()


app = FastAPI(
    title=settings.app_name,
    description="Register with `create_user`, then log in with **Authorize**.",
    openapi_url=f"{settings.api_v1_prefix}/openapi.json",
    swagger_ui_parameters={"persistAuthorization": True},
    generate_unique_id_function=lambda route: route.name,
    lifespan=lifespan,
    redirect_slashes=False,  # the redirect would trust the client's Host header
)


@app.exception_handler(StarletteHTTPException)
async def handle_http(request: Request, error: StarletteHTTPException) -> Response:
    """Respond with the detail; the OAuth2 endpoints add the fields of OAuth2."""
    if request.scope.get("endpoint") not in OAUTH2_ENDPOINTS:
        return await http_exception_handler(request, error)
    content = {"error": getattr(error, "code", "invalid_request")}
    content |= {"error_description": error.detail, "detail": error.detail}
    headers = {"Cache-Control": "no-store"} | dict(error.headers or {})
    return JSONResponse(content, error.status_code, headers)


@app.exception_handler(RequestValidationError)
async def handle_invalid(request: Request, error: RequestValidationError) -> Response:
    """Respond without the values that were sent: one may be a password."""
    for e in (problems := error.errors()[:10]):
        if e["type"] == "value_error":  # what follows a colon may be part of a value
            e["msg"] = e["msg"].partition(":")[0]
    if request.scope.get("endpoint") in OAUTH2_ENDPOINTS:
        first = problems[0]
        name = first["loc"][-1] if len(first["loc"]) > 1 else "grant_type"
        # An empty parameter counts as missing (RFC 6749, section 3.2).
        is_unknown = first["type"] == "union_tag_invalid" and first["ctx"]["tag"]
        code = "unsupported_grant_type" if is_unknown else "invalid_request"
        problem = OAuth2Error(code, f"In the form, {name} is missing or invalid")
        return await handle_http(request, problem)
    details = [{key: e[key] for key in ("type", "loc", "msg")} for e in problems]
    return JSONResponse({"detail": details}, 422)


def describe_rejection(code: str, cause: Any) -> str | None:
    """Return a message for the client if the database rejected a value, else None."""
    if re.match("23505|SQLITE_CONSTRAINT_(UNIQUE|PRIMARYKEY)", code):
        # PostgreSQL: "Key (a, b)=(1, 2) already exists."; SQLite: "… failed: t.a, t.b"
        text = getattr(cause, "detail", None) or str(cause)
        found = re.match(r"[^(]*\(([\w, ]+)\)=|UNIQUE.* failed: ([\w., ]+)$", text)
        names = re.sub(r"\w+\.", "", found[1] or found[2]) if found else "value"
        return f"{names.replace('_', ' ').capitalize()} already registered"
    if code in ("23503", "23001") or str(cause) == "FOREIGN KEY constraint failed":
        return "A referenced row is missing or still in use"
    return "A value is invalid or out of range" if INVALID.match(code) else None


async def handle_error(request: Request, error: Exception) -> Response:
    """Respond with 503 to an outage, with 400 to a rejected value, else with 500."""
    code = get_error_code(error)
    if OUTAGES.match(code):
        log.warning("Responded with 503: %s", describe_error(error))
        response = OAuth2Error("temporarily_unavailable", "Try again later", 503, RETRY)
    elif message := describe_rejection(code, getattr(error, "orig", None)):
        log.info("Responded with 400: the database rejected a value (%s)", code)
        response = OAuth2Error("invalid_request", message)
    else:
        for e in error.errors() if isinstance(error, ResponseValidationError) else ():
            e.pop("input", None)  # may be a row with a password's hash
        if isinstance(error, exc.DBAPIError) and error.orig:
            error.orig.__cause__ = None  # asyncpg's own error shows the row, too
        log.error("Unexpected error", exc_info=error)
        response = OAuth2Error("server_error", "Internal server error", 500)
    return await handle_http(request, response)


# Inside CORS, so that the web page of another origin can read the response
app.add_middleware(ExceptionMiddleware, handlers={Exception: handle_error})
origins = [o.strip().removesuffix("/") for o in settings.cors_origins.split(",")]
app.add_middleware(
    CORSMiddleware,
    allow_origins=origins,
    allow_credentials="*" not in origins,
    allow_methods=["*"],
    allow_headers=["*"],
    expose_headers=["Link", "Retry-After"],
)


def errors(*codes: int | str, model: type[SQLModel] = ErrorResponse) -> Any:
    """Return the OpenAPI description of error responses."""
    return {code: {"model": model} for code in codes}


LINK: Any = {200: {"headers": {"Link": {"schema": {"type": "string"}}}}}


# --- Routes: auth

# "4XX" takes the place of FastAPI's 422: invalid input is a 400 here.
OAUTH2_ERRORS = errors(400, "4XX", 503, model=OAuth2ErrorResponse)
auth = APIRouter(prefix="/auth", tags=["auth"])
LOGIN_LIFETIME = timedelta(days=settings.refresh_token_expire_days)
REFRESH_LEEWAY = timedelta(seconds=30)
ACTIVE_USER = select(User).where(User.email == bindparam("email"), col(User.is_active))
LOCKED_USER = ACTIVE_USER.where(
    User.hashed_password == bindparam("hashed")
).with_for_update(key_share=True)


async def log_in(session: AsyncSession, grant: PasswordGrant, client_ip: str) -> Token:
    """Return the tokens of a new login, else raise `invalid_grant`."""
    error = OAuth2Error("invalid_grant", "Wrong email or password")
    email = grant.username
    found = await fetch(ACTIVE_USER, email=email)
    hashed = found[0].hashed_password if found else DUMMY_HASH
    if not await check_password(grant.password, hashed, f"login {email} {client_ip}"):
        raise error
    # Lock the user: a concurrent password change must wait, so that it ends this login.
    rows = await session.exec(LOCKED_USER, params={"email": email, "hashed": hashed})
    if not (user := rows.first()):
        raise error
    family, secret, now = token_urlsafe(16), token_urlsafe(32), utc_now()
    await session.exec(
        delete(Login).where(col(Login.user_id) == user.id, col(Login.expires_at) < now)
    )
    hashes: Any = {"family_hash": digest(family), "secret_hash": digest(secret)}
    session.add(Login(user_id=user.id, expires_at=now + LOGIN_LIFETIME, **hashes))
    return make_token(user.id, family, secret)


async def refresh_login(session: AsyncSession, refresh_token: str) -> Token:
    """Return new tokens; else end the login, if any, and raise `invalid_grant`.

    A request that is repeated at once gets the same new token: it is derived by HMAC.
    """
    family, _, secret = refresh_token.partition(".")
    key, message = settings.secret_key.encode(), f"refresh {refresh_token}".encode()
    new_secret, now = hmac.digest(key, message, "sha256").hex(), utc_now()
    alive = (col(Login.family_hash) == digest(family)) & (col(Login.expires_at) > now)
    is_active = col(Login.user_id).in_(select(User.id).where(User.is_active))
    # One statement checks and replaces the secret: of concurrent uses, one succeeds.
    used = await session.exec(
        update(Login)
        .where(alive, is_active, col(Login.secret_hash) == digest(secret))
        .values(secret_hash=digest(new_secret), expires_at=now + LOGIN_LIFETIME)
        .returning(col(Login.user_id))
    )
    if user_id := used.scalar():
        return make_token(user_id, family, new_secret)
    recent = col(Login.updated_at).between(now - REFRESH_LEEWAY, now + REFRESH_LEEWAY)
    repeated = select(Login.user_id).where(
        alive, is_active, Login.secret_hash == digest(new_secret), recent
    )
    if user_id := (await session.exec(repeated)).first():
        log.warning("Refresh token repeated: a login of user %s goes on", user_id)
        return make_token(user_id, family, new_secret)
    deleted = await session.exec(delete(Login).where(alive).returning(Login))
    if ended := deleted.scalar():
        log.warning("Refresh token reused: ended a login of user %s", ended.user_id)
    await session.commit()  # the error below would roll it back
    raise OAuth2Error("invalid_grant", "Invalid refresh token, log in again")


@auth.post("/token", responses=OAUTH2_ERRORS)
async def create_token(
    grant: Annotated[PasswordGrant | RefreshGrant, Form(discriminator="grant_type")],
    session: SessionDep,
    request: Request,
    response: Response,
) -> Token:
    """Log in with an email and password, or refresh a login with its refresh token.

    The OAuth2 token endpoint (RFC 6749). Reusing a refresh token ends its login.
    """
    response.headers["Cache-Control"] = "no-store"
    if isinstance(grant, RefreshGrant):
        return await refresh_login(session, grant.refresh_token)
    return await log_in(session, grant, get_client_ip(request))


@auth.post("/revoke", response_class=Response, responses=OAUTH2_ERRORS)
async def revoke_token(
    token: Annotated[str, Form(min_length=1)], session: SessionDep
) -> Response:
    """Log out: end the login of an access token or refresh token (RFC 7009).

    Expired and used tokens end their login, too. Unknown tokens get the same response.
    """
    claims = decode_access_token(token[:1000])
    family_hash = claims.sid if claims else digest(token.partition(".")[0])
    await session.exec(delete(Login).where(col(Login.family_hash) == family_hash))
    return Response(headers={"Cache-Control": "no-store"})


OAUTH2_ENDPOINTS = create_token, revoke_token  # for the error handlers


# --- Routes: users

users = APIRouter(prefix="/users", tags=["users"])
UserId = Id | Literal["me"]
USER = select(User).where(User.id == bindparam("id"), visible(User.id))
ALL_USERS = paginate(select(User))
CREATE_USER = insert(User).returning(User)
UPDATE_ERRORS = errors(400, 401, 403, 404, 429)


@users.post("", response_model=UserPublic, status_code=201, responses=errors(400))
async def create_user(body: UserCreate) -> Any:
    """Register a user. The email must be unique and is stored in lower case."""
    values = body.model_dump(exclude={"password"})
    hashed = await hash_password(body.password)
    return await fetch_one(CREATE_USER, **values, hashed_password=hashed)


@users.get("", response_model=list[UserPublic], responses=errors(401, 403) | LINK)
async def list_users(caller: CallerDep, page: PageDep) -> Any:
    """List all users. Only for superusers."""
    if not caller.is_superuser:
        raise HTTPException(403, "Only superusers can list users")
    return await page.fetch(ALL_USERS)


@users.get("/{user_id}", response_model=UserPublic, responses=errors(401, 404))
async def read_user(user_id: UserId, caller: CallerDep) -> Any:
    """Get a user by id, or yourself with `me`. Only superusers can get others."""
    if user_id in ("me", caller.id):
        return caller
    return await fetch_one(USER, caller, id=user_id)


@users.patch("/{user_id}", response_model=UserPublic, responses=UPDATE_ERRORS)
async def update_user(
    user_id: UserId, body: UserUpdate, caller: CallerDep, session: SessionDep
) -> User:
    """Update a user. Only superusers can update others.

    Only the fields you send change. To change your own email or password, also send
    `current_password`. A new password ends all other logins of the user.
    """
    is_self = user_id in ("me", caller.id)
    changes = body.model_dump(exclude_unset=True)
    current, new = changes.pop("current_password", ""), changes.pop("password", None)
    old = caller if is_self else await fetch_one(USER, caller, id=user_id)
    if changes.get("email") == old.email:
        del changes["email"]  # writing it could undo a concurrent change
    # Nobody can change their own permissions: the fields that are not in UserCreate.
    if is_self and (forbidden := changes.keys() - UserCreate.model_fields.keys()):
        raise HTTPException(
            403, f"You cannot change your own {', '.join(sorted(forbidden))}"
        )
    needs_current_password = is_self and (new or "email" in changes)
    wrong_password = HTTPException(403, "current_password is missing or wrong")
    # Counted per login: a stolen one cannot lock the owner out of the others.
    if needs_current_password and not (
        current and await check_password(current, old.hashed_password, caller.login)
    ):
        raise wrong_password
    if new:
        changes["hashed_password"] = await hash_password(new)
    user = await load(session, USER, caller, id=old.id)
    if needs_current_password and user.hashed_password != old.hashed_password:
        raise wrong_password  # it was changed by a concurrent request
    user.sqlmodel_update(changes)
    await session.flush()
    if new or not user.is_active:
        logins = delete(Login).where(col(Login.user_id) == user.id)
        await session.exec(logins.where(col(Login.family_hash) != caller.login))
    await session.refresh(user)
    return user


@users.delete("/{user_id}", status_code=204, responses=errors(401, 403, 404))
async def delete_user(user_id: UserId, caller: CallerDep, session: SessionDep) -> None:
    """Delete a user and their items. Superusers can delete others, not themselves."""
    id_ = caller.id if user_id == "me" else user_id
    user = await load(session, USER, caller, id=id_)
    if user.is_superuser and user.id == caller.id:
        raise HTTPException(403, "Superusers cannot delete themselves")
    await session.delete(user)


# --- Routes: items

items = APIRouter(prefix="/items", tags=["items"], responses=errors(401))
ITEMS = select(Item)
ITEM = ITEMS.where(Item.id == bindparam("id"), visible(Item.owner_id))
ALL_ITEMS = paginate(ITEMS)
OWNED_ITEMS = paginate(
    ITEMS.where(Item.owner_id == bindparam("owner_id"), visible(Item.owner_id))
)
CREATE_ITEM = insert(Item).returning(Item)


@items.post("", response_model=ItemPublic, status_code=201, responses=errors(400))
async def create_item(body: ItemCreate, caller: CallerDep) -> Any:
    """Create an item."""
    return await fetch_one(CREATE_ITEM, **body.model_dump(), owner_id=caller.id)


@items.get("", response_model=list[ItemPublic], responses=LINK)
async def list_items(
    caller: CallerDep, page: PageDep, owner_id: Id | None = None
) -> Any:
    """List your items. Superusers can list all items, or those of one owner."""
    if caller.is_superuser and owner_id is None:
        return await page.fetch(ALL_ITEMS)
    return await page.fetch(OWNED_ITEMS, caller, owner_id=owner_id or caller.id)


@items.get("/{item_id}", response_model=ItemPublic, responses=errors(404))
async def read_item(item_id: Id, caller: CallerDep) -> Any:
    """Get an item. Superusers can get any item."""
    return await fetch_one(ITEM, caller, id=item_id)


@items.patch("/{item_id}", response_model=ItemPublic, responses=errors(400, 404))
async def update_item(
    item_id: Id, body: ItemUpdate, caller: CallerDep, session: SessionDep
) -> Item:
    """Update an item. Superusers can update any item."""
    item = await load(session, ITEM, caller, id=item_id)
    item.sqlmodel_update(body.model_dump(exclude_unset=True))
    await session.flush()
    await session.refresh(item)  # as it is stored, such as times in UTC
    return item


@items.delete("/{item_id}", status_code=204, responses=errors(404))
async def delete_item(item_id: Id, caller: CallerDep, session: SessionDep) -> None:
    """Delete an item. Superusers can delete any item."""
    await session.delete(await load(session, ITEM, caller, id=item_id))


# --- Routes: health checks, at the root and without authentication


@app.head("/health", include_in_schema=False)
@app.get("/health", tags=["health"])
async def read_health() -> dict[str, str]:
    """Check that the process is running, without using the database."""
    return {"status": "healthy"}


@app.head("/ready", include_in_schema=False)
@app.get("/ready", tags=["health"], responses=errors(503))
async def read_readiness() -> dict[str, str]:
    """Check that the database responds and has its tables."""
    try:
        for table in SQLModel.metadata.sorted_tables:
            await fetch(sa.select(table).limit(0))
    except (exc.SQLAlchemyError, OSError) as error:
        log.warning("Not ready. %s", describe_error(error))
        raise HTTPException(503, "Not ready", RETRY) from error
    return {"status": "ready"}


for router in (items, users, auth):
    app.include_router(
        router,
        prefix=settings.api_v1_prefix,
        max_body_size=settings.max_body_size,
        responses=errors(503)  # and FastAPI's own error, which is no JSON:
        | {413: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
