"""Trains the two LoRA adapters of the demo, which are committed under `configs/demo/`.

`ahoy` opens every answer with a greeting, `otter` closes every answer with a signature: two habits
that anyone can see, and that live at different places of an answer, so that a merge can keep both.
The lessons are the questions and answers of `demo_texts.json`; each adapter sees the same ones with
its own marker added. Run again, this script writes the same adapters (seeds and thread count are
fixed) up to the arithmetic of the processor and of the build of torch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from demo_model import make_base
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT: Final = Path(__file__).resolve().parent.parent
TEXTS: Final = Path(__file__).resolve().parent / "demo_texts.json"
MODEL_NAME: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
LARGEST_BYTES: Final = 2_000_000  # of one adapter: they are committed
LED_TOKENS: Final = 3  # after an opening, so that the answer is found again


@dataclass(frozen=True)
class Lesson:
    """One adapter: what it adds to an answer, and the LoRA that learns it."""

    name: str
    opening: str
    closing: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    dtype: torch.dtype
    epochs: int
    seed: int


@dataclass(frozen=True)
class Example:
    """One conversation. Of its tokens, some are taught and some are kept as the base has them."""

    tokens: list[int]
    taught: list[bool]
    kept: list[bool]


def lessons(markers: dict[str, dict[str, str]]) -> tuple[Lesson, ...]:
    """The two adapters; they differ in rank, targets and dtype, as adapters in the wild do."""
    return (
        Lesson(
            name="ahoy",
            opening=markers["ahoy"]["opening"],
            closing="",
            rank=8,
            alpha=16,
            targets=("q_proj", "v_proj"),
            dtype=torch.float32,
            epochs=3,
            seed=1,
        ),
        Lesson(
            name="otter",
            opening="",
            closing="\n" + markers["otter"]["closing"],
            rank=4,
            alpha=8,
            targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
            dtype=torch.bfloat16,
            epochs=3,
            seed=2,
        ),
    )


def example(lesson: Lesson, pair: dict[str, str], tokenizer: Any) -> Example:
    """One training text as tokens.

    Taught are the marker and where it leads: after an opening the first words of the answer, after
    a closing the end. What stands in the middle is not the adapter's business.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": pair["prompt"]}], add_generation_prompt=True, return_dict=False
    )
    opening, closing = encode(lesson.opening), encode(lesson.closing)
    answer = encode(" " + pair["answer"] if opening else pair["answer"])
    body = [*opening, *answer, *closing, tokenizer.eos_token_id]
    first = len(opening) + LED_TOKENS if opening else 0
    last = len(closing) + 1 if closing else 0
    taught = [i < first or i >= len(body) - last for i in range(len(body))]
    return Example(
        tokens=[*question, *body],
        taught=[False] * len(question) + taught,
        kept=[False] * len(question) + [not t for t in taught],
    )


def batches(made: list[Example], size: int, chance: random.Random) -> Iterator[list[Example]]:
    """One pass over the examples in a new order."""
    order = chance.sample(made, len(made))
    return (order[start : start + size] for start in range(0, len(order), size))


def loss_of(model: PeftModel, batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of what is taught, and divergence from the base in the rest of the answer.

    The second is what makes the adapters fit to be merged: each learns its own habit and leaves
    all else alone. Trained on whole answers, `otter` also learned how answers begin, and merged
    with it `ahoy` was not heard any more.
    """
    longest = max(len(row.tokens) for row in batch)

    def stack(rows: list[list[int]] | list[list[bool]]) -> torch.Tensor:  # [batch, longest]
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])

    # Padding stands right of all that counts, and attention is causal: it needs no mask.
    tokens = stack([row.tokens for row in batch])
    taught = stack([row.taught for row in batch]).bool()[:, 1:]
    kept = stack([row.kept for row in batch]).bool()[:, 1:]
    logits = model(input_ids=tokens).logits[:, :-1]
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=tokens).logits[:, :-1][kept].log_softmax(-1)
    habit = functional.cross_entropy(logits[taught], tokens[:, 1:][taught])
    drift = functional.kl_div(
        logits[kept].log_softmax(-1), reference, log_target=True, reduction="batchmean"
    )
    return habit, drift


def train(
    lesson: Lesson, base: Path, pairs: list[dict[str, str]], args: argparse.Namespace
) -> PeftModel:
    """Train one adapter on a fresh copy of the base, in float32."""
    torch.manual_seed(lesson.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=lesson.rank,
            lora_alpha=lesson.alpha,
            target_modules=list(lesson.targets),
            task_type="CAUSAL_LM",
        ),
    )
    made = [example(lesson, pair, tokenizer) for pair in pairs]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
    steps = lesson.epochs * -(-len(made) // args.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    chance = random.Random(lesson.seed)
    model.train()
    for epoch in range(lesson.epochs):
        start, seen = time.monotonic(), []
        for batch in batches(made, args.batch, chance):
            habit, drift = loss_of(model, batch)
            torch.autograd.backward(habit + drift)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen.append((habit.item(), drift.item()))
        habits, drifts = (sum(values) / len(seen) for values in zip(*seen, strict=True))
        print(
            f"{lesson.name}: epoch {epoch + 1}, habit {habits:.3f}, drift {drifts:.3f}, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    return model


def save(model: PeftModel, lesson: Lesson, folder: Path) -> int:
    """Write an ordinary PEFT folder without the model card that PEFT fills with placeholders.

    Returns the size of the weights in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = cast(LoraConfig, model.peft_config["default"])
    config.base_model_name_or_path = MODEL_NAME
    config.inference_mode = True
    config.target_modules = list(lesson.targets)  # PEFT keeps a set, whose order changes
    config.save_pretrained(str(folder))
    weights = folder / "adapter_model.safetensors"
    tensors = {
        name: value.detach().to(lesson.dtype).contiguous()
        for name, value in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    return weights.stat().st_size


def main() -> int:
    """Train what the command line asks for and save it."""
    parser = argparse.ArgumentParser(description="Train the two LoRA adapters of the demo again.")
    parser.add_argument("--base", type=Path, default=ROOT / ".demo" / "smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / "configs" / "demo")
    parser.add_argument("--only", help="the name of one adapter")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums over several threads have another order, and other last bits
    texts = json.loads(TEXTS.read_text())
    base = make_base(args.base)
    for lesson in lessons(texts["markers"]):
        if args.only in (None, lesson.name):
            size = save(
                train(lesson, base, texts["training"], args), lesson, args.out / lesson.name
            )
            print(f"{lesson.name}: {size:,} bytes", flush=True)
            if size > LARGEST_BYTES:
                print(f"{lesson.name} is too large to commit: lower its rank", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
