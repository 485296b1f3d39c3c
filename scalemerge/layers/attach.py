"""Put merged layers into a transformers model, and take them out again.

`attach` replaces every module that has a task vector; modules whose task vectors are all absent stay as they are. The
base weights stay where they are (no copy). Tied weights stay tied, whether two names share a module or two modules a
parameter: every place gets the task vectors and the coefficients of the first name given, held once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from scalemerge.kernels.formats import TaskVector
from scalemerge.kernels.workspace import release_workspace
from scalemerge.layers.coefficients import Coefficients
from scalemerge.layers.embedding import MergedEmbedding
from scalemerge.layers.linear import MergedConv1D, MergedLinear
from scalemerge.layers.merged import MergedLayer, MergedLayerNorm, MergedModule, MergedRMSNorm
from scalemerge.layers.recompute import recompute_blocks
from scalemerge.layers.settings import MergeSettings


def attach(
    model: nn.Module,
    task_vectors: Mapping[str, Sequence[TaskVector]],
    coefficients: Coefficients,
    settings: MergeSettings | None = None,
) -> list[MergedLayer]:
    """Swap merged layers in, in place.

    task_vectors: E for each parameter name of `model`: tensors of any floating-point dtype, or Quantized and LowRank
    ones (kernels.formats), mixed as you like. coefficients: where each parameter finds its c. settings: strategy,
    precision, chunk size and the rest; shared by all layers.
    Returns the layers swapped in. Raises ValueError for a name that the model does not have or a shape that differs.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    by_module: dict[str, dict[str, list[TaskVector]]] = {}
    placed: set[int] = set()
    for name, vectors in task_vectors.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter '{name}'; were the task vectors made from another base?")
        if name not in coefficients.rows and name not in coefficients.by_row:
            raise ValueError(f"no coefficients for '{name}'")
        if id(parameters[name]) in placed:
            continue
        placed.add(id(parameters[name]))
        here = [vector.to(parameters[name].device) for vector in vectors]
        for alias in names_of[id(parameters[name])]:
            coefficients.alias(name, alias)
            module_name, _, own_name = alias.rpartition(".")
            by_module.setdefault(module_name, {})[own_name] = here
    if "" in by_module:
        raise ValueError("parameters directly on the model cannot be merged; wrap the model in a module")
    model.requires_grad_(False)
    settings = settings or MergeSettings()
    swapped: dict[int, MergedLayer] = {}
    for module_name, vectors_of in by_module.items():
        original = modules[module_name]
        if id(original) not in swapped:
            swapped[id(original)] = _layer_for(original)(original, vectors_of, coefficients, module_name, settings)
    for module in modules.values():
        for child_name, child in list(module._modules.items()):
            if child is not None and id(child) in swapped:
                module._modules[child_name] = swapped[id(child)]
    if settings.recompute != "none":
        recompute_blocks(model, settings.recompute)
    return list(swapped.values())


def detach(model: nn.Module) -> nn.Module:
    """The plain model again, in place, with the merged weights at the present coefficients."""
    recompute_blocks(model, "none")
    restored: dict[int, nn.Module] = {}
    written: set[int] = set()
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, MergedLayer):
                if id(child) not in restored:
                    restored[id(child)] = child.restore(written)
                module._modules[name] = restored[id(child)]
    release_workspace()  # the largest quantized weight was in it whole
    return model


def _layer_for(module: nn.Module) -> type[MergedLayer]:
    kind = type(module)
    if kind is nn.Linear:
        return MergedLinear
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):
        return MergedConv1D
    if kind is nn.LayerNorm:
        return MergedLayerNorm
    if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")):
        return MergedRMSNorm
    scaled = isinstance(module, nn.Embedding) and "ScaledWordEmbedding" in kind.__name__
    if (kind is nn.Embedding or scaled) and module.max_norm is None:
        return MergedEmbedding
    return MergedModule
