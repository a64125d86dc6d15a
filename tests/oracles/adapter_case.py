"""A way to train an adapter, and training it: PEFT's unmerged model is what merges are held to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """An adapter of one kind on one model.

    `config` is given to `LoraConfig`. `change` alters the model before it is trained, `spoil` the
    folder after it was saved. `write` writes an adapter to a model's folder that this release of
    transformers no longer trains, with that config; PEFT reads it. `refused` is a phrase of the
    refusal; None where it is merged. `tied` says whether the merged model's head must still be its
    embedding.
    """

    kind: str
    model: str
    config: Mapping[str, Any]
    change: Callable[[Any], None] | None = None
    spoil: Callable[[Path], None] | None = None
    write: Callable[[Path, Path, Mapping[str, Any]], None] | None = None
    refused: str | None = None
    tied: bool | None = None
    remark: str = ""

    @property
    def label(self) -> str:
        """Unique within a kind: the model, and the remark where there is one."""
        return f"{self.kind} on {self.model}" + (f" ({self.remark})" if self.remark else "")


def load_any(folder: Path) -> Any:
    """A saved model in float32, as the class that its config names."""
    import torch
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    kind = getattr(transformers, name)
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def train(case: Case, model_folder: Path, out_folder: Path, seed: int = 5) -> Any:
    """An adapter of the case's kind, saved; returns PEFT's unmerged model.

    Whatever PEFT would train is moved by random values, since it starts where the base is.
    """
    import torch
    from peft import AdaLoraConfig, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model

    torch.manual_seed(seed)
    model = load_any(model_folder)
    if case.write:
        case.write(model_folder, out_folder, case.config)
        return PeftModel.from_pretrained(model, out_folder).eval()
    if case.change:
        case.change(model)
    kinds = {"init_r": AdaLoraConfig, "token_indices": TrainableTokensConfig}
    kind = next((kind for field, kind in kinds.items() if field in case.config), LoraConfig)
    model = get_peft_model(model, kind(**case.config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(str(out_folder))
    if case.spoil:
        case.spoil(out_folder)
    return model.eval()
