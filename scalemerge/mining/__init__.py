"""Hard negatives for retrieval training, mined with a trained encoder."""

from scalemerge.mining.mine import Summary, mine, mine_files
from scalemerge.mining.rules import Rules

__all__ = ["Rules", "Summary", "mine", "mine_files"]
