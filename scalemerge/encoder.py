"""The encoder: a transformers backbone, pooling, normalization and prompts, turning texts into embeddings.

It reads and writes sentence-transformers folders, so that everything scalemerge makes loads elsewhere with
`SentenceTransformer(path)`, and reads plain transformers folders when told how to pool. It is our own class and not
a SentenceTransformer because training, positioning and the gradient cache need one `forward` over several padded
groups of texts (a single call through DDP or DeepSpeed), and a backbone whose layers can be swapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalemerge.errors import InputError

POOLINGS = ("cls", "mean", "last")
_POOLING_FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """Pool token states [B, L, D] under a mask [B, L] of 0 and 1 into [B, D] float32.

    cls and last take the first and the last real token, whichever side the padding is on.
    """
    hidden = hidden.float()
    if how == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if how == "cls":
        index = mask.argmax(1)
    elif how == "last":
        index = (mask * positions).argmax(1)
    else:
        raise ValueError(f"pooling '{how}' is not one of {', '.join(POOLINGS)}")
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]


class Encoder(nn.Module):
    """Texts to embeddings.

    backbone: a transformers model whose output has `last_hidden_state` [B, L, D].
    prompts: optional texts put before a query or a document (keys "query", "document").
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        normalize: bool = True,
        max_length: int = 512,
        prompts: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError(f"pooling '{pooling}' is not one of {', '.join(POOLINGS)}")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.max_length = max_length
        self.prompts = dict(prompts or {})

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    # ---- texts to features -------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[dict[str, list[int]]]:
        """Token ids and what else the backbone takes, one dictionary a text, truncated, not yet padded."""
        if not texts:
            return []
        joined = [prompt + text for text in texts] if prompt else list(texts)
        encoded = self.tokenizer(joined, truncation=True, max_length=self.max_length, padding=False)
        keys = list(encoded.keys())
        return [{key: encoded[key][row] for key in keys} for row in range(len(joined))]

    def pad(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Pad features to the longest of them: tensors [B, L] on the encoder's device."""
        batch = self.tokenizer.pad(list(features), padding=True, return_tensors="pt")
        return {key: value.to(self.device) for key, value in batch.items()}

    def groups(self, features: Sequence[dict[str, list[int]]], count: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Split features into `count` padded groups of similar length.

        Returns the groups and the inverse order: `forward(groups)[inverse]` is in the order of `features`. The number
        of groups depends on `count` and the number of rows alone, so that all ranks of a sharded model make the same
        number of calls.
        """
        order = sorted(range(len(features)), key=lambda row: (len(features[row]["input_ids"]), row))
        count = min(count, len(order))
        bounds = [len(order) * part // count for part in range(count + 1)]
        padded = [self.pad([features[row] for row in order[start:stop]]) for start, stop in pairwise(bounds)]
        inverse = torch.empty(len(order), dtype=torch.long)
        inverse[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
        return padded, inverse.to(self.device)

    # ---- features to embeddings --------------------------------------------------------------------------------

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """One padded batch to embeddings [B, D] float32."""
        output = self.backbone(**batch)
        embeddings = pool(output.last_hidden_state, batch["attention_mask"], self.pooling)
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def forward(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """Several padded batches to embeddings [sum of B, D]: one call, however many groups of lengths."""
        return torch.cat([self.embed(batch) for batch in batches])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, batch_size: int = 64, prompt: str = "", progress: bool = False) -> Tensor:
        """Embeddings [n, D], float32 on the CPU, in the order of `texts`; evaluation mode, longest texts first."""
        was_training = self.training
        self.eval()
        try:
            features = self.tokenize([str(text) for text in texts], prompt)
            order = sorted(range(len(features)), key=lambda row: -len(features[row]["input_ids"]))
            result: Tensor | None = None
            starts: Iterable[int] = range(0, len(order), batch_size)
            if progress:
                from rich.progress import track

                starts = track(list(starts), description="encoding")
            for start in starts:
                rows = order[start : start + batch_size]
                embeddings = self.embed(self.pad([features[row] for row in rows])).cpu()
                if result is None:
                    result = torch.empty(len(order), embeddings.shape[1])
                result[rows] = embeddings
            return result if result is not None else torch.empty(0, self.dimension)
        finally:
            self.train(was_training)

    @property
    def dimension(self) -> int:
        return int(self.backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]

    # ---- folders -----------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        attention: str | None = None,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = torch.float32,
    ) -> Encoder:
        """Load a sentence-transformers folder, a transformers folder, or a hub id.

        What the folder says of pooling, normalization and length holds unless an argument says otherwise; a folder that
        says nothing is pooled by `mean` and normalized. Raises InputError for folders that are no model.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        folder = local_folder(path)
        described = read_modules(folder)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            backbone, loaded = AutoModel.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # transformers raises many types for one cause: the folder is no usable model
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{path}: cannot load a model ({reason}); give a complete model folder") from error
        if set(tokenizer.get_vocab()) <= set(
            tokenizer.all_special_tokens
        ):  # transformers makes one up without its file
            raise InputError(f"{path}: the tokenizer has no vocabulary; give a folder with its tokenizer.json")
        missing = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))
        if missing:  # transformers would fill them with random numbers
            raise InputError(f"{path}: the weights lack {', '.join(missing[:3])}; give a complete model folder")
        freeze_unused(backbone)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if hasattr(backbone.config, "use_cache"):
            backbone.config.use_cache = False
        length = max_length or described.get("max_length")
        if length is None:
            # a sentence-transformers folder without a length means the tokenizer's; a plain one is cut at 512
            cut = tokenizer.model_max_length if described else min(tokenizer.model_max_length, 512)
            length = min(cut, position_limit(backbone))
        encoder = cls(
            backbone,
            tokenizer,
            pooling=pooling or described.get("pooling") or "mean",
            normalize=described.get("normalize", True) if normalize is None else normalize,
            max_length=int(length),
            prompts=described.get("prompts"),
        )
        return encoder.to(device)

    def save(self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a sentence-transformers folder (no rename: callers give a temporary one). Safetensors only."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            self.backbone.save_pretrained(folder)  # type: ignore[operator]
        else:
            self.backbone.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)
        write_modules(
            folder,
            dimension=self.dimension,
            pooling=self.pooling,
            normalize=self.normalize,
            max_length=self.max_length,
            prompts=self.prompts,
        )


def position_limit(backbone: nn.Module) -> int:
    """How many tokens the backbone has positions for; RoBERTa's kind counts them from padding_idx + 1."""
    count = getattr(backbone.config, "max_position_embeddings", None) or 512
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return int(count) - (0 if offset is None else offset + 1)


def freeze_unused(backbone: nn.Module) -> None:
    """Freeze the poolers some backbones carry: our pooling reads token states, so they never get a gradient, and a
    parameter without a gradient stops DDP."""
    for name, parameter in backbone.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)


def local_folder(path: str | Path) -> str:
    """The folder of a model: a local one as it is, `package:` resolved, anything else left for the hub."""
    text = str(path)
    if text.startswith("package:"):
        return str(package_folder(text))
    folder = Path(text)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json; give a model folder in transformers format")
        return str(folder)
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"{text}: no such model folder; give a folder, a hub id or package:<name>/<folder>")
    return text


def package_folder(reference: str) -> Path:
    """The folder that `package:<import name>/<folder>` stands for, without importing the package."""
    import importlib.util

    name, _, inside = reference.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{reference}: package '{name}' is not installed; pip install {name.replace('_', '-')}")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise InputError(f"{reference}: package '{name}' has no folder '{inside}'")
    return folder


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); restore the file") from None
    if not isinstance(content, kind):
        raise InputError(f"{path}: holds no JSON {'object' if kind is dict else 'list'}; restore the file")
    return content


def read_modules(folder: str | Path) -> dict[str, Any]:
    """What a sentence-transformers folder says of pooling, normalize, max_length and prompts; {} where it is silent."""
    folder = Path(folder)
    described: dict[str, Any] = {}
    if not (folder / "modules.json").is_file():
        return described
    described["normalize"] = False
    for module in _read_json(folder / "modules.json", list):
        if not isinstance(module, dict) or not isinstance(module.get("path"), str):
            raise InputError(f"{folder / 'modules.json'}: a module has no path; restore the file")
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Normalize":
            described["normalize"] = True
        elif kind == "Pooling":
            described["pooling"] = _read_pooling(folder / module["path"] / "config.json")
        elif kind != "Transformer":
            raise InputError(f"{folder / 'modules.json'}: module '{kind}' is not supported; only Transformer, "
                             "Pooling and Normalize are")  # fmt: skip
    for name in ("sentence_bert_config.json", "sentence_transformer_config.json"):
        if (folder / name).is_file():
            length = _read_json(folder / name).get("max_seq_length")
            if length is not None and (not isinstance(length, int) or length < 2):
                raise InputError(f"{folder / name}: max_seq_length is {length!r}; give a whole number of tokens")
            if length:
                described["max_length"] = length
    if (folder / "config_sentence_transformers.json").is_file():
        prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
        if not isinstance(prompts, dict):
            raise InputError(
                f"{folder / 'config_sentence_transformers.json'}: 'prompts' is no object; restore the file"
            )
        described["prompts"] = {key: value for key, value in prompts.items() if value}
    return described


def _read_pooling(path: Path) -> str:
    config = _read_json(path)
    if config.get("include_prompt") is False:
        raise InputError(f"{path}: include_prompt: false is not supported; only pooling over the prompt as well is")
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        chosen = [{"lasttoken": "last", "last_token": "last"}.get(mode, mode)]
    elif mode is not None:
        chosen = list(mode) if isinstance(mode, list) else [mode]
    else:
        flags = {flag: name for name, flag in _POOLING_FLAGS.items()}
        chosen = [flags.get(key, key) for key, on in config.items() if key.startswith("pooling_mode") and on is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise InputError(f"{path}: pooling {chosen} is not supported; use one of {', '.join(POOLINGS)}")
    return chosen[0]


def write_modules(
    folder: Path, *, dimension: int, pooling: str, normalize: bool, max_length: int, prompts: dict[str, str]
) -> None:
    """Write the small files that make a transformers folder a sentence-transformers folder."""

    def write(name: str, content: Any) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalize else [])
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    flags = {flag: name == pooling for name, flag in _POOLING_FLAGS.items()}
    flags |= {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    write("modules.json", modules)
    write("1_Pooling/config.json", {"word_embedding_dimension": dimension, **flags, "include_prompt": True})
    write("sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    stated = {"query": "", "document": "", **prompts}
    write(
        "config_sentence_transformers.json",
        {"prompts": stated, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    if normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)
