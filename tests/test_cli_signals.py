"""A signal stops a merge in good order: no new tiles, exit 75, and the line that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import streammerge as sm
from streammerge import signals
from tests.running import COMMAND, digest, make_inputs, run, write_recipe
from tests.stopping import stopped

WRITING = "streammerge.storage.shard ShardFile.write 9"
PLANNING = "streammerge.system usable_cpus 1"
COMMITTING = "streammerge.sinks.shards ShardsSink.commit 1"
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe(folder, "ties")
    return folder


@pytest.fixture(scope="module", autouse=True)
def heeded() -> Iterator[None]:
    """A suite that is run by nohup or in the background ignores these, and so would the command."""
    ignored = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(sm.merge(inputs / "ties.yaml", out=tmp_path_factory.mktemp("u") / "out").out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "outs").mkdir()
    return tmp_path / "outs" / "out"


def assert_goes_on(inputs: Path, out: Path, undisturbed: str, said: str) -> None:
    """By the very line that was printed."""
    assert not out.exists()
    command = said.split("streammerge merge ")[-1].split()
    again = run("merge", *command, cwd=inputs)
    assert again.returncode == 0, again.stderr
    assert "went on with" in again.stdout
    assert digest(out) == undisturbed
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_it_and_the_line_goes_on(
    inputs: Path, undisturbed: str, tmp_path: Path, out: Path, name: str
) -> None:
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(WRITING, tmp_path / "marks", *arguments, cwd=inputs) as merge:
        if name == "SIGTERM":  # as a batch system does that had suspended it
            merge.send_signal(signal.SIGSTOP)
            merge.send_signal(signal.SIGCONT)
        merge.send_signal(getattr(signal, name))
        time.sleep(0.1)
        (tmp_path / "marks" / "go").touch()
        _, said = merge.communicate(timeout=20)
    assert merge.returncode == 75, said
    assert f"stopped by {name}" in said and "% done, and kept there" in said
    assert_goes_on(inputs, out, undisturbed, said)


def test_a_second_signal_ends_it_at_once(
    inputs: Path, undisturbed: str, tmp_path: Path, out: Path
) -> None:
    """A thread hangs, as on a file server that is gone."""
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(WRITING, tmp_path / "marks", *arguments, cwd=inputs) as merge:
        merge.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert merge.poll() is None
        merge.send_signal(signal.SIGTERM)
        _, said = merge.communicate(timeout=5)
    assert merge.returncode == 75
    assert "stopped by SIGINT, without waiting" in said
    assert_goes_on(inputs, out, undisturbed, said)


def test_it_waits_less_than_ten_seconds(
    inputs: Path, undisturbed: str, tmp_path: Path, out: Path
) -> None:
    assert signals.GRACE_SECONDS < 9
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(WRITING, tmp_path / "marks", *arguments, cwd=inputs) as merge:
        merge.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, said = merge.communicate(timeout=20)
    assert time.monotonic() - began < 10
    assert merge.returncode == 75
    assert_goes_on(inputs, out, undisturbed, said)


def test_before_the_first_tile_there_is_nothing_to_keep(
    inputs: Path, tmp_path: Path, out: Path
) -> None:
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(PLANNING, tmp_path / "marks", *arguments, cwd=inputs) as merge:
        merge.send_signal(signal.SIGTERM)
        _, said = merge.communicate(timeout=10)
    assert merge.returncode == 75
    assert "Traceback" not in said and "streammerge merge ties.yaml" in said
    assert not list(out.parent.iterdir())


def test_once_all_is_written_it_finishes(
    inputs: Path, undisturbed: str, tmp_path: Path, out: Path
) -> None:
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(COMMITTING, tmp_path / "marks", *arguments, cwd=inputs) as merge:
        merge.send_signal(signal.SIGTERM)
        (tmp_path / "marks" / "go").touch()
        _, said = merge.communicate(timeout=10)
    assert merge.returncode == 0, said
    assert digest(out) == undisturbed


def test_what_nohup_ignores_stays_ignored(
    inputs: Path, undisturbed: str, tmp_path: Path, out: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the command inherits
    try:
        arguments = ("merge", "ties.yaml", "--out", out)
        with stopped(WRITING, tmp_path / "marks", *arguments, cwd=inputs) as merge:
            merge.send_signal(signal.SIGHUP)
            (tmp_path / "marks" / "go").touch()
            _, said = merge.communicate(timeout=20)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert merge.returncode == 0, said
    assert digest(out) == undisturbed


def test_signals_at_any_time_lose_nothing(inputs: Path, undisturbed: str, out: Path) -> None:
    """However often it is stopped, in the end it is there."""
    command = [COMMAND, "merge", str(inputs / "ties.yaml"), "--out", str(out), "--quiet"]
    codes = set()
    for tenths in (6, 8, 10, 12, 300):
        merge = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        try:
            merge.wait(tenths / 10)
        except subprocess.TimeoutExpired:
            merge.send_signal(signal.SIGTERM)
        _, said = merge.communicate(timeout=20)
        codes.add(merge.returncode)
        assert merge.returncode in (0, 75, -signal.SIGTERM), said  # at once, while Python starts
    assert merge.returncode == 0
    assert digest(out) == undisturbed
