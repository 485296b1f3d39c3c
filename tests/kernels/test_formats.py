"""Formats of task vectors: what quantization may lose, and that any block is the same block of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.kernels.formats import (
    GROUP_SIZES,
    LowRank,
    Packed,
    Quantized,
    dense_block,
    quantize,
    unpack,
)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("magnitude", [1.0, 1e-5])  # 1e-5 / 127 is subnormal in float16
@pytest.mark.parametrize("columns", [1, 31, 64, 129, 256, 300])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_entry_is_within_half_a_step(
    kit: Any, bits: int, group_size: int, columns: int, magnitude: float
) -> None:
    """Values are rounded against the rounded scale, so nothing is lost beyond half a step: the bound is exact."""
    dense = kit.numbers(5, columns, seed=columns, scale=magnitude)
    packed = quantize(dense, bits, group_size)
    step = packed.scales.double().repeat_interleave(group_size, 1)[:, :columns]
    kit.assert_within(kit.dequantized(packed), dense.double(), step * (0.5 + 1e-6))
    largest = torch.nn.functional.pad(dense.abs(), (0, -columns % group_size)).view(5, -1, group_size).amax(2).double()
    # a step is no larger than the range needs: the largest entry is the last value, up to bfloat16's 2^-8
    kit.assert_within(packed.scales, largest / (127 if bits == 8 else 7), largest / (127 if bits == 8 else 7) * 2.0**-8)


@pytest.mark.parametrize("bits", [4, 8])
def test_layout(bits: int) -> None:
    """What the kernels rely on, number by number."""
    limit = 7 if bits == 4 else 127
    packed = quantize(torch.tensor([[1.0, -1.0, 0.0, 0.5, 1.0]]) * limit, bits, 32)
    assert packed.bits == bits and packed.group_size == 32 and packed.shape == (1, 5)
    assert packed.scales.tolist() == [[1.0]] and packed.scales.dtype == torch.bfloat16
    if bits == 4:  # 3.5 rounds to even; the missing sixth column is stored as zero
        assert packed.values.tolist() == [[15 + 1 * 16, 8 + 12 * 16, 15 + 8 * 16]]
    else:
        assert packed.values.tolist() == [[127, -127, 0, 64, 127]] and packed.values.dtype == torch.int8


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_stay_zero_and_disturb_no_other(kit: Any, bits: int) -> None:
    dense = kit.numbers(4, 70, seed=0)
    dense[1] = 0
    dense[2, :64] = 0
    found = dense_block(quantize(dense, bits))
    assert (found[1] == 0).all() and (found[2, :64] == 0).all()
    assert found[0].ne(0).any() and found[2, 64:].ne(0).any()


@pytest.mark.parametrize(
    "shape, bits, group_size, message",
    [((4, 4), 3, 64, "bits must be 4 or 8"), ((4, 4), 8, 48, "group_size must be one of"),
     ((4,), 8, 64, "only matrices"), ((2, 2, 2), 4, 64, "only matrices")],
)  # fmt: skip
def test_what_cannot_be_quantized(shape: tuple[int, ...], bits: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.zeros(shape), bits, group_size)


@pytest.mark.parametrize("bits, most", [(4, 0.28), (8, 0.52)])
def test_bytes_against_bfloat16(bits: int, most: float) -> None:
    packed = quantize(torch.ones(64, 1024), bits, 64)
    assert packed.nbytes == packed.values.nbytes + packed.scales.nbytes
    assert bits / 16 < packed.nbytes / torch.ones(64, 1024, dtype=torch.bfloat16).nbytes <= most


@given(
    data=st.data(),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from(GROUP_SIZES),
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    padding=st.integers(0, 3),
)
def test_any_block_is_that_of_the_whole(
    kit: Any, data: st.DataObject, bits: int, group_size: int, rows: int, columns: int, dtype: torch.dtype, padding: int
) -> None:
    packed = quantize(kit.numbers(rows, columns, seed=0), bits, group_size)
    r0, r1 = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    c0, c1 = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    exact = kit.dequantized(packed)
    # 8 bits times 8 bits are exact in float32; in bfloat16 the product is rounded once
    expected = exact[r0:r1, c0:c1].to(dtype)
    assert torch.equal(dense_block(packed, (r0, r1), (c0, c1), dtype=dtype), expected)
    buffer = torch.full((r1 - r0, c1 - c0 + padding), float("nan"), dtype=dtype)
    dense_block(packed, (r0, r1), (c0, c1), out=buffer[:, : c1 - c0])
    assert torch.equal(buffer[:, : c1 - c0], expected)
    assert buffer[:, c1 - c0 :].isnan().all()
    assert torch.equal(dense_block(packed), exact.float())


def test_blocks_of_dense_and_low_rank(kit: Any) -> None:
    dense = kit.numbers(6, 9, seed=0, dtype=torch.float16)
    part = dense_block(dense, (1, 4), (2, 9))
    assert torch.equal(part, dense[1:4, 2:9]) and part.data_ptr() == dense[1:, 2:].data_ptr()
    low = LowRank(kit.numbers(2, 9, seed=1), kit.numbers(6, 2, seed=2))
    assert low.shape == (6, 9) and low.nbytes == 4 * 2 * (6 + 9)
    found = dense_block(low, (1, 4), (2, 9), dtype=torch.float64)
    kit.assert_within(found, (low.b.double() @ low.a.double())[1:4, 2:9], 1e-14)
    out = torch.empty(6, 9)
    assert dense_block(low, out=out) is out
    kit.assert_within(out, low.b.double() @ low.a.double(), 1e-6 * (low.b.abs().double() @ low.a.abs().double()))


@pytest.mark.parametrize("a, b", [((2, 9), (6, 3)), ((9,), (6, 2)), ((2, 9), (6, 2, 1))])
def test_low_rank_shapes_must_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs a \\[R, K\\] and b \\[N, R\\]"):
        LowRank(torch.zeros(a), torch.zeros(b))


def test_packed_sorts_mixed_experts(kit: Any) -> None:
    shape = (6, 70)
    first = LowRank(kit.numbers(2, 70, seed=0), kit.numbers(6, 2, seed=1))
    last = LowRank(kit.numbers(3, 70, seed=2), kit.numbers(6, 3, seed=3))
    dense = kit.numbers(*shape, seed=4, dtype=torch.bfloat16)
    four, eight = (kit.task_vector(kind, shape, seed=5) for kind in ("int4/32", "int8/128"))
    packed = Packed.of([first, four, dense, eight, last])
    assert packed.shape == shape and packed.experts == 5
    assert packed.merged == (1, 2, 3) and packed.groups == (32, 0, 128) and not packed.all_merged
    assert packed.values[0] is four.values and packed.values[1] is dense and packed.values[2] is eight.values
    assert packed.scales[0] is four.scales and packed.scales[1].numel() == 0
    assert packed.low_rank is not None and packed.low_rank.tolist() == [0, 0, 4, 4, 4]
    c = kit.numbers(5, seed=9, dtype=torch.float64)
    exact = c[0] * first.b.double() @ first.a.double() + c[4] * last.b.double() @ last.a.double()
    assert packed.a is not None and packed.b is not None
    kit.assert_within((packed.b.double() * c[packed.low_rank]) @ packed.a.double(), exact, 1e-13)
    assert packed.nbytes == four.nbytes + dense.nbytes + eight.nbytes + first.nbytes + last.nbytes
    restored = [unpack(*one, shape) for one in zip(packed.values, packed.scales, packed.groups)]
    assert isinstance(restored[0], Quantized) and restored[0] == four and restored[1] is dense


def test_packed_without_low_rank_or_without_anything(kit: Any) -> None:
    packed = Packed.of([kit.numbers(3, 4, seed=0), kit.task_vector("int8/32", (3, 4), seed=1)])
    assert packed.all_merged and packed.low_rank is None and packed.a is None
    none = Packed.of_none(torch.Size((3, 4)))
    assert none.experts == 0 and none.all_merged and none.nbytes == 0


def test_packed_refuses_other_shapes_and_integers() -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 5\], another one \[3, 4\]"):
        Packed.of([torch.zeros(3, 4), LowRank(torch.zeros(1, 5), torch.zeros(3, 1))])
    with pytest.raises(ValueError, match=r"must be floating point, not torch.int8"):
        Packed.of([torch.zeros(3, 4, dtype=torch.int8)])
