"""The folder of a finished `scalemerge run` as a bench: its recipe, experts, probe rows and suite, other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from measuring import hide_this_folder
from torch import Tensor

from scalemerge import pipeline
from scalemerge.positioning import Search, build
from scalemerge.recipe import load_recipe
from scalemerge.training import load_encoder


def open_run(folder: Path, out: Path) -> pipeline.Run:
    """The run of `folder`, with searches, merged models and scores going to `out`/work."""
    hide_this_folder()
    recipe = load_recipe(folder / "recipe.yaml")
    experts = {name: folder / "experts" / name for name in recipe.tasks}
    return pipeline.prepare(recipe, out / "work", experts=experts)


def make_search(run: pipeline.Run, folder: Path, *, seed: int | None = None, **settings: Any) -> Search:
    """A search over the run's experts with some positioning settings changed; `folder` is where it would save."""
    chosen = run.recipe.positioning.model_copy(update=settings)
    model = build(load_encoder(run.recipe.base), pipeline.open_store(run, chosen.task_vectors), chosen)
    probe = {name: data.probe for name, data in run.data.items()}
    validation = {name: data.validation for name, data in run.data.items()}
    seed = run.recipe.seed if seed is None else seed
    return Search(model, run.recipe.tasks, probe, validation, chosen, seed=seed, folder=folder)


def next_batches(search: Search) -> list[Any]:
    """The next probe batch of every task."""
    return [next(stream) for stream in search._streams.values()]


def gradient_at_start(search: Search, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, D] of the batches and dc [E] of the sum of their losses, at the start of the search."""
    seen: list[Tensor] = []
    encode = search._encode

    def recording(features: Any) -> Tensor:
        seen.append(encode(features))
        return seen[-1]

    search._encode = recording  # type: ignore[method-assign]
    try:
        c = search.model.place(search.model.position().detach().requires_grad_(True))
        losses = search._task_losses(batches)
    finally:
        search._encode = encode  # type: ignore[method-assign]
    (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), c)
    return torch.cat(seen).detach(), gradient.flatten()
