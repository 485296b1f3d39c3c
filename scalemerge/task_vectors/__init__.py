"""Task vectors on disk and their Gram matrix."""

from scalemerge.task_vectors.gram import cosines, gram_matrices, group_grams, moved
from scalemerge.task_vectors.groups import GRANULARITIES, group_names, group_of
from scalemerge.task_vectors.store import TaskVectorStore

__all__ = [
    "GRANULARITIES",
    "TaskVectorStore",
    "cosines",
    "gram_matrices",
    "group_grams",
    "group_names",
    "group_of",
    "moved",
]
