"""Task vectors on disk and their Gram matrix.

store.py        TaskVectorStore: base and experts, whatever kind each is
experts.py      the kinds: full checkpoints, stored task vectors (stored.py), LoRA adapters (adapters.py)
formats.py      what task vectors are held in
compression.py  writes stores of compressed task vectors; measuring.py says what that costs
gram.py         Gram matrices; groups.py: which tensors share a position
"""

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
