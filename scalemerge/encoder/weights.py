"""Which tensors of a backbone belong in its weights file, under which names, without reading a value.

Under ZeRO-3 a parameter holds a shard, or nothing, until it is gathered; so what is to be written is listed first.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from scalemerge.encoder.adapters import ADAPTER_WEIGHTS, adapter_parameters, file_name, is_adapter


class Weight(NamedTuple):
    """name: in the file; own: in `backbone.state_dict()`; tensor: the parameter or buffer itself."""

    name: str
    own: str
    tensor: Tensor


def list_weights(backbone: nn.Module) -> list[Weight]:
    """Parameters and persistent buffers as save_pretrained names them, tied ones once; of an adapter its own alone."""
    if is_adapter(backbone):
        return [Weight(file_name(own), own, tensor) for own, tensor in adapter_parameters(backbone).items()]
    fleeting = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in backbone.named_modules()
        for name in module._non_persistent_buffers_set
    }
    own: list[tuple[str, Tensor]] = [*backbone.named_parameters(), *backbone.named_buffers()]
    return [Weight(name, name, tensor) for name, tensor in own if name not in fleeting]


def weights_file(backbone: nn.Module) -> str:
    return ADAPTER_WEIGHTS if is_adapter(backbone) else "model.safetensors"
