"""Merge model folders by flags alone: base, experts, and a static method or a coefficients.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalemerge.checkpoints.atomic import require_writable
from scalemerge.encoder import local_folder
from scalemerge.errors import InputError
from scalemerge.merging.learned import combine_learned, read_coefficients
from scalemerge.merging.registry import find_method
from scalemerge.merging.write import DTYPES, Storage, write_merged
from scalemerge.task_vectors import TaskVectorStore


def merge_folders(
    base: str,
    experts: dict[str, Path],
    out: Path,
    method: str,
    parameters: dict[str, Any],
    coefficients: Path | None = None,
    dtype: str | None = None,
    storage: Storage | None = None,
) -> float:
    """Write the merged folder `out`. Returns the share of the delta that survived the stored dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; give another --out")
    require_writable(out.parent)
    store = TaskVectorStore(local_folder(base), experts)
    description: dict[str, Any] = {
        "title": out.name,
        "base": base,
        "experts": {name: str(folder) for name, folder in experts.items()},
    }
    if coefficients is not None:
        learned = read_coefficients(coefficients)
        if learned["experts"] != store.experts:
            raise InputError(
                f"{coefficients}: learned for experts {', '.join(learned['experts'])}; give --expert for each, in "
                "this order"
            )
        combine = combine_learned(learned)
        description |= {"method": "self_positioning", "c": learned["c"], "granularity": learned["granularity"]}
    else:
        chosen = find_method(method, "--method")
        values = chosen.check(parameters, "--set")
        description |= {"method": method, "source": chosen.source, "parameters": values}

        def combine(name: str, tensor: Any, task_vectors: Any) -> Any:
            return chosen(tensor, task_vectors, values)

    return write_merged(store, out, combine, description=description, key="", dtype=dtype, storage=storage)
