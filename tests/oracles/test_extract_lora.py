"""extract-lora and merges of full rank as adapters: what PEFT makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from peft_models import Shelf, load, make_gpt2, make_llama
from test_adapter_output import beside, distance, llama, merge, updates
from test_logits import CONV1D, MEMORY, TIGHT, logits

import streammerge as sm
from streammerge import events
from streammerge.commands.extract import recipe_of
from streammerge.commands.recompute import recompute
from streammerge.commands.verify import verify
from streammerge.errors import BadInput, ConfigError
from streammerge.recipe import to_yaml
from streammerge.sinks.receipts import Receipt
from streammerge.sinks.shards import ShardsSink
from streammerge.storage.record import read_record
from tests.oracles import low_rank as oracle
from tests.oracles.dense import Exact
from tests.running import digest, run

RANK = 3


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("extracted"))


def tuned(folder: Path, base: Path, *, norms: bool, noise: float) -> Path:
    """The base with a change of rank 3 to every linear layer, and noise."""
    import torch

    model = load(base)
    draw = torch.Generator().manual_seed(9)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * norms * torch.randn(weight.shape, generator=draw)
        elif "proj" in name:
            left = torch.randn(weight.shape[0], RANK, generator=draw)
            right = torch.randn(RANK, weight.shape[1], generator=draw)
            weight.data += 0.05 * left @ right
            weight.data += noise * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(folder)
    return folder


def test_a_change_of_low_rank_is_found_again(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=True, noise=0)
    recipe = recipe_of(str(other), base=str(base), rank=RANK, norms=True, embeddings=True)
    report = sm.merge(recipe, out=tmp_path / "out", memory=MEMORY)
    assert max(one.relative for one in report.missed.values()) < 1e-5
    assert distance(beside(base, tmp_path / "out"), logits(load(other))) < 10 * TIGHT
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {"lm_head", "model.norm", "model.embed_tokens"} < set(config["modules_to_save"])


def test_the_error_is_nearly_the_least_of_that_rank_and_is_reported(
    shelf: Shelf, tmp_path: Path
) -> None:
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=False, noise=0.02)
    command = ["extract-lora", other, "--base", base, "--rank", 5, "--out", tmp_path / "out"]
    done = run(*command, "--json")
    assert done.returncode == 0, done.stderr
    assert "left out of the adapter" in done.stderr
    record = read_record(tmp_path / "out")
    before, after = load(base).state_dict(), load(other).state_dict()
    assert len(record.approximations) == 14
    for name, one in record.approximations.items():
        delta = (after[name] - before[name]).double().numpy()
        best = np.linalg.norm(delta - oracle.nearest(delta, 5))
        assert best * 0.999 <= one.missed <= 1.1 * best
        assert one.update == pytest.approx(np.linalg.norm(delta), rel=1e-4)
    assert json.loads(done.stdout)["missed"].keys() == record.approximations.keys()


def differences(base: Path, other: Path) -> dict[str, Exact]:
    """Linear layers of a tuned model minus the base's, in float64."""
    before, after = load(base).state_dict(), load(other).state_dict()
    return {n: (after[n] - one).double().numpy() for n, one in before.items() if "proj" in n}


def changed(base: Path, updates: dict[str, Exact]) -> Any:
    """The base with some modules' weights changed by so much."""
    import torch

    model = load(base)
    for module, update in updates.items():
        weight = model.get_submodule(module).weight.data
        weight += torch.from_numpy(update).to(weight.dtype)
    return model


@pytest.mark.parametrize(
    ("options", "share"),
    [(("--energy", "0.95"), 0.05), (("--error", "0.1"), 0.01), (("--energy", 0.5), 0.5)],
)
def test_each_matrix_gets_the_least_rank_that_is_enough(
    shelf: Shelf, tmp_path: Path, options: tuple[str, ...], share: float
) -> None:
    """Of dense singular values; PEFT makes of the factors what the record says they miss."""
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=False, noise=0.02)
    done = run("extract-lora", other, "--base", base, *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "every direction is looked for in 14 tensors: a `rank`" in done.stderr
    record, found = read_record(tmp_path / "out"), updates(tmp_path / "out")
    deltas = differences(base, other)
    assert record.approximations.keys() == deltas.keys()
    for name, delta in deltas.items():
        one, size = record.approximations[name], np.linalg.norm(delta)
        missed = np.linalg.norm(delta - found[name.removesuffix(".weight")])
        assert one.missed == pytest.approx(missed, rel=1e-4)
        assert missed**2 <= share * size**2 * (1 + 1e-5)
        values = np.linalg.svd(delta, compute_uv=False) ** 2
        best = int(np.flatnonzero(values.cumsum() >= (1 - share) * values.sum())[0]) + 1
        assert best <= one.rank <= best + 1
    ranks = {one.rank for one in record.approximations.values()}
    span = f"ranks {min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"rank {max(ranks)}"
    assert f"the factors, of {span}, miss " in done.stdout
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == ranks
    answer = beside(base, tmp_path / "out")
    assert distance(answer, logits(changed(base, found))) < TIGHT
    if share < 0.5:
        assert len(ranks) > 1
        tuned_answer = logits(load(other))
        assert distance(answer, tuned_answer) < distance(logits(load(base)), tuned_answer) / 2


def test_a_rank_is_then_the_most_there_may_be(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=False, noise=0.02)
    limits = ("--error", "0.01", "--rank", 4, "--out", tmp_path / "out")
    done = run("extract-lora", other, "--base", base, *limits)
    assert done.returncode == 0, done.stderr
    assert "every direction" not in done.stderr
    assert "14 tensors miss more than 0.01 at the most rank allowed" in done.stderr
    assert {one.rank for one in read_record(tmp_path / "out").approximations.values()} == {4}


def test_without_a_rank_or_a_bound_it_is_no_command(tmp_path: Path) -> None:
    done = run("extract-lora", "tuned", "--base", "base", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "Missing one of '--rank', '--energy' and '--error'" in done.stderr


def test_what_was_cut_is_verified_derived_again_and_known(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=True, noise=0.02)
    recipe = recipe_of(str(other), base=str(base), energy=0.9, norms=True, out_dtype="bfloat16")
    sm.merge(recipe, out=tmp_path / "out", memory=MEMORY)
    found = verify(tmp_path / "out", read_data=True)
    assert found.summed == found.tensors
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe))
    assert recompute(found, 99, config=again, memory=MEMORY).derived == found.tensors
    weights = tmp_path / "out" / "adapter_model.safetensors"
    data = weights.read_bytes()
    assert sm.merge(recipe, out=tmp_path / "out", memory=MEMORY).already_done
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadInput, match="is not what the inputs give"):
        recompute(found, 99, config=again, memory=MEMORY)


@pytest.mark.parametrize("place", ["trim", "write_companions"])
def test_stopped_around_the_cut_it_goes_on(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Nothing is merged again, and the bytes are those of a run that nobody stopped."""
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=False, noise=0.02)
    recipe = recipe_of(str(other), base=str(base), error=0.2)
    sm.merge(recipe, out=tmp_path / "whole", memory=MEMORY)

    def stop(*arguments: object) -> None:
        raise RuntimeError("a power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a power cut"):
        patch.setattr(f"streammerge.building.{place}", stop)
        sm.merge(recipe, out=tmp_path / "out", memory=MEMORY)
    report = sm.merge(recipe, out=tmp_path / "out", memory=MEMORY, threads=1)
    assert report.resumed_bytes == sm.plan(recipe, memory=MEMORY).demand.write_bytes
    assert report.read_bytes == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("pieces", [1, 2, 13, 27])
def test_stopped_between_the_factors_it_goes_on(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    """Also where A is there and B is not: then B measures by itself."""
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=False, noise=0.02)
    recipe = recipe_of(str(other), base=str(base), rank=5)
    sm.merge(recipe, out=tmp_path / "whole", memory=MEMORY)
    original, left = ShardsSink.record, iter(range(pieces))

    def record(sink: ShardsSink, receipt: Receipt) -> None:
        if next(left, None) is None:
            raise RuntimeError("a power cut")
        original(sink, receipt)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a power cut"):
        patch.setattr(ShardsSink, "record", record)
        sm.merge(recipe, out=tmp_path / "out", memory=MEMORY, threads=1)
    assert sm.merge(recipe, out=tmp_path / "out", memory=MEMORY).resumed_bytes > 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("threads", [1, 4])
def test_the_models_are_read_once_for_both_factors(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """As often as the plan says: two looks for directions, and one along them; and all of that is
    what its progress counts."""
    base = shelf.get("llama", make_llama)
    other = tuned(tmp_path / "tuned", base, norms=False, noise=0.02)
    recipe = recipe_of(str(other), base=str(base), rank=5)
    plan = sm.plan(recipe, memory=MEMORY, threads=threads)
    told: list[events.Progress] = []
    monkeypatch.setattr("streammerge.building.PROGRESS_SECONDS", 0)
    matrices = sum(v.nbytes for n, v in load(base).state_dict().items() if "proj" in n)
    assert plan.demand.read_bytes == 3 * 2 * matrices
    report = sm.merge(
        recipe,
        out=tmp_path / "out",
        memory=MEMORY,
        threads=threads,
        emit=lambda event: told.append(event) if isinstance(event, events.Progress) else None,
    )
    assert report.read_bytes == plan.demand.read_bytes
    assert [one.done == one.total for one in told] == [False] * (len(told) - 1) + [True]


def test_layers_that_store_their_weights_turned(shelf: Shelf, tmp_path: Path) -> None:
    """GPT-2's Conv1D, of shapes that are not square; PEFT turns the product of the factors."""
    import torch

    base = shelf.get("gpt2", make_gpt2, tied=False)
    model = load(base)
    draw = torch.Generator().manual_seed(9)
    for name, weight in model.named_parameters():
        if name.endswith(tuple(f"{layer}.weight" for layer in CONV1D)):
            left = torch.randn(weight.shape[0], RANK, generator=draw)
            weight.data += 0.05 * left @ torch.randn(RANK, weight.shape[1], generator=draw)
    model.save_pretrained(tmp_path / "tuned")
    recipe = recipe_of(str(tmp_path / "tuned"), base=str(base), rank=RANK)
    report = sm.merge(recipe, out=tmp_path / "out", memory=MEMORY)
    assert max(one.relative for one in report.missed.values()) < 1e-5
    assert distance(beside(base, tmp_path / "out"), logits(model)) < 10 * TIGHT
    assert distance(logits(load(base)), logits(model)) > 100 * TIGHT


def test_a_vote_in_full_space_as_an_adapter(shelf: Shelf, tmp_path: Path) -> None:
    """Of full rank where the rank allows it, so PEFT gives the logits of the merged model."""
    base, adapters = llama(shelf)
    keys: dict[str, Any] = {"parameters": {"density": 0.4}}
    merge(tmp_path, "ties", base, adapters, "model", **keys)
    output = {"kind": "adapter", "rank": 64}
    report = merge(tmp_path, "ties", base, adapters, "adapter", output=output, **keys)
    assert max(one.relative for one in report.missed.values()) < 1e-5
    assert distance(beside(base, tmp_path / "adapter"), logits(load(tmp_path / "model"))) < TIGHT


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ({"kind": "adapter"}, "needs a rank"),
        ({"kind": "adapter", "rank": 4}, "tensors that no low-rank matrix can stand for"),
    ],
)
def test_a_full_model_without_a_rank_or_a_choice(
    shelf: Shelf, tmp_path: Path, output: dict[str, Any], words: str
) -> None:
    base = shelf.get("llama", make_llama)
    other = shelf.get("same", make_llama)
    recipe = {
        "base_model": str(base),
        "merge_method": "task_arithmetic",
        "models": [{"model": str(other)}],
        "output": output,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(sm.StreammergeError) as caught:
        sm.plan(tmp_path / "r.yaml", memory=MEMORY)
    assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError) or len(str(caught.value).splitlines()) > 3
