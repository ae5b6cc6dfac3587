"""The doctor's judgement: facts of nodes in, one finding a check out. Pure functions; nothing is measured here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distseg.data.place import is_url
from distseg.work.node_facts import AGREE, Disk, NodeFacts
from distseg.work.node_probes import Speed

Level = Literal["ok", "warn", "fail"]
_RANK: dict[Level, int] = {"ok": 0, "warn": 1, "fail": 2}

MUST_AGREE = ("distseg", "python", "torch", "ray")  # pickles and process groups cross these; the others only should
SLOW_MIB_S = 50.0  # below it a GPU's patches come late: 2 x 96^3 int16 a slot and step
LOW_DISK_GIB, LITTLE_DISK_GIB = 1.0, 10.0
RAY_DISK_SHARE = 0.05  # Ray stops spilling where less of its disk is free
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 20.0  # a ledger's heartbeat lapses after 60 s by the reader's clock
SMALL_SHM_GIB = 1.0
SLOW_ROUND_TRIP_S = 0.5  # of 6 MiB; a step of preset small takes about as long
_SHOWN_NODES = 3


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: `text` says what is there and why it matters, `fix` what to do."""

    check: str
    level: Level
    text: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.level:<5}{self.check:<16}{self.text}" + (f"; {self.fix}" if self.fix else "")


def check_versions(nodes: Sequence[NodeFacts]) -> Finding:
    """Everywhere the same, and inside pyproject's ranges."""
    different = {p: _by_value(nodes, lambda node, p=p: node.versions.get(p, "none")) for p in AGREE}  # type: ignore[misc]  # p is bound now
    different = {package: values for package, values in different.items() if len(values) > 1}
    if different:
        level: Level = "fail" if set(different) & set(MUST_AGREE) else "warn"
        texts = [
            f"{package} {' and '.join(f'{value} on {_names(where)}' for value, where in values.items())}"
            for package, values in different.items()
        ]
        return Finding("versions", level, f"nodes differ: {', '.join(texts)}", "install one wheelhouse or image on all")
    wrong = sorted({text for node in nodes for text in node.out_of_range})
    if wrong:
        fix = "pip install distseg again, with its dependencies"
        return Finding("versions", "fail", ", ".join(wrong), fix)
    known = ", ".join(f"{package} {nodes[0].versions[package]}" for package in AGREE if package in nodes[0].versions)
    if "ray" not in nodes[0].versions:
        return Finding(
            "versions", "warn", f"{known}; no ray: only launcher=local works", "pip install 'ray[default,train,tune]'"
        )
    return Finding("versions", "ok", known)


def check_devices(nodes: Sequence[NodeFacts], *, gpus_per_worker: float) -> Finding:
    """Cores and GPUs, and whether torch can use them."""
    blind = [n.node for n in nodes if n.has_nvidia_driver and not n.gpus]
    throttled = [n for n in nodes if n.cpu_limit is not None and n.cpu_limit < n.cores]
    gpus = _by_value(nodes, lambda n: ", ".join(f"{gpu.name} {gpu.memory_gib:.0f} GiB" for gpu in n.gpus) or "no GPU")
    described = "; ".join(f"{text} on {_names(where)}" for text, where in gpus.items())
    text = f"{sum(n.cores for n in nodes)} cores, {sum(n.memory_gib for n in nodes):.0f} GiB; {described}"
    if gpus_per_worker > 0 and not any(n.gpus for n in nodes):
        return Finding(
            "devices",
            "fail",
            f"{text}, and resources.gpus_per_worker={gpus_per_worker:g}",
            "set it to 0, or add GPU nodes",
        )
    if blind:
        build = next(n for n in nodes if n.node in blind).torch_cuda
        why = (
            "torch is built without CUDA"
            if build is None
            else f"torch is built for CUDA {build}, which the driver refuses"
        )
        return Finding(
            "devices",
            "warn",
            f"{text}; an NVIDIA driver is on {_names(blind)} but {why}",
            "install the torch that fits the driver",
        )
    if throttled:
        limits = ", ".join(f"{n.cpu_limit:g} of {n.cores} on {n.node}" for n in throttled[:_SHOWN_NODES])
        return Finding(
            "devices",
            "warn",
            f"{text}; the container may use {limits} cores",
            "set train.threads to that many over its workers",
        )
    return Finding("devices", "ok", text)


def check_faiss(nodes: Sequence[NodeFacts]) -> Finding:
    """Which build serves the shared index, whether it is whole, and a search on it."""
    findings = [_faiss_of(node) for node in nodes]
    worst = max(findings, key=lambda finding: _RANK[finding.level])
    alike = [
        node.node for node, f in zip(nodes, findings, strict=True) if (f.level, f.text) == (worst.level, worst.text)
    ]
    where = f" ({_names(alike)})" if len(nodes) > 1 and worst.level != "ok" else ""
    return Finding(worst.check, worst.level, worst.text + where, worst.fix)


def check_reader(nodes: Sequence[NodeFacts]) -> Finding:
    """What reads patches of a local cohort."""
    slower = [node.node for node in nodes if node.reader != "tensorstore"]
    if not slower:
        return Finding("patches", "ok", "read by TensorStore")
    where = f" on {_names(slower)}" if len(nodes) > 1 else ""
    return Finding(
        "patches", "ok", f"read by zarr-python{where} (distseg[io] brings TensorStore, several times faster)"
    )


def _faiss_of(node: NodeFacts) -> Finding:
    report = node.faiss
    names = " and ".join(report.distributions)
    again = "pip uninstall -y faiss-cpu faiss-gpu, then install one: distseg[cpu] or distseg[gpu]"
    if len(report.distributions) > 1:
        return Finding("faiss", "fail", f"{names} are both installed and own the same module", again)
    if report.distributions and not report.importable:
        return Finding("faiss", "fail", f"{names} is installed but broken ({report.error})", again)
    if report.error is not None:
        return Finding("faiss", "fail", f"{names or 'a faiss of unknown origin'}: {report.error}", again)
    if not report.importable:
        return Finding("faiss", "ok", "none: the shared index runs in torch (distseg[cpu] or distseg[gpu] bring FAISS)")
    text = f"{names or 'a faiss of unknown origin'}, exact search {report.microseconds_a_query:.0f} us a query"
    if node.gpus and not report.gpus:
        return Finding(
            "faiss",
            "warn",
            f"{text}, but it cannot use the GPU",
            "pip uninstall -y faiss-cpu, then install distseg[gpu]",
        )
    if report.distributions and "gpu" in report.distributions[0] and not node.gpus:
        return Finding("faiss", "ok", f"{text}; on this machine without a GPU it searches on the CPU")
    return Finding("faiss", "ok", text)


def check_shared_memory(nodes: Sequence[NodeFacts], *, object_store_gib: Mapping[str, float]) -> Finding:
    """/dev/shm against what Ray's object store wants there (GiB by node; {} without Ray)."""
    small = []
    for node in nodes:
        wanted = object_store_gib.get(node.node, SMALL_SHM_GIB)
        if node.shared_memory is None or node.shared_memory.total_gib < wanted:
            has = 0.0 if node.shared_memory is None else node.shared_memory.total_gib
            small.append(f"{has:.2g} GiB on {node.node}, {wanted:.2g} wanted")
    if small:
        why = "the object store falls back to the disk"
        return Finding(
            "shared memory",
            "warn",
            f"{', '.join(small[:_SHOWN_NODES])}: {why}",
            "start the container with --shm-size or a memory-backed /dev/shm",
        )
    sizes = [node.shared_memory.total_gib for node in nodes if node.shared_memory is not None]
    return Finding("shared memory", "ok", f"{min(sizes):.0f} GiB")


def check_disk(disks: Mapping[str, Sequence[Disk]]) -> Finding:
    """Free space by node: of the storage and of the temporary folder that Ray spills into."""
    level: Level = "ok"
    short = []
    for node, of_node in disks.items():
        for disk in of_node:
            if disk.free_gib < LITTLE_DISK_GIB or disk.free_gib < RAY_DISK_SHARE * disk.total_gib:
                short.append(f"{disk.free_gib:.1f} of {disk.total_gib:.0f} GiB under {disk.path} on {node}")
                level = "fail" if disk.free_gib < LOW_DISK_GIB else max(level, "warn", key=_RANK.__getitem__)
    if short:
        return Finding(
            "free disk", level, ", ".join(short[:_SHOWN_NODES]), "free space there, or choose another storage="
        )
    least = min((disk for of_node in disks.values() for disk in of_node), key=lambda disk: disk.free_gib)
    return Finding("free disk", "ok", f"{least.free_gib:.0f} GiB at least ({least.path})")


def check_storage(storage: str, written: Mapping[str, Speed], read: Mapping[str, Speed]) -> Finding:
    """`read[node]` is of a file that another node wrote, where there are several."""
    for done, speeds in (("written", written), ("read", read)):
        errors = {node: speed.error for node, speed in speeds.items() if speed.error}
        if errors:
            node, why = next(iter(errors.items()))
            fix = "choose a storage= that exists and may be written"
            if is_url(storage):
                fix = "check the URL, and the keys and the endpoint in the environment of each node"
            elif len(written) > 1 and done == "read":
                fix = "mount the same storage at that path on every node"
            return Finding(
                "storage",
                "fail",
                f"{storage} cannot be {done} on {_names(sorted(errors))}: {why}"
                + (f" ({node})" if len(errors) > 1 else ""),
                fix,
            )
    slowest = min(read.items(), key=lambda item: item[1].mib_per_s)
    write_speed = min(speed.mib_per_s for speed in written.values())
    text = f"{storage}: written at {write_speed:.0f} MiB/s, read at {slowest[1].mib_per_s:.0f}"
    if len(written) > 1:
        text += f" across {len(written)} nodes (the slowest: {slowest[0]})"
    if slowest[1].mib_per_s < SLOW_MIB_S:
        return Finding(
            "storage",
            "warn",
            f"{text}: a GPU waits for patches below {SLOW_MIB_S:.0f}",
            "copy the cohort to a faster storage, or raise data.memory_gib",
        )
    return Finding("storage", "ok", text)


def check_clocks(offsets_s: Mapping[str, float]) -> Finding:
    """Offsets of the nodes' clocks from the driver's."""
    node, worst = max(offsets_s.items(), key=lambda item: abs(item[1]))
    text = f"at most {abs(worst):.3f} s apart" + (f" ({node})" if abs(worst) > SKEW_WARN_S else "")
    if abs(worst) > SKEW_WARN_S:
        level: Level = "fail" if abs(worst) > SKEW_FAIL_S else "warn"
        return Finding(
            "clocks", level, f"{text}: heartbeats and file times are compared", "run chrony or ntpd on every node"
        )
    return Finding("clocks", "ok", text)


def check_round_trip(processes: str, seconds: float | str) -> Finding:
    """`seconds` of one 6 MiB all-reduce, or one line why it failed."""
    if isinstance(seconds, str):
        fix = "open the ports between the nodes; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their interface"
        return Finding("process group", "fail", f"gloo over {processes}: {seconds}", fix)
    text = f"gloo over {processes}: 6 MiB summed in {seconds * 1e3:.0f} ms"
    if seconds > SLOW_ROUND_TRIP_S:
        return Finding(
            "process group",
            "warn",
            f"{text}, longer than a step of preset small",
            "use a faster network, or fewer and larger nodes",
        )
    return Finding("process group", "ok", text)


def check_authentication(nodes: Sequence[NodeFacts], *, loopback_only: bool) -> Finding:
    """Whether Ray asks for a token; `loopback_only`: the cluster is embedded and listens on this machine alone."""
    open_nodes = [node.node for node in nodes if (node.ray_auth_mode or "").lower() != "token"]
    if not open_nodes:
        return Finding("authentication", "ok", "Ray asks for a token")
    fix = (
        "set RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN on all nodes before Ray starts (ray get-auth-token --generate)"
    )
    if loopback_only:
        return Finding(
            "authentication",
            "warn",
            "Ray listens on loopback without a token: other users of this machine can run code as you",
            fix,
        )
    return Finding(
        "authentication", "warn", f"no token on {_names(open_nodes)}: whoever reaches its ports runs code there", fix
    )


def check_fit(*, workers: int, gpus_per_worker: float, cpus: float, gpus: float) -> Finding:
    """Whether the workers that were asked for would all start."""
    asked = f"resources.workers={workers}" + (f" with {gpus_per_worker:g} GPU each" if gpus_per_worker else "")
    if workers > cpus or workers * gpus_per_worker > gpus:
        return Finding(
            "resources",
            "fail",
            f"{asked} does not fit {cpus:g} CPUs and {gpus:g} GPUs: Ray would wait for ever",
            "ask for fewer, or add nodes",
        )
    return Finding("resources", "ok", f"{asked} fits {cpus:g} CPUs and {gpus:g} GPUs")


def _by_value(nodes: Sequence[NodeFacts], value: Callable[[NodeFacts], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        groups[value(node)].append(node.node)
    return dict(groups)


def _names(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - _SHOWN_NODES} more" if len(nodes) > _SHOWN_NODES else ""
    return ", ".join(nodes[:_SHOWN_NODES]) + more
