"""Where a model is: a folder, a folder inside an installed package, or a hub id."""

from __future__ import annotations

from pathlib import Path

from scalemerge.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"  # peft's name: a folder with it holds an adapter, not a whole model


def local_folder(path: str | Path) -> str:
    """The folder of a model: a local one as it is, `package:` resolved, a hub id from the hub or its cache."""
    text = str(path)
    if text.startswith("package:"):
        return str(package_folder(text))
    folder = Path(text)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file():
            raise InputError(f"{folder}: no config.json; give a model folder in transformers format")
        return str(folder)
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"{text}: no such model folder; give a folder, a hub id or package:<name>/<folder>")
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(text, ignore_patterns=["*.bin", "*.onnx", "*.h5"]))
    except Exception as error:  # the hub client raises many types for one cause: the model cannot be had
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{text}: is no folder and no reachable hub model ({reason[:150]})") from error


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
