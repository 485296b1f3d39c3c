"""What identifies a model: a hash of everything in its folder that changes an embedding.

sentence-transformers names a model after its card's `base_model`, so all models merged from one base share a name and,
in mteb's cache, each other's scores. The revision made here is what keeps them apart; a card or a training log beside
the weights does not change it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from scalemerge.errors import InputError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SMALL_FILES = (
    "added_tokens.json", "config.json", "config_sentence_transformers.json", "merges.txt", "modules.json",
    "sentence_bert_config.json", "sentence_transformer_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


def content_key(content: object) -> str:
    """16 hex digits of anything JSON can write: what decides a product, so that a stale one is never taken for it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def model_revision(folder: str | Path) -> str:
    """40 hex digits of the weights, tokenizer, module, pooling and prompt files. Raises InputError without weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder; give a folder in sentence-transformers format")
    digest = hashlib.sha256()
    weights = 0
    for part in _module_folders(folder):
        names = {path.name for pattern in _WEIGHTS for path in part.glob(pattern)}
        weights += len(names)
        for name in sorted(names | {name for name in _SMALL_FILES if (part / name).is_file()}):
            path = part / name
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    if not weights:
        raise InputError(f"{folder}: no weights (*.safetensors); give a complete model folder")
    return digest.hexdigest()[:40]


def _module_folders(folder: Path) -> list[Path]:
    """The folder itself and those of its modules: not, for instance, checkpoints that lie inside it."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = {str(module["path"]) for module in modules}
    except FileNotFoundError:
        paths = set()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / 'modules.json'}: not a list of modules with a path ({error}); restore it"
        ) from None
    inside = sorted(path for path in paths if path and (folder / path).is_dir())
    return [folder, *(folder / path for path in inside)]
