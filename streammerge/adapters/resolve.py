"""From an adapter's folder to the updates of a base's tensors: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.adapters.faults import Fault, Findings
from streammerge.adapters.folder import AdapterFolder
from streammerge.adapters.keys import sort_tensors
from streammerge.adapters.lora import Orientation, fits, update_of
from streammerge.adapters.names import AS_THEY_ARE, Move, find_tensors
from streammerge.adapters.pairs import Pair
from streammerge.errors import BadInput, Problems
from streammerge.storage.smallfile import show
from streammerge.words import Addition, Extent, Factors, Update

HEAD: Final = "lm_head"

_TIED_HEAD: Final = Fault(
    "LoRA on a head that shares its weight with the embedding, which cannot be merged yet",
    "layers with a weight of their own: adding to the shared one would change the embedding too",
    "untie the base first (tie_word_embeddings: false, with lm_head.weight stored), or train "
    "without the head",
)
_TIED_EMBEDDING: Final = Fault(
    "LoRA on an embedding that shares its weight with the head, which cannot be merged yet",
    "layers with a weight of their own: adding to the shared one would change the head too",
    "untie the base first (tie_word_embeddings: false, with lm_head.weight stored), or train "
    "without the embedding",
)
_NO_BIAS: Final = Fault(
    "biases of lora_B on layers of the base that have none",
    "a bias of the layer to add it to, of one number for each output feature",
    "train without lora_bias: no merged weight can hold such a bias; PEFT cannot merge it either",
)


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter and the update that it makes to each tensor of a base it touches."""

    folder: AdapterFolder
    updates: Mapping[str, Update]  # by the base tensor's name, in the base's order
    notes: tuple[str, ...]  # the folder's, and what finding the tensors adds


def resolve_adapter(
    folder: AdapterFolder, base: Mapping[str, Extent], base_config: Mapping[str, Any]
) -> ResolvedAdapter:
    """Find the base tensor of every tensor of an adapter, and check that each fits.

    `base` is the base's tensors in file order, `base_config` its config.json. Raises BadInput, or
    Refused with every kind of problem, unless all tensors of the adapter can be applied.
    """
    findings = Findings(folder.header.path)
    contents = sort_tensors(folder.header.tensors, findings)
    pairs = list(_own_weights(contents.pairs, base, base_config, findings))
    names = [f"{pair.module}.weight" for pair in pairs]
    named_base = folder.config.base_model_name_or_path
    tensors, move = find_tensors(names, base, findings, named_base)
    named = zip(pairs, names, strict=True)
    targets = [(pair, base[tensors[name]]) for pair, name in named if name in tensors]
    sound = [one for one in targets if fits(*one, folder.config, findings)]
    updates = _updates(folder, sound, Orientation(sound, base_config, folder.config))
    updates |= _biases(folder, sound, base, findings)
    _raise_any(findings, folder, bool(pairs))
    notes = [*folder.notes, *_notes(folder, updates, base, move, contents.training_state)]
    notes += _empty(pairs)
    in_order = {name: updates[name] for name in base if name in updates}
    return ResolvedAdapter(folder, in_order, tuple(notes))


def _own_weights(
    pairs: Sequence[Pair],
    base: Mapping[str, Extent],
    base_config: Mapping[str, Any],
    findings: Findings,
) -> Iterator[Pair]:
    """The pairs without those on a shared weight, which go to `findings`."""
    heads = [pair for pair in pairs if pair.module.rpartition(".")[2] == HEAD]
    embeddings = [pair for pair in pairs if pair.embedding]
    tied = bool(heads or embeddings) and _head_is_tied(base, base_config)
    for pair in pairs:
        if tied and pair in heads:
            findings.add(_TIED_HEAD, pair.module)
        elif tied and pair in embeddings:
            findings.add(_TIED_EMBEDDING, pair.module)
        else:
            yield pair


def _head_is_tied(base: Mapping[str, Extent], config: Mapping[str, Any]) -> bool:
    """Whether the base's head is its embedding; where the config is silent, the file decides."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    said = {config.get("tie_word_embeddings"), nested}
    stored = any(name.endswith(f"{HEAD}.weight") for name in base)
    return True in said or (False not in said and not stored)


def _raise_any(findings: Findings, folder: AdapterFolder, any_pairs: bool) -> None:
    problems = Problems()
    findings.report(problems)
    if not any_pairs and not problems:
        problems.add(
            BadInput(
                "the adapter holds no LoRA tensors",
                where=folder.header.path,
                found=f"{len(folder.header.tensors)} tensors",
                expected="<module>.lora_A.weight and <module>.lora_B.weight",
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


def _is_folder_of(base: Mapping[str, Extent], named: str) -> bool:
    """Whether the base's folder carries the name, plainly or as the hub's cache writes it."""
    folder = Path(next(iter(base.values())).path).parent
    cached = f"models--{named.replace('/', '--')}"
    return Path(named).name == folder.name or cached in folder.parts
