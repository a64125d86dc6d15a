"""What a model or adapter folder holds, from its headers, and what hinders a merge of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.adapters.config import LoraConfig
from streammerge.adapters.faults import Findings
from streammerge.adapters.folder import CONFIG as ADAPTER_CONFIG
from streammerge.adapters.folder import AdapterFolder, find_adapter, open_adapter, read_weights
from streammerge.adapters.heads import with_named_head
from streammerge.adapters.keys import Contents, sort_tensors
from streammerge.adapters.resolve import resolve_adapter
from streammerge.adapters.saved import Saved, gather
from streammerge.errors import Problems, StreammergeError
from streammerge.sizes import format_size
from streammerge.storage.folder import ModelFolder, holds_model, open_model
from streammerge.storage.header import Header
from streammerge.storage.pickles import Pickles
from streammerge.storage.references import display_name, resolve


def examine(
    reference: str, base: str | None, problems: Problems, pickles: Pickles | None = None
) -> dict[str, Any]:
    """The facts of one folder; with `base`, what an adapter would touch there.

    `pickles` is the leave to look into those of a folder that holds no safetensors.
    What hinders a merge goes to `problems`, and as text into the facts, which then are those that
    could be found: of a folder that is neither a model nor an adapter, where it was looked for.
    """
    hindered = Problems()
    facts: dict[str, Any] = {"kind": "unreadable", "path": reference}
    try:
        path = resolve(reference, None, [Path.cwd()])
        facts["path"] = str(path)
        if _holds_adapter(path):
            facts = _adapter(find_adapter(path), base, pickles, hindered)
        else:
            facts = _model(path, open_model(path, pickles))
    except StreammergeError as problem:
        hindered.add(problem)
    for one in hindered:
        problems.add(one)
    return {**facts, "hindered_by": [str(problem) for problem in hindered]}


def _holds_adapter(path: Path) -> bool:
    return os.path.exists(path / ADAPTER_CONFIG) or not holds_model(path)


def _model(path: Path, folder: ModelFolder) -> dict[str, Any]:
    specs = [extent.spec for shard in folder.shards for extent in shard.tensors.values()]
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


def _adapter(
    path: Path, base: str | None, pickles: Pickles | None, problems: Problems
) -> dict[str, Any]:
    name, folder, header = display_name(path), None, None
    try:
        folder = open_adapter(path, name, pickles)
        header = folder.header
    except StreammergeError as problem:
        problems.add(problem)
        why_not = Problems()  # known already
        header = read_weights(path, pickles, why_not)
    facts: dict[str, Any] = {"kind": "adapter", "path": str(path)}
    if header is not None:
        facts |= _tensors(header, folder.config if folder else None)
    if folder is not None:
        facts |= _config(folder)
    if folder is not None and base is not None:
        facts |= _on_base(folder, base, pickles, problems)
    return facts


def _tensors(header: Header, config: LoraConfig | None) -> dict[str, Any]:
    contents = sort_tensors(header.tensors, Findings(header.path))
    saved = gather(contents.saved, contents.name)
    modules = [pair.module for pair in contents.pairs]
    scales = {config.scale(module) for module in modules} if config else set()
    return {
        "kind": _kind(contents, saved),
        "ranks": sorted({pair.rank for pair in contents.pairs}),
        "scales": sorted(scales),
        "tensors": len(header.tensors),
        "bytes": sum(extent.spec.nbytes for extent in header.tensors.values()),
        "targets": _counted(modules),
        "replaces": _counted([name.removesuffix(".weight") for name in saved]),
    }


def _kind(contents: Contents, saved: Mapping[str, Saved]) -> str:
    """In the words of PEFT: what it adds to weights, and what it holds besides."""
    pairs = contents.pairs
    family = "AdaLoRA" if any(pair.svd for pair in pairs) else "LoRA" if pairs else ""
    family = "DoRA" if any(pair.magnitude for pair in pairs) else family
    beside = {
        "lora_bias": any(pair.bias for pair in pairs),
        "trainable tokens": any(one.rows for one in saved.values()),
        "tensors in full": any(one.whole for one in saved.values()),
    }
    return ", ".join(filter(None, [family, *(kind for kind, held in beside.items() if held)]))


def _config(folder: AdapterFolder) -> dict[str, Any]:
    return {
        "trained_on": folder.config.base_model_name_or_path,
        "peft_version": folder.config.peft_version,
        "alpha": folder.config.alpha,
        "rslora": folder.config.use_rslora,
        "notes": list(folder.notes),
    }


def _on_base(
    folder: AdapterFolder, base: str, pickles: Pickles | None, problems: Problems
) -> dict[str, Any]:
    try:
        opened = open_model(resolve(base, None, [Path.cwd()]), pickles)
        model = with_named_head(opened, folder)
        found = resolve_adapter(folder, model.tensors, model.config, model.ties)
    except StreammergeError as problem:
        problems.add(problem)
        return {"base": base, "touches": []}
    notes = [*found.notes, *found.warnings]
    return {"base": base, "touches": list(found.updates), "notes": notes}


def _counted(modules: Sequence[str]) -> dict[str, int]:
    """The last part of a module's name -> how many of them."""
    return dict(sorted(Counter(module.rpartition(".")[2] for module in modules).items()))


def describe(facts: Mapping[str, Any]) -> str:
    """The facts for a person."""
    about = _about_model(facts) if facts["kind"] == "model" else _about_adapter(facts)
    rows = [("path", facts["path"]), ("kind", facts["kind"]), *about]
    rows += [("note", note) for note in facts.get("notes", ())]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)


def _about_model(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    dtypes, largest = facts["bytes_by_dtype"].items(), facts["largest"]
    return [
        ("architecture", facts["architecture"] or "unknown: no config.json"),
        ("tensors", f"{facts['tensors']} in {facts['shards']} file(s)"),
        ("parameters", f"{facts['parameters']:,}"),
        ("size", ", ".join(f"{format_size(size)} of {label}" for label, size in dtypes)),
        ("largest", f"{largest['name']} {largest['shape']}, {format_size(largest['bytes'])}"),
    ]


def _about_adapter(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What could be found of it."""
    rows: list[tuple[str, str]] = []
    if "alpha" in facts:
        scaling = "alpha / sqrt(rank)" if facts["rslora"] else "alpha / rank"
        scales = ", ".join(f"{scale:g}" for scale in facts["scales"])
        rows += [
            ("trained on", facts["trained_on"] or "not said"),
            ("scaling", f"{scaling}, alpha {facts['alpha']:g}: {scales or 'nothing to scale'}"),
        ]
    if "tensors" in facts:
        rows += [
            ("rank", ", ".join(map(str, facts["ranks"])) or "no factors"),
            ("targets", _listed(facts["targets"])),
            ("replaces", _listed(facts["replaces"])),
            ("size", f"{facts['tensors']} tensors, {format_size(facts['bytes'])}"),
        ]
    if "touches" in facts:
        rows.append(("on that base", f"{len(facts['touches'])} tensors applied"))
    return rows


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"
