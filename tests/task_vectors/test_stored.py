"""Stored task vectors read back: round trips, rows, Gram matrices, shared bases, and every kind of spoilt folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank, Quantized, dense_block
from scalemerge.layers import Coefficients, attach
from scalemerge.task_vectors import TaskVectorStore, gram_matrices
from scalemerge.task_vectors.compression import Compression, compress_folders
from scalemerge.task_vectors.formats import compress, low_rank
from scalemerge.task_vectors.stored import DESCRIPTION, WEIGHTS

ODD = {"wide.weight": (5, 133), "narrow.weight": (9, 3), "even.weight": (4, 64), "bias": (7,)}
HOWS = [
    Compression("int8"),
    Compression("int8", group_size=32),
    Compression("int4"),
    Compression("int4", group_size=128),
    Compression("bfloat16"),
    Compression("svd", rank=3),
    Compression("int4", shared_base=True),
    Compression("svd", rank=2, shared_base=True),
]


def label(how: Compression) -> str:
    return f"{how.form}-{how.group_size}{'-shared' if how.shared_base else ''}"


@pytest.fixture
def odd(model_folder):
    """A base and three experts with tensors of odd widths, one of which the last expert has left alone."""

    def make(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(*shape, generator=generator) for name, shape in ODD.items()}

    base = make(0)
    experts = {
        name: {key: base[key] + 1e-2 * value for key, value in make(i + 1).items()} for i, name in enumerate("abc")
    }
    experts["c"]["even.weight"] = base["even.weight"].clone()
    return model_folder("base", base), {name: model_folder(name, tensors) for name, tensors in experts.items()}


@pytest.fixture
def stored(odd, tmp_path):
    """Write a store and open it: (dense store, compressed store)."""

    def make(how: Compression, place: str = "store"):
        base, experts = odd
        compress_folders(base, experts, tmp_path / place, how)
        return TaskVectorStore(base, experts), TaskVectorStore(
            base, {name: tmp_path / place / name for name in experts}
        )

    return make


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm()) if exact.any() else float(found.norm())


# Noise of rounding: see test_formats; of three of min(9, 3) singular values nothing is lost but bfloat16's digits.
@pytest.mark.parametrize(
    "form, least, most", [("int8", 1e-3, 8e-3), ("int4", 0.02, 0.12), ("bfloat16", 1e-4, 3e-3), ("svd", 1e-4, 5e-3)]
)
def test_what_was_written_is_read(stored, form, least, most) -> None:
    dense, compressed = stored(Compression(form, rank=5))
    assert compressed.names == dense.names and compressed.terms == ["a", "b", "c"] and compressed.mixing is None
    for i in range(3):
        for name in ("wide.weight", "narrow.weight"):
            error = relative(compressed.task_vector(i, name), dense.task_vector(i, name))
            assert least <= error <= most, name
        exact, bias = dense.task_vector(i, "bias"), compressed.task_vector(i, "bias")
        assert torch.equal(bias, exact) if form.startswith("int") else torch.equal(bias, exact.bfloat16().float())
    assert not compressed.task_vector(2, "even.weight").any()
    kinds = {"int8": Quantized, "int4": Quantized, "bfloat16": torch.Tensor, "svd": LowRank}
    assert all(isinstance(vector, kinds[form]) for vector in compressed.held("wide.weight"))
    assert isinstance(compressed.held("even.weight")[2], LowRank), "what is not stored takes no memory"


@pytest.mark.parametrize("how", HOWS, ids=label)
def test_rows_are_those_of_the_whole(stored, how) -> None:
    _, store = stored(how)
    for name, shape in ODD.items():
        for rows in ((0, shape[0]), (1, 4), (3, shape[0]), (2, 2), (shape[0], shape[0])):
            part, whole = store.held(name, rows), store.held(name)
            assert len(part) == len(whole) == len(store.terms)
            for one, other in zip(part, whole, strict=True):
                assert type(one) is type(other) and tuple(one.shape) == (rows[1] - rows[0], *shape[1:])
                torch.testing.assert_close(dense_block(one), dense_block(other, rows), rtol=0, atol=1e-8)
                if isinstance(one, Quantized):
                    assert torch.equal(one.values, other.values[rows[0] : rows[1]])
                    assert torch.equal(one.scales, other.scales[rows[0] : rows[1]])
                    assert one.group_size == other.group_size == how.group_size and one.bits == other.bits
        for i in range(3):
            part = store.task_vector(i, name, 1, 4)
            torch.testing.assert_close(part, store.task_vector(i, name)[1:4], rtol=0, atol=1e-8)


@pytest.mark.parametrize("form, parts", [("int8", 2), ("int4", 2), ("bfloat16", 1), ("svd", 1)])
def test_only_the_rows_asked_for_are_read(stored, form, parts) -> None:
    """By slices of the file; of a low-rank task vector the whole of a besides."""
    _, store = stored(Compression(form))
    own, whole = store.members[0].own, []

    class Handle:
        def __init__(self, handle):
            self.handle, self.slices = handle, []

        def get_tensor(self, name):
            whole.append(name)
            return self.handle.get_tensor(name)

        def get_slice(self, name):
            self.slices.append(name)
            return self.handle.get_slice(name)

    own._handle = Handle(own._handle)
    store.held("wide.weight", (1, 3))
    assert len(own._handle.slices) == parts
    assert whole == (["wide.weight/a"] if form == "svd" else [])


@pytest.mark.parametrize("how", HOWS, ids=label)
def test_gram_matrices_are_of_what_is_stored(stored, how) -> None:
    dense, store = stored(how)
    grams, exact = gram_matrices(store), gram_matrices(dense)
    for name in ODD:
        rows = torch.stack([store.task_vector(i, name).double().flatten() for i in range(3)])
        assert grams[name].shape == (3, 3), "over experts, not terms"
        torch.testing.assert_close(grams[name], rows @ rows.T, rtol=1e-12, atol=0)
    assert any(not torch.allclose(grams[name], exact[name], rtol=1e-5) for name in ODD), "nothing was compressed"


@pytest.mark.parametrize("how", [how for how in HOWS if how.shared_base], ids=label)
def test_a_shared_base_is_one_term(stored, how, odd) -> None:
    dense, store = stored(how)
    assert store.terms == ["a", "b", "c", "shared"] and store.experts == ["a", "b", "c"]
    expected = torch.cat([torch.eye(3), torch.ones(1, 3)])
    assert store.mixing is not None and torch.equal(store.mixing, expected)
    for name in ODD:
        *own, shared = (dense_block(vector).double() for vector in store.held(name))
        for i in range(3):
            torch.testing.assert_close(store.task_vector(i, name).double(), own[i] + shared, rtol=1e-6, atol=1e-7)
        mean = torch.stack(dense.task_vectors(name)).mean(0)
        assert relative(shared, mean.double()) < (0.12 if how.form == "int4" else 0.999)
    left_alone, mean = store.task_vector(2, "even.weight"), dense_block(store.held("even.weight")[3]).float()
    assert left_alone.norm() < 0.1 * mean.norm(), "an expert that left a tensor alone takes the mean off again"
    # what is stored of the mean is taken off: at 4 bits its error of a tenth would otherwise be added to each expert's
    errors = [relative(store.task_vector(i, n), dense.task_vector(i, n)) for i in range(2) for n in ("wide.weight",)]
    assert max(errors) < (0.1 if how.form == "int4" else 0.9)


def test_a_mixture_of_stores_and_a_whole_model(stored, odd, tmp_path) -> None:
    """Two shared bases, used by two of four experts and by one; a plain store; a full checkpoint."""
    base, experts = odd
    stored(Compression("int4", shared_base=True), "one")
    compress_folders(base, {"c": experts["c"]}, tmp_path / "two", Compression("int8", shared_base=True))
    stored(Compression("int8"), "three")
    folders = {
        "whole": experts["a"], "first": tmp_path / "one" / "a", "second": tmp_path / "two" / "c",
        "third": tmp_path / "three" / "b", "fourth": tmp_path / "one" / "b",
    }  # fmt: skip
    store = TaskVectorStore(base, folders, "bfloat16")
    assert store.terms == [*folders, "shared", "shared 2"]
    assert store.mixing.tolist()[5:] == [[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]
    held = store.held("wide.weight")
    assert [type(vector) for vector in held] == [torch.Tensor] + [Quantized] * 6
    assert held[0].dtype == torch.bfloat16, "the format is for whole models alone"
    assert store.held_bytes == sum(vector.nbytes for name in ODD for vector in store.held(name)
                                   if not isinstance(vector, LowRank))  # fmt: skip
    c = torch.randn(2, 5)
    summed = sum(x * dense_block(v).float() for x, v in zip((c @ store.mixing.T)[1], held, strict=True))
    wanted = sum(x * t for x, t in zip(c[1], store.task_vectors("wide.weight"), strict=True))
    torch.testing.assert_close(summed, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", HOWS, ids=label)
@pytest.mark.parametrize("seed", [0, 1])
def test_layers_at_random_coefficients(how, seed, tiny_model, tmp_path) -> None:
    """attach() with the terms gives what the dense sum over experts gives, for a model of every kind of layer."""
    from transformers import AutoModel

    base = tiny_model(tmp_path / "base", "bert", 0)
    experts = {name: tiny_model(tmp_path / name, "bert", i + 1) for i, name in enumerate("ab")}
    compress_folders(base, experts, tmp_path / "store", how)
    store = TaskVectorStore(base, {name: tmp_path / "store" / name for name in experts})
    c = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed)) * 0.3
    model, dense = (AutoModel.from_pretrained(base).eval() for _ in range(2))
    parameters = dict(model.named_parameters())
    names = [name for name in store.names if name in parameters]
    terms = c if store.mixing is None else c @ store.mixing.T
    attach(model, {name: store.held(name) for name in names}, Coefficients(dict.fromkeys(names, 0), terms))
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            for x, vector in zip(c[0], store.task_vectors(name), strict=True):
                parameter += x * vector
        ids = torch.arange(20).view(2, 10)
        found, wanted = model(ids).last_hidden_state, dense(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- spoilt folders ----------------------------------------------------------------------------------------------


def refused(base, folder, *, read: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        store = TaskVectorStore(base, {"x": folder})
        for name in store.names if read else []:
            store.held(name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def edit(folder, **changes) -> None:
    content = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**content, **changes}))


def test_another_base_is_refused_by_hash(stored, odd, model_folder, tensors, tmp_path) -> None:
    """The same shapes, one number changed."""
    from safetensors.torch import load_file, save_file

    stored(Compression("int8"))
    base, _ = odd
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["bias"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    message = refused(other, tmp_path / "store" / "a", read=False)
    assert all(word in message for word in (str(base), str(other), str(tmp_path / "store" / "a"), "give that base"))
    late = TaskVectorStore(other, {"x": tmp_path / "store" / "a"}, verify=False)
    with pytest.raises(InputError, match="give that base"):
        _ = late.revisions
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    TaskVectorStore(moved, {"x": tmp_path / "store" / "a"})  # the same bytes elsewhere are the same base


def test_a_base_of_other_shapes(stored, tmp_path, model_folder) -> None:
    stored(Compression("int8"))
    small = model_folder("small", {"wide.weight": torch.zeros(5, 7), "bias": torch.zeros(7)})
    message = refused(small, tmp_path / "store" / "a")
    assert str(tmp_path / "store" / "a") in message and "give the base" in message


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_weights(stored, odd, tmp_path, keep) -> None:
    stored(Compression("int4"))
    file = tmp_path / "store" / "a" / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(odd[0], file.parent)
    assert str(file) in message and "truncated or corrupt" in message


def test_a_flipped_bit_is_found_by_the_revision(stored, odd, tmp_path) -> None:
    _, store = stored(Compression("int4", shared_base=True))
    before = store.revisions
    for part in ("a", "shared"):
        file = tmp_path / "store" / part / WEIGHTS
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(InputError, match=r"is not the file that task_vectors\.json describes") as caught:
            _ = TaskVectorStore(odd[0], {"x": file.parents[1] / "a"}).revisions
        assert str(file) in str(caught.value)
        file.write_bytes(good)
    again = TaskVectorStore(odd[0], {name: tmp_path / "store" / name for name in "abc"})
    assert again.revisions == before and len(set(before)) == 4


def test_missing_files(stored, odd, tmp_path) -> None:
    stored(Compression("int4", shared_base=True))
    base, root = odd[0], tmp_path / "store"
    assert "one expert in it: a, b, c, shared" in refused(base, root)
    assert "is the shared base of a store" in refused(base, root / "shared")
    shutil.move(root / "shared", root / "elsewhere")
    assert f"{root / 'shared'}: the shared base of {root / 'a'} is missing" in refused(base, root / "a")
    shutil.move(root / "elsewhere", root / "shared")
    (root / "b" / WEIGHTS).unlink()
    assert f"{root / 'b' / WEIGHTS}: is missing" in refused(base, root / "b")


def test_another_shared_base(stored, odd, tmp_path) -> None:
    """The shared folder of another run of compress, put in the place of the right one."""
    stored(Compression("int4", shared_base=True))
    base, experts = odd
    compress_folders(base, {"a": experts["a"]}, tmp_path / "other", Compression("int4", shared_base=True))
    shutil.rmtree(tmp_path / "store" / "shared")
    shutil.copytree(tmp_path / "other" / "shared", tmp_path / "store" / "shared")
    assert "was made with another shared base" in refused(base, tmp_path / "store" / "a")


@pytest.mark.parametrize("name", ["../other/shared", "/etc", "..", ".", "", "a/../shared", "link"])
def test_nothing_outside_the_store_is_read(stored, odd, tmp_path, name) -> None:
    stored(Compression("int4", shared_base=True))
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    folder = tmp_path / "store" / "a"
    (tmp_path / "store" / "link").symlink_to(tmp_path / "other" / "shared")
    shared = json.loads((folder / DESCRIPTION).read_text())["shared"]
    edit(folder, shared={**shared, "folder": name})
    assert f"shared folder '{name}' is outside the store" in refused(odd[0], folder)


def test_a_link_to_an_expert_is_followed_to_its_store(stored, odd, tmp_path) -> None:
    stored(Compression("int4", shared_base=True))
    (tmp_path / "link").symlink_to(tmp_path / "store" / "a")
    assert TaskVectorStore(odd[0], {"x": tmp_path / "link"}).terms == ["x", "shared"]


SPOILT = [
    ({"schema": 2}, "schema 2 is not 1"),
    ({"schema": None}, "describes no task vectors"),
    ({"format": 3}, "field 'format'"),
    ({"group_size": 48}, "field 'group_size'"),
    ({"group_size": None}, "field 'tensors.even.weight'"),
    ({"rank": -1}, "field 'rank'"),
    ({"base": {"path": "x"}}, "field 'base'"),
    ({"expert": {}}, "field 'expert'"),
    ({"shared": {"folder": 1}}, "field 'shared'"),
    ({"sha256": None}, "field 'sha256'"),
    ({"unchanged": {}}, "field 'unchanged'"),
    ({"tensors": []}, "field 'tensors'"),
    ({"tensors": {"bias": {"shape": [-1], "form": "float32"}}}, "field 'tensors.bias'"),
    ({"tensors": {"bias": {"shape": [7], "form": "pickle"}}}, "field 'tensors.bias'"),
    ({"tensors": {"bias": {"shape": [7], "form": "float32", "sums": {"error": 1}}}}, "field 'tensors.bias'"),
]


@pytest.mark.parametrize("changes, words", SPOILT, ids=[words for _, words in SPOILT])
def test_spoilt_descriptions(stored, odd, tmp_path, changes, words) -> None:
    stored(Compression("int4"))
    folder = tmp_path / "store" / "a"
    edit(folder, **changes)
    message = refused(odd[0], folder)
    assert message.startswith(str(folder / DESCRIPTION)) and words in message
    (folder / DESCRIPTION).write_text("{")
    assert "not valid JSON" in refused(odd[0], folder)
    (folder / DESCRIPTION).write_text("[1]")
    assert "describes no task vectors" in refused(odd[0], folder)


def test_headers_that_are_not_as_described(stored, odd, tmp_path) -> None:
    stored(Compression("int4"))
    stored(Compression("int8"), "other")
    shutil.copyfile(tmp_path / "other" / "a" / WEIGHTS, tmp_path / "store" / "a" / WEIGHTS)
    message = refused(odd[0], tmp_path / "store" / "a")
    assert "torch.int8" in message and "copy both files again" in message
    tensors = json.loads((tmp_path / "store" / "b" / DESCRIPTION).read_text())["tensors"]
    edit(tmp_path / "store" / "b", tensors={**tensors, "more": tensors["bias"]})
    assert "lacks tensor 'more'" in refused(odd[0], tmp_path / "store" / "b")


def test_numbers_that_are_none(stored, odd, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    stored(Compression("int4"))
    file = tmp_path / "store" / "a" / WEIGHTS
    weights = load_file(file)
    weights["wide.weight/scales"][1, 1] = float("nan")
    save_file(weights, file)
    assert f"{file}: tensor 'wide.weight' holds NaN" in refused(odd[0], file.parent)


# ---- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_fitted_int4_scales_lose_less(group_size) -> None:
    vector = 1e-4 * torch.randn(64, 301, generator=torch.Generator().manual_seed(0))
    vector[3] = 0
    vector[4, 5] = 1.0  # one number far above the others, which no limit may cut
    plain, fitted = (dense_block(compress(vector, "int4", group_size, fit=fit)) for fit in (False, True))
    groups = torch.nn.functional.pad((fitted - vector).square(), (0, -301 % group_size)).view(64, -1, group_size).sum(2)
    before = torch.nn.functional.pad((plain - vector).square(), (0, -301 % group_size)).view(64, -1, group_size).sum(2)
    assert (groups <= before * (1 + 1e-6)).all(), "no group is worse"
    assert groups.sum() - groups[4].sum() < 0.92 * (before.sum() - before[4].sum())
    assert not fitted[3].any() and fitted[4, 5] == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (12, 12), (3, 1)])
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_low_rank_is_the_nearest_of_its_rank(shape, rank) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    found = low_rank(matrix, rank)
    kept = min(rank, *shape)
    assert found.a.shape == (kept, shape[1]) and found.b.shape == (shape[0], kept)
    assert found.a.dtype == found.b.dtype == torch.bfloat16 and found.a.is_contiguous() and found.b.is_contiguous()
    left = torch.linalg.svdvals(matrix.double())[kept:].square().sum().sqrt()
    error = (dense_block(found).double() - matrix.double()).norm()
    assert left * (1 - 1e-9) <= error <= left + 4e-3 * matrix.norm()
    assert not dense_block(low_rank(torch.zeros(*shape), rank)).any()
