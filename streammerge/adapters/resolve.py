"""From an adapter's folder to the updates of a base's tensors: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from streammerge.adapters.config import LoraConfig
from streammerge.adapters.faults import Fault, Findings
from streammerge.adapters.folder import AdapterFolder
from streammerge.adapters.keys import sort_tensors
from streammerge.adapters.lora import Orientation, fits, update_of
from streammerge.adapters.names import AS_THEY_ARE, Move, find_tensors, nearest
from streammerge.adapters.pairs import Pair
from streammerge.adapters.saved import Replacements, gather
from streammerge.errors import BadInput, Problems
from streammerge.storage.heads import is_of_a_task
from streammerge.storage.smallfile import show
from streammerge.words import Addition, Extent, Factors, Update

_NO_BIAS: Final = Fault(
    "biases of lora_B on layers of the base that have none",
    "a bias of the layer to add it to, of one number for each output feature",
    "train without lora_bias: no merged weight can hold such a bias; PEFT cannot merge it either",
)


_OTHER_TASK: Final = Fault(
    "tensors of a classifier, or another head of a task, that the base does not have",
    "a base with that head, whose numbers do not matter: the adapter's replace them",
    "load the base with the head in transformers (AutoModelForSequenceClassification, "
    "num_labels=...), save it, and merge into that",
)


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter and the update that it makes to each tensor of a base it touches."""

    folder: AdapterFolder
    updates: Mapping[str, Update]  # by the base tensor's name, in the base's order
    notes: tuple[str, ...]  # the folder's, and what finding the tensors adds
    warnings: tuple[str, ...]


def resolve_adapter(
    folder: AdapterFolder,
    base: Mapping[str, Extent],
    base_config: Mapping[str, Any],
    ties: Mapping[str, str] = MappingProxyType({}),
) -> ResolvedAdapter:
    """Find the base tensor of every tensor of an adapter, and check that each fits.

    `base` is the base's tensors in file order, `base_config` its config.json, and `ties` says
    which of them are others of them. Raises BadInput, or Refused with every kind of problem, unless
    all tensors of the adapter can be applied.
    """
    findings = Findings(folder.header.path)
    contents = sort_tensors(folder.header.tensors, findings)
    pairs = contents.pairs
    saved = gather(contents.saved, contents.name)
    weights = [f"{pair.module}.weight" for pair in pairs]
    named_base = folder.config.base_model_name_or_path
    names = [name for name in dict.fromkeys([*weights, *saved]) if not _is_foreign(name, base)]
    for name in (name for name in saved if _is_foreign(name, base)):
        findings.add(_OTHER_TASK, f"{name} (nearest: {', '.join(nearest(name, base))})")
    tensors, move = find_tensors(names, base, findings, named_base)
    replacements = Replacements(folder.config, findings)
    for name, tensor in tensors.items():
        if name in saved:
            replacements.add(name, saved[name], base[tensor])
    for name, of in ties.items():
        replacements.share(of, name)
    named = zip(pairs, weights, strict=True)
    found = ((pair, tensors[weight]) for pair, weight in named if weight in tensors)
    targets = [(pair, replacements.target(base[tensor])) for pair, tensor in found]
    sound = [one for one in targets if fits(*one, folder.config, findings)]
    updates = _updates(folder, sound, Orientation(sound, base_config, folder.config))
    updates |= _biases(folder, sound, base, findings)
    updates = replacements.before(updates)
    _raise_any(findings, folder, bool(updates))
    notes = [*folder.notes, *_notes(folder, updates, base, move, contents.training_state)]
    notes += [*_empty(pairs), *_copies(replacements.copies)]
    warnings = _lost_biases(folder.config, saved, tensors, base)
    in_order = {name: updates[name] for name in base if name in updates}
    return ResolvedAdapter(folder, in_order, tuple(notes), tuple(warnings))


def _is_foreign(name: str, base: Mapping[str, Extent]) -> bool:
    """Whether a tensor is of a head that the base lacks, not of one that has another name there."""
    return is_of_a_task(name) and not any(map(is_of_a_task, base))


def _raise_any(findings: Findings, folder: AdapterFolder, any_updates: bool) -> None:
    problems = Problems()
    findings.report(problems)
    if not any_updates and not problems:
        problems.add(
            BadInput(
                "the adapter holds no tensors that change a model",
                where=folder.header.path,
                found=f"{len(folder.header.tensors)} tensors",
                expected="<module>.lora_A.weight and <module>.lora_B.weight, or modules in full",
                remedy="check that training had target_modules, and save the adapter again",
            )
        )
    problems.raise_any()


def _updates(
    folder: AdapterFolder, targets: Sequence[tuple[Pair, Extent]], orientation: Orientation
) -> dict[str, Update]:
    """By the base tensor's name."""
    return {
        target.spec.name: update_of(
            pair,
            folder.config.scale(pair.module),
            transposed=orientation.transposed(pair, target),
        )
        for pair, target in targets
        if pair.rank
    }


def _biases(
    folder: AdapterFolder,
    targets: Sequence[tuple[Pair, Extent]],
    base: Mapping[str, Extent],
    findings: Findings,
) -> dict[str, Update]:
    """What biases of lora_B add to those of the base; where it has none goes to `findings`."""
    found: dict[str, Update] = {}
    for pair, target in targets:
        if pair.bias is None:
            continue
        own = base.get(target.spec.name.removesuffix(".weight") + ".bias")
        if own is None or own.spec.shape != pair.bias.spec.shape or not own.spec.dtype.mergeable:
            findings.add(_NO_BIAS, f"{pair.module}: {list(pair.bias.spec.shape)}")
        else:
            found[own.spec.name] = Addition(folder.config.scale(pair.module), pair.bias)
    return found


# ----------------------------------------------------------------------------------------- notes


def _notes(
    folder: AdapterFolder,
    updates: Mapping[str, Update],
    base: Mapping[str, Extent],
    move: Move,
    training_state: int,
) -> Iterator[str]:
    named = folder.config.base_model_name_or_path
    if named and not _is_folder_of(base, named):
        yield f"its config names {show(named)} as the base; names and shapes fit this one"
    if move is not AS_THEY_ARE:
        yield f"its tensor names fit the base's {move.about}"
    if training_state:
        yield f"{training_state} tensors acted in training only and change no weight"
    silent = sum(isinstance(one, Factors) and one.scale == 0 for one in updates.values())
    if silent:
        yield f"alpha is 0 for {silent} of its {len(updates)} tensors: these stay unchanged"


def _empty(pairs: Sequence[Pair]) -> list[str]:
    """AdaLoRA may leave a module no rank at all."""
    count = sum(pair.rank == 0 for pair in pairs)
    return [f"{count} of its {len(pairs)} modules have rank 0 and change nothing"] if count else []


def _copies(count: int) -> list[str]:
    """PEFT saves the base's own weight beside an adapter on an embedding or a head."""
    return [f"{count} of its tensors are copies of the base's and change nothing"] if count else []


def _lost_biases(
    config: LoraConfig,
    saved: Mapping[str, object],
    tensors: Mapping[str, str],
    base: Mapping[str, Extent],
) -> Iterator[str]:
    """PEFT up to 0.20.0 trained biases under `lora_only` and saved none of them."""
    if config.bias != "lora_only" or any(name.endswith(".bias") for name in saved):
        return
    layers = {tensor.removesuffix(".weight") for tensor in tensors.values()}
    lost = sum(f"{layer}.bias" in base for layer in layers)
    if lost:
        yield (
            f"it was trained with bias: lora_only, but its file holds none of {lost} trained "
            "biases, as PEFT up to 0.20.0 saved it; those of the base are kept"
        )


def _is_folder_of(base: Mapping[str, Extent], named: str) -> bool:
    """Whether the base's folder carries the name, plainly or as the hub's cache writes it."""
    folder = Path(next(iter(base.values())).path).parent
    cached = f"models--{named.replace('/', '--')}"
    return Path(named).name == folder.name or cached in folder.parts
