"""Tokenizers and backbones from folders, with InputError of one line for whatever is no usable model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from scalemerge.encoder.attention import check_attention
from scalemerge.errors import InputError

Quantization = Literal["none", "int8", "nf4"]


def load_tokenizer(folder: str, path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, with a padding token. path: what the user called the folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for one cause: the folder has no usable tokenizer
        raise InputError(f"{path}: cannot load a model ({first_line(error)}); give a complete model folder") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up without its file
        raise InputError(f"{path}: the tokenizer has no vocabulary; give a folder with its tokenizer.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_backbone(
    folder: str,
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    quantize: Quantization = "none",
    trust_remote_code: bool = False,
) -> Any:
    """The backbone of a folder on a device, every weight from its file.

    Raises InputError for folders that are no model, an attention that is not installed, or a quantization without
    bitsandbytes and a GPU.
    """
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    check_attention(attention)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if quantize != "none":
        options |= {"quantization_config": quantization_config(quantize), "device_map": {"": device}}
    try:
        backbone, loaded = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # transformers raises many types for one cause: the folder is no usable model
        raise InputError(f"{path}: cannot load a model ({first_line(error)}); give a complete model folder") from error
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))
    if missing:  # transformers would fill them with random numbers
        raise InputError(f"{path}: the weights lack {', '.join(missing[:3])}; give a complete model folder")
    freeze_unused(backbone)
    if hasattr(backbone.config, "use_cache"):
        backbone.config.use_cache = False
    return backbone if quantize != "none" else backbone.to(device)


def empty_backbone(
    folder: str, path: str | Path, *, attention: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The backbone of a folder without its weights: parameters on the meta device, buffers real, in float32.

    Raises InputError for a folder that describes no model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel

    check_attention(attention)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            backbone = AutoModel.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises many types for one cause: the folder is no usable model
        raise InputError(f"{path}: cannot load a model ({first_line(error)}); give a complete model folder") from error
    freeze_unused(backbone)
    if hasattr(backbone.config, "use_cache"):
        backbone.config.use_cache = False
    return backbone


def quantization_config(quantize: Quantization) -> Any:
    """bitsandbytes' settings for a frozen base: nf4 as in QLoRA (Dettmers et al. 2023), or int8."""
    import importlib.util

    if quantize not in ("int8", "nf4"):
        raise InputError(f"quantize: '{quantize}' is not one of none, int8, nf4")
    if importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise InputError(f"quantize: {quantize} needs bitsandbytes and a GPU; pip install bitsandbytes on a machine "
                         "with one, or set quantize: none")  # fmt: skip
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def freeze_unused(backbone: nn.Module) -> None:
    """Freeze the poolers some backbones carry: our pooling reads token states, so they never get a gradient, and a
    parameter without a gradient stops DDP."""
    for name, parameter in backbone.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)


def position_table(backbone: nn.Module) -> Any:
    """The table of absolute positions that BERT's kind has, else None."""
    return getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)


def position_limit(backbone: nn.Module) -> int:
    """How many tokens the backbone has positions for; RoBERTa's kind counts them from padding_idx + 1."""
    count = getattr(backbone.config, "max_position_embeddings", None) or 512
    offset = getattr(position_table(backbone), "padding_idx", None)
    return int(count) - (0 if offset is None else offset + 1)


def pad_where_positions_allow(tokenizer: Any, backbone: nn.Module) -> None:
    """BERT counts positions from the row's first column, so padding on the left would move the text; RoBERTa's kind
    counts real tokens only, and rotary positions are relative."""
    table = position_table(backbone)
    if table is not None and getattr(table, "padding_idx", None) is None:
        tokenizer.padding_side = "right"


def lower_case(tokenizer: Any, path: str | Path) -> None:
    """Lowercase before all else, as sentence-transformers does for `do_lower_case`; a no-op where it is done."""
    from tokenizers.normalizers import Lowercase, Sequence

    if not tokenizer.is_fast:
        raise InputError(f"{path}: do_lower_case needs a tokenizer.json; save the tokenizer in that format")
    normalizer = tokenizer.backend_tokenizer.normalizer
    steps: list[Any] = [] if normalizer is None else [normalizer]
    if isinstance(normalizer, Sequence):
        steps = list(normalizer)  # type: ignore[call-overload]
    if not any(isinstance(step, Lowercase) for step in steps):
        tokenizer.backend_tokenizer.normalizer = Sequence([Lowercase(), *steps])
