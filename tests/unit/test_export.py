"""Exports: the logits read back are the network's, and the bundle's masks are those of predict."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch

import distseg
from distseg.cli import main
from distseg.config.schema import NetworkConfig
from distseg.data.intensity import Intensity
from distseg.errors import ConfigError, DistsegError, InputError
from distseg.inference import export_graph
from distseg.inference.export_graph import Logits
from distseg.inference.model import ModelInfo, build_network, load_model, save_model

PATCH = (16, 12, 8)
monai_loads_torchscript = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
# Storage orders and affines that a bundle must undo as predict does: axial, coronal with flips, oblique.
AXIAL = np.diag([-1.5, -1.5, 3.0, 1.0])
CORONAL = np.array([[0.0, 1.5, 0.0, -10], [0, 0, -2.2, 40], [2.0, 0, 0, -7], [0, 0, 0, 1]])
OBLIQUE = np.array([[1.4, 0.3, 0.1, 5], [-0.3, 1.5, 0.2, -9], [-0.1, -0.2, 2.4, 11], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model: its classes are near ties everywhere, so that any difference shows."""
    folder = tmp_path_factory.mktemp("run") / "model"
    write_model(folder, Intensity("ct", low=-100.0, high=300.0, mean=40.0, sd=90.0))
    return str(folder.parent)


def write_model(
    folder: Path, intensity: Intensity, whole: tuple[str, ...] = (), names: tuple[str, str] = ("hip", "femur")
) -> None:
    config = NetworkConfig(base_filters=2, levels=3)
    networks = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        networks[name] = build_network(config, num_classes=3).state_dict()
    info = ModelInfo(
        class_names=("background", *names),
        modality="CT",
        spacing_mm=(2.5, 2.0, 1.7),
        patch_zyx=PATCH,
        network=config,
        intensity=intensity,
        method="embedding_matching",
        threshold_nats=0.5,
        step=7,
        checkpoint="last",
        whole=whole,
    )
    save_model(folder, info, networks)


def write_images(folder: Path) -> list[str]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, affine, shape in (
        ("axial", AXIAL, (30, 26, 14)),
        ("coronal", CORONAL, (20, 25, 28)),
        ("oblique", OBLIQUE, (22, 24, 19)),
        ("smaller_than_a_window", AXIAL, (9, 26, 10)),
    ):
        image = rng.integers(-1000, 900, shape).astype(np.int16)
        nib.save(nib.Nifti1Image(image, affine), folder / f"{name}.nii.gz")
    return sorted(path.name for path in folder.iterdir())


def patches(count: int, size: tuple[int, ...] = PATCH) -> torch.Tensor:
    return torch.randn((count, 1, *size), generator=torch.Generator().manual_seed(9))


def logits(run: str, network: str, image: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(Logits(load_model(run).networks[network])(image))


def test_torchscript_gives_the_networks_logits(run: str, tmp_path: Path) -> None:
    report = distseg.export(run=run, output=tmp_path, format="torchscript", network="teacher")
    assert report.path == str(tmp_path / "model.ts")
    with pytest.warns(DeprecationWarning, match=r"torch.jit.load"):
        network = torch.jit.load(report.path)
    for image in (patches(1), patches(3), patches(2, (24, 16, 16))):
        np.testing.assert_allclose(network(image).numpy(), logits(run, "teacher", image), atol=1e-5)
    told = json.loads((tmp_path / "model.json").read_text())
    assert (told["classes"], told["patch_zyx"], told["network"]) == (
        ["background", "hip", "femur"],
        [16, 12, 8],
        "teacher",
    )
    assert told["intensity"]["low"] == -100.0
    with pytest.raises(InputError, match=r"output: exists already \(got .*model.ts\)"):
        distseg.export(run=run, output=tmp_path, format="torchscript")


@pytest.mark.slow  # half a minute for torch's exporter and its imports
def test_onnx_gives_the_networks_logits(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="distseg[onnx] is not installed")
    file = tmp_path / "named.onnx"
    assert main(["export", f"run={run}", f"output={file}", "format=onnx"]) == 0
    assert f"{file}: logits read back differ by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        image = patches(count)
        (found,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(found, logits(run, "student", image), atol=1e-4)
    about = json.loads(session.get_modelmeta().custom_metadata_map["metadata.json"])
    assert about == json.loads((tmp_path / "named.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["named.json", "named.onnx"]


@monai_loads_torchscript
@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")  # MONAI's, where pydicom is installed
@pytest.mark.parametrize("kind", ["ct", "per_scan"])
def test_the_bundles_masks_are_those_of_predict(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intensity = Intensity("ct", -100.0, 300.0, 40.0, 90.0) if kind == "ct" else Intensity("per_scan")
    write_model(tmp_path / "run" / "model", intensity, whole=("femur",))
    names = write_images(tmp_path / "images")
    ours, theirs, bundle = tmp_path / "ours", tmp_path / "theirs", tmp_path / "bundle"
    distseg.predict(run=tmp_path / "run", input=tmp_path / "images", output=ours, progress=False)
    distseg.export(run=tmp_path / "run", output=bundle)
    monkeypatch.syspath_prepend(str(bundle))
    run_bundle(bundle, tmp_path / "images", theirs)
    for name in names:
        one, two = nib.load(ours / name), nib.load(theirs / name)
        np.testing.assert_allclose(one.affine, two.affine, atol=1e-4)
        differ = int((np.asarray(one.dataobj) != np.asarray(two.dataobj)).sum())
        assert differ <= 2, f"{name}: {differ} of {one.shape}"  # ties: sums in another order
        assert np.asarray(two.dataobj).dtype == np.uint8
        assert len(np.unique(np.asarray(two.dataobj))) > 1


def run_bundle(bundle: Path, images: Path, masks: Path) -> None:
    """What monai.bundle run does, without the ignite engine that its evaluator wants."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser.read_meta(str(bundle / "configs" / "metadata.json"))
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(images), "output_dir": str(masks)})
    network = parser.get_parsed_content("network")
    inferer, after = parser.get_parsed_content("inferer"), parser.get_parsed_content("postprocessing")
    for batch in parser.get_parsed_content("dataloader"):
        batch["pred"] = inferer(batch["image"], network)
        for scan in decollate_batch(batch):
            after(scan)


@monai_loads_torchscript
def test_monai_loads_the_bundle_by_name(run: str, tmp_path: Path) -> None:
    from monai import bundle as monai_bundle

    assert main(["export", f"run={run}", f"output={tmp_path}/seg", "network=teacher"]) == 0
    network, metadata, _ = monai_bundle.load(
        "seg", bundle_dir=str(tmp_path), load_ts_module=True, remove_prefix=None, config_files=()
    )
    np.testing.assert_allclose(network(patches(2)).detach().numpy(), logits(run, "teacher", patches(2)), atol=1e-5)
    assert (tmp_path / "seg" / "docs" / "README.md").read_text().count("1 hip, 2 femur") == 1
    assert metadata["classes"] == ["background", "hip", "femur"]


def test_the_script_of_a_bundle_needs_no_distseg(run: str, tmp_path: Path) -> None:
    distseg.export(run=run, output=tmp_path / "b")
    script = tmp_path / "b" / "scripts" / "run_grid_inferer.py"
    assert "distseg" not in [
        line.split()[1].split(".")[0]
        for line in script.read_text().splitlines()
        if line.startswith(("import ", "from "))
    ]
    assert "RunGridInferer" in runpy.run_path(str(script))


def test_a_name_that_monai_would_evaluate_is_a_models_but_no_bundles(tmp_path: Path) -> None:
    intensity = Intensity("ct", low=-100.0, high=300.0, mean=40.0, sd=90.0)
    write_model(tmp_path / "run/model", intensity, names=("$import os", "@femur"))
    message = r"format=monai_bundle: a name that a bundle cannot hold \(got \$import os\)"
    with pytest.raises(ConfigError, match=message):
        distseg.export(run=tmp_path / "run", output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    distseg.export(run=tmp_path / "run", output=tmp_path / "model.ts", format="torchscript")
    assert (tmp_path / "model.ts").is_file()


def test_an_existing_bundle_is_left_alone(run: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"output: exists already"):
        distseg.export(run=run, output=tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("format", ["torchscript", "onnx", "monai_bundle"])
@pytest.mark.parametrize("kept", ["config.yaml", "model/model.json"])
def test_a_run_is_no_place_for_an_export(format: Any, kept: str, run: str, tmp_path: Path) -> None:
    """RUN/model.json would be taken for the run's own model, which then cannot be read."""
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("")
    message = rf"output: a run directory \(got {tmp_path}\); an export has a folder .*; set output={tmp_path}/export"
    with pytest.raises(InputError, match=message):
        distseg.export(run=run, output=tmp_path, format=format)
    with pytest.raises(InputError, match=r"a run directory|not a name"):
        distseg.export(run=run, output=tmp_path / "model.ts", format=format)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_an_export_beside_a_runs_own_files_leaves_the_run_readable(run: str) -> None:
    distseg.export(run=run, output=Path(run) / "export", format="torchscript")
    load_model(run)
    with pytest.raises(InputError, match="a run directory"):
        distseg.export(run=run, output=run, format="torchscript")
    load_model(run)


@pytest.mark.parametrize(
    ("format", "name", "says"),
    [
        ("onnx", "x.pt", "output: not a name for format=onnx (got {0}/x.pt); set format=torchscript"),
        ("onnx", "x.ts", "output: not a name for format=onnx (got {0}/x.ts); set format=torchscript"),
        ("torchscript", "x.onnx", "output: not a name for format=torchscript (got {0}/x.onnx); set format=onnx"),
        ("monai_bundle", "x.onnx", "output: not a name for format=monai_bundle (got {0}/x.onnx); set format=onnx"),
    ],
)
def test_a_suffix_of_another_format_is_refused(
    format: str, name: str, says: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"run={run}", f"output={tmp_path / name}", f"format={format}"]) == 2
    assert capsys.readouterr().err.startswith(says.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/bundle", "file/model.ts", "file"])
def test_a_place_that_cannot_be_written_is_one_line(
    name: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    format = "monai_bundle" if name.endswith("bundle") else "torchscript"
    assert main(["export", f"run={run}", f"output={tmp_path / name}", f"format={format}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"output: cannot be written (got {tmp_path / name}); ")
    assert "; choose an output= on a disk that may be written and has space" in said
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_torch_says_of_a_full_disk_is_an_error_of_the_output(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nframe #0: ...")

    monkeypatch.setattr(torch.jit, "save", full)
    for format in ("torchscript", "monai_bundle"):
        message = rf"output: cannot be written \(got {tmp_path}/{format}\); PytorchStreamWriter .* write failed; choose"
        with pytest.raises(InputError, match=message):
            distseg.export(run=run, output=tmp_path / format, format=format)  # type: ignore[arg-type]  # a loop's text
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_missing_package_is_named(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    pytest.importorskip("onnx", reason="distseg[onnx] is not installed")
    with pytest.raises(ConfigError, match=r"format=onnx: needs the package onnxscript; pip install 'distseg\[onnx\]'"):
        distseg.export(run=run, output=tmp_path / "o", format="onnx")


def test_other_logits_are_refused_and_leave_nothing(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Any, sample: torch.Tensor, file: Path, about: str) -> torch.Tensor:
        file.write_bytes(b"")
        with torch.inference_mode():
            other: torch.Tensor = logits(sample) + 0.01
        return other

    monkeypatch.setattr(export_graph, "_write_torchscript", wrong)
    with pytest.raises(DistsegError, match=r"the exported logits differ by 0.01, more than 0.001"):
        distseg.export(run=run, output=tmp_path / "t", format="torchscript")
    assert list((tmp_path / "t").iterdir()) == []
