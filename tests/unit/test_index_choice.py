"""Which index is chosen, with its reason, and what is said of a FAISS that is missing, doubled or broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distseg.errors import ConfigError
from distseg.matching import index, index_choice
from distseg.matching.index import build_index
from distseg.matching.index_choice import IVF_FROM, check_faiss_packages, choose, faiss_packages

MANY = IVF_FROM


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is installed is looked up once a process."""
    index._faiss_gpus.cache_clear()
    yield
    index._faiss_gpus.cache_clear()


def never() -> int | None:
    raise AssertionError("FAISS need not be looked at")


@pytest.mark.parametrize(
    ("count", "asked", "table", "gpus", "chosen", "why"),
    [
        (MANY - 1, {}, "cpu", never, "torch flat cpu", f"exact: {MANY - 1} rows are fewer than {MANY}"),
        (MANY, {}, "cpu", lambda: 0, "faiss ivf cpu", f"ivf at {MANY} rows (IVF from {MANY}), FAISS on cpu where"),
        (MANY, {}, "cpu", lambda: None, "torch flat cpu", "FAISS is not installed"),
        (MANY, {}, "cuda", never, "torch flat cuda", "FAISS on one is unproven"),
        (MANY, {"kind": "flat"}, "cpu", never, "torch flat cpu", "exact as asked"),
        (MANY, {"backend": "torch"}, "cpu", never, "torch flat cpu", "as asked"),
        (9, {"backend": "faiss"}, "cpu", lambda: 0, "faiss flat cpu", "flat at 9 rows"),
        (9, {"kind": "ivf"}, "cpu", lambda: 0, "faiss ivf cpu", "ivf as asked"),
        (MANY, {"backend": "faiss"}, "cuda", lambda: 2, "faiss ivf cuda", "where the table is"),
        (MANY, {"backend": "faiss"}, "cuda", lambda: 0, "faiss ivf cpu", "FAISS sees no GPU here"),
        (MANY, {"device": "cpu"}, "cuda", lambda: 0, "faiss ivf cpu", "FAISS on cpu as asked"),
        (9, {"device": "cuda", "backend": "faiss", "kind": "flat"}, "cpu", lambda: 1, "faiss flat cuda", "as asked"),
    ],
)  # fmt: skip
def test_choice_and_reason(
    monkeypatch: pytest.MonkeyPatch, count: int, asked: dict[str, str], table: str, gpus: object, chosen: str, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    full = {"backend": "auto", "kind": "auto", "device": "auto", **asked}
    choice = choose(count, **full, table_device=table, faiss_gpus=gpus)  # type: ignore[arg-type]  # keys by name
    assert f"{choice.backend} {choice.kind} {choice.device}" == chosen
    assert why in choice.reason


@pytest.mark.parametrize(
    ("asked", "cuda", "gpus", "says"),
    [
        ({"device": "cuda"}, False, 0, "no GPU for the reference index (got cuda); set matching.device=cpu"),
        ({"device": "cuda", "backend": "faiss"}, True, 0, "FAISS sees no GPU here (got matching.device=cuda); inst"),
        ({"backend": "faiss"}, True, None, "matching.index=auto); pip install 'distseg[cpu]' (or [gpu])"),
        ({"kind": "ivf"}, True, None, "FAISS is not installed"),
        ({"backend": "torch", "kind": "ivf"}, True, 0, "searches exactly (got matching.index=ivf); set"),
        ({"backend": "fais"}, True, 0, "matching.backend: unknown value (got fais)"),
        ({"kind": "hnsw"}, True, 0, "matching.index: unknown value (got hnsw)"),
        ({"device": "tpu"}, True, 0, "matching.device: unknown value (got tpu)"),
    ],
)  # fmt: skip
def test_combinations_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], cuda: bool, gpus: int | None, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    full = {"backend": "auto", "kind": "auto", "device": "auto", **asked}
    with pytest.raises(ConfigError) as error:
        choose(9, **full, table_device="cpu", faiss_gpus=lambda: gpus)
    assert says in str(error.value)


def _install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = [SimpleNamespace(name=name) for name in names]
    monkeypatch.setattr(index_choice.importlib.metadata, "distributions", lambda: iter(found))


@pytest.mark.parametrize("second", ["faiss-gpu", "faiss_gpu_cu12", "faiss-gpu-cuvs"])
def test_two_packages_own_one_module(monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    _install(monkeypatch, "numpy", "faiss_cpu", second, "faiss-stubs", "my-faiss-cpu")
    name = second.replace("_", "-")
    assert faiss_packages() == ("faiss-cpu", name)
    says = (
        f"more than one FAISS is installed (got faiss-cpu, {name}); all of them own the Python module faiss, and pip "
        f"does not see it; pip uninstall -y faiss-cpu {name}, then install one again; or set matching.backend=torch"
    )
    with pytest.raises(ConfigError) as error:
        check_faiss_packages()
    assert str(error.value) == says
    table = torch.eye(4), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ConfigError, match="more than one FAISS"):
        build_index(*table, num_classes=2, backend="faiss")
    assert build_index(*table, num_classes=2, backend="torch").backend == "torch"


def test_one_package_or_none_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "numpy", "faiss-gpu")
    check_faiss_packages()
    _install(monkeypatch, "numpy")
    check_faiss_packages()
    assert faiss_packages() == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "FAISS is installed but does not load (got the module faiss is empty)"),
        ("import gone_with_the_other_package", "does not load (got No module named 'gone_with_the_other_package')"),
    ],
)
def test_what_a_removed_package_leaves_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str
) -> None:
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    with pytest.raises(ConfigError) as error:
        build_index(torch.eye(4), torch.tensor([0, 0, 1, 1]), num_classes=2, backend="faiss")
    assert says in str(error.value)
    assert "--force-reinstall --no-deps faiss" in str(error.value)
    sys.modules.pop("faiss", None)
