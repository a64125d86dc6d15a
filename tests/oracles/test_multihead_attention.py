"""Why LoRA on torch's MultiheadAttention is refused: its file does not say what it means.

PEFT 0.21.2 adds the update of `out_proj` twice, whether it merges or not, so a model was trained
with twice of it (huggingface/peft#3774). A release that adds it once will fail here; then the
version in the adapter's config decides, and adapters of one kind can be merged.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


class Attending(nn.Module):
    """Attention from a tensor to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.attention(rows, rows, rows)[0]
        return out


def test_peft_adds_the_update_of_out_proj_twice() -> None:
    torch.manual_seed(3)
    plain, rows = Attending(), torch.randn(2, 5, 8)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    config = LoraConfig(target_modules=["attention"], r=2, lora_alpha=2)  # a scale of 1
    adapted = get_peft_model(plain, config).eval()
    factors = {name: one for name, one in adapted.named_parameters() if "lora_" in name}
    for parameter in factors.values():
        parameter.data = torch.randn_like(parameter)
    update, inputs = (
        next(one for name, one in factors.items() if name.endswith(f"{part}.lora_B.default.weight"))
        @ next(
            one for name, one in factors.items() if name.endswith(f"{part}.lora_A.default.weight")
        )
        for part in ("out_proj", "attention")
    )
    with torch.inference_mode():
        theirs = adapted(rows)
        distances = {
            times: float((meant(before, inputs, times * update)(rows) - theirs).abs().max())
            for times in (0, 1, 2)
        }
    assert distances[2] < 1e-5 < 1e-2 < min(distances[0], distances[1])


def meant(weights: dict[str, Tensor], inputs: Tensor, update: Tensor) -> Attending:
    """The model with updates of both projections added."""
    model = Attending().eval()
    both = {"attention.in_proj_weight": inputs, "attention.out_proj.weight": update}
    model.load_state_dict({name: one + both.get(name, 0) for name, one in weights.items()})
    return model
