"""What each line of an image's Dockerfile adds, where no container engine runs: `Dockerfile.cpu`, replayed.

Its RUN lines fill an environment at another prefix, as tests/deploy/test_install.py replays them. A layer is the
regular files that a line made or changed, as a tar stream: raw, by `gzip -1` and by `zstd -3`; what a later line
removes stays in the build stage's earlier layers. Only the last stage is shipped: its COPY of the environment is one
layer. Not weighed: the base image, and the RUN that adds a user (a few lines of /etc). TORCH_INDEX as for that test;
fetches half a gigabyte, unless pip's cache has it, and takes 3 GB of disk.

Keys, megabytes (10^6 bytes):
  layers.cpu.{raw,gzip,zstd}_mb           what is shipped on top of the base image
  layers.cpu.LINE.{raw,gzip,zstd}_mb      by line of the build stage, counted from 1 as RUN and COPY come
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.deploy.dockerfile import DEPLOY, PREFIX, bare, copy, instructions, of_the_environment

PACKERS = {"raw": ["cat"], "gzip": ["gzip", "-1"], "zstd": ["zstd", "-3", "-q"]}
MB, LARGEST, CHUNK_NBYTES = 1e6, 8, 2**20
Files = dict[str, tuple[int, int, int]]  # path -> bytes, when changed, inode


def run() -> dict[str, float]:
    results: dict[str, float] = {}
    table = Table(title="Dockerfile.cpu: what each line adds")
    for head in ("line", "files", *(f"{name} MB" for name in PACKERS)):
        table.add_column(head)

    def weigh(name: str, key: str, root: Path, files: list[str]) -> None:
        sizes = {packer: _packed_nbytes(root, files, words) / MB for packer, words in PACKERS.items()}
        table.add_row(name, str(len(files)), *(f"{size:.2f}" for size in sizes.values()))
        results.update({f"layers.cpu.{key}{packer}_mb": size for packer, size in sizes.items()})

    with tempfile.TemporaryDirectory(prefix="distseg-bench-") as folder:
        root = Path(folder)
        environment = _build_environment(root)
        before: Files = {}
        number = 0
        for word, rest in instructions((DEPLOY / "Dockerfile.cpu").read_text()):
            if word not in ("RUN", "COPY") or rest.startswith("--from"):
                continue
            number += 1
            if word == "COPY":
                copy(rest.split(), root / "src")
            elif of_the_environment(rest):
                line = rest.replace(PREFIX, str(root / "distseg"))
                subprocess.run(["sh", "-ec", line], cwd=root / "src", env=environment, check=True)
            else:
                continue
            after = _files(root)
            weigh(
                f"{word} {rest[:60]}", f"{number}.", root, [p for p, state in after.items() if before.get(p) != state]
            )
            before = after
        shipped = [path for path in before if path.startswith("distseg/")]
        weigh(f"shipped: COPY --from=build {PREFIX}", "", root, shipped)
        largest = _largest_packages(before)
    Console().print(table)
    Console().print("largest, MB:", ", ".join(f"{name} {nbytes / MB:.0f}" for name, nbytes in largest), markup=False)
    return results


def _build_environment(root: Path) -> dict[str, str]:
    """As the build stage has it: the image's Python first on the path, no bytecode."""
    for name in ("src", "bin"):
        (root / name).mkdir()
    (root / "bin" / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3.11")
    index = os.environ.get("TORCH_INDEX", "")
    return bare(PATH=f"{root / 'bin'}:{os.environ['PATH']}", TORCH_INDEX=index, PYTHONDONTWRITEBYTECODE="1")


def _files(root: Path) -> Files:
    """Regular files of the environment and of the sources; a link holds no bytes of its own."""
    found: Files = {}
    for part in ("src", "distseg"):
        for folder, _, names in os.walk(root / part):
            for name in names:
                path = Path(folder, name)
                if not path.is_symlink():
                    state = path.stat()
                    found[str(path.relative_to(root))] = state.st_size, state.st_mtime_ns, state.st_ino
    return found


def _packed_nbytes(root: Path, files: list[str], packer: list[str]) -> int:
    """Of a tar stream of `files`, through `packer`."""
    listed = root / "listed"
    listed.write_bytes(b"\0".join(os.fsencode(path) for path in sorted(files)))
    tar = subprocess.Popen(["tar", "-c", "-C", str(root), "--null", "-T", str(listed)], stdout=subprocess.PIPE)
    packed = subprocess.Popen(packer, stdin=tar.stdout, stdout=subprocess.PIPE)
    assert tar.stdout is not None
    assert packed.stdout is not None
    tar.stdout.close()
    nbytes = sum(len(chunk) for chunk in iter(lambda: packed.stdout.read(CHUNK_NBYTES), b""))
    if tar.wait() or packed.wait():
        raise RuntimeError(f"{packer}: a layer of {len(files)} files could not be packed")
    return nbytes


def _largest_packages(files: Files) -> list[tuple[str, int]]:
    """(name, bytes) of what takes most room in site-packages."""
    sizes: dict[str, int] = {}
    for path, (nbytes, _, _) in files.items():
        _, inside, name = path.partition("/site-packages/")
        if inside:
            package = name.partition("/")[0]
            sizes[package] = sizes.get(package, 0) + nbytes
    return sorted(sizes.items(), key=lambda item: -item[1])[:LARGEST]
