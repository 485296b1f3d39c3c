"""The encoder: a transformers backbone, pooling, normalization and prompts, turning texts into embeddings.

model.py      Encoder: tokenize, pad, embed, load, save
pooling.py    token states to one vector, with or without the prompt's tokens
attention.py  which attention code runs, and decoders whose tokens see later ones
adapters.py   LoRA and QLoRA through peft
loading.py    tokenizers, backbones and their weights
modules.py    the small JSON files of a sentence-transformers folder
folders.py    where a model is: a folder, `package:<name>/<folder>`, a hub id
"""

from scalemerge.encoder.adapters import add_lora
from scalemerge.encoder.folders import local_folder, package_folder
from scalemerge.encoder.loading import freeze_unused, position_limit
from scalemerge.encoder.model import Encoder
from scalemerge.encoder.modules import read_modules, write_modules
from scalemerge.encoder.pooling import POOLINGS, pool

__all__ = [
    "POOLINGS",
    "Encoder",
    "add_lora",
    "freeze_unused",
    "local_folder",
    "package_folder",
    "pool",
    "position_limit",
    "read_modules",
    "write_modules",
]
