"""A LoRA adapter of peft as an expert, without peft and without merging it to disk: T = (alpha / r) B A, low rank.

With rsLoRA the factor is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732); rank_pattern and alpha_pattern give
modules their own. Weights that lie [inputs, outputs] (GPT-2's Conv1D: fan_in_fan_out) and embeddings (lora_embedding_A,
lora_embedding_B) have T = (alpha / r) A' B'. Whatever else changes the sum is refused by name: DoRA, biases,
modules_to_save, other initializations that move the base itself (PiSSA, OLoRA ...).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalemerge.checkpoints.atomic import read_json
from scalemerge.checkpoints.reader import TensorSpec
from scalemerge.checkpoints.revision import content_key, model_revision
from scalemerge.encoder.adapters import ADAPTER_WEIGHTS, adapter_base
from scalemerge.encoder.folders import ADAPTER_CONFIG
from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank, TaskVector

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?"
)
_PREFIXES = ("model.", "bert.", "roberta.", "auto_model.", "0.auto_model.")  # what may stand before a backbone's names
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # the base stays as it was
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip


class _Pair(NamedTuple):
    """Where the two matrices of a tensor lie, and what their product is multiplied by."""

    a: str
    b: str
    scaling: float
    transposed: bool


class AdapterExpert:
    """A peft LoRA adapter folder as an expert.

    base: shapes and dtypes of the base's tensors by name; base_folder: where it is. Raises InputError for an adapter of
    another kind, one whose base is gone, a tensor that belongs nowhere, and spoilt files.
    """

    def __init__(self, folder: Path, base: Mapping[str, TensorSpec], base_folder: Path) -> None:
        self.folder, self.file = folder, folder / ADAPTER_WEIGHTS
        config = read_json(folder / ADAPTER_CONFIG)
        if not isinstance(config, dict):
            raise InputError(f"{folder / ADAPTER_CONFIG}: holds no JSON object; copy it again")
        self._config: dict[str, Any] = config
        self._refuse_unsupported()
        self._trained_on = self._own_base(base_folder)
        if not self.file.is_file():
            raise InputError(f"{folder}: no {ADAPTER_WEIGHTS} (safetensors only, no pickle); give a complete adapter")
        try:
            self._handle = safe_open(str(self.file), framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{self.file}: truncated or corrupt safetensors ({error}); copy it again") from None
        self._pairs = self._match(base)
        self.changed = frozenset(self._pairs)
        self.names = frozenset(name for name, spec in base.items() if spec.dtype.is_floating_point)

    def _refuse_unsupported(self) -> None:
        path, config = self.folder / ADAPTER_CONFIG, self._config
        remedy = "merge it into a full checkpoint with peft first"
        for field in _UNSUPPORTED:
            if config.get(field):
                raise InputError(f"{path}: {field} = {json.dumps(config[field])[:80]} is not supported; {remedy}")
        if config.get("bias", "none") != "none":
            raise InputError(f"{path}: bias = {config['bias']!r} is not supported; {remedy}")
        start = config.get("init_lora_weights")
        if not any(start is plain or (start == plain and isinstance(start, str)) for plain in _PLAIN_STARTS):
            raise InputError(f"{path}: init_lora_weights = {start!r} changes the base itself; {remedy}")
        for field in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(field) or {}, dict):
                raise InputError(f"{path}: {field} must be a mapping of module names to numbers; restore the file")

    def _own_base(self, base_folder: Path) -> Path | None:
        """The base that the adapter names; None where it is `base_folder` itself."""
        named = Path(adapter_base(self.folder) or base_folder)
        return None if named.resolve() == base_folder.resolve() else named

    def _match(self, base: Mapping[str, TensorSpec]) -> dict[str, _Pair]:
        sides: dict[tuple[str, bool], dict[str, str]] = {}
        for key in self._handle.keys():  # noqa: SIM118
            found = _KEY.fullmatch(key)
            if found is None or bool(found["embedding"]) == bool(found["weight"]):
                raise InputError(f"{self.file}: tensor '{key}' is no matrix of LoRA; merge the adapter with peft first")
            sides.setdefault((found["module"], bool(found["embedding"])), {})[found["side"]] = key
        if not sides:
            raise InputError(f"{self.file}: holds no tensors; give a complete adapter")
        pairs: dict[str, _Pair] = {}
        for (module, embedding), keys in sides.items():
            if len(keys) < 2:
                raise InputError(
                    f"{self.file}: tensor '{next(iter(keys.values()))}' has no partner; copy the file again"
                )
            name = self._name(module, base)
            a, b = (tuple(self._handle.get_slice(keys[side]).get_shape()) for side in "AB")
            transposed = embedding or bool(self._config.get("fan_in_fan_out"))
            product = (a[-1], b[0]) if transposed else (b[0], a[-1])
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or product != base[name].shape:
                raise InputError(
                    f"{self.file}: the matrices of '{module}' have shapes {list(a)} and {list(b)}, the base's tensor "
                    f"'{name}' {list(base[name].shape)}; give the base that the adapter was trained on"
                )
            pairs[name] = _Pair(keys["A"], keys["B"], self._scaling(module, a[0]), transposed)
        return pairs

    def _name(self, module: str, base: Mapping[str, TensorSpec]) -> str:
        """The backbone's name of a module's weight: as Checkpoint names it, without what a head puts before it."""
        for prefix in ("", *_PREFIXES):
            if module.startswith(prefix) and f"{module[len(prefix) :]}.weight" in base:
                return f"{module[len(prefix) :]}.weight"
        raise InputError(f"{self.file}: module '{module}' is not in the base; give the base that it was trained on")

    def _scaling(self, module: str, rank: int) -> float:
        path, config = self.folder / ADAPTER_CONFIG, self._config
        try:
            said = int(_by_pattern(config.get("rank_pattern"), module, config.get("r")))
            alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha")))
        except (TypeError, ValueError, re.error) as error:
            raise InputError(f"{path}: no rank and alpha for '{module}' ({error}); restore the file") from None
        if said != rank or not math.isfinite(alpha):
            raise InputError(
                f"{path}: rank {said} and alpha {alpha} of '{module}', but {self.file.name} has rank {rank}; copy both "
                "files again"
            )
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def held(self, name: str, rows: tuple[int, int] | None = None) -> TaskVector | None:
        """T of a tensor, or rows [start, stop) of it, as float32 matrices; None where the adapter has none."""
        pair = self._pairs.get(name)
        if pair is None:
            return None
        start, stop = rows or (None, None)
        if pair.transposed:
            a = self._finite(pair.b, self._handle.get_tensor(pair.b)).T
            b = self._finite(pair.a, self._handle.get_slice(pair.a)[:, start:stop]).T
        else:
            a = self._finite(pair.a, self._handle.get_tensor(pair.a))
            b = self._finite(pair.b, self._handle.get_slice(pair.b)[start:stop])
        return LowRank(a.float().contiguous(), b.float().contiguous() * pair.scaling)

    def _finite(self, key: str, tensor: Tensor) -> Tensor:
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise InputError(f"{self.file}: tensor '{key}' holds NaN or infinity; train or copy this adapter again")
        return tensor

    def require_base(self, folder: Path, revision: Callable[[], str]) -> None:
        """Raise InputError unless the adapter was trained on this base: the same folder, or one of the same hash."""
        if self._trained_on is not None and model_revision(self._trained_on) != revision():
            raise InputError(
                f"{self.folder / ADAPTER_CONFIG}: the adapter's base is {self._trained_on}, another model than "
                f"{folder}; give that base, or experts of this one"
            )

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        shapes = (self._handle.get_slice(key).get_shape() for pair in self._pairs.values() for key in (pair.a, pair.b))
        return sum(4 * shape[0] * shape[1] for shape in shapes)

    @cached_property
    def revision(self) -> str:
        """What identifies the task vectors: the matrices and what they are multiplied by. Reads every byte."""
        factors = {name: [pair.scaling, pair.transposed] for name, pair in sorted(self._pairs.items())}
        return content_key([model_revision(self.folder), factors])


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's name or its end, as peft matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
