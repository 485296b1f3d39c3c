"""Attention: which code computes it, and decoders whose tokens see later tokens.

A decoder turns bidirectional through transformers' own switch: `config.is_causal = False` (transformers 5.2 and later).
Every forward pass then builds its masks with `create_bidirectional_mask` (padding stays masked) and hands
`is_causal=False` to the attention functions, eager, SDPA and FlashAttention alike. The key is written to config.json,
so AutoModel, and with it sentence-transformers, loads such a folder bidirectionally too.

Decoders with a sliding window (Mistral, some layers of Gemma 2 and 3) then see a window on both sides; for texts longer
than the window SDPA and eager reach one token further than FlashAttention does.
"""

from __future__ import annotations

from typing import Any

import torch

from scalemerge.errors import InputError

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def check_attention(attention: str | None) -> None:
    """Raises InputError for an attention that is unknown or not installed; None leaves the choice to transformers."""
    if attention is None or "/" in attention:  # a kernel of the hub
        return
    if attention not in ATTENTIONS:
        raise InputError(f"attention '{attention}' is not one of {', '.join(ATTENTIONS)}")
    if attention.startswith("flash_attention"):
        from transformers import utils

        number = attention[-1]
        installed = getattr(utils, f"is_flash_attn_{number}_available", lambda: False)
        if not installed() and not utils.is_kernels_available():
            raise InputError(f"attention '{attention}' needs a GPU and its package, which is not installed; "
                             "pip install flash-attn, or choose sdpa")  # fmt: skip


def is_bidirectional(config: Any) -> bool:
    """Whether a decoder's configuration says that its tokens see later ones; False for encoders, which need no say."""
    return getattr(config, "is_causal", None) is False


def make_bidirectional(backbone: Any) -> None:
    """Let the tokens of a decoder see later ones; a backbone whose tokens do already is left as it is.

    Raises InputError where the backbone goes on hiding them: its code, or an old transformers, ignores the switch.
    """
    if sees_later_tokens(backbone):
        return
    backbone.config.is_causal = False
    if sees_later_tokens(backbone) is False:
        raise InputError(
            f"bidirectional: {type(backbone).__name__} ignores config.is_causal, so its tokens cannot see later ones; "
            "use transformers 5.2 or later, or a decoder of its own code (Qwen, Mistral, Llama, Gemma)"
        )


@torch.no_grad()
def sees_later_tokens(backbone: Any) -> bool | None:
    """Whether changing the last of three tokens changes the first one's state, by trying it.

    None where it cannot be tried: partitioned parameters (ZeRO-3), or FlashAttention on the CPU.
    """
    first = next(backbone.parameters())
    flash = "flash" in str(getattr(backbone.config, "_attn_implementation", ""))
    if any(hasattr(p, "ds_id") for p in backbone.parameters()) or (flash and first.device.type == "cpu"):
        return None
    was_training = backbone.training
    backbone.eval()
    states = []
    for last in (1, 2):
        tokens = torch.tensor([[3, 4, last]], device=first.device)
        with torch.autocast(first.device.type, torch.bfloat16, enabled=flash):
            output = backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        states.append(output.last_hidden_state[:, 0])
    backbone.train(was_training)
    return not torch.equal(*states)
