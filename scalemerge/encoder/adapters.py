"""LoRA and QLoRA through peft: low-rank adapters beside frozen weights, W x + (alpha / rank) B A x (Hu et al. 2021).

An adapter folder is a sentence-transformers folder that holds adapter_config.json and adapter_model.safetensors in
place of the weights; `base_model_name_or_path` says where those are. SentenceTransformer(folder) loads it too. It has
no config.json, as transformers would then look for the base's weights beside it; so whether a decoder's tokens see
later ones stands in config_sentence_transformers.json, in a key of ours: sentence-transformers asks the base alone.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from scalemerge.encoder.attention import is_bidirectional
from scalemerge.encoder.folders import ADAPTER_CONFIG, local_folder
from scalemerge.encoder.loading import first_line
from scalemerge.errors import InputError
from scalemerge.progress import say

if TYPE_CHECKING:
    from scalemerge.encoder.model import Encoder
    from scalemerge.recipe import Lora

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"  # peft's name of the only adapter; it stands in parameter names, not in files
_UNUSED = r"(.*\.)?pooler\..*"  # see freeze_unused: an adapter there would never get a gradient


def is_adapter(backbone: Any) -> bool:
    """Whether peft has put an adapter into a backbone."""
    return getattr(backbone, "peft_config", None) is not None


def add_lora(encoder: Encoder, settings: Lora) -> None:
    """Freeze the encoder's backbone and wrap it in a new LoRA adapter, in place.

    The adapter's first matrices are drawn from torch's generator: seed it before. Targets default to all linear layers
    but a pooler's. Works with gradient checkpointing, switched on before or after: transformers and peft then make the
    embeddings' output require a gradient. Raises InputError when peft is not installed, a target is no module, or the
    backbone has an adapter already; ValueError when the backbone was not loaded as `settings.quantize` says.
    """
    peft = _peft()
    backbone: Any = encoder.backbone
    if is_adapter(backbone):
        raise InputError("training.lora: the base is an adapter already; merge it into its base first")
    base = backbone.name_or_path
    if not base:
        raise InputError("training.lora: the base was not loaded from a folder, so an adapter cannot name it")
    quantized = bool(getattr(backbone, "is_quantized", False))
    if quantized != (settings.quantize != "none"):
        raise ValueError(f"quantize '{settings.quantize}' is for Encoder.load; the base was loaded otherwise")
    if settings.save == "adapter" and is_bidirectional(backbone.config):
        say("training.lora: sentence-transformers asks the base's config.json alone whether tokens see later ones; set "
            "save: merged to use a bidirectional model there")  # fmt: skip
    if quantized:
        backbone = peft.prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets or "all-linear",
        exclude_modules=_UNUSED if hasattr(backbone, "pooler") else None,  # peft warns where it finds nothing
        task_type="FEATURE_EXTRACTION",
    )
    try:
        wrapped = peft.get_peft_model(backbone, config)
    except ValueError as error:
        wanted = f" {', '.join(settings.targets)}" if settings.targets else ""
        raise InputError(f"training.lora.targets:{wanted}: {first_line(error)}; name linear layers") from error
    # peft takes the path as it was given, which is of no use elsewhere when it is relative
    wrapped.peft_config[_NAME].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    encoder.backbone = wrapped


def adapter_base(folder: str | Path) -> str | None:
    """The folder or hub id of the base that an adapter folder names, or None when the folder holds no adapter.

    Raises InputError when the base is gone, or the adapter is none of LoRA's.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, kind = config["base_model_name_or_path"], config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: names no base_model_name_or_path and peft_type ({error}); restore the file"
        ) from None
    if kind != "LORA" or not isinstance(base, str) or not base:
        raise InputError(f"{path}: an adapter of kind {kind} on base {base!r} is not supported; only LoRA is")
    try:
        found = local_folder(base)
    except InputError as error:
        raise InputError(f"{path}: the adapter's base is not there ({error}); set base_model_name_or_path") from None
    return found


def load_adapter(backbone: Any, folder: str | Path) -> Any:
    """The backbone wrapped in the folder's adapter, all of it frozen. Raises InputError for spoilt adapters."""
    peft = _peft()
    file = Path(folder) / ADAPTER_WEIGHTS
    if not file.is_file():  # peft would fall back to a pickle
        raise InputError(f"{folder}: no {ADAPTER_WEIGHTS}; give a complete adapter folder")
    from safetensors import safe_open

    try:
        wrapped = peft.PeftModel.from_pretrained(backbone, str(folder))
        with safe_open(file, "pt") as stored:
            missing = sorted(set(map(file_name, adapter_parameters(wrapped))) - set(stored.keys()))
    except Exception as error:  # peft, safetensors and torch each raise their own
        raise InputError(f"{folder}: cannot load the adapter ({first_line(error)}); give a complete folder") from error
    if missing:  # peft would only warn and keep random numbers
        raise InputError(f"{folder}: the adapter lacks {', '.join(missing[:3])}; give a complete adapter folder")
    return wrapped


def adapter_parameters(backbone: Any) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the backbone; their values are not read."""
    return {name: value for name, value in backbone.named_parameters() if ".lora_" in name}


def file_name(name: str) -> str:
    """A parameter's name in adapter_model.safetensors: without the adapter's own name."""
    return name.replace(f".{_NAME}.", ".")


def write_adapter_config(backbone: Any, folder: Path) -> None:
    """adapter_config.json, for inference, with the targets in one order."""
    config = copy.copy(backbone.peft_config[_NAME])
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def merge_adapter(encoder: Encoder) -> None:
    """Add an adapter to the weights it stands beside and drop it, in place. Not for a quantized base: see save."""
    if is_adapter(encoder.backbone):
        encoder.backbone = encoder.backbone.merge_and_unload()  # type: ignore[operator]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("LoRA adapters need peft; pip install 'scalemerge[train]'") from None
    return peft
