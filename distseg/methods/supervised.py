"""The baseline: labelled patches alone. Its teacher is the student's moving average, as everyone's."""

from __future__ import annotations

from distseg.methods.base import At, Method


class Supervised(Method):
    """No term on unlabelled patches; the step does not run the student on them."""

    uses_unlabelled = False

    def weights(self, at: At) -> dict[str, float]:
        return {}
