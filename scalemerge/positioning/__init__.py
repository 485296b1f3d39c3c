"""Self Positioning: learn where among the task vectors the best single model lies."""

from scalemerge.positioning.positions import POSITIONS, Position
from scalemerge.positioning.search import Search
from scalemerge.positioning.setup import PositionedModel, build

__all__ = ["POSITIONS", "Position", "PositionedModel", "Search", "build"]
