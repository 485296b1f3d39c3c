"""Imports of the optional packages (extra `report`), at the moment they are needed.

A training machine has no use for matplotlib; whoever asks it for a report gets one line that says what to install.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from scalemerge.errors import InputError


def require(module: str) -> ModuleType:
    """Import `module` (dotted name), or raise an InputError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        remedy = 'pip install "scalemerge[report]"'
        raise InputError(f"the report needs {package}, which is not installed: {remedy}") from None
