"""Rooms import lower floors only, and only the room that owns a heavy framework loads it (DESIGN section 4).

Arrows between rooms are read from the import statements, wherever they stand; frameworks are looked for in
`sys.modules` of a fresh process that imported every module of the room. The checker itself is tested on a planted
violation.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "distseg"
FLOORS = {
    "errors": 0,
    "config": 1,
    "losses": 1,
    "networks": 1,
    "evaluation": 1,
    "data": 2,
    "matching": 2,
    "inference": 3,
    "methods": 4,
    "training": 5,
    "work": 6,
    "distributed": 7,
    "api": 8,
    "doors": 9,
    "cli": 9,
}
# The only modules that may import it, by dotted prefix.
OWNERS = {"ray": ("distseg.distributed.",), "hydra": ("distseg.cli.",), "faiss": ("distseg.matching.index.",)}
# The front of the package names api's functions lazily and belongs to no floor.
FRONT = "distseg"


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module in the package folder."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import statement in the file; `from a import b` gives a.b as well as a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "distseg" and len(parts) > 1 and parts[1] in FLOORS else None


def violations(package: Path) -> list[str]:
    """Every import that climbs, stays on its floor across rooms, or takes a framework from its owner."""
    wrong = []
    for module, path in modules(package).items():
        here = room(module)
        for line, target in imported(path):
            there, framework = room(target), target.split(".")[0]
            if framework in OWNERS and not f"{module}.".startswith(OWNERS[framework]):
                wrong.append(f"{module}:{line} imports {target}, which belongs to {OWNERS[framework][0][:-1]}")
            if module == FRONT or here is None or there is None or here == there:
                continue
            same_door = {here, there} == {"cli", "doors"}
            if FLOORS[there] >= FLOORS[here] and not same_door:
                wrong.append(f"{module}:{line} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})")
    return sorted(set(wrong))


def test_imports_go_down() -> None:
    assert violations(PACKAGE) == []


def test_every_module_lives_in_a_room() -> None:
    assert [name for name in modules(PACKAGE) if name != FRONT and room(name) is None] == []


@pytest.mark.parametrize(
    ("where", "statement", "says"),
    [
        ("losses/planted.py", "from distseg.training import step", "(floor 1) imports distseg.training"),
        ("data/planted.py", "from distseg.matching.index import x", "(floor 2) imports distseg.matching.index"),
        ("work/planted.py", "def f():\n    import ray.data", "distseg.work.planted:2 imports ray.data"),
        ("api.py", "from hydra import compose", "imports hydra.compose"),
        ("matching/surface.py", "import faiss", "imports faiss"),
        ("matching/index_torch.py", "import faiss", "imports faiss"),
        ("errors.py", "import distseg.config.checks", "(floor 0) imports distseg.config.checks"),
    ],
)
def test_the_checker_sees_a_planted_violation(tmp_path: Path, where: str, statement: str, says: str) -> None:
    planted = tmp_path / "distseg" / where
    planted.parent.mkdir(parents=True)
    planted.write_text(statement + "\n")
    found = violations(tmp_path / "distseg")
    assert found
    assert any(says in line for line in found), found


# Loads what is slow and nobody's own, then forks a child for each room: each child is fresh as far as distseg goes.
FORKS = """
import importlib, json, os, sys
import torch, monai.networks.blocks, scipy.ndimage, zarr, nibabel
for line in sys.stdin:
    modules = json.loads(line)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            for module in modules:
                importlib.import_module(module)
            print(json.dumps(sorted(sys.modules)), flush=True)
        except BaseException as error:
            print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def loaded_by_room() -> dict[str, list[str]]:
    rooms = {name: [module for module in modules(PACKAGE) if room(module) == name] for name in FLOORS}
    lines = "".join(json.dumps([m for m in mine if m != "distseg.matching.index"]) + "\n" for mine in rooms.values())
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(rooms, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", FLOORS)
def test_a_room_loads_only_what_it_owns(loaded_by_room: dict[str, list[str]], name: str) -> None:
    """All of a room's modules, nothing else of ours before: no foreign framework, no higher room."""
    loaded = loaded_by_room[name]
    assert isinstance(loaded, list), loaded
    assert f"distseg.{name}" in loaded
    frameworks = {"ray", "faiss", "hydra"} - ({"ray"} if name == "distributed" else set())
    assert frameworks.isdisjoint(module.split(".")[0] for module in loaded)
    higher = {other for other in map(room, loaded) if other is not None and FLOORS[other] > FLOORS[name]}
    assert not higher


@pytest.mark.parametrize("verb", ["train", "ingest", "cohort"])
def test_the_package_loads_verbs_lazily(verb: str) -> None:
    code = f"""
import sys, distseg
assert "torch" not in sys.modules and "numpy" not in sys.modules and "distseg.api" not in sys.modules
assert callable(distseg.{verb})
assert not {{"torch", "ray", "hydra", "faiss", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
