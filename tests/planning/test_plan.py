"""Plans against what is: shapes against the meta device, bytes against tensors, the verb as its user sees it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.planning.hardware import load_hardware
from scalemerge.planning.memory import activation_bytes, sharded_bytes, task_vector_bytes, training_bytes
from scalemerge.planning.plan import Assumptions, make_plan
from scalemerge.planning.shapes import KNOWN, Backbone, backbone, read_config
from scalemerge.planning.traffic import naive_traffic, sharded_traffic, training_traffic
from scalemerge.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"vocab_size": 997, "hidden_size": 192, "intermediate_size": 416, "num_hidden_layers": 3,
         "num_attention_heads": 6}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": 130},
    "xlm-roberta": {"max_position_embeddings": 130, "type_vocab_size": 1},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},
    "mistral": {"num_key_value_heads": 3},
    "llama": {"num_key_value_heads": 2},
}


def model_of(kind: str, device: str = "cpu", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **changes})
    config._attn_implementation = "sdpa"
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.device(device):
        model = AutoModel.from_config(config)
    if hasattr(model, "pooler"):
        model.pooler = None
    return model


def shape_of(model: Any) -> Backbone:
    return backbone({**model.config.to_dict(), "model_type": model.config.model_type})


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_model(kind: str) -> None:
    model = model_of(kind, "meta")
    shape = shape_of(model)
    assert shape.numbers == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert shape.linear_numbers == sum(module.weight.numel() for module in linear)
    assert sorted(shape.linear * shape.layers) == sorted(tuple(module.weight.shape) for module in linear)


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-0.6B", 0.596), ("Qwen3-4B", 4.022), ("Qwen3-8B", 7.568)])
def test_known_models_have_their_published_sizes(name: str, billions: float) -> None:
    """Without the output head, which 0.6B and 4B tie and an encoder never has."""
    assert backbone(KNOWN[name]).numbers / 1e9 == pytest.approx(billions, rel=2e-3)


def saved_bytes(model: Any, tokens: tuple[int, int], *own: torch.Tensor) -> int:
    """What torch keeps for backward of a forward pass, weights aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *own)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 900, tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_activations_of_training(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, num_hidden_layers=8).to(dtype).train()
    planned = activation_bytes(shape_of(model), 4 * 64, dtype.itemsize)
    assert saved_bytes(model, (4, 64)) == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_positioning_holds_and_keeps_what_is_planned(kind: str, form: str) -> None:
    from scalemerge.layers import Coefficients, MergeSettings, attach
    from scalemerge.task_vectors.formats import compress

    model = model_of(kind, num_hidden_layers=8).eval()
    shape = shape_of(model)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    vectors = {name: [compress(0.01 * torch.randn(size), form)] for name, size in names.items()}  # type: ignore[arg-type]
    held = sum(vector.nbytes for of_one in vectors.values() for vector in of_one)
    assert held == pytest.approx(task_vector_bytes(shape, form), rel=0.1)
    attach(model, vectors, Coefficients.uniform(names, torch.ones(1, requires_grad=True)), MergeSettings())
    parts = [part for of_one in vectors.values() for v in of_one for part in ([v] if torch.is_tensor(v) else
                                                                             [v.values, v.scales])]  # fmt: skip
    assert saved_bytes(model, (4, 64), *parts) == pytest.approx(activation_bytes(shape, 4 * 64, 4), rel=0.1)


def test_training_holds_what_is_planned() -> None:
    model = model_of("bert")
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(2, 5, dtype=torch.long)).last_hidden_state.sum().backward()
    optimizer.step()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim())
    planned = training_bytes(shape_of(model), "plain", 1, 0, bf16=False)
    assert (weights, gradients + moments) == pytest.approx((planned.weights, planned.others), rel=0.02)


def test_sharded_positioning_against_the_measured_run() -> None:
    """The largest model of benchmarks/positioning_sharded.py: BERT-shaped, 302M linear weights, 4 bfloat16 experts."""
    figures = ROOT / "benchmarks" / "results" / "cpu" / "positioning_sharded_memory.csv"
    config = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24,
              "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 512}  # fmt: skip
    shape = backbone(config)
    measured: dict[int, float] = {}
    for line in figures.read_text().splitlines()[1:]:
        fields = line.split(",")
        if fields[-3] == "peak_bytes":
            measured[int(fields[7])] = float(fields[-2])
    assert set(measured) == {2, 4}
    for ranks, peak in measured.items():
        planned = sharded_bytes(shape, 4, "bfloat16", ranks, 2 * 8 * 32 // ranks, chunk=8 * 2**20)
        assert planned.total == pytest.approx(peak, rel=0.1)


def test_traffic_does_not_grow_with_the_experts() -> None:
    shape = backbone(KNOWN["Qwen3-8B"])
    p, ring = shape.linear_numbers, 63 / 64
    assert sharded_traffic(shape, 64) == pytest.approx(ring * (2 * p * 2 + p * 4))
    assert naive_traffic(shape, 8, 64) == pytest.approx(ring * 9 * 2 * p * 2)
    assert training_traffic(shape, "zero3", 64) == pytest.approx(ring * (2 * 2 + 4) * shape.numbers)
    assert training_traffic(shape, "plain", 1) == 0


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-4b", "qwen3-8b"])
def test_recipes_of_large_backbones_have_a_plan(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    shape = backbone(read_config(recipe.base.path, None))
    plans = [make_plan(recipe, shape, load_hardware("h100", "ndr400", 8), devices) for devices in (1, 8, 64)]
    assert plans[-1].chosen["training"] is not None and plans[-1].chosen["positioning"] is not None
    if name == "qwen3-8b":
        fitting = {line.way for line in plans[0].lines if line.stage == "training" and line.fits}
        assert fitting == {"zero3_offload"}, "one GPU does not hold 8B weights with Adam's state"
        assert "sharded" in plans[1].chosen["positioning"].way  # type: ignore[union-attr]
    hours = plans[0].hours
    assert hours["sweep of 8 joint runs"] == pytest.approx(8 * hours["experts"])
    more = make_plan(recipe, shape, load_hardware("h100", "ndr400", 8), 8, Assumptions(tokens=256))
    assert more.hours["experts"] > 2 * hours["experts"]


def test_a_plan_in_two_seconds(command: Callable[..., Any], tmp_path: Path) -> None:
    best = 9.0
    for _ in range(3):  # the machine may be busy
        began = time.perf_counter()
        ended = command("plan", ROOT / "recipes" / "qwen3-8b.yaml", "--devices", "64", "--json", tmp_path / "plan.json")
        best = min(best, time.perf_counter() - began)
        assert ended.returncode == 0, ended.stderr
        if best < 2:
            break
    assert best < 2
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["experts"] == 8 and found["devices"] == 64
    for text in ("training: the shortest step that fits", "positioning: the shortest step that fits", "not measured"):
        assert text in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], r"--gpu h1000: is not one of h100, .* add it through --hardware FILE"),
        (["--network", "dial-up"], r"--network dial-up: is not one of"),
        (["--config", "{tmp}/none.json"], r"none\.json: no configuration there"),
        (["--config", "{tmp}/gpt.json"], r"model_type 'gpt2' is not one of qwen3"),
        (["--config", "{tmp}/short.json"], r"field 'intermediate_size' is missing"),
        (["--hardware", "{tmp}/gpt.json"], r"gpt\.json: not a TOML file"),
    ],
)
def test_bad_input(arguments: list[str], message: str, command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "gpt.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "short.json").write_text('{"model_type": "bert", "hidden_size": 4, "num_hidden_layers": 1}')
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    ended = command("plan", ROOT / "recipes" / "qwen3-8b.yaml", *given)
    assert ended.returncode == 2 and len(ended.stderr.strip().splitlines()) == 1
    assert re.search(message, ended.stderr), ended.stderr


def test_hardware_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[gpu.mine]\nmemory = 10\nflops = 1\nbandwidth = 2\nlink = 3\n[network.wire]\nbandwidth = 4\n")
    found = load_hardware("mine", "wire", 2, own)
    assert (found.memory, found.flops, found.network) == (10e9, 1e12, 4e9)
    with pytest.raises(InputError, match=r"gpu\.broken or network\.wire lacks 'flops'"):
        own.write_text("[gpu.broken]\nmemory = 10\n[network.wire]\nbandwidth = 4\n")
        load_hardware("broken", "wire", 2, own)
