"""What a model or adapter folder holds, from its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.adapters import AdapterFolder, open_adapter, resolve_adapter
from streammerge.sizes import format_size
from streammerge.storage.folder import ModelFolder, open_model
from streammerge.storage.references import display_name, resolve
from streammerge.words import Extent, Replacement


def examine(reference: str, base: str | None) -> dict[str, Any]:
    """The facts of one folder; with `base`, what an adapter would touch there.

    Raises StreammergeError when the folder could not take part in a merge, saying why.
    """
    path = resolve(reference, None, [Path.cwd()])
    if (path / "adapter_config.json").exists():
        return _adapter(path, open_adapter(path, display_name(path)), base)
    return _model(path, open_model(path))


def _model(path: Path, folder: ModelFolder) -> dict[str, Any]:
    specs = [folder.tensors[name].spec for name in folder.tensors]
    bytes_by_dtype: Counter[str] = Counter()
    for spec in specs:
        bytes_by_dtype[spec.dtype.label] += spec.nbytes
    largest = max(specs, key=lambda spec: spec.nbytes)
    return {
        "kind": "model",
        "path": str(path),
        "architecture": _architecture(folder.config),
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs if spec.dtype.mergeable),
        "bytes": sum(spec.nbytes for spec in specs),
        "bytes_by_dtype": dict(bytes_by_dtype),
        "shards": len(folder.shards),
        "largest": {"name": largest.name, "shape": list(largest.shape), "bytes": largest.nbytes},
        "notes": list(folder.notes),
    }


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else config.get("model_type")


def _adapter(path: Path, folder: AdapterFolder, base: str | None) -> dict[str, Any]:
    tensors = folder.header.tensors
    ranks = {tensors[n].spec.shape[0] for n in tensors if ".lora_A." in n}
    facts: dict[str, Any] = {
        "kind": "LoRA adapter",
        "path": str(path),
        "trained_on": folder.config.base_model_name_or_path,
        "ranks": sorted(ranks),
        "alpha": folder.config.alpha,
        "rslora": folder.config.use_rslora,
        "tensors": len(tensors),
        "bytes": folder.header.data_bytes,
        "targets": _targets(tensors),
        "notes": list(folder.notes),
    }
    if base is not None:
        model = open_model(resolve(base, None, [Path.cwd()]))
        resolved = resolve_adapter(folder, model.tensors, model.config)
        updates = resolved.updates.values()
        scales = sorted({one.scale for one in updates if not isinstance(one, Replacement)})
        facts |= {"base": base, "touches": len(resolved.updates), "scales": scales}
        facts["notes"] = list(resolved.notes)
    return facts


def _targets(tensors: Mapping[str, Extent]) -> dict[str, int]:
    """Module kind -> how many of them."""
    modules = [name.split(".lora_A.")[0] for name in tensors if ".lora_A." in name]
    return dict(sorted(Counter(module.rpartition(".")[2] for module in modules).items()))


def describe(facts: Mapping[str, Any]) -> str:
    """The facts for a person."""
    rows = [("path", facts["path"]), ("kind", facts["kind"])]
    if facts["kind"] == "model":
        dtypes = facts["bytes_by_dtype"].items()
        largest = facts["largest"]
        rows += [
            ("architecture", facts["architecture"] or "unknown: no config.json"),
            ("tensors", f"{facts['tensors']} in {facts['shards']} file(s)"),
            ("parameters", f"{facts['parameters']:,}"),
            ("size", ", ".join(f"{format_size(size)} of {label}" for label, size in dtypes)),
            ("largest", f"{largest['name']} {largest['shape']}, {format_size(largest['bytes'])}"),
        ]
    else:
        targets = ", ".join(f"{count} {kind}" for kind, count in facts["targets"].items())
        scaling = "alpha / sqrt(rank)" if facts["rslora"] else "alpha / rank"
        rows += [
            ("trained on", facts["trained_on"] or "not said"),
            ("rank", ", ".join(map(str, facts["ranks"]))),
            ("scaling", f"{scaling}, alpha {facts['alpha']:g}"),
            ("targets", targets),
            ("size", f"{facts['tensors']} tensors, {format_size(facts['bytes'])}"),
        ]
        if "touches" in facts:
            updates = sum(facts["targets"].values())
            rows.append(("on that base", f"{facts['touches']} of {updates} tensors applied"))
    rows += [("note", note) for note in facts["notes"]]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)
