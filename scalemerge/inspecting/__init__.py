"""Looking at models: what differs between two folders (diff.py), what is in one (inspect.py), as tables (tables.py)."""

from scalemerge.inspecting.diff import Difference, Differences, diff_folders
from scalemerge.inspecting.inspect import (
    AdapterFolder,
    Experts,
    ModelFolder,
    Store,
    StoredVectors,
    inspect_experts,
    inspect_folder,
)

__all__ = [
    "AdapterFolder",
    "Difference",
    "Differences",
    "Experts",
    "ModelFolder",
    "Store",
    "StoredVectors",
    "diff_folders",
    "inspect_experts",
    "inspect_folder",
]
