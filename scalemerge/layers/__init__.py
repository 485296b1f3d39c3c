"""The merge layers: weights W0 + sum_i c_i T_i inside the forward pass, with exact gradients for c.

from scalemerge.layers import MergedLinear, attach, detach
"""

from scalemerge.layers.attach import attach, detach
from scalemerge.layers.coefficients import Coefficients
from scalemerge.layers.merged import MergedEmbedding, MergedLayer, MergedLinear, MergedModule

__all__ = [
    "Coefficients",
    "MergedEmbedding",
    "MergedLayer",
    "MergedLinear",
    "MergedModule",
    "attach",
    "detach",
]
