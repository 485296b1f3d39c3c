"""The streaming writer against the safetensors library."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scalemerge.checkpoints.reader import DTYPES, SINGLE, Checkpoint, TensorSpec
from scalemerge.checkpoints.writer import write_safetensors
from scalemerge.errors import InputError


def spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def write(path: Path, tensors: dict[str, torch.Tensor], **options) -> None:
    write_safetensors(path, {name: spec(tensor) for name, tensor in tensors.items()}, tensors.__getitem__, **options)


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed))
    return (values / 8).to(dtype) if dtype.is_floating_point else values.to(dtype)


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=12, alphabet=st.characters(codec="utf-8")).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(SHAPES, st.sampled_from(list(DTYPES.values())), st.integers(0, 99)),
        max_size=6,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_reads_back_as_the_library_would(tmp_path: Path, tensors) -> None:
    """All dtypes, 0-d and empty tensors, any name: bit for bit what save_file stores."""
    made = {name: some(*recipe) for name, recipe in tensors.items()}
    write(tmp_path / "ours.safetensors", made)
    save_file(made, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys() == made.keys()
    for name in made:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    made = {"0-d": some((), dtype, 1), "empty": some((0, 3), dtype, 2), "full": some((3, 5), dtype, 3)}
    write(tmp_path / SINGLE, made)
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in made.items():
        assert checkpoint.specs[name] == spec(tensor)
        assert torch.equal(checkpoint.read(name), tensor)


def test_transformers_reads_it(tmp_path: Path, tiny_folders) -> None:
    """Metadata included: from_pretrained refuses a file without its format."""
    from transformers import AutoModel

    folder = tiny_folders("bert")
    tensors = load_file(folder / SINGLE)
    write(tmp_path / SINGLE, tensors)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_and_gradients(tmp_path: Path) -> None:
    """Transposed, expanded, and trainable tensors are written by value."""
    made = {
        "transposed": torch.arange(6.0).view(2, 3).T,
        "expanded": torch.ones(1, 3).expand(4, 3),
        "trainable": torch.nn.Parameter(torch.ones(3)),
    }
    write(tmp_path / SINGLE, made)
    loaded = load_file(tmp_path / SINGLE)
    for name, tensor in made.items():
        assert torch.equal(loaded[name], tensor)


def test_progress_sums_to_the_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    write(tmp_path / SINGLE, {"a": torch.zeros(5), "b": torch.zeros(2, 2, dtype=torch.int8)}, progress=seen.append)
    assert seen == [20, 4]


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """While a tensor is made, the ones before it are gone."""
    import weakref

    alive: list[weakref.ref] = []

    def make(name: str) -> torch.Tensor:
        assert sum(reference() is not None for reference in alive) == 0
        tensor = torch.full((1000,), float(len(alive)))
        alive.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path / SINGLE, {str(n): TensorSpec((1000,), torch.float32) for n in range(6)}, make)
    assert len(alive) == 6


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(2, 1)])
def test_another_shape_or_dtype_is_refused_and_leaves_nothing(tmp_path: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tensor 'a'"):
        write_safetensors(tmp_path / SINGLE, {"a": TensorSpec((2,), torch.float32)}, lambda name: wrong)
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"a": torch.ones(2)})

    def make(name: str) -> torch.Tensor:
        if name == "b":
            raise RuntimeError("killed")
        return torch.zeros(2)

    with pytest.raises(RuntimeError, match="killed"):
        write_safetensors(tmp_path / SINGLE, dict.fromkeys("ab", TensorSpec((2,), torch.float32)), make)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], torch.ones(2))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full; free space") as caught:
        write(tmp_path / SINGLE, {"a": torch.ones(2)})
    assert str(tmp_path / SINGLE) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_really_full_disk(tmp_path: Path) -> None:
    """Writing to /dev/full fails as a full disk does, in the middle of a tensor."""
    (tmp_path / f"{SINGLE}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match="the disk is full"):
        write(tmp_path / SINGLE, {"a": torch.ones(100_000)})
    assert not (tmp_path / SINGLE).exists()


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / SINGLE, tmp_path / "nowhere" / SINGLE):
        with pytest.raises(InputError, match="cannot be written") as caught:
            write(path, {"a": torch.ones(2)})
        assert str(path) in str(caught.value)


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Python's own allocations stay small: no copy of the bytes is made on the way to the file."""
    specs = {str(number): TensorSpec((1_000_000,), torch.float32) for number in range(3)}
    tracemalloc.start()
    try:
        write_safetensors(tmp_path / SINGLE, specs, lambda name: torch.zeros(1_000_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
