"""distseg: Ray-distributed semi-supervised 3D segmentation by embedding matching (Xie et al., MIDL 2024).

Every verb of the command line is a function here: `distseg.train(...)`, `distseg.ingest(...)`. They load lazily, so
that `import distseg` costs nothing. Axis order is Z, Y, X everywhere inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
VERBS = (
    "benchmark", "cohort", "demo", "doctor", "evaluate", "export", "ingest", "label", "predict", "train", "tune",
)  # fmt: skip
__all__ = ["__version__", *VERBS]

if TYPE_CHECKING:
    from distseg.api import benchmark as benchmark
    from distseg.api import cohort as cohort
    from distseg.api import demo as demo
    from distseg.api import doctor as doctor
    from distseg.api import evaluate as evaluate
    from distseg.api import export as export
    from distseg.api import ingest as ingest
    from distseg.api import label as label
    from distseg.api import predict as predict
    from distseg.api import train as train
    from distseg.api import tune as tune


def __getattr__(name: str) -> Any:
    if name in VERBS:
        from distseg import api

        return getattr(api, name)
    raise AttributeError(f"module 'distseg' has no attribute {name!r}")
