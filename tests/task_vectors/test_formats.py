"""Formats of task vectors: what remains of them, and that a store holds them so."""

from __future__ import annotations

import pytest
import torch

from scalemerge.kernels.formats import Quantized, dense_block
from scalemerge.task_vectors import TaskVectorStore
from scalemerge.task_vectors.formats import FORMATS, compress, decompressed

DENSE = "encoder.layer.0.attention.output.dense.weight"
BIAS = "encoder.layer.0.attention.output.dense.bias"


# Rounding noise of numbers that are uniform within a step: bfloat16 keeps 8 digits; int8 and int4 round to the
# largest of 64 normal numbers (about 2.4 standard deviations) over 127 and 7.
@pytest.mark.parametrize("form, least, most", [("float32", 0, 0), ("bfloat16", 1e-4, 3e-3), ("int8", 3e-3, 8e-3),
                                               ("int4", 0.06, 0.14)])  # fmt: skip
def test_relative_error_of_each_format(form, least, most) -> None:
    vector = 1e-4 * torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    error = float((decompressed(vector, form) - vector).norm() / vector.norm())
    assert least <= error <= most


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_independent(form) -> None:
    vector = torch.randn(7, 70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decompressed(vector, form)[2:5], decompressed(vector[2:5], form))


def test_vectors_stay_exact_in_integer_formats() -> None:
    bias = torch.randn(9)
    assert compress(bias, "int4") is bias


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="int2"):
        compress(torch.zeros(2, 2), "int2")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMATS)
def test_a_store_reads_what_it_holds(tensors, model_folder, form) -> None:
    base, one = tensors(0), tensors(1)
    store = TaskVectorStore(model_folder("base", base), {"one": model_folder("one", one)}, form)
    (held,) = store.held(DENSE)
    assert isinstance(held, Quantized) == form.startswith("int")
    assert torch.equal(dense_block(held).float(), store.task_vector(0, DENSE))
    assert torch.equal(store.task_vector(0, DENSE)[1:4], store.task_vector(0, DENSE, 1, 4))
    exact = one[DENSE] - base[DENSE]
    assert torch.equal(store.task_vector(0, DENSE), exact) == (form == "float32")
    assert torch.equal(store.held(BIAS)[0].float(), decompressed(one[BIAS] - base[BIAS], form))
