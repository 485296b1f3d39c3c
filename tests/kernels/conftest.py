"""What the kernels' tests share: weights with their exact numbers in float64, and matrices that are too large to exist.

The kernels run on a GPU where there is one, else in Triton's interpreter (tests/conftest.py asks for it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalemerge.kernels.formats import Packed, Quantized, TaskVector, quantize
from scalemerge.kernels.tiles import interpreted, triton

#: how an expert may lie in memory: a dense dtype, or bits / columns of a scale
KINDS = ("float32", "int4/32", "float16", "int8/64", "bfloat16", "int4/64", "int8/32", "int4/128", "int8/128")

#: half a unit in the last place
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made * scale).to(dtype)


def padded(tensor: Tensor, padding: int) -> Tensor:
    """The same matrix with a row stride larger by `padding`; what lies between rows is NaN (255 for integers)."""
    rows, columns = tensor.shape
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((rows, columns + padding), poison, dtype=tensor.dtype)
    buffer[:, :columns] = tensor
    return buffer[:, :columns]


def dequantized(vector: TaskVector) -> Tensor:
    """A task vector in float64, written out from the definition of its format."""
    if isinstance(vector, Tensor):
        return vector.cpu().double()
    assert isinstance(vector, Quantized)
    values = vector.values.cpu().to(torch.int64)
    if vector.values.dtype == torch.uint8:
        values = torch.stack([values % 16 - 8, values // 16 - 8], 2).flatten(1)[:, : vector.shape[1]]
    scales = vector.scales.cpu().double().repeat_interleave(vector.group_size, 1)
    return values.double() * scales[:, : vector.shape[1]]


def task_vector(kind: str, shape: Sequence[int], seed: int, padding: int = 0) -> TaskVector:
    """One of KINDS."""
    dense = numbers(*shape, seed=seed, scale=0.1)
    if "/" not in kind:
        return padded(dense.to(getattr(torch, kind)), padding)
    made = quantize(dense, int(kind[3]), int(kind.split("/")[1]))
    return Quantized(padded(made.values, padding), padded(made.scales, padding), made.group_size, made.shape)


@dataclass
class Weights:
    """A weight as the kernels take it, and the same in float64 on the CPU."""

    base: Tensor | None
    vectors: list[TaskVector]
    coefficients: Tensor
    exact_base: Tensor
    exact_vectors: Tensor  # [E, N, K]

    def __post_init__(self) -> None:
        packed = Packed.of(self.vectors)
        self.shape = packed.shape
        self.lists = packed.values, packed.scales, packed.groups

    def _sum(self, base: Tensor, vectors: Tensor, c: Tensor) -> Tensor:
        return base + (c.view(len(c), -1, 1) * vectors).sum(0)

    @property
    def merged(self) -> Tensor:
        """W0 + sum_i c_i T_i."""
        return self._sum(self.exact_base, self.exact_vectors, self.coefficients.cpu().double())

    @property
    def magnitude(self) -> Tensor:
        """|W0| + sum_i |c_i T_i|: what rounding errors of a sum are relative to."""
        return self._sum(self.exact_base.abs(), self.exact_vectors.abs(), self.coefficients.cpu().double().abs())


def weights(
    kinds: Sequence[str],
    shape: tuple[int, int],
    *,
    device: torch.device | None = None,
    base: torch.dtype | None = torch.float32,
    per_row: bool = False,
    padding: int = 0,
    seed: int = 0,
) -> Weights:
    """Random ones. base: dtype of W0, None for no W0 at all; per_row: c [E, N]; padding: see padded."""
    device = device or torch.device("cpu")
    own_base = None if base is None else padded(numbers(*shape, seed=seed, dtype=base), padding)
    vectors = [task_vector(kind, shape, seed + 1 + i, padding) for i, kind in enumerate(kinds)]
    c = numbers(len(kinds), *([shape[0]] if per_row else []), seed=seed + 100)
    exact_base = torch.zeros(shape, dtype=torch.float64) if own_base is None else own_base.double()
    exact = torch.stack([dequantized(vector) for vector in vectors])
    if device.type != "cpu":  # a copy to a device drops the padding
        own_base = None if own_base is None else own_base.to(device)
        vectors = [vector.to(device) for vector in vectors]
    return Weights(own_base, vectors, c.to(device), exact_base, exact)


def assert_within(found: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """|found - exact| <= bound, entry by entry, and no NaN."""
    assert found.shape == exact.shape
    error = (found.detach().cpu().double() - exact).abs()
    excess = (error / torch.as_tensor(bound, dtype=torch.float64).clamp_min(1e-300)).max().item()
    assert excess <= 1, f"{excess:.3g} times the error bound"


class FarMatrix:
    """Stands for a matrix of which only some rows exist: `real` are rows first_row, first_row + 1, ... of it.

    It has addresses of its own, where there is no memory, and any row stride. Under `far_memory` loads and stores there
    are carried out in `real`, and one outside of the rows and columns of `real` is an error. Interpreter only.
    """

    _made = 0

    def __init__(self, real: Tensor, stride: int, first_row: int = 0) -> None:
        FarMatrix._made += 1
        self.real, self.row_stride, self.first_row = real, stride, first_row
        self.address = 2**50 + FarMatrix._made % 1000 * 2**47
        self.dtype, self.device = real.dtype, real.device
        self.shape = torch.Size((first_row + real.shape[0], real.shape[1]))

    def stride(self, dimension: int | None = None) -> Any:
        return (self.row_stride, 1) if dimension is None else (self.row_stride, 1)[dimension]

    def size(self) -> torch.Size:
        return self.shape

    def dim(self) -> int:
        return 2

    def element_size(self) -> int:
        return self.real.element_size()

    def data_ptr(self) -> int:
        return self.address

    # what the interpreter asks of a tensor before it takes its address
    def untyped_storage(self) -> Any:
        return self.real.untyped_storage()

    def storage_offset(self) -> int:
        return 0

    def new_empty(self, *_: Any, **__: Any) -> FarMatrix:
        return self

    def set_(self, *_: Any) -> FarMatrix:
        return self

    def translate(self, addresses: np.ndarray, mask: np.ndarray) -> np.ndarray:
        offset = (addresses.astype(np.int64) - self.address) // self.element_size()
        row, column = offset // self.row_stride - self.first_row, offset % self.row_stride
        rows, columns = self.real.shape
        outside = mask & ((row < 0) | (row >= rows) | (column >= columns))
        if outside.any():
            raise IndexError(f"offset {offset[outside][0]} is outside of the matrix")
        return (self.real.data_ptr() + (row * self.real.stride(0) + column) * self.element_size()).astype(np.uint64)


@contextmanager
def far_memory(*matrices: FarMatrix) -> Iterator[None]:
    """While it is active, kernels in the interpreter may be given these matrices."""
    if not interpreted():
        pytest.skip("addresses without memory need Triton's interpreter")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def real(pointers: Any, mask: Any) -> Any:
        if pointers.data.flat[0] < 2**49:
            return pointers
        own = [one for one in matrices if abs(int(pointers.data.flat[0]) - one.address) < 2**46]
        return TensorHandle(
            own[0].translate(pointers.data, np.broadcast_to(mask.data, pointers.data.shape)), pointers.dtype
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder, "create_masked_load", lambda self, p, m, *rest: load(self, real(p, m), m, *rest)
        )
        patch.setattr(
            InterpreterBuilder, "create_masked_store", lambda self, p, v, m, *rest: store(self, real(p, m), v, m, *rest)
        )
        yield


class Kit:
    """The functions above, for tests: test modules cannot import a conftest."""

    KINDS = KINDS
    UNIT = UNIT
    numbers = staticmethod(numbers)
    padded = staticmethod(padded)
    dequantized = staticmethod(dequantized)
    task_vector = staticmethod(task_vector)
    weights = staticmethod(weights)
    assert_within = staticmethod(assert_within)
    FarMatrix = FarMatrix
    far_memory = staticmethod(far_memory)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run: a GPU, or the interpreter."""
    if triton is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not interpreted():
        pytest.skip("no usable GPU, and TRITON_INTERPRET=1 was not set before the kernels were imported")
    return torch.device("cpu")


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an entry that a kernel should have written and did not is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
