"""The kernels for torch tensors: the same names, arguments and formulas as for arrays.

Rounded operation by operation in the order of the formula, so what is per element has the bits of
the CPU's; products and sums have not. Two orders that torch could fuse are kept apart on purpose:
`a += w * b` is a product and then a sum. What goes back to statistics are arrays of the host.

Bytes of files come from buffers that the host reuses, so a copy is waited for; others go on on
streams of their own (see `device`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streammerge import noise
from streammerge.kernels.prune import ABOVE_ALL, KEEP_ALL_EQUAL, Cut
from streammerge.kernels.vote import Divisor, Vote
from streammerge.words import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streammerge.arrays import InnerProducts, PerModel, RawBytes
    from streammerge.noise import Draws

    Exact = NDArray[np.float64]

_TYPES = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
}
_MAGNITUDE = ABOVE_ALL - 1  # the bits of a key


def _rounded(value: float) -> float:
    """The float32 next to a number."""
    return float(np.float32(value))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


# ----------------------------------------------------------------------------------------- casts


def widen(stored: RawBytes, dtype: DType, out: Tensor) -> None:
    own = stored if stored.flags.writeable else stored.copy()  # mapped: torch takes no such memory
    elements = torch.from_numpy(own).to(out.device, non_blocking=True).view(_TYPES[dtype])
    out.copy_(elements.view(out.shape))
    _wait(out.device)


def narrow(rows: Tensor, dtype: DType, out: RawBytes) -> int:
    """Overflow gives infinity, as it does on the CPU; those are counted with the rest."""
    stored = rows.reshape(-1).to(_TYPES[dtype])
    bad = torch.count_nonzero(~torch.isfinite(stored))
    torch.from_numpy(out).copy_(stored.view(torch.uint8), non_blocking=True)
    _wait(rows.device)
    return int(bad)


def not_finite(rows: Tensor) -> int:
    return int(torch.count_nonzero(~torch.isfinite(rows)))


# ------------------------------------------------------------------------------------------ sums


def add(rows: Tensor, others: Tensor, out: Tensor) -> None:
    torch.add(rows, others, out=out)


def subtract(rows: Tensor, others: Tensor, out: Tensor) -> None:
    torch.sub(rows, others, out=out)


def copy(rows: Tensor, out: Tensor) -> None:
    out.copy_(rows)


def fill(out: Tensor, value: float) -> None:
    out.fill_(value)


def multiply_by(rows: Tensor, factors: Exact) -> None:
    rows.mul_(_on(rows, factors.astype(np.float32)))


def add_scaled(out: Tensor, factor: float, rows: Tensor) -> None:
    out.add_(rows * _rounded(factor))


def take_up_to(delta: Tensor, most: float, least: float) -> Tensor:
    share = delta.abs().clamp_(min=_rounded(least))
    share = torch.full_like(share, _rounded(most)).div_(share).clamp_(0, 1)
    return delta.mul_(share)


def sum_of_squares(rows: Tensor) -> float:
    return float(rows.double().square_().sum())


def sum_of_squared_differences(rows: Tensor, base: Tensor) -> float:
    return float(rows.double().sub_(base).square_().sum())


def sum_of_magnitudes(rows: Tensor) -> float:
    return float(rows.double().abs_().sum())


# -------------------------------------------------------------------------------------- products


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out=out)


def thinned(matrix: Tensor, step: int) -> Tensor:
    return matrix[:, ::step].contiguous()


def gram(rows: Tensor | Sequence[Tensor]) -> InnerProducts:
    total = np.zeros((len(rows), len(rows)))
    for start in range(0, len(rows[0]), 1 << 20):
        block = torch.stack([row[start : start + (1 << 20)].double() for row in rows])
        total += (block @ block.T).cpu().numpy()
    return total


def products_along(rows: Tensor, others: Tensor, axis: int) -> PerModel:
    return _home((rows.double() * others).sum(dim=axis))


def squared_norms(left: Tensor, right_grams: list[Exact], scales: list[float]) -> PerModel:
    norms, start = [], 0
    for right_gram, scale in zip(right_grams, scales, strict=True):
        band = left[:, start : start + len(right_gram)]
        left_gram = _home((band.T @ band).double())
        with np.errstate(invalid="ignore", over="ignore"):  # said when the tile is written
            norms.append(scale * scale * float(np.sum(left_gram * right_gram)))
        start += len(right_gram)
    return np.array(norms, np.float64)


# ---------------------------------------------------------------------------------------- norms


def squares_of_columns(rows: Tensor) -> Exact:
    return _home(rows.double().square_().sum(dim=0))


def norms_of_rows(rows: Tensor, added: Tensor) -> Exact:
    return _home((rows + added).double().square_().sum(dim=1).sqrt_())


def rescale_rows(rows: Tensor, change: Tensor, factors: Exact) -> None:
    _rescale(rows, change, _on(rows, factors)[:, None])


def rescale_columns(rows: Tensor, change: Tensor, factors: Exact) -> None:
    _rescale(rows, change, _on(rows, factors)[None, :])


def _rescale(rows: Tensor, change: Tensor, factors: Tensor) -> None:
    grown = rows.double() * (factors - 1.0)
    change.copy_(grown + change.double() * factors)


# --------------------------------------------------------------------------------------- pruning


def keys(rows: Tensor, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
    found: NDArray[np.uint32] = _home(_keys(rows)).view(np.uint32)
    if out is not None:
        np.copyto(out, found)
    return found if out is None else out


def _keys(rows: Tensor) -> Tensor:
    """int32, which orders non-negative floats."""
    return rows.view(torch.int32) & _MAGNITUDE


def count_and_collect(
    rows: Tensor, low: int, high: int, scratch: object
) -> tuple[int, NDArray[np.uint32]]:
    found = _keys(rows.reshape(-1))
    inside = found >= low
    above = 0
    if high < ABOVE_ALL:  # else nothing is, and it would not fit into an int32
        above = int(torch.count_nonzero(found >= high))
        inside &= found < high
    return above, _home(found[inside]).view(np.uint32)


def count_nonzero(rows: Tensor) -> int:
    return int(torch.count_nonzero(rows))


def trim(deltas: Tensor, cut: Cut) -> Tensor:
    for delta, threshold, quota in zip(deltas, cut.thresholds, cut.quotas, strict=True):
        if threshold == 0:
            continue
        flat = delta.view(-1)
        flat.masked_fill_(~_largest(_keys(flat), threshold, quota), 0)
    return deltas


def drop_largest(deltas: Tensor, cut: Cut) -> Tensor:
    for delta, threshold, quota in zip(deltas, cut.thresholds, cut.quotas, strict=True):
        if threshold < ABOVE_ALL:
            flat = delta.view(-1)
            flat.masked_fill_(_largest(_keys(flat), threshold, quota), 0)
    return deltas


def _largest(found: Tensor, threshold: int, quota: int) -> Tensor:
    """Which keys are above the threshold, or among the first `quota` of those at it."""
    if threshold >= ABOVE_ALL:  # which no key is, and no int32
        return torch.zeros_like(found, dtype=torch.bool)
    equal = found == threshold
    if quota < KEEP_ALL_EQUAL:
        equal &= equal.cumsum(0) <= quota
    return equal | (found > threshold)


# -------------------------------------------------------------------------------------- dropping


def drop(deltas: Tensor, share: PerModel, random: Draws) -> Tensor:
    for delta, kept, key in zip(deltas, share.tolist(), random.keys, strict=True):
        if kept < 1:
            flat = delta.view(-1)
            bits = _drawn(key, random.first, flat.numel(), flat.device)
            flat.masked_fill_(bits >= noise.limit_of(kept), 0)
    return deltas


def drop_by_rank(
    deltas: Tensor, share: PerModel, spread: PerModel, random: Draws, *, divide: bool
) -> Tensor:
    rows, cols = deltas.shape[1:]
    for delta, kept, around, key in zip(
        deltas, share.tolist(), spread.tolist(), random.keys, strict=True
    ):
        if kept >= 1:
            continue
        order = torch.sort(_keys(delta), dim=1, stable=True).indices  # [rows, cols], by rank
        low, high = kept - around, kept + around
        ranks = torch.arange(cols, device=delta.device, dtype=torch.float64)
        by_rank = (
            (high - low) * ranks / (cols - 1) + low if cols > 1 else 0.5 * (low + high) + ranks
        )
        shares = torch.empty((rows, cols), dtype=torch.float64, device=delta.device)
        shares.scatter_(1, order, by_rank.expand(rows, cols))
        bits = _drawn(key, random.first, delta.numel(), delta.device).view(rows, cols)
        dropped = bits.double() * 2.0**-noise.BITS >= shares
        if divide:
            delta.copy_(delta.double() / shares)
        delta.masked_fill_(dropped, 0)
    return deltas


def _drawn(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """The random bits of elements `[count]`; see `noise.uniform`. int64 wraps as uint64 does."""
    index = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    z = index * _signed(noise.GOLDEN) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(noise.FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(noise.SECOND)
    return _shifted(z ^ _shifted(z, 31), 64 - noise.BITS)


def _signed(bits: int) -> int:
    """64 bits as the int64 that they are."""
    return bits - (1 << 64) if bits >> 63 else bits


def _shifted(z: Tensor, by: int) -> Tensor:
    """Right by so many bits, zeros from the left."""
    return (z >> by) & ((1 << (64 - by)) - 1)


# ---------------------------------------------------------------------------- all models at once


def elect(
    deltas: Tensor,
    weight: PerModel,
    *,
    vote: Vote = "weighted",
    divide: Divisor = "weights",
    scale: float = 1.0,
    least_divisor: float = 0.0,
) -> Tensor:
    weights = np.asarray(weight, np.float64).tolist()
    votes = torch.zeros_like(deltas[0])
    for delta, w in zip(deltas, weights, strict=True):
        votes.add_(_vote(delta, w, vote))
    plus = votes >= 0
    total = votes - votes  # nothing; NaN where a delta is not finite, to be found
    divisor = torch.zeros_like(total, dtype=torch.float64)
    for delta, w in zip(deltas, weights, strict=True):
        weighted = delta * _rounded(w)
        side = delta if vote == "unweighted" else weighted
        agrees = torch.where(plus, side > 0, side < 0)
        total.add_(weighted.masked_fill_(~agrees, 0))
        if divide != "none":
            divisor.add_(agrees.double().mul_(1.0 if divide == "count" else w))
    if divide != "none":
        least = divisor.clamp_(min=least_divisor) if least_divisor > 0 else divisor
        small = (least.abs() < 1e-8) & (least_divisor <= 0)
        total.div_(least.masked_fill_(small, 1.0).float())
    merged: Tensor = deltas[0].copy_(total.mul_(_rounded(scale)))
    return merged


def _vote(delta: Tensor, weight: float, vote: Vote) -> Tensor:
    if vote == "unweighted":
        return delta
    weighted = delta * _rounded(weight)
    return weighted if vote == "weighted" else weighted.sign_()


def variance(deltas: Tensor, models: int) -> Tensor:
    exact = deltas.double()
    mean = exact.sum(dim=0).div_(models)
    total = mean.square() * (models - len(deltas))
    for delta in exact:
        total.add_((delta - mean).square_())
    return total.div_(models).float()


def zero_where_zero(deltas: Tensor, marks: Tensor) -> Tensor:
    return deltas.masked_fill_(marks == 0, 0)


def zero_below(delta: Tensor, marks: Tensor, least: float) -> Tensor:
    return delta.masked_fill_(marks.double() < least, 0)


def count_contributions(deltas: Tensor, epsilon: float) -> Exact:
    there = deltas.abs() > _rounded(epsilon)
    shared = there.sum(dim=0) > 1
    counts = [(there & shared).sum(dim=(1, 2)), (there & ~shared).sum(dim=(1, 2))]
    return _home(torch.stack(counts).double())


def merge_contributions(deltas: Tensor, epsilon: float, alone: PerModel) -> Tensor:
    there = deltas.abs() > _rounded(epsilon)
    count = there.sum(dim=0)
    total = torch.zeros_like(deltas[0])
    factor = torch.ones_like(total)
    for delta, here, one in zip(deltas, there, alone.tolist(), strict=True):
        total.add_(delta.masked_fill(~here, 0))
        factor.masked_fill_(here, _rounded(one))
    merged = torch.where(count > 1, total / count.clamp(min=1), total * factor)
    return deltas[0].copy_(merged)


def importance(delta: Tensor, base: Tensor) -> Tensor:
    shares = [torch.softmax(rows.double(), dim=1) + 1e-8 for rows in (base + delta, base)]
    of_model, of_base = shares
    apart = (of_model * (of_model / of_base).log_()).sum(dim=1, keepdim=True).clamp_(min=0)
    return (delta.double().abs_() * apart).float()


def _on(rows: Tensor, array: NDArray[Any]) -> Tensor:
    """An array of the host beside some rows."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(rows.device)


def _home(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array of the host, once it is computed."""
    found: NDArray[Any] = tensor.cpu().numpy()
    return found
