"""Merging: static methods (one file each), the learned position, and the writer of merged folders."""

from scalemerge.merging import average as _average
from scalemerge.merging import task_arithmetic as _task_arithmetic
from scalemerge.merging.learned import combine_learned, read_coefficients
from scalemerge.merging.registry import METHODS, MergeMethod, find_method, merge_method
from scalemerge.merging.write import write_merged

__all__ = [
    "METHODS",
    "MergeMethod",
    "combine_learned",
    "find_method",
    "merge_method",
    "read_coefficients",
    "write_merged",
]
del _average, _task_arithmetic
