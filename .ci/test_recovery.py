"""Tests of the README's recipe "Emails: a forgotten password", with an SMTP server.

    uv run python -m pytest .ci/test_recovery.py    # in a clone that has the recipe

The SMTP server runs in this process. Each test runs on SQLite and on PostgreSQL.
"""

import asyncio
import email.policy
import logging
import smtplib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from email.message import EmailMessage
from typing import Any

import anyio
import httpx
import jwt
import pytest
import sqlalchemy as sa

from test_app import (
    DATABASES,
    PASSWORD,
    SETTINGS,
    Client,
    Log,
    NewUrl,
    Patch,
    at_once,
    before_hashing,
    call_during,
    load_app,
    new_email,
    running,
    statuses,
)

pytest_plugins = "test_app"  # its fixtures

NEW_PASSWORD = "another password"
PAGE = "https://shop.example/new-password#token="
MAIL = {"EMAIL_FROM": "shop@example.com", "RESET_URL": PAGE}


def do_nothing() -> None: ...


class Mailbox:
    """An SMTP server that keeps what it receives."""

    def __init__(self) -> None:
        self.commands, self.mails = list[str](), list[EmailMessage]()
        self.url, self.on_connect = "", do_nothing

    async def answer(self, reader: asyncio.StreamReader, writer: Any) -> None:
        self.on_connect()
        writer.write(b"220 ready\r\n")
        while line := await reader.readline():
            if line[:4].upper() == b"EHLO":
                writer.write(b"250-hello\r\n")  # then the line with what it supports
            command = line.decode().strip().upper()
            self.commands.append(command)
            if command == "DATA":
                writer.write(b"354 go on\r\n")
                content = (await reader.readuntil(b"\r\n.\r\n"))[:-3]
                policy = email.policy.SMTP
                self.mails.append(email.message_from_bytes(content, policy=policy))
            writer.write(b"221 bye\r\n" if command == "QUIT" else b"250 AUTH PLAIN\r\n")
        writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Mailbox"]:
        async with await asyncio.start_server(self.answer, "127.0.0.1") as server:
            self.url = "smtp://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
            yield self

    def token(self) -> str:
        """Return the token of the only mail, and forget the mail."""
        [mail] = self.mails
        self.mails.clear()
        text = str(mail.get_content()).strip()
        assert text.startswith(PAGE)
        return text.removeprefix(PAGE)


Shop = tuple[Client, Mailbox]


@pytest.fixture(scope="module", params=DATABASES)
async def shop(request: Any, new_url: NewUrl) -> AsyncIterator[Shop]:
    """The app that most tests share, with its SMTP server."""
    url = "sqlite://" if request.param == "sqlite" else new_url("postgresql")
    async with (
        Mailbox().running() as mailbox,
        running(load_app(url, SMTP_URL=mailbox.url, **MAIL)) as client,
    ):
        yield client, mailbox


@pytest.fixture
async def api(shop: Shop) -> Client:
    """A client, in place of the one of test_app.py; nothing counts to a limit yet."""
    await shop[0].sql("DELETE FROM login_attempts")
    return shop[0]


@pytest.fixture
def mailbox(shop: Shop) -> Iterator[Mailbox]:
    mailbox = shop[1]
    mailbox.mails.clear()
    mailbox.commands.clear()
    yield mailbox
    mailbox.on_connect = do_nothing


def at(client: Client, address: str) -> Client:
    """Return a client that is not logged in, at another IP address."""
    transport = httpx.ASGITransport(client.app.app, client=(address, 1))
    return Client(transport, app=client.app)


async def recover(client: Client, email: str = "") -> httpx.Response:
    email = email or client.user["email"]
    return await client.post("/auth/recover", json={"email": email})


async def reset(client: Client, token: str, status: int = 204) -> Any:
    """Set the new password with a token."""
    body = {"token": token, "password": NEW_PASSWORD}
    return await client.expect(status, "POST /auth/reset", **body)


def sign(key: str = SETTINGS["SECRET_KEY"], alg: str = "HS256", **claims: Any) -> str:
    """Return a token with these claims; None removes a claim."""
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key if alg != "none" else None, alg)


def claims_of(token: str) -> dict[str, Any]:
    return dict(jwt.decode(token, options={"verify_signature": False}))


@contextmanager
def recorded_statements(app: Any) -> Iterator[list[str]]:
    statements = list[str]()
    engines = {app.engine.sync_engine, app.autocommit_engine.sync_engine}

    def record(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    for engine in engines:
        sa.event.listen(engine, "before_cursor_execute", record)
    yield statements
    for engine in engines:
        sa.event.remove(engine, "before_cursor_execute", record)


# --- What it does


async def test_a_link_sets_a_new_password(alice: Client, mailbox: Mailbox) -> None:
    response = await recover(alice)
    assert response.status_code == 202
    [mail] = mailbox.mails
    assert (mail["From"], mail["To"]) == ("shop@example.com", alice.user["email"])
    await reset(alice, mailbox.token())
    await alice.log_in(alice.user["email"], NEW_PASSWORD)
    assert (await alice.get_token(alice.user["email"])).status_code == 400


async def test_the_case_of_the_email_does_not_count(
    alice: Client, mailbox: Mailbox
) -> None:
    await recover(alice, f" {alice.user['email'].upper()} ")
    await reset(alice, mailbox.token())


async def test_a_reset_ends_every_login(alice: Client, mailbox: Mailbox) -> None:
    other, bob = await alice.log_in(alice.user["email"]), await alice.new_user()
    await recover(alice)
    assert await other.is_logged_in()
    await reset(alice, mailbox.token())
    assert not await alice.is_logged_in()
    assert not await other.is_logged_in()
    assert await bob.is_logged_in()


async def test_no_login_with_the_old_password_outlives_a_reset(
    alice: Client, mailbox: Mailbox
) -> None:
    await recover(alice)
    old = [alice.get_token(alice.user["email"]) for _ in range(8)]
    [_, *responses] = await at_once([reset(alice, mailbox.token()), *old])
    for response in responses:
        if response.status_code == 200:
            alice.use(response)
            assert not await alice.is_logged_in()


# --- Tokens


async def test_a_token_works_once(alice: Client, mailbox: Mailbox) -> None:
    await recover(alice)
    token = mailbox.token()
    await reset(alice, token)
    problem = await reset(alice, token, 400)
    assert problem == {"detail": "Invalid or expired token"}


async def test_the_new_password_works_after_ten_wrong_ones(
    alice: Client, mailbox: Mailbox
) -> None:
    for _ in range(10):
        await alice.get_token(alice.email, "wrong")
    await recover(alice)
    await reset(alice, mailbox.token())
    await alice.log_in(alice.email, NEW_PASSWORD)


async def test_of_concurrent_uses_one_succeeds(alice: Client, mailbox: Mailbox) -> None:
    await recover(alice)
    body = {"token": mailbox.token(), "password": NEW_PASSWORD}
    uses = await at_once(alice.post("/auth/reset", json=body) for _ in range(8))
    assert statuses(uses) == [204] + 7 * [400]


async def test_a_token_is_valid_for_an_hour(alice: Client, mailbox: Mailbox) -> None:
    await recover(alice)
    claims = claims_of(mailbox.token())
    assert claims["exp"] - time.time() == pytest.approx(3600, abs=60)
    await reset(alice, sign(**claims | {"exp": time.time() - 1}), 400)
    await reset(alice, sign(**claims | {"exp": time.time() + 60}))


@pytest.mark.parametrize(
    "changes",
    [{"key": "k" * 32}, {"alg": "none"}, {"alg": "HS512"}, {"aud": None}, {"aud": "x"}],
    ids=str,
)
async def test_a_forged_token_is_refused(
    alice: Client, mailbox: Mailbox, changes: dict[str, Any]
) -> None:
    await recover(alice)
    await reset(alice, sign(**claims_of(mailbox.token()) | changes), 400)


async def test_the_token_of_another_user_is_refused(
    alice: Client, mailbox: Mailbox
) -> None:
    bob = await alice.new_user()
    await recover(bob)
    theirs = claims_of(mailbox.token())
    await recover(alice)
    mine = claims_of(mailbox.token())
    assert mine["fp"] != theirs["fp"]
    await reset(alice, sign(**theirs | {"fp": mine["fp"]}), 400)


async def test_a_token_of_a_login_is_no_reset_token(alice: Client) -> None:
    for token in alice.tokens["access_token"], alice.tokens["refresh_token"]:
        await reset(alice, token, 400)


async def test_a_reset_token_is_no_access_token(
    alice: Client, mailbox: Mailbox
) -> None:
    await recover(alice)
    token = mailbox.token()
    headers = {"Authorization": f"Bearer {token}"}
    assert (await alice.get("/users/me", headers=headers)).status_code == 401
    assert (await alice.refresh(token)).status_code == 400
    await alice.post("/auth/revoke", data={"token": token})
    assert await alice.is_logged_in()
    await reset(alice, token)  # and still works
    assert (await alice.get("/users/me", headers=headers)).status_code == 401


@pytest.mark.parametrize("field", ["email", "password"])
async def test_a_change_of_the_account_ends_the_token(
    alice: Client, mailbox: Mailbox, field: str
) -> None:
    await recover(alice)
    new = {"email": new_email(), "password": "a third password"}[field]
    change = {field: new, "current_password": PASSWORD}
    await alice.expect(200, "PATCH /users/me", **change)
    await reset(alice, mailbox.token(), 404 if field == "email" else 400)


async def test_a_token_is_not_for_the_next_user_of_the_email(
    alice: Client, mailbox: Mailbox
) -> None:
    await recover(alice)
    await alice.expect(204, "DELETE /users/me")
    await reset(alice, mailbox.token(), 404)
    await recover(alice)
    assert mailbox.mails == []
    again = await alice.new_user(email=alice.user["email"], password=NEW_PASSWORD)
    await recover(alice)
    token = mailbox.token()
    await again.expect(204, "DELETE /users/me")
    await alice.new_user(email=alice.user["email"])
    await reset(alice, token, 400)


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_change_during_a_reset_ends_the_token(
    alice: Client, mailbox: Mailbox, monkeypatch: Patch, is_late: bool
) -> None:
    await recover(alice)
    change, call = "hashed_password = 'x'", reset(alice, mailbox.token(), 400)
    if is_late:  # while it waits for the lock
        await call_during(alice, f"UPDATE users SET {change}", call)
        return
    hash_password = alice.app.hash_password

    async def hash_slowly(password: str) -> str:
        await alice.set_user(change)
        return str(await hash_password(password))

    monkeypatch.setattr(alice.app, "hash_password", hash_slowly)
    await call


# --- Who gets an email


async def test_an_unknown_email_gets_the_same_answer(
    alice: Client, mailbox: Mailbox, monkeypatch: Patch
) -> None:
    answers, hashed = list[Any](), list[bytes]()
    before_hashing(monkeypatch, lambda password, _: hashed.append(password))
    for to in (alice.user["email"], new_email()):
        with recorded_statements(alice.app) as statements:
            response = await recover(alice, to)
        answers.append(
            (response.status_code, response.text, response.headers.raw, statements)
        )
    assert answers[0] == answers[1]
    assert answers[0][3]
    assert hashed == []
    assert [mail["To"] for mail in mailbox.mails] == [alice.user["email"]]


async def test_an_inactive_user_gets_no_email(alice: Client, mailbox: Mailbox) -> None:
    await alice.set_user("is_active = false")
    assert (await recover(alice)).status_code == 202
    assert mailbox.commands == []


async def test_an_inactive_user_cannot_reset(alice: Client, mailbox: Mailbox) -> None:
    await recover(alice)
    await alice.set_user("is_active = false")
    await reset(alice, mailbox.token(), 404)
    await alice.set_user("is_active = true")
    assert (await alice.get_token(alice.user["email"])).status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "{0}\nBcc: eve@example.com",
        "{0}\r\nBcc: eve@example.com",
        "{0}%0ABcc: eve@example.com",
        "{0}, eve@example.com",
        "{0}\0",
        '"a\nb"@example.com',
        "eve@example.com\n<{0}>",
    ],
)
async def test_no_address_adds_a_header_or_a_recipient(
    alice: Client, mailbox: Mailbox, address: str
) -> None:
    response = await recover(alice, address.format(alice.user["email"]))
    assert response.status_code == 422
    assert mailbox.commands == []


async def test_a_header_has_no_line_break(api: Client, mailbox: Mailbox) -> None:
    for to, subject in (("a@example.com\nBcc: x@x.com", "x"), ("a@x.com", "x\r\ny")):
        with pytest.raises(ValueError, match="linefeed"):
            api.app.send_email(to, subject, "text")
    assert mailbox.commands == []


async def test_the_link_is_not_from_the_host_header(
    alice: Client, mailbox: Mailbox
) -> None:
    body = {"email": alice.user["email"]}
    headers = {"Host": "evil.example", "X-Forwarded-Host": "evil.example"}
    await alice.post("/auth/recover", json=body, headers=headers)
    await reset(alice, mailbox.token())  # checks the page


# --- Limits


@pytest.mark.parametrize("is_known", [False, True])
async def test_requests_are_limited_by_email(
    alice: Client, mailbox: Mailbox, is_known: bool
) -> None:
    to = alice.user["email"] if is_known else new_email()
    for n in range(10):
        client = at(alice, f"10.0.0.{n}")
        assert (await recover(client, to.upper())).status_code == 202
    response = await recover(at(alice, "10.0.0.99"), to)
    assert response.status_code == 429
    assert 0 < int(response.headers["Retry-After"]) <= 900
    assert len(mailbox.mails) == (10 if is_known else 0)


async def test_requests_are_limited_by_address(alice: Client) -> None:
    for n in range(10):
        response = await recover(at(alice, f"2001:db8::{n}"), new_email())
        assert response.status_code == 202
    assert (await recover(at(alice, "2001:db8::ff"), new_email())).status_code == 429
    assert (await recover(at(alice, "2001:db8:0:1::1"), new_email())).status_code == 202


async def test_a_limit_ends_after_15_minutes(alice: Client) -> None:
    responses = [await recover(alice) for _ in range(11)]
    assert statuses(responses) == 10 * [202] + [429]
    await alice.sql("UPDATE login_attempts SET created_at = '2020-01-01 00:00:00+00'")
    assert (await recover(alice)).status_code == 202


async def test_a_new_account_with_the_email_is_limited_too(alice: Client) -> None:
    for n in range(10):
        await recover(at(alice, f"10.0.0.{n}"), alice.user["email"])
    await alice.expect(204, "DELETE /users/me")
    again = await alice.new_user(email=alice.user["email"])
    change = {"email": new_email(), "current_password": PASSWORD}
    assert (await recover(again)).status_code == 429
    await again.expect(200, "PATCH /users/me", **change)
    assert (await recover(again)).status_code == 429
    assert (await recover(again, change["email"])).status_code == 202


async def test_a_limit_holds_across_workers(url: str) -> None:
    async with running(load_app(url)) as one, running(load_app(url)) as two:
        to = new_email()
        responses = [await recover(client, to) for client in (one, two) * 6]
    assert statuses(responses) == 10 * [202] + 2 * [429]


async def test_the_limit_is_not_the_one_of_logins(alice: Client) -> None:
    for _ in range(10):
        await recover(alice)
    await alice.log_in(alice.user["email"])


# --- Sending


async def test_an_email_is_sent_after_the_answer_without_a_connection(
    alice: Client, mailbox: Mailbox
) -> None:
    app, events = alice.app, list[str]()
    pools = {app.engine.pool, app.autocommit_engine.pool}

    async def observed(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            await send(message)
            events.append(message["type"])

        await app.app(scope, receive, note)

    def note_connect() -> None:
        events.append(f"mail {sum(pool.checkedout() for pool in pools)}")

    mailbox.on_connect = note_connect
    client = Client(httpx.ASGITransport(observed), app=app)
    await recover(client, alice.user["email"])
    assert events == ["http.response.start", "http.response.body", "mail 0"]


async def test_a_user_is_looked_up_after_the_answer(
    alice: Client, mailbox: Mailbox
) -> None:
    app, before = alice.app, list[str]()

    async def observed(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            before[:] = statements
            await send(message)

        await app.app(scope, receive, note)

    client = Client(httpx.ASGITransport(observed), app=app)
    with recorded_statements(app) as statements:
        await recover(client, alice.user["email"])
    assert not [statement for statement in before if "users" in statement]
    assert len(mailbox.mails) == 1


async def test_the_event_loop_runs_while_an_email_is_sent(
    alice: Client, mailbox: Mailbox
) -> None:
    # The SMTP server is in this loop: if it did not run, no email would arrive.
    with anyio.fail_after(5):
        await recover(alice)
    assert len(mailbox.mails) == 1


async def test_hashing_holds_no_connection(
    alice: Client, mailbox: Mailbox, monkeypatch: Patch
) -> None:
    app, seen = alice.app, list[int]()
    pools = {app.engine.pool, app.autocommit_engine.pool}

    def note(*_: bytes) -> None:
        seen.append(sum(pool.checkedout() for pool in pools))

    await recover(alice)
    before_hashing(monkeypatch, note)
    await reset(alice, mailbox.token())
    assert seen == [0]


async def test_no_password_is_hashed_for_an_invalid_token(
    alice: Client, monkeypatch: Patch
) -> None:
    hashed = list[bytes]()
    before_hashing(monkeypatch, lambda password, _: hashed.append(password))
    await reset(alice, alice.tokens["access_token"], 400)
    assert hashed == []


async def send(monkeypatch: Patch, client: Client, caplog: Log, smtp_url: str) -> str:
    """Ask for an email with this SMTP_URL; return the new lines of the log."""
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(client.app.settings, "smtp_url", smtp_url)
    assert (await recover(client)).status_code == 202
    assert client.user["email"] not in caplog.text
    return caplog.text


@pytest.mark.parametrize(
    ("smtp_url", "problem"),
    [
        ("", "SMTPServerDisconnected"),
        ("smtp://127.0.0.1:1", "ConnectionRefusedError"),
        ("smtp://127.0.0.1:port", "ValueError"),
    ],
)
async def test_a_failure_is_logged_and_changes_no_answer(
    alice: Client, monkeypatch: Patch, caplog: Log, smtp_url: str, problem: str
) -> None:
    text = await send(monkeypatch, alice, caplog, smtp_url)
    assert problem in text.partition("Email not sent: ")[2]
    assert "#token" not in text


async def test_an_odd_address_is_logged(api: Client, caplog: Log) -> None:
    odd = await api.new_user(
        email="=?x?q??=@example.com"
    )  # EmailMessage cannot read it
    assert (await recover(odd)).status_code == 202
    assert "Email not sent: <class 'IndexError'>" in caplog.text


async def test_a_server_that_says_nothing_is_given_up(
    alice: Client, monkeypatch: Patch, caplog: Log
) -> None:
    real, timeouts = smtplib.SMTP, list[float]()

    def connect(host: str, port: int, timeout: float) -> Any:
        timeouts.append(timeout)
        return real(host, port, timeout=0.2)

    async def wait(reader: asyncio.StreamReader, writer: Any) -> None:
        await reader.read()
        writer.close()

    monkeypatch.setattr(smtplib, "SMTP", connect)
    async with await asyncio.start_server(wait, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        url = f"smtp://127.0.0.1:{port}"
        assert "SMTPServerDisconnected" in await send(monkeypatch, alice, caplog, url)
    assert timeouts == [10]


async def test_a_password_is_never_sent_without_tls(
    alice: Client, mailbox: Mailbox, monkeypatch: Patch, caplog: Log
) -> None:
    url = mailbox.url.replace("//", "//shop:s3cr3t@")
    text = await send(monkeypatch, alice, caplog, url)
    assert "SMTPNotSupportedError" in text
    assert "s3cr3t" not in text
    assert not [command for command in mailbox.commands if "AUTH" in command]
    assert mailbox.mails == []


async def test_development_logs_the_link(url: str, caplog: Log) -> None:
    app = load_app(url, FASTAPI_ENV="development", RESET_URL=PAGE)
    async with running(app) as client:
        alice = await client.new_user()
        await recover(alice)
        _, _, token = caplog.text.partition(PAGE)
        await reset(alice, token.split()[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("SMTP_URL", "ftp://x"), ("SMTP_URL", "x"), ("EMAIL_FROM", "a\nb@example.com")],
)
def test_an_invalid_setting_stops_the_start(caplog: Log, name: str, value: str) -> None:
    with pytest.raises(SystemExit):
        load_app(**{name: value})
    assert f"{name}: " in caplog.text


# --- Bad input


@pytest.mark.parametrize(
    "token",
    ["", "a", "a.b.c", "..", "\0", "é", "x" * 1000, "x" * 1001, "W" * 400 + ".."],
)
async def test_no_token_is_a_5xx(alice: Client, token: str) -> None:
    body = {"token": token, "password": NEW_PASSWORD}
    response = await alice.post("/auth/reset", json=body)
    assert response.status_code in (400, 422)


async def test_the_rules_of_new_passwords_apply(
    alice: Client, mailbox: Mailbox
) -> None:
    await recover(alice)
    token = mailbox.token()
    for password in ("short", "x" * 73, "\0" * 8):
        body = {"token": token, "password": password}
        problem = await alice.expect(422, "POST /auth/reset", **body)
        assert token not in str(problem)
    await reset(alice, token)
