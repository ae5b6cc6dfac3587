"""From nothing to a working `distseg`, as an image and as a site with no internet get it: each in a fresh environment.

Both are `slow`: pip fetches (or takes from its cache) all that distseg needs. TORCH_INDEX is the index for torch, as in
the files tested; where pip would take a torch with CUDA, gigabytes, they skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.dockerfile import DEPLOY, PREFIX, ROOT, bare, copy, instructions, of_the_environment

TORCH_INDEX = os.environ.get("TORCH_INDEX", "")
MINUTES = 60


def run(command: list[str], *, cwd: Path, env: dict[str, str], minutes: int = 15) -> str:
    """What it says on stdout; fails with all it says."""
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=minutes * MINUTES, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The images' Python, below any virtual environment. Skips where its pip would fetch a torch with CUDA."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the images have Python 3.11")
    found = str(Path(sys.base_prefix) / "bin" / "python3.11")
    plan = tmp_path_factory.mktemp("plan")
    index = ["--extra-index-url", TORCH_INDEX] if TORCH_INDEX else []
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "plan.json", *index]
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    run([found, "-m", "pip", "install", *options, pin], cwd=plan, env=bare())
    (torch,) = json.loads((plan / "plan.json").read_text())["install"]
    if any(line.startswith(("nvidia-", "cuda-")) for line in torch["metadata"].get("requires_dist", [])):
        pytest.skip("pip would take a torch with CUDA: set TORCH_INDEX=https://download.pytorch.org/whl/cpu")
    return found


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(40 * MINUTES)
def test_the_cpu_images_run_lines(python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replayed at another prefix, with pip's cache; where a container engine runs, `docker build` says more."""
    venv, source, tools = tmp_path / "distseg", tmp_path / "src", tmp_path / "bin"
    for folder in (source, tools):
        folder.mkdir()
    (tools / "python").symlink_to(python)
    environment = bare(PATH=f"{tools}:{os.environ['PATH']}", TORCH_INDEX=TORCH_INDEX, PYTHONDONTWRITEBYTECODE="1")
    replayed, passed_over = [], []
    for word, rest in instructions((DEPLOY / "Dockerfile.cpu").read_text()):
        if word == "COPY" and not rest.startswith("--from"):
            copy(rest.split(), source)
        elif word == "RUN" and of_the_environment(rest):
            run(["sh", "-ec", rest.replace(PREFIX, str(venv))], cwd=source, env=environment)
            replayed.append(rest)
        elif word == "RUN":
            passed_over.append(rest)
    shutil.rmtree(source)  # the last stage has the environment alone
    with capsys.disabled():
        print(*(f"\nnot replayed: RUN {rest}" for rest in passed_over), sep="")
    assert len(replayed) == 3
    assert [rest.split()[0] for rest in passed_over] == ["groupadd"]
    last = bare(PATH=f"{venv / 'bin'}:/usr/bin:/bin", HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert "distseg VERB" in run(["distseg", "--help"], cwd=tmp_path, env=last)
    assert_works(venv, tmp_path, last)
    assert not list(venv.rglob("__pycache__"))
    assert not list((venv / "lib" / "python3.11" / "site-packages").glob("pip*"))


def test_run_lines_are_found_in_both_images() -> None:
    for name in ("Dockerfile.cpu", "Dockerfile.gpu"):
        lines = [rest for word, rest in instructions((DEPLOY / name).read_text()) if word == "RUN"]
        assert len(lines) == 4
        assert sum("pip install" in line for line in lines) == 1
        assert [of_the_environment(line) for line in lines] == [True, True, True, False]
        assert not any("\\" in line.replace("\\(", "").replace("\\)", "") for line in lines)


# --- no internet ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(40 * MINUTES)
def test_the_wheelhouse_installs_without_an_index(python: str, tmp_path: Path) -> None:
    house, venv = tmp_path / "house", tmp_path / "venv"
    script = str(DEPLOY / "offline" / "make_wheelhouse.sh")
    run(["bash", script, str(house), "cpu"], cwd=tmp_path, env=bare(PYTHON=python, TORCH_INDEX=TORCH_INDEX))
    wheels = {re.split(r"-\d", file.name)[0] for file in house.glob("*.whl")}
    assert {"distseg", "torch", "ray", "monai", "zarr", "faiss_cpu", "tensorstore", "s3fs"} <= wheels
    assert not [name for name in wheels if name.startswith(("faiss_gpu", "nvidia"))]
    # Whatever index or folder pip is told of elsewhere is not asked: these would make it fail.
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "http://127.0.0.1:9/wheels"}
    said = run(["sh", str(house / "install.sh"), str(venv)], cwd=tmp_path, env=bare(PYTHON=python, **nowhere))
    assert "ok   versions" in said  # the doctor's first line
    assert_works(venv, tmp_path, bare())
    carried_badly(house)
    done = subprocess.run(
        ["sh", str(house / "install.sh"), str(tmp_path / "other")],
        env=bare(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FAILED" in done.stdout + done.stderr
    assert not (tmp_path / "other").exists()


def carried_badly(house: Path) -> None:
    """One byte of the smallest wheel changes on the way."""
    file = min(house.glob("*.whl"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_works(venv: Path, cwd: Path, env: dict[str, str]) -> None:
    """The doctor finds nothing wrong, FAISS is there, and the package is the environment's own."""
    said = run([str(venv / "bin" / "distseg"), "doctor", "launcher=local", f"storage={cwd}"], cwd=cwd, env=env)
    lines = {line[5:21].strip(): line for line in said.splitlines()}
    assert not [line for line in said.splitlines() if line.startswith("fail")], said
    assert "faiss-cpu" in lines["faiss"]
    assert "TensorStore" in lines["patches"]
    code = "import distseg, ray, s3fs, torch, upath; print(distseg.__file__, torch.version.cuda)"
    where = run([str(venv / "bin" / "python"), "-c", code], cwd=cwd, env=env)
    assert where.split()[0].startswith(str(venv))
    assert where.split()[1] == "None"
