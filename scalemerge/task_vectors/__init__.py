"""Task vectors on disk and their Gram matrix."""

from scalemerge.task_vectors.gram import cosines, gram_matrices, group_grams, moved
from scalemerge.task_vectors.store import TaskVectorStore

__all__ = ["TaskVectorStore", "cosines", "gram_matrices", "group_grams", "moved"]
