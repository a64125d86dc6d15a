"""Inputs for benchmarks and memory measurements: models of real shapes, random values, no torch.

python scripts/bench_inputs.py llama FOLDER          2.5 GB, bfloat16, two shards
python scripts/bench_inputs.py adapters FOLDER N     N rank-16 LoRA adapters on all projections
python scripts/bench_inputs.py finetunes FOLDER N    N full fine-tunes of FOLDER/base
python scripts/bench_inputs.py embedding FOLDER      one 128256 x 8192 embedding, and a fine-tune
python scripts/bench_inputs.py embedding-loras FOLDER N   N LoRAs of rank 256 on that embedding
python scripts/bench_inputs.py sparse70b FOLDER      headers of a 70B model over sparse files
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
_ITEMSIZE = {"F32": 4, "BF16": 2}
_CHUNK = 1 << 22

# (hidden, intermediate, layers, key-value width, vocabulary)
LLAMA_1B = (2048, 8192, 16, 512, 128256)
LLAMA_70B = (8192, 28672, 80, 1024, 128256)

EMBEDDING = (128256, 8192)

Config = tuple[int, int, int, int, int]
Fill = Callable[[str, int], Iterable[NDArray[np.generic]]]  # name, elements -> chunks of them


def projections(config: Config) -> dict[str, tuple[int, int]]:
    """Projection -> (out, in)."""
    hidden, middle, _, key_value, _ = config
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }


def llama_tensors(config: Config, *, head: bool) -> dict[str, Shape]:
    """Names and shapes of a Llama model in the order in which transformers saves them."""
    hidden, _, layers, _, vocabulary = config
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in projections(config).items()}
    shapes["model.norm.weight"] = (hidden,)
    if head:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def llama_config(config: Config, *, tied: bool) -> dict[str, object]:
    hidden, middle, layers, key_value, vocabulary = config
    heads = hidden // 64
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value // 64,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def write_safetensors(
    path: Path, shapes: Mapping[str, Shape], dtype: str, fill: Fill | None
) -> None:
    """One file; without `fill`, a sparse one of the right size."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * _ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if fill is None:
            file.truncate(8 + len(text) + end)
            return
        for name, shape in shapes.items():
            for chunk in fill(name, int(np.prod(shape))):
                file.write(chunk.tobytes())


def write_folder(
    folder: Path,
    shapes: Mapping[str, Shape],
    shards: int,
    config: Mapping[str, object],
    fill: Fill | None,
) -> None:
    """A model folder in bfloat16, its tensors spread evenly over the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    groups: list[dict[str, Shape]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        groups[min(shards - 1, done * shards // total)][name] = shape
        done += int(np.prod(shape))
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        write_safetensors(folder / name, group, "BF16", fill)
        weight_map |= dict.fromkeys(group, name)
    if shards > 1:
        index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Noise:
    """Gaussian values cut from one pool at random places: fast, and no two tensors alike."""

    def __init__(self, seed: int, scale: float) -> None:
        self._random = np.random.default_rng(seed)
        self._pool = (self._random.standard_normal(3 * _CHUNK) * scale).astype(np.float32)

    def chunks(self, count: int) -> Iterable[NDArray[np.float32]]:
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            place = int(self._random.integers(0, 2 * _CHUNK))
            yield self._pool[place : place + size]


def make_llama(folder: Path, config: Config = LLAMA_1B, shards: int = 2) -> None:
    noise = Noise(0, 0.02)
    shapes = llama_tensors(config, head=False)

    def fill(name: str, count: int) -> Iterable[NDArray[np.generic]]:
        return (to_bfloat16(chunk) for chunk in noise.chunks(count))

    write_folder(folder, shapes, shards, llama_config(config, tied=True), fill)


def make_finetune(base: Path, folder: Path, seed: int, *, change: float = 1e-3) -> None:
    """The base plus small noise, rounded to bfloat16, as a full fine-tune would be."""
    noise = Noise(seed, change)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(base.iterdir()):
        data = file.read_bytes() if file.suffix == ".json" else None
        if data is not None:
            (folder / file.name).write_bytes(data)
            continue
        with open(file, "rb") as source, open(folder / file.name, "wb") as target:
            start = 8 + int.from_bytes(source.read(8), "little")
            source.seek(0)
            target.write(source.read(start))
            while raw := source.read(2 * _CHUNK):
                values = from_bfloat16(np.frombuffer(raw, np.uint16))
                (added,) = noise.chunks(len(values))
                target.write(to_bfloat16(values + added).tobytes())


def make_adapter(
    folder: Path,
    config: Config = LLAMA_1B,
    *,
    rank: int = 16,
    seed: int = 0,
    sparse: bool = False,
    targets: Sequence[str] = (),
    dora: bool = False,
) -> None:
    """A PEFT LoRA folder in float32 on all seven projections, or on some of them.

    With `dora`, lengths of their rows stand beside the factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {
        n: s for n, s in projections(config).items() if not targets or n.split(".")[-1] in targets
    }
    shapes: dict[str, Shape] = {}
    for layer in range(config[2]):
        for name, (rows, cols) in chosen.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{prefix}.lora_A.weight"] = (rank, cols)
            shapes[f"{prefix}.lora_B.weight"] = (rows, rank)
            if dora:
                shapes[f"{prefix}.lora_magnitude_vector"] = (rows,)
    noise = Noise(100 + seed, 0.01)

    def fill(name: str, count: int) -> Iterable[NDArray[np.generic]]:
        lift = np.float32(name.endswith("magnitude_vector"))  # about the length of a row
        return (chunk + lift for chunk in noise.chunks(count))

    write_safetensors(folder / "adapter_model.safetensors", shapes, "F32", None if sparse else fill)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "use_dora": dora,
        "bias": "none",
        "target_modules": sorted(name.split(".")[-1] for name in chosen),
    }
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2))


def make_embedding(folder: Path, shape: tuple[int, int] = EMBEDDING, *, tuned: bool = True) -> None:
    """A model of one embedding and a norm, and a fine-tune of it: 2.1 GB each at full size."""
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": shape,
        "model.norm.weight": shape[1:],
    }
    noise = Noise(7, 0.02)

    def fill(name: str, count: int) -> Iterable[NDArray[np.generic]]:
        return (to_bfloat16(chunk) for chunk in noise.chunks(count))

    config = {"model_type": "llama", "tie_word_embeddings": False}
    write_folder(folder / "base", shapes, 1, config, fill)
    if tuned:
        make_finetune(folder / "base", folder / "tuned", 8)


def make_embedding_adapter(
    folder: Path,
    shape: tuple[int, int] = EMBEDDING,
    *,
    rank: int,
    seed: int = 0,
    dora: bool = False,
) -> None:
    """A PEFT LoRA folder in float32 on the embedding alone; with `dora`, lengths of its columns."""
    vocabulary, hidden = shape
    prefix = "base_model.model.model.embed_tokens.lora"
    shapes: dict[str, Shape] = {
        f"{prefix}_embedding_A": (rank, vocabulary),
        f"{prefix}_embedding_B": (hidden, rank),
    }
    if dora:
        shapes[f"{prefix}_magnitude_vector"] = (1, hidden)
    noise = Noise(100 + seed, 0.01)
    length = 0.02 * vocabulary**0.5  # of a column of the base

    def fill(name: str, count: int) -> Iterable[NDArray[np.generic]]:
        lift = length if "magnitude" in name else 0
        return (chunk + np.float32(lift) for chunk in noise.chunks(count))

    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", shapes, "F32", fill)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def make_sparse_70b(folder: Path) -> None:
    """723 tensors in 30 shards and three adapters: the right headers, no data."""
    shapes = llama_tensors(LLAMA_70B, head=True)
    write_folder(folder / "base", shapes, 30, llama_config(LLAMA_70B, tied=False), None)
    for i in range(3):
        make_adapter(folder / f"lora-{i}", LLAMA_70B, seed=i, sparse=True)


def main(arguments: Sequence[str]) -> None:
    kind, folder, *rest = arguments
    root = Path(folder)
    count = int(rest[0]) if rest else 3
    if kind == "llama":
        make_llama(root / "base")
    elif kind == "adapters":
        for i in range(count):
            make_adapter(root / f"lora-{i}", seed=i)
    elif kind == "finetunes":
        for i in range(count):
            make_finetune(root / "base", root / f"tuned-{i}", 20 + i)
    elif kind == "embedding":
        make_embedding(root)
    elif kind == "embedding-loras":
        for i in range(count):
            make_embedding_adapter(root / f"lora-{i}", rank=256, seed=i)
    elif kind == "sparse70b":
        make_sparse_70b(root)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
