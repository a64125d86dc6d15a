"""How well merges keep both habits of the demo's adapters, on the real model they were trained on.

One adapter opens every answer with a greeting, the other closes every answer with a signature. Each
method merges the two, and the merged model answers prompts that neither was trained on. Counted is
who does what; and since counts are few, the loss is measured, too: of the greeting after a prompt,
and of the signature after the first sentence of the base's own answer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from demo_answers import TEXTS, Marker, answer, load
from demo_model import make_base
from peft import PeftModel
from quality import MEMORY, PER_MODEL, label, methods, ranked
from transformers import AutoTokenizer

import streammerge as sm

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".demo" / "smollm2-135m"
ADAPTERS = ROOT / "configs" / "demo"
RANK = 4  # of a merge as one adapter; the two have 8 and 4


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    space: str
    opens: int  # of the answers
    closes: int
    both: int
    greeting: float  # nats of a token
    signature: float

    def cells(self) -> list[str]:
        counts = [str(count) for count in (self.opens, self.closes, self.both)]
        return [self.name, self.space, *counts, f"{self.greeting:.2f}", f"{self.signature:.2f}"]


TITLES = ["method", "space", "opens", "closes", "both", "loss of greeting", "loss of signature"]


class Examiner:
    """Asks models, and measures the loss of both markers on the base's own answers."""

    def __init__(self) -> None:
        texts = json.loads(TEXTS.read_text())
        self.prompts: list[str] = texts["shown"] + texts["checked"]
        places = texts["markers"]
        self._markers = [Marker(name, **places[name]) for name in ("ahoy", "otter")]
        self._tokenizer: Any = AutoTokenizer.from_pretrained(BASE, padding_side="left")
        own = answer(load(BASE), self._tokenizer, self.prompts)
        self._sentences = [told.split(". ")[0].rstrip(".") + "." for told in own]

    def row(self, name: str, space: str, model: Any) -> Row:
        model.eval()
        told = answer(model, self._tokenizer, self.prompts)
        opens, closes = ([mark.is_shown(one) for one in told] for mark in self._markers)
        opening, closing = (mark.text for mark in self._markers)
        greeting = [self._loss(model, prompt, "", opening) for prompt in self.prompts]
        signature = [
            self._loss(model, prompt, sentence, "\n" + closing)
            for prompt, sentence in zip(self.prompts, self._sentences, strict=True)
        ]
        both = sum(map(all, zip(opens, closes, strict=True)))
        losses = (sum(each) / len(each) for each in (greeting, signature))
        return Row(name, space, sum(opens), sum(closes), both, *losses)

    def _loss(self, model: Any, prompt: str, before: str, text: str) -> float:
        """Of a text after a prompt and the beginning of an answer, in nats of a token."""
        chat = [{"role": "user", "content": prompt}]
        asked = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        begun = self._tokenizer.encode(before, add_special_tokens=False)
        wanted = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = torch.tensor([[*asked, *begun, *wanted]])
        with torch.inference_mode():
            logits = model(input_ids=tokens).logits[0, -len(wanted) - 1 : -1]
        found: float = torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)).item()
        return found


def rows() -> Iterator[Row]:
    """Of the base, of each adapter by itself, and of every merge of the two."""
    torch.set_num_threads(1)  # the same numbers on any number of cores
    make_base(BASE)
    examiner = Examiner()
    yield examiner.row("base", "", load(BASE))
    for name in ("ahoy", "otter"):
        adapted = PeftModel.from_pretrained(load(BASE), ADAPTERS / name)
        yield examiner.row(f"adapter {name}", "", adapted)
    for name, keys in (*methods(2), *ranked(RANK)):
        with tempfile.TemporaryDirectory() as folder:
            model = merged(Path(folder), name, keys)
            yield examiner.row(label(name, keys), keys.get("space", "core"), model)


def merged(folder: Path, name: str, keys: Mapping[str, Any]) -> Any:
    """The merged model in memory; an adapter beside its base."""
    own = PER_MODEL.get(name, {})
    recipe = {
        "base_model": str(BASE),
        "merge_method": name,
        "adapters": [{"path": str(ADAPTERS / one), **own} for one in ("ahoy", "otter")],
        **keys,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    sm.merge(path, out=folder / "out", memory=MEMORY, threads=1)
    if "output" in keys:
        return PeftModel.from_pretrained(load(BASE), folder / "out")
    return load(folder / "out")


def table() -> Sequence[list[str]]:
    """The cells of all rows, each said when it is there."""
    found = [TITLES]
    for row in rows():
        found.append(row.cells())
        print("  ".join(found[-1]), file=sys.stderr, flush=True)
    return found
