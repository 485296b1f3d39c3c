"""How merged layers compute: one object that all layers of a model share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from scalemerge.kernels import tuning
from scalemerge.layers.product import STRATEGIES, Strategy
from scalemerge.layers.recompute import LEVELS, Recompute


@dataclass
class MergeSettings:
    """Options of `attach`; the defaults are exact.

    strategy: see layers/product.py. precision: "merge" rounds W0 + sum c_i T_i once to the activations' dtype, as an
    exported model would; "split" makes x W0' + x (sum c_i T_i)', which keeps small deltas that bfloat16 rounds away, at
    the cost of one more product. chunk_bytes: size of a buffer of merged weights (None: the device's default). cache:
    keep merged weights while the coefficients stand still (a gradient-accumulation window): exact, one model's bytes.
    sample_rows: s estimates the coefficients' gradients of linear layers from one in s rows, drawn anew each time from
    `seed` and scaled up: unbiased, and the third product almost free. 1 is exact. recompute: see layers/recompute.py.
    """

    strategy: Strategy = "auto"
    precision: Literal["merge", "split"] = "merge"
    chunk_bytes: int | None = None
    cache: bool = False
    sample_rows: int = 1
    seed: int = 0
    recompute: Recompute = "none"
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        if self.precision not in ("merge", "split"):
            raise ValueError(f"precision must be 'merge' or 'split', not {self.precision!r}")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be positive, not {self.chunk_bytes}")
        if self.sample_rows < 1:
            raise ValueError(f"sample_rows must be 1 (all rows) or more, not {self.sample_rows}")
        if self.recompute not in LEVELS:
            raise ValueError(f"recompute must be one of {', '.join(LEVELS)}, not {self.recompute!r}")
        if self.cache and self.precision == "split":
            raise ValueError("cache=True keeps W(c) whole; it does not go with precision='split'")

    def chunk(self, device: torch.device) -> int:
        return self.chunk_bytes or tuning.chunk_bytes(device)

    def reseed(self, seed: int) -> None:
        """Draw the next samples from another seed: a search that is resumed draws what it would have drawn."""
        self.seed = seed
        self._generators.clear()

    def sample(self, rows: int, device: torch.device) -> Tensor | None:
        """Which of `rows` rows to estimate from, uniformly without replacement and sorted; None for all."""
        if self.sample_rows == 1 or rows < 2 * self.sample_rows:
            return None
        return self._draw(rows, device)

    @torch.compiler.disable  # graphs know no generators
    def _draw(self, rows: int, device: torch.device) -> Tensor:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        picked = torch.randperm(rows, generator=generator, device=device)[: -(-rows // self.sample_rows)]
        return picked.sort().values
