"""A run as a MONAI bundle: loads with monai.bundle, runs without distseg, gives the masks that `distseg predict` gives.

OUT/configs/metadata.json    what it is, in MONAI's fields
OUT/configs/inference.json   load, orient, RunGridInferer, back to the file's orientation, argmax, save
OUT/models/model.ts          the network, TorchScript
OUT/scripts/                 RunGridInferer
OUT/docs/README.md  OUT/LICENSE
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from distseg import __version__
from distseg.errors import ConfigError, InputError
from distseg.inference import keep_largest, run_grid_inferer
from distseg.inference.export_graph import ExportReport, check_no_run, check_output, write_graph, writing
from distseg.inference.model import Model, ModelInfo
from distseg.inference.whole_scan import WINDOWS_A_BATCH

_README = """# {classes} by {method}

A 3D segmentation network trained by distseg {version}. For research use only: not a medical device.

    cd THIS_FOLDER
    python -m monai.bundle run --config_file configs/inference.json --dataset_dir FOLDER_OF_NII_GZ --output_dir MASKS

needs monai, torch, nibabel, pytorch-ignite and fire. Masks lie in each file's own grid: {values}.
"""


def export_bundle(model: Model, *, network: str, overlap: float, output: str) -> ExportReport:
    """Write the bundle into `output`, which must not exist; it appears whole or not at all. Raises ConfigError for
    names that MONAI would evaluate, InputError for an `output` that cannot or must not be written."""
    _check_names(model.info)
    check_output(output, format="monai_bundle")
    target = Path(output)
    check_no_run(target)
    if os.path.lexists(target):
        raise InputError("exists already", where="output", value=target, fix="choose another output= or remove it")
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with writing(output):
            for folder in ("configs", "models", "scripts", "docs"):
                (staged / folder).mkdir(parents=True)
            difference = write_graph(model, format="torchscript", network=network, file=staged / "models" / "model.ts")
            _write_json(staged / "configs" / "metadata.json", _metadata(model))
            _write_json(staged / "configs" / "inference.json", _inference(model, overlap=overlap))
            (staged / "scripts" / "__init__.py").touch()
            for script in (run_grid_inferer, keep_largest):
                shutil.copyfile(str(script.__file__), staged / "scripts" / Path(str(script.__file__)).name)
            values = ", ".join(f"{value} {name}" for value, name in enumerate(model.class_names))
            readme = _README.format(
                classes=", ".join(model.class_names[1:]), method=model.info.method, version=__version__, values=values
            )
            (staged / "docs" / "README.md").write_text(readme)
            (staged / "LICENSE").write_text("Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0\n")
            staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return ExportReport(str(target), difference)


def _inference(model: Model, *, overlap: float) -> dict[str, Any]:
    """MONAI's config language: `_target_` names a class, `@` another entry, `$` an expression."""
    inferer = {
        "_target_": "scripts.run_grid_inferer.RunGridInferer",
        "spacing_mm": list(model.spacing_mm),
        "patch_zyx": list(model.patch_zyx),
        "overlap": overlap,
        "intensity": dataclasses.asdict(model.intensity),
        "sw_batch_size": WINDOWS_A_BATCH,
    }
    before = [
        {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "ensure_channel_first": True},
        # MONAI's labels written out: it is about to change the default.
        {"_target_": "Orientationd", "keys": "image", "axcodes": "SPL", "labels": [["L", "R"], ["P", "A"], ["I", "S"]]},
    ]
    after = [
        {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
         "nearest_interp": False, "to_tensor": True},
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {"_target_": "scripts.keep_largest.KeepLargestd", "keys": ["pred"],
         "values": list(model.info.whole_values("model"))},
        {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": "",
         "output_dtype": "$np.uint8", "separate_folder": False,
         "resample": False},
    ]  # fmt: skip
    return {
        "imports": ["$import glob", "$import os", "$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/masks'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "network": "$@network_def.eval()",
        "preprocessing": {"_target_": "Compose", "transforms": before},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': file} for file in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": inferer,
        "postprocessing": {"_target_": "Compose", "transforms": after},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def _check_names(info: ModelInfo) -> None:
    """Of a bundle's configuration they would be expressions or references."""
    for name in (*info.class_names, info.modality):
        if name[:1] in ("$", "@", "%"):
            rule, fix = "no name that begins with $, @ or %, which MONAI evaluates", "export format=torchscript or onnx"
            raise ConfigError(
                "a name that a bundle cannot hold", where="format=monai_bundle", value=name, rule=rule, fix=fix
            )


def _metadata(model: Model) -> dict[str, Any]:
    classes = {str(value): name for value, name in enumerate(model.class_names)}
    version = importlib.metadata.version
    volume = {"type": "image", "format": "magnitude", "num_channels": 1, "spatial_shape": ["*", "*", "*"]}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by distseg {__version__} from step {model.info.step}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "nibabel": version("nibabel"),
            "pytorch-ignite": "0.5",
            "scipy": version("scipy"),
        },
        "name": f"{', '.join(model.class_names[1:])} segmentation",
        "task": "3D segmentation",
        "description": f"{model.info.method}, {model.info.modality}; for research use only",
        "authors": "the user of distseg",
        "copyright": "the user of distseg",
        "network_data_format": {
            "inputs": {
                "image": {
                    **volume,
                    "modality": model.info.modality,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    **volume,
                    "format": "segmentation",
                    "num_channels": len(classes),
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": True,
                    "channel_def": classes,
                }
            },
        },
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
