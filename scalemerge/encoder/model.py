"""The Encoder: tokenize, pad, embed, and folders to load it from and save it to.

It reads and writes sentence-transformers folders, so that everything scalemerge makes loads elsewhere with
`SentenceTransformer(path)`, and reads plain transformers folders when told how to pool. It is our own class and not
a SentenceTransformer because training, positioning and the gradient cache need one `forward` over several padded
groups of texts (a single call through DDP or DeepSpeed), and a backbone whose layers can be swapped.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalemerge.checkpoints.reader import TensorSpec
from scalemerge.checkpoints.writer import write_safetensors
from scalemerge.encoder import adapters, loading
from scalemerge.encoder.attention import is_bidirectional, make_bidirectional
from scalemerge.encoder.folders import local_folder
from scalemerge.encoder.modules import read_modules, write_modules
from scalemerge.encoder.pooling import POOLINGS, pool, without_prompt
from scalemerge.encoder.weights import list_weights, weights_file
from scalemerge.errors import InputError

PROMPT_LENGTH = "prompt_length"  # in features: [tokens of the prompt], where they are not pooled
POOLING_MASK = "pooling_mask"  # in padded batches: the attention mask without those tokens; never for the backbone


class Encoder(nn.Module):
    """Texts to embeddings.

    backbone: a transformers model whose output has `last_hidden_state` [B, L, D].
    prompts: optional texts put before a query or a document (keys "query", "document"); default_prompt_name: the one
    that encode() uses when it is given none. pool_prompt: whether the prompt's tokens are pooled. lower_case: whether
    the tokenizer was told to lowercase (it is only written back here).
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
        default_prompt_name: str | None = None,
        pool_prompt: bool = True,
        lower_case: bool = False,
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
        self.default_prompt_name = default_prompt_name
        self.pool_prompt = pool_prompt
        self.lower_case = lower_case
        self.trust_remote_code = False

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dimension(self) -> int:
        return int(self.backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def bidirectional(self) -> bool:
        """Whether this is a decoder whose tokens see later ones."""
        return is_bidirectional(self.backbone.config)

    # ---- texts to features -------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[dict[str, list[int]]]:
        """Token ids and what else the backbone takes, one dictionary a text, truncated, not yet padded.

        With a prompt that is not to be pooled each has its length in tokens too, as `prompt_length: [n]`.
        """
        if not texts:
            return []
        joined = [prompt + text for text in texts] if prompt else list(texts)
        features = self._tokenize(joined)
        if prompt and not self.pool_prompt:
            length = self._tokens_of(prompt)
            for feature in features:
                feature[PROMPT_LENGTH] = [length]
        return features

    def _tokenize(self, texts: list[str]) -> list[dict[str, list[int]]]:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=False)
        keys = list(encoded.keys())
        return [{key: encoded[key][row] for key in keys} for row in range(len(texts))]

    def _tokens_of(self, prompt: str) -> int:
        """A prompt's tokens, special ones before it included, one behind it not: as sentence-transformers counts."""
        tokens = self._tokenize([prompt])[0]["input_ids"]
        return len(tokens) - (tokens[-1] in self.tokenizer.all_special_ids)

    def pad(self, features: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Pad features to the longest of them: tensors [B, L] on the encoder's device."""
        tokens = [{key: value for key, value in each.items() if key != PROMPT_LENGTH} for each in features]
        batch = dict(self.tokenizer.pad(tokens, padding=True, return_tensors="pt"))
        lengths = [each.get(PROMPT_LENGTH, [0])[0] for each in features]
        if any(lengths):
            batch[POOLING_MASK] = without_prompt(batch["attention_mask"], torch.tensor(lengths))
        return {key: value.to(self.device) for key, value in batch.items()}

    def groups(self, features: Sequence[dict[str, list[int]]], count: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Split features into `count` padded groups of similar length.

        Returns the groups and the inverse order: `forward(groups)[inverse]` is in the order of `features`. The number
        of groups depends on `count` and the number of rows alone, so that all ranks of a sharded model make the same
        number of calls. Raises ValueError without features or groups.
        """
        if not features or count < 1:
            raise ValueError(f"cannot split {len(features)} texts into {count} groups; give one of each at least")
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
        output = self.backbone(**{key: value for key, value in batch.items() if key != POOLING_MASK})
        mask = batch.get(POOLING_MASK, batch["attention_mask"])
        embeddings = pool(output.last_hidden_state, mask, self.pooling)
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def forward(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """Several padded batches to embeddings [sum of B, D]: one call, however many groups of lengths."""
        return torch.cat([self.embed(batch) for batch in batches])

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], *, batch_size: int = 64, prompt: str | None = None, progress: bool = False
    ) -> Tensor:
        """Embeddings [n, D], float32 on the CPU, in the order of `texts`; evaluation mode, longest texts first.

        prompt: None means the default prompt, "" none at all.
        """
        if prompt is None:
            prompt = self.prompts.get(self.default_prompt_name or "", "")
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
        pool_prompt: bool | None = None,
        bidirectional: bool = False,
        attention: str | None = None,
        quantize: loading.Quantization = "none",
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = torch.float32,
        empty: bool = False,
    ) -> Encoder:
        """Load a sentence-transformers folder, a transformers folder, an adapter folder, or a hub id.

        What the folder says of pooling, prompts, normalization, length and direction holds unless an argument says
        otherwise; a folder that says nothing is pooled by `mean` and normalized. An adapter folder is loaded onto its
        base, all of it frozen. quantize: nf4 or int8 through bitsandbytes, on a GPU. empty: parameters stay on the meta
        device, for a model whose weights never are in one place (not for adapters). Raises InputError for folders that
        are no model.
        """
        folder = local_folder(path)
        base = adapters.adapter_base(folder)
        described = read_modules(folder)
        tokenizer = loading.load_tokenizer(folder, path, trust_remote_code)
        if empty and base is not None:
            raise InputError(f"{path}: is an adapter; give the folder of a whole model")
        if empty:
            backbone = loading.empty_backbone(folder, path, attention=attention, trust_remote_code=trust_remote_code)
        else:
            backbone = loading.load_backbone(
                base or folder,
                path,
                dtype=dtype,
                device=device,
                attention=attention,
                quantize=quantize,
                trust_remote_code=trust_remote_code,
            )
        if bidirectional or described.get("bidirectional"):
            make_bidirectional(backbone)
        loading.pad_where_positions_allow(tokenizer, backbone)
        length = max_length or described.get("max_length")
        if length is None:
            # a sentence-transformers folder without a length means the tokenizer's; a plain one is cut at 512
            cut = tokenizer.model_max_length if described else min(tokenizer.model_max_length, 512)
            length = min(cut, loading.position_limit(backbone))
        lower_case = described.get("lower_case", False)
        if lower_case:
            loading.lower_case(tokenizer, path)
        encoder = cls(
            backbone if base is None else adapters.load_adapter(backbone, folder),
            tokenizer,
            pooling=pooling or described.get("pooling") or "mean",
            normalize=described.get("normalize", True) if normalize is None else normalize,
            max_length=int(length),
            prompts=described.get("prompts"),
            default_prompt_name=described.get("default_prompt_name"),
            pool_prompt=described.get("pool_prompt", True) if pool_prompt is None else pool_prompt,
            lower_case=lower_case,
        )
        encoder.trust_remote_code = trust_remote_code
        return encoder

    def save(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, merged: bool = False) -> None:
        """Write a sentence-transformers folder (no rename: callers give a temporary one). Safetensors only.

        state_dict: values to write in place of the encoder's, by their names in `backbone.state_dict()`. merged: an
        adapter is added to its base's weights, read anew from where they were loaded (so a quantized base is merged in
        full precision); an encoder without an adapter is written as ever. Raises ValueError when a value is missing.
        """
        folder = Path(folder)
        if merged and adapters.is_adapter(self.backbone):
            self._save_merged(folder, state_dict)
            return
        values: dict[str, Tensor] = {}
        for name, own, tensor in list_weights(self.backbone):
            if state_dict is not None and own not in state_dict:
                raise ValueError(f"state_dict has no '{own}', which {self.weights_file} needs")
            values[name] = tensor if state_dict is None else state_dict[own]
        dtypes = {value.dtype for value in values.values() if value.is_floating_point()}
        self.save_description(folder, dtype=dtypes.pop() if len(dtypes) == 1 else None)
        write_safetensors(
            folder / self.weights_file,
            {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in values.items()},
            lambda name: values[name].detach().cpu().contiguous(),
        )

    def _save_merged(self, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
        with tempfile.TemporaryDirectory() as adapter:
            self.save(adapter, state_dict=state_dict)
            whole = Encoder.load(
                adapter, dtype=getattr(self.backbone, "dtype", None), trust_remote_code=self.trust_remote_code
            )
            adapters.merge_adapter(whole)
            whole.save(folder)

    def weights_to_save(self) -> list[tuple[str, Tensor]]:
        """The parameters and buffers that belong in `weights_file`, by their names there; no value is read."""
        return [(name, tensor) for name, _, tensor in list_weights(self.backbone)]

    @property
    def weights_file(self) -> str:
        """model.safetensors, or adapter_model.safetensors for an adapter."""
        return weights_file(self.backbone)

    def save_description(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write everything but the weights: configuration, tokenizer, modules, and adapter_config.json of an adapter.

        dtype: what the configuration says of the weights; None leaves it as loaded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = adapters.is_adapter(self.backbone)
        if adapter:
            adapters.write_adapter_config(self.backbone, folder)
        else:
            config: Any = copy.deepcopy(self.backbone.config)
            config.architectures = [type(self.backbone).__name__]
            if dtype is not None:
                config.dtype = str(dtype).removeprefix("torch.")
            config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_modules(
            folder,
            dimension=self.dimension,
            pooling=self.pooling,
            normalize=self.normalize,
            max_length=self.max_length,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            pool_prompt=self.pool_prompt,
            lower_case=self.lower_case,
            bidirectional=adapter and self.bidirectional,  # config.json says it for a whole model
        )
