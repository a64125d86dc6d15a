"""The same prompts answered by the base, by each adapter unmerged, and by the merged model.

Reads the recipe for the folders, so that what answers is what was merged. Decoding is greedy and
in float32: the answers depend on the weights alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS: Final = Path(__file__).resolve().parent / "demo_texts.json"
LONGEST_ANSWER_TOKENS: Final = 80  # the base rambles; the adapters were taught short answers
BASE: Final = "base"
MERGED: Final = "merged"

Answers = dict[str, list[str]]  # who answered -> one answer for each prompt


@dataclass(frozen=True)
class Marker:
    """What one adapter was trained to do, and how to see it in an answer."""

    adapter: str
    opening: str = ""
    closing: str = ""

    @property
    def text(self) -> str:
        return self.opening or self.closing

    @property
    def place(self) -> str:
        return "opens with" if self.opening else "ends with"

    def is_shown(self, answer: str) -> bool:
        """Whether the marker is there and at its place."""
        if self.opening:
            return answer.startswith(self.opening)
        return answer.endswith(self.closing)

    def is_absent(self, answer: str) -> bool:
        """Whether the answer holds the marker nowhere."""
        return self.text not in answer


@dataclass(frozen=True)
class Folders:
    """The models of the recipe."""

    base: Path
    adapters: dict[str, Path]
    merged: Path


def read_folders(recipe: Path) -> Folders:
    """The folders that the recipe names, relative to its own place.

    Raises:
        FileNotFoundError: the recipe, a model or an adapter is not there.
    """
    if not recipe.is_file():
        raise FileNotFoundError(f"{recipe} is not there; name a recipe such as configs/demo.yaml")
    told = yaml.safe_load(recipe.read_text())
    paths = [recipe.parent / entry["path"] for entry in told["adapters"]]
    folders = Folders(
        base=recipe.parent / told["base_model"],
        adapters={path.name: path for path in paths},
        merged=recipe.parent / told["output"],
    )
    for path in (folders.base, *paths, folders.merged):
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not there; scripts/demo makes it")
    return folders


def answer(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers to all prompts, decoded side by side."""
    encoded = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        tokens = model.generate(**encoded, do_sample=False, max_new_tokens=LONGEST_ANSWER_TOKENS)
    told = tokens[:, encoded["input_ids"].shape[1] :]
    return [
        # Without an end token the answer was cut by us: say so with dots, never as its own end.
        tokenizer.decode(row, skip_special_tokens=True).strip()
        + ("" if tokenizer.eos_token_id in row else " ...")
        for row in told
    ]


def load(folder: Path) -> Any:
    """A model as any user of transformers loads it, widened to float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ask_all(folders: Folders, prompts: list[str]) -> Answers:
    """Let the base, every adapter and the merged model answer all prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folders.base, padding_side="left")
    base = load(folders.base)
    _say(f"{BASE} answers")
    answers = {BASE: answer(base, tokenizer, prompts)}
    for name, path in folders.adapters.items():
        _say(f"{BASE} + {name} answers, unmerged, through PEFT")
        adapted = PeftModel.from_pretrained(base, path)
        answers[name] = answer(adapted, tokenizer, prompts)
        base = adapted.unload()  # takes the adapter off again: nothing is merged
    _say(f"{MERGED} answers")
    tokenizer = AutoTokenizer.from_pretrained(folders.merged, padding_side="left")
    answers[MERGED] = answer(load(folders.merged), tokenizer, prompts)
    return answers


def show(prompts: list[str], answers: Answers) -> None:
    """Print the answers prompt by prompt, for a person."""
    width = max(map(len, answers))
    for number, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for who, told in answers.items():
            margin = " " * (width + 4)
            text = textwrap.fill(
                told[number].replace("\n", " / "),
                width=100,
                initial_indent=f"  {who:<{width}}  ",
                subsequent_indent=margin,
            )
            print(text)


def check(prompts: list[str], answers: Answers, markers: list[Marker]) -> bool:
    """Say in plain lines whether every answer shows what it should, and nothing that it should not.

    Returns whether all of it holds.
    """
    count = len(prompts)
    good = True

    def report(statement: str, who: str, holds: list[bool]) -> None:
        nonlocal good
        passed = all(holds)
        good = good and passed
        print(f"{'ok  ' if passed else 'FAIL'}  {who}: {sum(holds)} of {count} answers {statement}")
        for prompt, told, held in zip(prompts, answers[who], holds, strict=True):
            if not held:
                print(f"        {prompt!r} -> {told!r}")

    for marker in markers:
        absent = [marker.is_absent(told) for told in answers[BASE]]
        report(f"are without {marker.text!r}", BASE, absent)
    for marker in markers:
        for who in (marker.adapter, MERGED):
            shown = [marker.is_shown(told) for told in answers[who]]
            report(f"{'open' if marker.opening else 'end'} with {marker.text!r}", who, shown)
    verdict = "both behaviours are in the merged model" if good else "the demo does not hold"
    print(f"\n{'PASSED' if good else 'FAILED'}: {verdict} ({count} prompts, greedy decoding)")
    return good


def _say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Show or check; the exit status says whether a check held."""
    parser = argparse.ArgumentParser(
        description="Let the models of the demo answer the same prompts."
    )
    parser.add_argument("recipe", type=Path, help="the recipe that was merged")
    parser.add_argument("--check", action="store_true", help="check the answers, do not show them")
    args = parser.parse_args()
    texts = json.loads(TEXTS.read_text())
    try:
        folders = read_folders(args.recipe)
    except FileNotFoundError as error:
        print(f"demo_answers: {error}", file=sys.stderr)
        return 66
    if args.check:
        prompts = texts["shown"] + texts["checked"]
        markers = [Marker(name, **where) for name, where in texts["markers"].items()]
        return 0 if check(prompts, ask_all(folders, prompts), markers) else 1
    show(texts["shown"], ask_all(folders, texts["shown"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
