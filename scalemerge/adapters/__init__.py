"""LoRA adapters written from models: one from a full model by SVD, one from a weighted sum of adapters.

extract.py      the nearest adapter of rank r to an expert's task vectors, with its error
concatenate.py  sum_i c_i T_i of adapters as one adapter of concatenated rank, exactly
folders.py      adapter folders as peft and sentence-transformers read them

Reading adapters as experts is task_vectors/adapters.py.
"""

from scalemerge.adapters.concatenate import Concatenation, concatenate_adapters
from scalemerge.adapters.extract import Extraction, extract_adapter

__all__ = ["Concatenation", "Extraction", "concatenate_adapters", "extract_adapter"]
