"""The sbatch script under a stand-in srun: each "host" is a network namespace, so Ray's nodes meet over a wire."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "deploy" / "slurm" / "distseg.sbatch"
WIRE = "wire0"


@dataclass(frozen=True)
class Hosts:
    """Two namespaces joined by a pair of virtual interfaces."""

    names: tuple[str, str]
    addresses: tuple[str, str]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = f"{os.getpid() % 10_000}"
    names = (f"ds-a{tag}", f"ds-b{tag}")
    addresses = ("10.213.77.1", "10.213.77.2")
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", WIRE, "netns", names[0], "type", "veth", "peer", WIRE, "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", WIRE)
            ip("-n", name, "link", "set", WIRE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names, addresses)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)


def stand_ins(folder: Path, hosts: Hosts, listed: tuple[str, ...]) -> None:
    """scontrol lists hosts; srun runs its command in the namespace of --nodelist."""
    folder.mkdir()
    cases = "\n".join(f"    {a}) space={n} ;;" for n, a in zip(hosts.names, hosts.addresses, strict=True))
    scripts = {
        "scontrol": f"#!/bin/sh\nprintf '%s\\n' {' '.join(listed)}\n",
        "srun": f"""#!/bin/sh
while [ "${{1#--}}" != "$1" ]; do
    case $1 in --nodelist=*) host=${{1#--nodelist=}} ;; esac
    shift
done
case $host in
{cases}
    *) echo "srun: no host $host" >&2; exit 1 ;;
esac
exec ip netns exec "$space" "$@"
""",
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def sbatch(
    hosts: Hosts, tmp_path: Path, *words: str, listed: tuple[str, ...] | None = None
) -> subprocess.CompletedProcess[str]:
    """What Slurm would run on the first node."""
    stand_ins(tmp_path / "bin", hosts, listed or hosts.addresses)
    (tmp_path / "storage").mkdir()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "DISTSEG_BIN": os.path.dirname(sys.executable),
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "host[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "DISTSEG_STORAGE": str(tmp_path / "storage"),
        "HOME": str(tmp_path),
        "GLOO_SOCKET_IFNAME": WIRE,  # namespaces share one host name, which is the loopback's
    }
    command = ["ip", "netns", "exec", hosts.names[0], "bash", str(SBATCH), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420, check=False)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(500)
def test_a_ray_cluster_forms_and_the_command_runs_on_it(hosts: Hosts, tmp_path: Path) -> None:
    words = (f"run={tmp_path}/none", f"input={tmp_path}", f"output={tmp_path}/masks", "launcher=ray")
    done = sbatch(hosts, tmp_path, "predict", *words, "resources.workers=2")
    lines = {
        line[5:21].strip(): line for line in done.stdout.splitlines() if line[:4].strip() in ("ok", "warn", "fail")
    }
    assert "2 nodes" in lines["cluster"], done.stdout + done.stderr
    assert lines["process group"].startswith("ok   process group   gloo over 2 nodes")
    assert "across 2 nodes" in lines["storage"]
    assert "resources.workers=2 fits 2 CPUs" in lines["resources"]  # the job's own, handed to the doctor
    assert lines["authentication"].endswith("Ray asks for a token")
    assert not [line for line in lines.values() if line.startswith("fail")]
    assert done.returncode == 2  # the command's own: there is no such run
    assert f"{tmp_path}/none: no trained model here" in done.stderr
    assert not ray_processes(os.getpid())


@pytest.mark.slow
@pytest.mark.ray
def test_a_head_that_does_not_start_ends_the_job(hosts: Hosts, tmp_path: Path) -> None:
    done = sbatch(hosts, tmp_path, "doctor", listed=("192.0.2.1", hosts.addresses[1]))  # srun knows no such host
    assert done.returncode == 1
    assert "the head on 192.0.2.1 did not start" in done.stderr


def ray_processes(job: int) -> list[str]:
    """Command lines that still belong to the job's Ray, by its temporary folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # gone meanwhile
            found += [line] if f"/tmp/ray-{job}/" in line else []
    return found
