"""Gradients, updates and states of every engine against plain autograd on the whole batch: the part of one rank.

    python engine_parity.py --table [--core] [--engines zero2 zero3]    launch all, print a Markdown table
    python engine_parity.py FOLDER NAME                                 what is launched: one rank of one engine

A rank writes FOLDER/NAME-RANK.json, with errors and no verdict: the tests judge. The reference is made by one process
without any of the engine's code (`write_reference`); a step is made with the training loop's own `_accumulate`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("bert", "qwen3")
PATHS: dict[str, int | None] = {"plain": None, "1 token": 1, "37 tokens": 37, "one chunk": 10**6}  # chunk_tokens
ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
LAUNCHES = [("plain", 1), ("ddp", 2), *((engine, world) for engine in ENGINES[2:] for world in (1, 2))]
STEPS, SAVED, RATE, CLIP = 20, 6, 1e-3, 3.0  # optimizer steps, those before a state is saved, learning rate, clip_norm
LONGEST = 9  # tokens of a text

# Five rows (seven texts) over two ranks are uneven; the negatives are more so, and rank 0 may have none at all.
LOSSES: dict[str, dict[str, Any]] = {
    "infonce": {"loss": "infonce"},
    "infonce, symmetric, hard negatives": {
        "loss": "infonce",
        "parameters": {"symmetric": True, "temperature": 0.1},
        "negatives": (2, 0, 1, 3, 1),
    },
    "infonce, margin": {"loss": "infonce", "parameters": {"margin": 0.0}, "negatives": (0, 0, 2, 1, 0)},
    "cosent": {"loss": "cosent"},
    "supcon": {"loss": "supcon"},
    "infonce, matryoshka": {"loss": "infonce", "matryoshka": ((8, 1.0), (32, 0.5))},
    "cosent, matryoshka": {"loss": "cosent", "matryoshka": ((8, 0.3), (16, 1.0), (32, 1.0))},
}


def seen_in(core: bool) -> list[tuple[str, str, str]]:
    """(kind, loss, path) of the gradients to compare: all of them, or every loss and every path once for each kind."""
    if not core:
        return [(kind, loss, path) for kind in KINDS for loss in LOSSES for path in PATHS]
    paths = list(PATHS)
    return [
        (kind, loss, paths[(number + shift) % len(paths)])
        for shift, kind in enumerate(KINDS)
        for number, loss in enumerate(LOSSES)
    ]


# ---- models and batches ------------------------------------------------------------------------------------------


class Padding:
    """As much of a tokenizer as training takes."""

    def __init__(self, side: str) -> None:
        self.side = side

    def pad(self, features: Sequence[dict[str, list[int]]], **_: Any) -> dict[str, Any]:
        import torch

        longest = max(len(each["input_ids"]) for each in features)
        ids, mask = torch.ones(len(features), longest, dtype=torch.long), torch.zeros(len(features), longest).long()
        for row, each in enumerate(features):
            length = len(each["input_ids"])
            part = slice(longest - length, None) if self.side == "left" else slice(length)
            ids[row, part], mask[row, part] = torch.tensor(each["input_ids"]), 1
        return {"input_ids": ids, "attention_mask": mask}


def make_encoder(kind: str) -> Any:
    """A BERT with mean pooling, or a Qwen3 with the last token's and padding on the left; without dropout."""
    import torch
    import transformers

    from scalemerge.encoder import Encoder

    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 1}
    common |= {"num_attention_heads": 4, "max_position_embeddings": 16}
    torch.manual_seed(5)
    if kind == "bert":
        config = transformers.BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        backbone = transformers.AutoModel.from_config(config, add_pooling_layer=False)
        encoder = Encoder(backbone, Padding("right"), pooling="mean")
    else:
        config = transformers.Qwen3Config(**common, num_key_value_heads=2, head_dim=8)
        encoder = Encoder(transformers.AutoModel.from_config(config), Padding("left"), pooling="last")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():  # no vector of zeros or ones, no embedding of length 0.1
            parameter += (1.0 if "embed" in name and parameter.dim() > 1 else 0.1) * torch.randn_like(parameter)
    return encoder


def make_batch(name: str, seed: int) -> Any:
    import torch

    from scalemerge.objectives.batches import TextBatch

    chosen, made = LOSSES[name], random.Random(seed)

    def texts(count: int) -> list[dict[str, list[int]]]:
        return [{"input_ids": made.choices(range(2, 64), k=made.randint(2, LONGEST))} for _ in range(count)]

    negatives = chosen.get("negatives")
    targets: dict[str, Any] = {}
    if chosen["loss"] == "supcon":
        roles, targets = {"text": texts(7)}, {"label": torch.tensor([0, 1, 0, 2, 1, 0, 1])}
    elif chosen["loss"] == "cosent":
        roles = {"sentence1": texts(5), "sentence2": texts(5)}
        targets = {"score": torch.tensor([2.0, 0.0, 1.0, 1.0, 3.0])}
    else:
        roles = {"query": texts(5), "positive": texts(5)}
        if negatives:
            roles["negatives"] = texts(sum(negatives))
    return TextBatch(
        name, chosen["loss"], chosen.get("parameters", {}), roles, targets, negatives, chosen.get("matryoshka", ())
    )


def accumulated() -> list[Any]:
    """Three batches, of different losses and sizes, that make one step."""
    return [make_batch(name, 50 + number) for number, name in enumerate(LOSSES) if number in (2, 4, 6)]


def batch_of_step(step: int) -> Any:
    return make_batch(list(LOSSES)[step % len(LOSSES)], 100 + step)


def is_noise(name: str) -> bool:
    """Softmax does not see a key's bias: its gradient is rounding alone, which Adam scales to full steps."""
    return name.endswith("key.bias")


# ---- the reference: one process, one padded batch, plain autograd --------------------------------------------------


def plain_loss(encoder: Any, batch: Any) -> Any:
    from scalemerge.objectives import compute_loss

    embeddings = encoder([encoder.pad([text for texts in batch.roles.values() for text in texts])])
    by_role = dict(zip(batch.roles, embeddings.split([len(texts) for texts in batch.roles.values()])))
    return compute_loss(batch.loss, by_role, batch.targets, batch.parameters, batch.matryoshka)


def plain_optimizer(encoder: Any) -> Any:
    import torch

    split: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in encoder.parameters():
        split[parameter.dim() > 1].append(parameter)
    return torch.optim.AdamW([{"params": split[True], "weight_decay": 0.01}, {"params": split[False]}], RATE,
                             weight_decay=0.0)  # fmt: skip


def write_reference(folder: Path) -> None:
    """Initial weights, gradients, and weights and moments after some steps: KIND/{state-*,gradients}.safetensors."""
    import torch
    from safetensors.torch import save_file

    for kind in KINDS:
        encoder = make_encoder(kind)
        names = {parameter: name for name, parameter in encoder.named_parameters()}
        optimizer = plain_optimizer(encoder)

        def write_state(step: int, names: Any = names, optimizer: Any = optimizer, kind: str = kind) -> None:
            state = {}
            for parameter, name in names.items():
                state[name] = parameter.detach().clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = optimizer.state[parameter][key] if step else torch.zeros_like(parameter)
                    state[f"{key}/{name}"] = moment.clone()
            (folder / kind / f"state-{step}").mkdir(parents=True)
            save_file(state, folder / kind / f"state-{step}" / "state.safetensors")

        gradients, losses = {}, {}
        for label, batches in (*((name, [make_batch(name, 7)]) for name in LOSSES), ("accumulated", accumulated())):
            encoder.zero_grad()
            loss = torch.stack([plain_loss(encoder, batch) for batch in batches]).mean()
            loss.backward()
            losses[label] = loss.item()
            for parameter, name in names.items():
                gradients[f"{label}:{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        encoder.zero_grad()
        norms = []
        for step in range(STEPS):
            if step in (0, SAVED, SAVED + 1):
                write_state(step)
            plain_loss(encoder, batch_of_step(step)).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)))
            optimizer.step()
            optimizer.zero_grad()
        write_state(STEPS)
        save_file(gradients, folder / kind / "gradients.safetensors")
        (folder / kind / "numbers.json").write_text(json.dumps({"norms": norms, "losses": losses}))


# ---- one rank of one engine ----------------------------------------------------------------------------------------


def full_gradients(engine: Any) -> Iterator[tuple[str, Any]]:
    from scalemerge.training.state import full_shape, trained_parameters

    for name, parameter in trained_parameters(engine.model):
        gradient = parameter.grad
        if engine.deepspeed:
            from deepspeed.utils import safe_get_full_grad

            assert gradient is None, f"{name}: DeepSpeed has not taken the gradient, this would be the local one"
            gradient = safe_get_full_grad(parameter).view(full_shape(parameter))
        yield name, gradient


def gradient_errors(found: Iterable[tuple[str, Any]], expected: dict[str, Any]) -> dict[str, Any]:
    """The worst parameter's |g - g'| / |g'|; that of key biases over the norm of the whole gradient."""
    import torch

    total = math.sqrt(sum(float(value.double().square().sum()) for value in expected.values()))
    worst, at, noise = 0.0, "", 0.0
    for name, gradient in found:
        reference = expected[name].double()
        difference = float((torch.zeros(()) if gradient is None else gradient.double()).sub(reference).norm())
        if is_noise(name):
            noise = max(noise, difference / total)
        elif difference and (error := difference / (float(reference.norm()) or 1e-30)) > worst:
            worst, at = error, name
    return {"gradient": worst, "at": at, "key_bias": noise, "total": total}


def state_errors(folder: Path, expected: Path) -> dict[str, Any]:
    """Files of `save_state` compared: largest difference of weights, and of moments over the tensor's largest entry."""
    from safetensors.torch import load_file

    one, two = load_file(folder / "state.safetensors"), load_file(expected / "state.safetensors")
    errors: dict[str, Any] = {"names": one.keys() == two.keys(), "weight": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    errors["same bits"] = errors["names"] and all(one[name].equal(two[name]) for name in one)
    for name in one.keys() & two.keys():
        if is_noise(name):
            continue
        what = name.split("/")[0] if "/" in name else "weight"
        scale = 1.0 if what == "weight" else max(float(two[name].abs().max()), 1e-12)
        errors[what] = max(errors[what], float((one[name] - two[name]).abs().max()) / scale)
    return errors


def make_trainer(kind: str) -> Any:
    """The training loop's `_Trainer` around an engine, without a job: `_accumulate` is what is tested."""
    import torch

    from scalemerge.recipe import Training
    from scalemerge.report.cost import Cost
    from scalemerge.training.engine import Engine, make_accelerator
    from scalemerge.training.loop import _decay_groups, _Trainer

    accelerator = make_accelerator(Training(clip_norm=CLIP, batch_size=5))
    if kind == "qwen3" and accelerator.state.deepspeed_plugin is not None:
        # ZeRO-3 keeps parameters as small as these whole after their first use: here they are gathered every time
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    trainer = _Trainer.__new__(_Trainer)
    trainer.encoder = make_encoder(kind)
    optimizer = torch.optim.AdamW(_decay_groups(trainer.encoder, 0.01), lr=0.0)
    trainer.engine = Engine(accelerator, trainer.encoder, optimizer, CLIP)
    trainer.engine.model.train()
    trainer.flops, trainer.cost = SimpleNamespace(forward=lambda shapes: 0), Cost()
    trainer.job = SimpleNamespace(name="parity", seed=0)
    return trainer


def accumulate(trainer: Any, batches: list[Any], chunk_tokens: int | None) -> list[float]:
    """Back-propagate the mean of the batches' losses. Returns the losses."""
    from scalemerge.recipe import Training

    trainer.settings = Training(batch_size=5, chunk_tokens=chunk_tokens, length_groups=2, clip_norm=CLIP)
    trainer.chunk_tokens = chunk_tokens
    rank, world = trainer.engine.rank, trainer.engine.world
    shares = [batch.share(rank, world) if world > 1 else batch for batch in batches]
    return [
        trainer._accumulate(0, share, len(shares), number == len(shares) - 1) for number, share in enumerate(shares)
    ]


def run_kind(kind: str, reference: Path, work: Path, core: bool, other: Path | None) -> dict[str, Any]:
    """All comparisons of one model. other: the folder of states another engine wrote."""
    from safetensors.torch import load_file

    from scalemerge.training.state import load_state, prime, save_state

    trainer = make_trainer(kind)
    engine = trainer.engine

    def reset(step: int, folder: Path | None = None) -> None:
        load_state(engine, folder or reference / kind / f"state-{step}", step)

    def save(name: str) -> Path:
        folder = work / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        save_state(engine, folder)
        engine.wait()
        return folder

    def update(step: int, chunk_tokens: int | None) -> float:
        engine.set_learning_rate(RATE)
        accumulate(trainer, [batch_of_step(step)], chunk_tokens)
        return engine.step()

    prime(engine, lambda: trainer._embed([{"input_ids": [2]}]).sum() * 0.0)
    expected = load_file(reference / kind / "gradients.safetensors")
    numbers = json.loads((reference / kind / "numbers.json").read_text())
    result: dict[str, Any] = {"engine": engine.name, "world": engine.world, "gradients": {}, "steps": {}, "states": {}}

    reset(0)
    engine.set_learning_rate(0.0)  # the weights stay; moments are read with the next state
    cases = [(loss, path) for of_kind, loss, path in seen_in(core) if of_kind == kind]
    cases += [("accumulated", path) for path in PATHS if not core or path in ("plain", "37 tokens")]
    for loss, path in cases:
        batches = accumulated() if loss == "accumulated" else [make_batch(loss, 7)]
        values = accumulate(trainer, batches, PATHS[path])
        wanted = {name.split(":")[1]: value for name, value in expected.items() if name.split(":")[0] == loss}
        errors = gradient_errors(full_gradients(engine), wanted)
        norm = engine.step()
        loss_error = abs(sum(values) / len(values) / numbers["losses"][loss] - 1)
        errors |= {"norm": abs(norm / errors["total"] - 1), "loss": loss_error}
        result["gradients"][f"{loss}/{path}"] = errors

    norms = numbers["norms"]
    paths = ("plain", "37 tokens")
    for path in (paths[KINDS.index(kind)],) if core else paths:
        reset(0)
        found = []
        for step in range(STEPS):
            if step == SAVED:
                written = save("trained")
                result["states"][f"trained/{path}"] = state_errors(written, reference / kind / f"state-{SAVED}")
            found.append(update(step, PATHS[path]))
        errors = state_errors(save("last"), reference / kind / f"state-{STEPS}")
        errors["norm"] = max(abs(one / two - 1) for one, two in zip(found, norms))
        result["steps"][path] = errors

    reset(SAVED)
    result["states"]["read and written"] = state_errors(save("copy"), reference / kind / f"state-{SAVED}")
    update(SAVED, None)
    result["states"]["resumed from plain"] = state_errors(save("next"), reference / kind / f"state-{SAVED + 1}")
    if other:
        reset(SAVED, other / kind / "trained")
        result["states"]["read from the other"] = state_errors(save("copy"), other / kind / "trained")
        update(SAVED, 37)
        result["states"]["resumed from the other"] = state_errors(save("next"), reference / kind / f"state-{SAVED + 1}")
    result["clipped"] = sum(norm > CLIP for norm in norms)
    engine.accelerator.free_memory()
    return result


# ---- launching -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def launch(engine: str, world: int, folder: Path, *, core: bool = False, other: str | None = None) -> list[Any]:
    """Run all comparisons under an engine; the results of every rank. other: NAME of an earlier launch to resume.

    The first one has to be plain: it writes the reference.
    """
    name = f"{engine}-{world}"
    prefix = [sys.executable]
    if engine != "plain":
        config = ROOT / "accelerate_configs" / f"{engine}_cpu.yaml"
        prefix += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(world)]
        prefix += ["--main_process_port", str(free_port())]
    command = [*prefix, str(Path(__file__).resolve()), str(folder), name]
    command += ["--core"] * core + (["--other", other] if other else [])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if ended.returncode:
        raise RuntimeError(f"{name} ended with {ended.returncode}:\n{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}")
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world)]


def table(results: dict[str, list[Any]]) -> str:
    """Engine x world x path: the worst of all ranks, models and losses."""
    lines = [
        "| engine | ranks | path | gradient | key bias | norm | accumulated | weights after 20 steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, ranks in results.items():
        kinds = [of_kind for rank in ranks for of_kind in rank["kinds"].values()]
        for path in PATHS:
            entries = [
                (label, each) for one in kinds for label, each in one["gradients"].items() if label.endswith(path)
            ]
            single = [each for label, each in entries if not label.startswith("accumulated")]
            several = [each["gradient"] for label, each in entries if label.startswith("accumulated")]
            weights = [one["steps"][path]["weight"] for one in kinds if path in one["steps"]]
            cells = [max(each[key] for each in single) for key in ("gradient", "key_bias", "norm")]
            cells += [max(several, default=None), max(weights, default=None)]  # type: ignore[type-var]
            numbers = " | ".join("" if cell is None else f"{cell:.1e}" for cell in cells)
            seconds = f"{ranks[0]['seconds']:.0f}" if path == "plain" else ""
            lines.append(f"| {name.rsplit('-', 1)[0]} | {len(ranks)} | {path} | {numbers} | {seconds} |")
    return "\n".join(lines)


def show_table(engines: list[str], core: bool) -> None:
    results: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine, world in LAUNCHES:
            if engine in engines or engine == "plain":
                previous = next(reversed(results), None)
                results[f"{engine}-{world}"] = launch(engine, world, Path(folder), core=core, other=previous)
    print(table(results))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--core", action="store_true")
    parser.add_argument("--other")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    given = parser.parse_args()
    if given.table:
        show_table(given.engines, given.core)
        return
    began = time.monotonic()
    import torch

    torch.set_num_threads(1)
    reference = given.folder / "reference"
    if given.name == "plain-1":
        write_reference(reference)
    other = given.folder / given.other if given.other else None
    kinds = {kind: run_kind(kind, reference, given.folder / given.name, given.core, other) for kind in KINDS}
    rank = int(os.environ.get("RANK", "0"))
    result = {"kinds": kinds, "seconds": time.monotonic() - began}
    (given.folder / f"{given.name}-{rank}.json").write_text(json.dumps(result, indent=1))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
