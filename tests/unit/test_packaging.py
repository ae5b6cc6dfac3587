"""What ships: conf/ inside the wheel, declared dependencies, and the versions that were tested."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distribution name -> the module it brings, where the two differ.
MODULES = {
    "hydra-core": "hydra",
    "PyYAML": "yaml",
    "faiss-cpu": "faiss",
    "faiss-gpu": "faiss",
    "universal-pathlib": "upath",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the backend at hand: nothing is fetched."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel_has_conf_and_types_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"distseg/conf/{path.name}" for path in (ROOT / "conf").glob("*.yaml")} <= names
    assert "distseg/conf/train.yaml" in names
    assert "distseg/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]
    assert any(name.endswith("LICENSE") for name in names)


def test_command_line_works_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import sys; from distseg import cli; print(cli.conf_folder()); sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "cohort=c", "run=r", "--cfg", "job", "method=uamt"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "distseg" / "conf")
    assert "name: uamt" in done.stdout


def test_every_import_is_declared() -> None:
    declared = {
        re.split(r"[\[<>=!~ ]", line)[0]
        for line in PROJECT["dependencies"]
        + [line for extra, lines in PROJECT["optional-dependencies"].items() if extra != "dev" for line in lines]
    }
    allowed = {MODULES.get(name, name).replace("-", "_") for name in declared} | {"distseg"} | sys.stdlib_module_names
    missing = set()
    for path in (ROOT / "distseg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            missing |= {f"{path.name}: {name}" for name in names if name.split(".")[0] not in allowed}
    assert not missing


def test_every_dependency_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("dependencies = [")
    for line in lines[start + 1 : lines.index("]", start)]:
        assert re.search(r'^    "[^"]+",\s+# \S+', line), line


def test_constraints_pin_a_version_in_range_for_every_dependency() -> None:
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = {canonicalize_name(name): version for name, version in lines}
    wanted = PROJECT["dependencies"] + [
        line for extra in ("cpu", "gpu", "io", "remote", "dev") for line in PROJECT["optional-dependencies"][extra]
    ]
    for line in wanted:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pins, line
        assert requirement.specifier.contains(pins[name]), line


def test_console_script_is_the_door() -> None:
    scripts = metadata.entry_points(group="console_scripts", name="distseg")
    assert {script.value for script in scripts} == {"distseg.cli:main"}


def test_readme_and_ci_run_the_same_tests() -> None:
    assert "make test" in "\n".join((ROOT / "README.md").read_text().splitlines()[:35])
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
