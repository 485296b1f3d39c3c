"""The small JSON files that make a transformers folder a sentence-transformers folder.

`modules.json` names the modules; `1_Pooling/config.json` says how to pool and whether the prompt's tokens count;
`sentence_bert_config.json` holds the length and do_lower_case; `config_sentence_transformers.json` the prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scalemerge.encoder.pooling import POOLINGS
from scalemerge.errors import InputError

_POOLING_FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}


def read_modules(folder: str | Path) -> dict[str, Any]:
    """What a sentence-transformers folder says; {} where there is no modules.json, else some of the keys

    pooling, pool_prompt, normalize, max_length, lower_case, prompts, default_prompt_name, bidirectional.
    Raises InputError for spoilt files and for modules that are not supported.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        return {}
    return _read_module_list(folder) | _read_transformer(folder) | _read_prompts(folder)


def _read_module_list(folder: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"normalize": False}
    for module in _read_json(folder / "modules.json", list):
        if not isinstance(module, dict) or not isinstance(module.get("path"), str):
            raise InputError(f"{folder / 'modules.json'}: a module has no path; restore the file")
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Normalize":
            described["normalize"] = True
        elif kind == "Pooling":
            described |= _read_pooling(folder / module["path"] / "config.json")
        elif kind != "Transformer":
            raise InputError(f"{folder / 'modules.json'}: module '{kind}' is not supported; only Transformer, "
                             "Pooling and Normalize are")  # fmt: skip
    return described


def _read_pooling(path: Path) -> dict[str, Any]:
    config = _read_json(path)
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
    return {"pooling": chosen[0], "pool_prompt": config.get("include_prompt") is not False}


def _read_transformer(folder: Path) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for name in ("sentence_bert_config.json", "sentence_transformer_config.json"):
        if not (folder / name).is_file():
            continue
        config = _read_json(folder / name)
        length = config.get("max_seq_length")
        if length is not None and (not isinstance(length, int) or length < 2):
            raise InputError(f"{folder / name}: max_seq_length is {length!r}; give a whole number of tokens")
        if length:
            described["max_length"] = length
        described["lower_case"] = config.get("do_lower_case") is True
    return described


def _read_prompts(folder: Path) -> dict[str, Any]:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return {}
    config = _read_json(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise InputError(f"{path}: 'prompts' is no object; restore the file")
    if default is not None and default not in prompts:
        raise InputError(f"{path}: default_prompt_name {default!r} is none of the prompts; name one of them, or null")
    described = {"prompts": {key: value for key, value in prompts.items() if value}, "default_prompt_name": default}
    own = config.get("scalemerge")
    return described | {"bidirectional": isinstance(own, dict) and own.get("bidirectional") is True}


def write_modules(
    folder: Path,
    *,
    dimension: int,
    pooling: str,
    normalize: bool,
    max_length: int,
    prompts: dict[str, str],
    default_prompt_name: str | None = None,
    pool_prompt: bool = True,
    lower_case: bool = False,
    bidirectional: bool = False,
) -> None:
    """Write the files. A default prompt that is none of the prompts is left out: sentence-transformers refuses it.

    bidirectional: to be said here, in a key of our own, since the folder has no config.json (adapters).
    """

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
    stated = {"query": "", "document": "", **prompts}
    write("modules.json", modules)
    write("1_Pooling/config.json", {"word_embedding_dimension": dimension, **flags, "include_prompt": pool_prompt})
    write("sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": lower_case})
    write(
        "config_sentence_transformers.json",
        {
            "prompts": stated,
            "default_prompt_name": default_prompt_name if default_prompt_name in stated else None,
            "similarity_fn_name": "cosine",
            **({"scalemerge": {"bidirectional": True}} if bidirectional else {}),
        },
    )
    if normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); restore the file") from None
    if not isinstance(content, kind):
        raise InputError(f"{path}: holds no JSON {'object' if kind is dict else 'list'}; restore the file")
    return content
