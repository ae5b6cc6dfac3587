"""Text that OmegaConf must take as it is."""

from __future__ import annotations

import re


def omegaconf_escaped(value: str) -> str:
    """`${` as text: a backslash before it, and those already there doubled. Elsewhere backslashes are plain."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
