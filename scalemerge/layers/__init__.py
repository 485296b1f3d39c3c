"""The merge layers: weights W0 + sum_i c_i T_i inside the forward pass, with exact gradients for c.

from scalemerge.layers import MergedLinear, attach, detach
"""

from scalemerge.kernels.formats import LowRank, Quantized, quantize
from scalemerge.layers.attach import attach, detach
from scalemerge.layers.coefficients import Coefficients
from scalemerge.layers.embedding import MergedEmbedding
from scalemerge.layers.linear import MergedConv1D, MergedLinear
from scalemerge.layers.merged import MergedLayer, MergedLayerNorm, MergedModule, MergedRMSNorm
from scalemerge.layers.settings import MergeSettings

__all__ = [
    "Coefficients",
    "LowRank",
    "MergeSettings",
    "MergedConv1D",
    "MergedEmbedding",
    "MergedLayer",
    "MergedLayerNorm",
    "MergedLinear",
    "MergedModule",
    "MergedRMSNorm",
    "Quantized",
    "attach",
    "detach",
    "quantize",
]
