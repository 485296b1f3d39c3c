"""Our encoder behind mteb's interface. Imports mteb (10 s): only `evaluate` imports this module.

The scores must equal those of mteb's own SentenceTransformerEncoderWrapper around SentenceTransformer(path), so the
choice of prompts follows it exactly:

* with a prompt type (retrieval, reranking): the first of "<task>-<type>", "<task>", "<mteb type>-<type>",
  "<mteb type>", "query" or "document" that the model has; otherwise none;
* without one (STS, pairs, classification, clustering): "<task>" or "<mteb type>", otherwise the model's default prompt,
  which most models do not have. "query" is never used there.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction

from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import mteb_name


class TextEncoder(Protocol):
    """What is wanted of an encoder; scalemerge.encoder.Encoder is one."""

    prompts: dict[str, str]

    def encode(
        self, texts: list[str], *, batch_size: int = 64, prompt: str = "", progress: bool = False
    ) -> torch.Tensor:
        """Embeddings [n, d], float32 on the CPU."""
        ...


class ScoredEncoder(AbsEncoder):
    """An encoder as mteb sees it, under a name and revision no other model has."""

    def __init__(self, encoder: TextEncoder, *, name: str, revision: str, folder: Path) -> None:
        stated = _stated(folder)
        self.model = encoder
        self._label = str(folder)
        self._default_prompt = str((stated.get("prompts") or {}).get(stated.get("default_prompt_name")) or "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mteb warns of every prompt name that is none of its tasks
            self.model_prompts = self.validate_task_to_prompt_name(encoder.prompts, raise_for_invalid_keys=False)[0]
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": mteb_name(name),
                "revision": revision,
                "framework": ["PyTorch"],
                "similarity_fn_name": _similarity(folder, stated),
                "open_weights": True,
            }
        )

    def encode(  # type: ignore[override]
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, batch_size: int = 64, **_: Any
    ) -> np.ndarray:
        """Encode a dataloader's texts. Raises InputError when the model gives NaN or infinity."""
        texts = [text for batch in inputs for text in batch["text"]]
        name = get_prompt_name(self.model_prompts, task_metadata, prompt_type)
        if name is not None:
            prompt = (self.model_prompts or {}).get(name, "")
        else:
            prompt = "" if prompt_type else self._default_prompt
        embeddings = self.model.encode(texts, batch_size=batch_size, prompt=prompt)
        if not torch.isfinite(embeddings).all():
            raise InputError(f"{self._label}: the model's embeddings of task '{task_metadata.name}' contain NaN or "
                             "infinity; its weights are broken, train or merge it again")  # fmt: skip
        return embeddings.detach().cpu().float().numpy()


def _stated(folder: Path) -> dict[str, Any]:
    """config_sentence_transformers.json: prompts, default prompt and similarity; {} where there is none."""
    path = folder / "config_sentence_transformers.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable as a JSON object ({error}); restore the file") from None


def _similarity(folder: Path, stated: dict[str, Any]) -> ScoringFunction:
    name = stated.get("similarity_fn_name") or "cosine"
    known = {"cosine": ScoringFunction.COSINE, "dot": ScoringFunction.DOT_PRODUCT}
    if name not in known:
        raise InputError(f"{folder / 'config_sentence_transformers.json'}: similarity_fn_name '{name}' is not "
                         "supported; use cosine or dot")  # fmt: skip
    return known[name]
