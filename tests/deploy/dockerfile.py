"""What a Dockerfile of deploy/ does, read line by line, so that it can be replayed where no container engine runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PREFIX = "/opt/distseg"  # of the environment in the image


def bare(**more: str) -> dict[str, str]:
    """This environment without what would let the tree or the environment of the tests shine through."""
    hidden = ("PYTHON", "RAY_", "VIRTUAL_ENV")
    return {**{key: value for key, value in os.environ.items() if not key.startswith(hidden)}, **more}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(word, rest) of each line, comments left out and continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def of_the_environment(rest: str) -> bool:
    """A RUN line that fills the virtual environment: not one for the image's own system (users, apt)."""
    return PREFIX in rest and not any(word in rest for word in ("apt-get", "groupadd"))


def copy(words: list[str], source: Path) -> None:
    """COPY of files into a folder, or of one folder to a name."""
    *froms, to = words
    for name in froms:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / to)
