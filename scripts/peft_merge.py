"""A merge of LoRA adapters as PEFT's documentation does it: load, combine, fold in, save.

python scripts/peft_merge.py BASE OUT METHOD ADAPTER...

METHOD is `linear`, `ties` or `dare_ties` with density 0.5, of PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

DENSITY = 0.5


def merge(base: str, out: str, method: str, adapters: Sequence[str]) -> None:
    """Write the merged model to the folder `out`."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    names = [f"adapter-{number}" for number in range(len(adapters))]
    model: Any = PeftModel.from_pretrained(loaded, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    density = {} if method == "linear" else {"density": DENSITY}
    weights = [1 / len(names) if method == "linear" else 1.0] * len(names)
    model.add_weighted_adapter(names, weights, "merged", combination_type=method, **density)
    model.set_adapter("merged")
    model.merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    _, base, out, method, *adapters = sys.argv
    merge(base, out, method, adapters)
