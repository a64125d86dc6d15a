"""The command as a person uses it: what it takes, what it prints where, and what it makes.

What it refuses, and how, is in test_cli_refusals.py; what a kill leaves in test_cli_kill.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import streammerge as sm
from tests.running import COMMAND, digest, make_inputs, run, tensor_digest, write_recipe

# Control sequences that a terminal understands: colours, cursor movement, erasing.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe(folder, "ties")
    write_recipe(folder, "linear")
    return folder


@pytest.fixture(scope="module")
def usual(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sm.merge(inputs / "ties.yaml", out=tmp_path_factory.mktemp("usual") / "out").out


def json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


# ---------------------------------------------------------------------------------------- merge


def test_a_recipe_is_merged_and_the_end_says_what_came_of_it(
    inputs: Path, usual: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("merge", inputs / "ties.yaml", "--out", out, "--memory", "1GiB", "--threads", 2)
    assert done.returncode == 0, done.stderr
    assert digest(out) == digest(usual)
    said = done.stdout.splitlines()
    assert re.fullmatch(r"lora-0: 14 of 14 tensors applied, mean relative change [\d.]+ %", said[0])
    assert re.fullmatch(
        r"20 tensors in [\d.]+ s: read [\d.]+ KiB, wrote [\d.]+ KiB "
        r"\([\d.]+ KiB copied unchanged\), peak memory [\d.]+ MiB",
        said[2],
    )
    assert f"output: {out}" in said
    assert f'load:   AutoModelForCausalLM.from_pretrained("{out}", dtype="auto")' in said


def test_without_a_terminal_there_are_plain_lines(inputs: Path, tmp_path: Path) -> None:
    done = run("merge", inputs / "ties.yaml", "--out", tmp_path / "out")
    planned = "ties: 14 tensors to merge, 6 to copy; reading"
    assert any(line.startswith(planned) for line in done.stderr.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)


def test_options_make_the_recipe_and_print_it(inputs: Path, tmp_path: Path) -> None:
    options = ["--base", "base", "--adapter", "lora-0=0.7", "--adapter", "lora-1=0.3"]
    done = run("merge", *options, "--method", "ties", "--out", tmp_path / "a", cwd=inputs)
    assert done.returncode == 0, done.stderr
    text = done.stderr[: done.stderr.index("\n\n")]
    recipe = yaml.safe_load(text)
    assert recipe["merge_method"] == "ties"
    assert [entry["weight"] for entry in recipe["adapters"]] == [0.7, 0.3]
    write_recipe(inputs, "printed", text)
    again = run("merge", "printed.yaml", "--out", tmp_path / "b", cwd=inputs)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_options_win_over_the_recipe(inputs: Path, usual: Path, tmp_path: Path) -> None:
    recipe = write_recipe(inputs, "own", (inputs / "ties.yaml").read_text() + "output: ./unused\n")
    options = ("--out", tmp_path / "out", "--shard-size", "1GiB", "--cache", tmp_path / "cache")
    done = run("merge", recipe, *options, "--io", "read")
    assert done.returncode == 0, done.stderr
    assert not (inputs / "unused").exists()
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert tensor_digest(tmp_path / "out") == tensor_digest(usual)


def test_without_an_output_the_recipe_names_it(inputs: Path, tmp_path: Path) -> None:
    done = run("merge", inputs / "ties.yaml", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ties"]
    assert "output: ties" in done.stdout


def test_an_empty_folder_takes_the_output(inputs: Path, usual: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("merge", inputs / "ties.yaml", "--out", tmp_path / "out").returncode == 0
    assert digest(tmp_path / "out") == digest(usual)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_again_is_said_and_nothing_is_written(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = json.loads(run("merge", inputs / "ties.yaml", "--out", out, "--json").stdout)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run("merge", inputs / "ties.yaml", "--out", out, "--json")
    assert again.returncode == 0
    report = json.loads(again.stdout)
    assert report["already_done"] and report["written_bytes"] == 0
    assert report["changes"] == first["changes"]
    assert [change["applied"] for change in report["changes"]] == [14, 14]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    told = run("merge", inputs / "ties.yaml", "--out", out)
    assert "the output is there already, complete" in told.stdout


# ----------------------------------------------------------------------------- for other programs


def test_json_puts_the_report_on_stdout(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("merge", inputs / "ties.yaml", "--out", out, "--json")
    report = json.loads(done.stdout)
    assert report["out"] == str(out)
    assert [change["name"] for change in report["changes"]] == ["lora-0", "lora-1"]
    assert report["written_bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert 0 < report["peak_bytes"] <= report["projected_bytes"]


def test_quiet_leaves_the_result_alone(inputs: Path, tmp_path: Path) -> None:
    done = run("merge", inputs / "ties.yaml", "--out", tmp_path / "out", "--quiet")
    assert done.stderr == ""
    assert "tensors applied" in done.stdout


@pytest.mark.parametrize("log", [[], ["--log-format", "json"]], ids=["text", "JSON"])
def test_quiet_still_warns(inputs: Path, tmp_path: Path, log: list[str]) -> None:
    named = inputs / "named.yaml"
    named.write_text("name: mine\n" + (inputs / "ties.yaml").read_text())
    done = run("merge", named, "--out", tmp_path / "out", "--quiet", *log)
    (line,) = done.stderr.splitlines()
    text = json.loads(line)["text"] if log else line.removeprefix("warning: ")
    assert text.startswith(f"{named}:1:1: `name` has no effect"), line


def test_a_json_log_is_json_on_every_line(inputs: Path, tmp_path: Path) -> None:
    done = run("merge", inputs / "ties.yaml", "--out", tmp_path / "out", "--log-format", "json")
    lines = json_lines(done.stderr)
    assert {"note", "progress"} <= {line["event"] for line in lines}
    last = [line for line in lines if line["event"] == "progress"][-1]
    assert last["done"] == last["total"]


def test_a_json_log_is_json_when_options_make_the_recipe(inputs: Path, tmp_path: Path) -> None:
    options = ["--base", "base", "--adapter", "lora-0", "--method", "linear"]
    log = ("--log-format", "json", "--out", tmp_path / "out")
    done = run("merge", *options, *log, cwd=inputs)
    assert done.returncode == 0
    assert json_lines(done.stderr)


@pytest.mark.parametrize("option", [["--log-format", "json"], ["--log-format=json"]])
def test_a_json_log_has_errors_as_json(inputs: Path, tmp_path: Path, option: list[str]) -> None:
    done = run("merge", tmp_path / "none.yaml", *option)
    assert done.returncode == 66
    (line,) = json_lines(done.stderr)
    error = line["error"]
    assert isinstance(error, dict)
    assert error["where"] == str(tmp_path / "none.yaml")
    assert error["remedy"]


# ------------------------------------------------------------------------------------ a terminal


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    yield ours, theirs
    os.close(ours)


def test_a_terminal_shows_a_bar_without_garbage(
    inputs: Path, tmp_path: Path, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    command = [COMMAND, "merge", str(inputs / "ties.yaml"), "--out", str(tmp_path / "out")]
    env = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    raw = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            raw += chunk
    except OSError:
        pass  # Linux says EIO when the other end is closed
    assert process.wait() == 0
    assert "\x1b[?25h" in raw.decode(), "the cursor is shown again"
    shown = CONTROL.sub("", raw.decode())
    assert re.search(r"100 %  [\d.]+ (K|M)iB/s, [\d.]+ s left, [\d.]+ MiB of memory", shown)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\[/?[a-z]+\]|Traceback", shown)
    # The bar is gone at the end: the result stands on lines of its own.
    assert "\r\nlora-1: 14 of 14 tensors applied" in shown


# ----------------------------------------------------------------------------- the other commands


def test_plan_describes_the_merge(inputs: Path) -> None:
    done = run("plan", inputs / "ties.yaml", "--memory", "1GiB")
    assert done.returncode == 0, done.stderr
    for line in (
        "method    ties",
        "model     lora-0: weight 0.7, density 1; 14 of 14 tensors applied",
        "tensors   14 read once: ",
        "tensors   6 copied as they are",
        "projected peak, of 1 GiB allowed",
    ):
        assert line in done.stdout


def test_plan_as_json_agrees_with_merge(inputs: Path, tmp_path: Path) -> None:
    planned = json.loads(run("plan", inputs / "ties.yaml", "--json").stdout)
    merged = json.loads(
        run("merge", inputs / "ties.yaml", "--out", tmp_path / "out", "--json").stdout
    )
    assert planned["read_bytes"] == merged["read_bytes"]
    assert planned["copied_bytes"] == merged["copied_bytes"]
    assert sum(planned["tensors"].values()) == merged["tensors"]


def test_inspect_tells_models_and_adapters(inputs: Path) -> None:
    done = run("inspect", "base", "lora-0", "--json", cwd=inputs)
    model, adapter = json.loads(done.stdout)
    assert (model["kind"], model["tensors"], model["shards"]) == ("model", 20, 2)
    assert model["architecture"] == "LlamaForCausalLM"
    assert (adapter["kind"], adapter["hindered_by"]) == ("LoRA", [])
    assert (adapter["ranks"], adapter["alpha"], adapter["scales"]) == ([4], 8, [2])
    assert adapter["targets"]["q_proj"] == 2
    told = run("inspect", "lora-0", "--base", "base", cwd=inputs)
    assert told.returncode == 0, told.stderr
    assert "14 tensors applied" in told.stdout


def test_inspect_tells_the_others_where_one_cannot_be_read(inputs: Path) -> None:
    done = run("inspect", "none", "lora-0", "--json", cwd=inputs)
    none, adapter = json.loads(done.stdout)
    assert done.returncode == 66 and "'none'" in done.stderr
    assert (none["kind"], none["path"]) == ("unreadable", "none")
    assert "'none'" in none["hindered_by"][0]
    assert (adapter["kind"], adapter["ranks"], adapter["hindered_by"]) == ("LoRA", [4], [])


def test_methods_lists_and_explains() -> None:
    listed = run("methods").stdout
    for name in ("linear", "task_arithmetic", "ties", "passthrough"):
        assert re.search(rf"^{name} ", listed, re.MULTILINE)
    explained = run("methods", "ties").stdout
    for word in ("weight", "density", "lambda", "normalize", "arXiv 2306.01708", "merge_method"):
        assert word in explained


def test_an_example_of_methods_is_a_recipe(inputs: Path) -> None:
    _, example = run("methods", "ties").stdout.split("example\n")
    text = re.sub(r"\./llama", "./base", example)
    text = text.replace("lora-math", "lora-0").replace("lora-code", "lora-1")
    done = run("plan", write_recipe(inputs, "example", text.replace("\n    ", "\n").lstrip()))
    assert done.returncode == 0, done.stderr


def test_version_and_help() -> None:
    assert run("--version").stdout == f"streammerge, version {sm.__version__}\n"
    helped = run("--help").stdout
    for command in ("merge", "plan", "inspect", "methods", "verify"):
        assert re.search(rf"^  {command} ", helped, re.MULTILINE)
    assert "--memory" in run("merge", "-h").stdout


# --------------------------------------------------------------------- where a shell may be cruel


def test_a_closed_pipe_does_not_spoil_a_merge(inputs: Path, usual: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    out = tmp_path / "out"
    done = run("merge", inputs / "ties.yaml", "--out", out, "--quiet", stdout=write)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert digest(out) == digest(usual)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_spoil_a_merge(
    inputs: Path, usual: Path, tmp_path: Path, closed: str
) -> None:
    script = f'"$1" merge "$2" --out out {closed}'
    arguments = ["sh", "-c", script, "sh", COMMAND, str(inputs / "ties.yaml")]
    assert subprocess.run(arguments, cwd=tmp_path, timeout=100).returncode == 0
    assert digest(tmp_path / "out") == digest(usual)


def test_a_full_disk_under_stdout_is_said(inputs: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("merge", inputs / "ties.yaml", "--out", tmp_path / "out", stdout=full)
    assert done.returncode == 74
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_no_home_is_needed(inputs: Path, usual: Path, tmp_path: Path, home: str | None) -> None:
    """A home that is missing or cannot be written: the kernels are compiled anew."""
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "TMPDIR")}
    env = keep | ({} if home is None else {"HOME": home})
    done = run("merge", inputs / "ties.yaml", "--out", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert "compiling kernels" in done.stderr
    assert digest(tmp_path / "out") == digest(usual)


def test_a_c_locale_is_enough(inputs: Path, tmp_path: Path) -> None:
    recipe = write_recipe(inputs, "ünïcode", (inputs / "linear.yaml").read_text())
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("merge", recipe, "--out", tmp_path / "möglich", env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "möglich" / "streammerge.json").exists()
