"""Perform the README's recipes over HTTP, after readme.py has pasted them.

uv run python -m pytest .ci/test_recipes.py
"""

import json
import secrets
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
import sqlalchemy as sa

from test_app import HOSTILE, Client, at_once, statuses

pytest_plugins = "test_app"  # its fixtures


async def add_notes(client: Client, *notes: dict[str, Any]) -> list[int]:
    """Create notes and return their ids."""
    return [(await client.expect(201, "POST /notes", **n))["id"] for n in notes]


async def list_texts(client: Client, url: str) -> list[str]:
    return [note["text"] for note in await client.expect(200, f"GET {url}")]


async def test_a_table_has_private_rows(alice: Client, api: Client) -> None:
    note, bob = await alice.expect(201, "POST /notes", text="a"), await api.new_user()
    url = f"/notes/{note['id']}"
    assert await alice.expect(200, "GET /notes") == [note]
    assert await alice.expect(200, f"GET {url}") == note
    changed = await alice.expect(200, f"PATCH {url}", text="b")
    assert changed == note | {"text": "b", "updated_at": changed["updated_at"]}
    await alice.expect(422, f"PATCH {url}", text="x" * 10_001)
    for method in ("GET", "PATCH", "DELETE"):
        await bob.expect(404, f"{method} {url}")
    assert await bob.expect(200, "GET /notes") == []
    await alice.expect(204, f"DELETE {url}")
    await alice.expect(404, f"GET {url}")


async def test_each_kind_of_field_is_stored_as_it_was_sent(alice: Client) -> None:
    slug = f"Slug-{secrets.token_hex(4)}"
    sent = {
        "subtitle": "a subtitle",
        "published": True,
        "status": "done",
        "price": "9876543210.99",
        "due_on": "2030-01-31",
        "starts_at": "2030-01-31T01:00:00+02:00",
        "website": "https://example.com/?q=1",
        "slug": slug.upper(),
        "labels": {"color": "red", "\0": "\U0001f600"},
    }
    stored = sent | {"starts_at": "2030-01-30T23:00:00Z", "slug": slug.lower()}
    response = await alice.post("/notes", json={"text": "a"} | sent)
    note, url = response.json(), f"/notes/{response.json()['id']}"
    assert note.items() >= stored.items()
    assert await alice.expect(200, f"GET {url}") == note
    taken = await alice.expect(400, "POST /notes", text="b", slug=slug)
    assert taken == {"detail": "Slug already registered"}
    for name in sent:
        response = await alice.patch(url, json={name: None})
        is_required = name in ("published", "status")
        assert response.status_code == (422 if is_required else 200), name
    where = f"id = {note['id']} AND labels IS NULL AND status = 'done'"
    assert await alice.sql(f"SELECT 1 FROM notes WHERE {where}")
    response = await alice.patch(url, json=sent)
    assert response.json().items() >= stored.items()


async def test_no_value_of_a_field_makes_a_row_unreadable(alice: Client) -> None:
    [id_] = await add_notes(alice, {"text": "a"})
    odd = [*HOSTILE, "1e999", "1.234", "ftp://x", "https://\0", "https://\ud800"]
    odd += ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "0000-00-00"]
    odd += [{text: "x"} for text in HOSTILE if isinstance(text, str)]
    odd += [{"x": value} for value in [*HOSTILE, "\0", 1e999]]
    for name in alice.app.NoteUpdate.model_fields:
        for value in odd:
            content = json.dumps({"text": "b", name: value})
            for method, url in (("PATCH", f"/notes/{id_}"), ("POST", "/notes")):
                response = await alice.request(method, url, content=content)
                got = f"{method} {content:.99}: {response.status_code}"
                assert response.status_code in (200, 201, 400, 422), got
                if response.is_success:
                    read = f"/notes/{response.json()['id']}"
                    assert (await alice.get(read)).json() == response.json(), got


async def test_a_reference_is_cleared_with_its_row(alice: Client) -> None:
    item, [id_] = await alice.new_item(), await add_notes(alice, {"text": "a"})
    where = f"WHERE id = {id_} AND item_id"
    await alice.sql(f"UPDATE notes SET item_id = {item['id']} WHERE id = {id_}")
    assert await alice.sql(f"SELECT 1 FROM notes {where} = {item['id']}")
    await alice.sql(f"DELETE FROM items WHERE id = {item['id']}")  # not to the trash
    assert await alice.sql(f"SELECT 1 FROM notes {where} IS NULL")


async def test_only_superusers_give_a_permission(alice: Client) -> None:
    root = await alice.log_in()
    user = await alice.expect(200, "PATCH /users/me", company="Engines Ltd")
    assert (user["company"], user["is_editor"]) == ("Engines Ltd", False)
    await alice.expect(403, "PATCH /users/me", is_editor=True)
    await root.expect(200, f"PATCH {alice.url}", is_editor=True)
    caller = await alice.app.get_caller(alice.tokens["access_token"])
    assert caller.is_editor


async def test_anybody_can_search_published_notes(alice: Client, api: Client) -> None:
    word, nobody, bob = secrets.token_hex(4), api, await api.new_user()
    notes = [{"text": f"{word} {i}", "published": i > 0} for i in range(4)]
    ids = await add_notes(alice, *notes)
    await add_notes(bob, {"text": f"{word} draft"})
    url = f"/notes/search?sort=-id&limit=2&q={word.upper()}"
    for client, expected in ((nobody, [3, 2, 1]), (bob, ["draft", 3, 2, 1])):
        texts, page = list[str](), url
        while page:
            response = await client.get(page)
            texts += [note["text"] for note in response.json()]
            page = response.links.get("next", {}).get("url", "")
        assert texts == [f"{word} {i}" for i in expected]
    own = await list_texts(alice, f"/notes/search?q={word}")
    assert own == [f"{word} {i}" for i in range(4)]
    assert await list_texts(nobody, f"/notes/search?q={word}%25") == []  # no wildcard
    await bob.expect(404, f"PATCH /notes/{ids[1]}", text="x")  # published, not theirs


async def test_a_list_has_the_same_order_on_both_databases(alice: Client) -> None:
    days = {"b": "2030-01-02", "a": None, "Z": "2030-01-01", "é": "2030-01-02"}
    days |= {"É": None, "_": "2029-12-31", "z": "2030-01-01", "A b": None, "a-b": None}
    for text, day in days.items():
        status = "done" if text == "b" else "open"
        await add_notes(alice, {"text": text, "due_on": day, "status": status})
    by_text = ["_", "a", "A b", "a-b", "b", "Z", "z", "É", "é"]
    by_day = ["_", "Z", "z", "b", "é", "a", "É", "A b", "a-b"]
    by_status = [*list(days)[1:], "b"]  # "open" is above "done" in the enumeration
    for name, expected in (
        ("text", by_text),
        ("due_on", by_day),
        ("status", by_status),
    ):
        url = f"/notes/sorted?by={name}"
        assert await list_texts(alice, url) == expected
        assert await list_texts(alice, f"{url}&skip=7") == expected[7:]
        assert "Link" not in (await alice.get(url)).headers


async def test_notes_share_tags(alice: Client, api: Client) -> None:
    bob, new = await api.new_user(), secrets.token_hex(4)
    [first, second], [other] = (
        await add_notes(alice, {"text": "1"}, {"text": "2"}),
        await add_notes(bob, {"text": "3"}),
    )
    for client, id_, names in (
        (alice, first, ["a", f"{new} b", "a"]),
        (alice, second, [f"{new} b", "c"]),
        (bob, other, ["a"]),
        (alice, first, ["c", new]),
        (alice, second, []),
    ):
        url = f"/notes/{id_}/tags"
        assert (await client.put(url, json=names)).status_code == 204
        tags = await client.expect(200, f"GET {url}")
        assert sorted(tag["name"] for tag in tags) == sorted({*names})
    assert (await bob.put(f"/notes/{first}/tags", json=[])).status_code == 404
    await bob.expect(404, f"GET /notes/{first}/tags")
    many = [str(number) for number in range(21)]
    assert (await bob.put(f"/notes/{other}/tags", json=many)).status_code == 422
    await bob.expect(204, f"DELETE /notes/{other}")
    assert len(await alice.sql("SELECT 1 FROM tags WHERE name = 'a'")) == 1


async def test_likes_are_counted_once_each(alice: Client) -> None:
    bob, eve = await alice.new_user(), await alice.new_user()
    [id_, draft] = await add_notes(
        alice, {"text": "a", "published": True}, {"text": "b"}
    )
    url = f"/notes/{id_}"
    assert {*statuses(await at_once(bob.put(f"{url}/like") for _ in range(5)))} == {204}
    await eve.expect(204, f"PUT {url}/like")
    await eve.expect(404, f"PUT /notes/{draft}/like")
    note = await bob.expect(200, f"GET {url}/likes")
    assert (note["likes"], note["is_liked"], note["text"]) == (2, True, "a")
    assert await bob.expect(200, "GET /notes/liked") == [note]
    await eve.expect(204, "DELETE /users/me")
    note = await alice.expect(200, f"GET {url}/likes")
    assert (note["likes"], note["is_liked"]) == (1, False)


async def new_note(client: Client, text: str = "a note") -> Any:
    return await client.expect(201, "POST /notes", text=text)


async def new_team(admin: Client, *members: Client) -> tuple[str, str]:
    """Create a team and return its path, and an invitation that its members used."""
    team = await admin.expect(201, "POST /teams", name="Crew")
    path = f"/teams/{team['id']}"
    code = await admin.expect(201, f"POST {path}/invitations", uses=len(members) + 1)
    for member in members:
        await member.expect(204, "POST /teams/join", code=code)
    return path, code


async def role(client: Client, status: int, path: str, who: Client, role: Any) -> None:
    await client.expect(status, f"PUT {path}/members/{who.user['id']}", role=role)


async def test_a_role_gives_its_rights_and_no_more(alice: Client) -> None:
    bob, eve = await alice.new_user(), await alice.new_user()
    path, _ = await new_team(alice, bob)
    await eve.expect(404, f"GET {path}")
    await bob.expect(200, f"GET {path}")
    await bob.expect(404, f"PATCH {path}", name="Mine")
    await role(bob, 404, path, bob, "admin")
    await role(alice, 204, path, bob, "editor")
    assert (await bob.expect(200, f"PATCH {path}", name="Ours"))["name"] == "Ours"
    await role(bob, 404, path, alice, None)
    await role(bob, 204, path, bob, None)  # leaves
    await bob.expect(404, f"GET {path}")


async def test_a_list_without_ids_has_pages(alice: Client) -> None:
    users = [await alice.new_user() for _ in range(4)]
    path, _ = await new_team(alice, *users)
    for sort in ("id", "-id"):
        found, url = list[str](), f"{path}/members?limit=2&sort={sort}"
        while url:
            response = await alice.get(url)
            found += [member["email"] for member in response.json()]
            url = response.links.get("next", {}).get("url", "")
        emails = [user.email for user in (alice, *users)]
        assert found == (emails if sort == "id" else emails[::-1])


async def test_the_last_admin_stays(alice: Client) -> None:
    for new in (None, "viewer"):
        bob = await alice.new_user()
        path, _ = await new_team(alice, bob)
        await role(alice, 400, path, alice, new)
        await role(alice, 204, path, bob, "admin")
        both = [(c, f"{path}/members/{c.user['id']}") for c in (alice, bob)]
        sent = [c.put(url, json={"role": new}) for c, url in both]
        assert statuses(await at_once(sent)) == [204, 400]
    # A user who is deleted leaves the team to superusers.
    path, _ = await new_team(bob, alice)
    await bob.expect(204, "DELETE /users/me")
    await role(await alice.log_in(), 204, path, alice, "admin")
    await role(alice, 400, path, alice, None)


async def test_notes_of_an_owner_have_each_number_once(alice: Client) -> None:
    root, bob = await alice.log_in(), await alice.new_user()
    others, owner = await bob.new_item(), alice.user["id"]
    notes = [await new_note(alice) for _ in range(8)]
    items = [await alice.new_item() for _ in notes]
    pairs = zip(notes, items, strict=True)
    calls = [alice.put(f"/notes/{n['id']}/items/{i['id']}") for n, i in pairs]
    assert statuses(await at_once(calls)) == [204] * 8
    rows = await alice.sql(f"SELECT number FROM notes WHERE owner_id = {owner}")
    assert sorted(n for [n] in rows) == list(range(1, 9))
    for client in (alice, root):  # nor can a superuser mix owners
        call = f"PUT /notes/{notes[0]['id']}/items/{others['id']}"
        await client.expect(404, call)


async def test_an_invitation_is_used_at_most_n_times(alice: Client) -> None:
    path, code = await new_team(alice)  # one use is left
    users = [await alice.new_user() for _ in range(6)]
    calls = [user.post("/teams/join", json={"code": code}) for user in users]
    assert statuses(await at_once(calls)) == [204] + [404] * 5
    code = await alice.expect(201, f"POST {path}/invitations", uses=1)
    await alice.expect(400, "POST /teams/join", code=code)  # is a member: no use
    joins = [await user.post("/teams/join", json={"code": code}) for user in users]
    assert statuses(joins)[0] == 204


async def test_every_deletion_leaves_a_trail(alice: Client) -> None:
    first, second = await new_note(alice), await new_note(alice)
    await alice.expect(204, f"DELETE /notes/{first['id']}")
    await alice.expect(204, "DELETE /users/me")
    trail = f"FROM changes WHERE note_id IN ({first['id']}, {second['id']})"
    stored = await alice.sql(f"SELECT user_id, action, created_at IS NULL {trail}")
    assert [(who, action) for who, action, _ in stored] == [(alice.id, "delete")] * 2


async def test_an_api_key_works_until_it_is_revoked(alice: Client) -> None:
    note, others = await new_note(alice), await new_note(await alice.new_user())
    key = await alice.expect(201, "POST /users/me/keys")
    stored = await alice.sql("SELECT key_hash FROM api_keys")
    assert (key["key"],) not in stored
    bot = Client(alice.transport, app=alice.app)
    for value, call, status in (
        ("x", f"/notes/{note['id']}", 401),
        (key["key"], f"/notes/{others['id']}", 404),
        (key["key"], f"/notes/{note['id']}", 204),
    ):
        bot.headers["API-Key"] = value
        assert (await bot.delete(call)).status_code == status
    await bot.expect(401, "GET /users/me")  # not one of its routes
    note = await new_note(alice)
    await alice.expect(204, f"DELETE /users/me/keys/{key['id']}")
    await bot.expect(401, f"DELETE /notes/{note['id']}")


async def import_csv(client: Client, text: str | bytes) -> httpx.Response:
    return await client.post("/notes/import", files={"file": text})


async def test_an_export_can_be_imported(alice: Client) -> None:
    bob = await alice.new_user()
    await new_note(bob)
    rows = [f'"{i}, ""a""\nb",,' for i in range(2496)]
    rows += ["ä,x,2030-01-31", "'=1+1,'-2,", "''=1,,", "'tis,,"]
    file = "\r\n".join(["text,subtitle,due_on", *rows, ""])
    assert (await import_csv(alice, "\ufeff" + file)).status_code == 204
    export = await alice.get("/notes/export")
    assert export.text == file
    assert export.headers["Content-Type"] == "text/csv; charset=utf-8"
    texts = await list_texts(alice, "/notes?sort=-id&limit=3")
    assert texts == ["'tis", "'=1", "=1+1"]
    assert len((await bob.get("/notes/export")).text.splitlines()) == 2
    await Client(alice.transport, app=alice.app).expect(401, "GET /notes/export")
    file = (await (await alice.new_user()).get("/notes/export")).text
    assert (await import_csv(alice, file)).status_code == 204


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ("a,,\n" * 5000, '[5002],"msg":"Value error, should be one of 5,000 rows'),
        (",b,\n", '[3,"text"]'),
        ('"a\nb",,\n"a\nb",b,tomorrow\n', '[5,"due_on"]'),
        ("\na,,\n,,\n", '[3],"msg":"Value error, should be one'),
        ("\na,,\n,,\n", '[5,"text"]'),
        ("a\0b,,\n", '[3,"text"]'),
        ("a,b\n", "[3]"),
        ("a,b,,d\n", "[3]"),
        ("," * 100_000, "[3]"),
        (b"\xff,,\n", '[3,"text"]'),
        (',,\n"a\nb"c,,\na,,', '[3,"text"]'),
        (',,\n"a\nb"c,,\na,,', "[4]"),
        ("x" * 200_000, "[3]"),
    ],
)
async def test_an_import_is_all_or_nothing(
    alice: Client, rows: Any, error: str
) -> None:
    rows = rows if isinstance(rows, bytes) else rows.encode()
    response = await import_csv(alice, b"text,subtitle,due_on\nfine,,\n" + rows)
    assert response.status_code == 422
    assert f'"loc":{error}' in response.text
    assert len((await alice.get("/notes/export")).text.splitlines()) == 1


async def test_an_import_checks_its_header_and_its_size(alice: Client) -> None:
    for file in (b"", b"text\na", b"a,a,a\n", b"," * 100_000, b"\xff", b"\n" * 2**22):
        response = await import_csv(alice, file)
        assert (response.status_code, len(response.json()["detail"])) == (422, 1)
    large = "text,subtitle,due_on\n" + f"{'x' * 250},,\n" * 5000  # over max_body_size
    assert (await import_csv(alice, large)).status_code == 204
    assert (await import_csv(alice, b" " * (2**23 + 1))).status_code == 413


async def test_an_import_needs_the_login_until_its_commit(alice: Client) -> None:
    app = alice.app
    caller = await app.get_caller(alice.tokens["access_token"])
    await alice.sql(f"DELETE FROM logins WHERE user_id = {alice.id}")
    app.app.dependency_overrides[app.get_caller] = lambda: caller
    response = await import_csv(alice, "text,subtitle,due_on\na,,")
    app.app.dependency_overrides.clear()
    assert response.status_code == 404


async def test_an_error_in_the_middle_ends_the_export(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await new_note(alice)
    fetch, pages = alice.app.fetch, list[Any]()

    async def fail_at_second(statement: Any, *args: Any, **values: Any) -> Any:
        pages.append(statement is alice.app.OWNED_NOTES["id"])
        assert sum(pages) < 2, "the database is away"
        return await fetch(statement, *args, **values)

    monkeypatch.setattr(alice.app, "fetch", fail_at_second)
    with pytest.raises((AssertionError, RuntimeError, httpx.TransportError)):
        await alice.get("/notes/export")


async def test_who_breaks_off_an_export_closes_no_connection(alice: Client) -> None:
    app, opened = alice.app, list[Any]()
    sa.event.listen(
        app.autocommit_engine.sync_engine, "connect", lambda *_: opened.append(1)
    )
    caller = SimpleNamespace(id=alice.id, is_superuser=False)
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            stream = app.write_csv(caller)
            await anext(stream)
            tasks.start_soon(anext, stream, "")
            await anyio.lowlevel.checkpoint()  # its query begins
        tasks.cancel_scope.cancel()
    await alice.expect(200, "GET /users/me")
    assert len(opened) <= app.settings.database_pool_size


async def test_work_follows_the_response(alice: Client, caplog: Any) -> None:
    caplog.set_level("INFO")
    await alice.new_user()
    assert "A user registered" in caplog.text


async def test_daily_work_deletes_what_is_old(
    alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = alice.app.autocommit_engine.sync_engine
    stub = SimpleNamespace(sync_engine=engine, dispose=anyio.lowlevel.checkpoint)
    monkeypatch.setattr(alice.app, "autocommit_engine", stub)
    bob, (path, _) = await alice.new_user(), await new_team(alice)
    empty, _ = await new_team(bob)
    await bob.expect(204, "DELETE /users/me")
    old, new = await alice.new_item(), await alice.new_item()
    for item in (old, new):
        await alice.expect(204, f"DELETE /items/{item['id']}")
    long_ago = "deleted_at = '2020-01-01 00:00:00'"
    await alice.sql(f"UPDATE items SET {long_ago} WHERE id = {old['id']}")
    await alice.app.run_daily()
    root = await alice.log_in()
    await root.expect(200, f"GET {path}")
    await root.expect(404, f"GET {empty}")
    rows = await alice.sql(f"SELECT id FROM items WHERE id >= {old['id']}")
    assert rows == [(new["id"],)]


async def test_a_deleted_item_is_hidden_everywhere(alice: Client) -> None:
    item = await alice.new_item()
    await alice.expect(204, f"DELETE /items/{item['id']}")
    for method in ("GET", "PATCH", "DELETE"):
        await alice.expect(404, f"{method} /items/{item['id']}")
    assert await alice.expect(200, "GET /items") == []
    assert await alice.sql(f"SELECT 1 FROM items WHERE id = {item['id']}")


async def test_routes_of_another_file_use_the_same_app(alice: Client) -> None:
    await alice.new_item()
    assert await alice.expect(200, "GET /stats") == {"items": 1}
