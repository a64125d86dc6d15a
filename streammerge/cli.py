"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from streammerge import __version__
from streammerge.errors import (
    Interrupted,
    OutputRefused,
    Problems,
    Refused,
    StorageError,
    StreammergeError,
)
from streammerge.merge_options import PICKLE_HELP, recipe_options

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.planning import Plan
    from streammerge.recipe import Recipe

BUG = 70
FORCE_HELP = (
    "Replace the output that is there, and what another merge left half done. What this very merge "
    "left half done is gone on with."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streammerge")
def cli() -> None:
    """Merge language models and LoRA adapters on a small machine.

    The merge streams through memory tile by tile, so it runs in a few hundred MiB whatever the
    size of the model. Start with a recipe (mergekit's YAML files work too):

    \b
        base_model: ./llama-70b
        merge_method: ties
        adapters:
          - {path: ./lora-math, weight: 0.5, density: 0.6}
          - {path: ./lora-code, weight: 0.3, density: 0.5}

    \b
    and run
        streammerge plan cfg.yaml
        streammerge merge cfg.yaml --out ./merged
    """


@cli.command()
@recipe_options
@click.option("--force", is_flag=True, help=FORCE_HELP)
@click.option(
    "--nan",
    type=click.Choice(["error", "keep"]),
    default="error",
    show_default=True,
    help="What to do with values that are NaN or infinite, where they are computed with; for what "
    "is copied unread ask `verify --read-data`.",
)
@click.option(
    "--strict-bytes",
    is_flag=True,
    help="Refuse to go on with a merge that other libraries or another processor began.",
)
@click.option("--quiet", is_flag=True, help="Warnings, but no progress and no notes.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How progress and notes are written on standard error.",
)
def merge(
    config: str | None,
    quiet: bool,
    log_format: str,
    force: bool,
    nan: str,
    strict_bytes: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge as the recipe CONFIG says, or as the options say.

    \b
        streammerge merge cfg.yaml --out ./merged --memory 1GiB
        streammerge merge --base ./llama --adapter ./math=0.7 --adapter ./code=0.3 \\
                          --method ties --out ./merged
    """
    from streammerge.signals import Signals

    with Signals(_same_command()) as signals:
        recipe = _recipe(config, options)
        from streammerge import engine, progress
        from streammerge.manner import Manner

        with progress.reporter(quiet=quiet, log_format=log_format) as emit:
            if not config:
                emit(progress.as_file(recipe))
            out = engine.output_folder(recipe, config or recipe, options["out"])
            made = _plan(recipe, options, emit, out)
            emit(progress.planned(made))
            manner = Manner(force, strict_bytes, nan == "keep", signals.stopped, emit)
            report = engine.run(made, out, manner)
    _print(json.dumps(report.as_dict()) if as_json else progress.describe_report(report))


@cli.command("extract-lora")
@click.argument("tuned", type=click.Path())
@click.option("--base", metavar="DIR", required=True, help="The model that it was tuned from.")
@click.option("--rank", type=click.IntRange(min=1), help="Of every matrix; the most it may have.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Give each matrix the least rank that keeps this share of its squared norm, e.g. 0.95.",
)
@click.option(
    "--error",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Give each matrix the least rank that misses no more of its norm, e.g. 0.05.",
)
@click.option("--out", metavar="DIR", required=True, help="Where the adapter goes.")
@click.option("--allow-pickle", is_flag=True, help=PICKLE_HELP)
@click.option("--embeddings", is_flag=True, help="Save embeddings and head whole, as modules.")
@click.option("--norms", is_flag=True, help="Save norms whole, as modules.")
@click.option("--dtype", "out_dtype", metavar="NAME", help="Of the adapter; default: float32.")
@click.option("--memory", metavar="SIZE", help="The most memory to use.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all usable CPUs.")
@click.option("--seed", type=int, help="Of the random vectors that look for directions.")
@click.option("--force", is_flag=True, help=FORCE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def extract_lora(tuned: str, out: str, force: bool, as_json: bool, **options: Any) -> None:
    """Write what sets the model TUNED apart from its base as a LoRA adapter.

    Each matrix gets the factors nearest to the difference, and what they miss is measured.
    Embeddings, head and norms are left out unless they are asked for.

    \b
        streammerge extract-lora ./tuned --base ./llama --rank 32 --out ./adapter
        streammerge extract-lora ./tuned --base ./llama --error 0.1 --rank 128 --out ./adapter
    """
    if all(options[name] is None for name in ("rank", "energy", "error")):
        raise click.UsageError("Missing one of '--rank', '--energy' and '--error'.")
    from streammerge.signals import Signals

    with Signals(_same_command()) as signals:
        _prepare(None)
        from pathlib import Path

        from streammerge import engine, progress
        from streammerge.commands.extract import recipe_of
        from streammerge.manner import Manner

        limits = {name: options.pop(name) for name in ("memory", "threads", "allow_pickle")}
        recipe = recipe_of(tuned, **options)
        with progress.reporter(quiet=False, log_format="text") as emit:
            made = engine.plan(recipe, out=out, emit=emit, **limits)
            emit(progress.planned(made))
            manner = Manner(force, stopped=signals.stopped, emit=emit)
            report = engine.run(made, Path(out), manner)
    _print(json.dumps(report.as_dict()) if as_json else progress.describe_report(report))


@cli.command()
@recipe_options
@click.option("--tensors", is_flag=True, help="Also what happens to each tensor.")
def plan(config: str | None, as_json: bool, tensors: bool, **options: Any) -> None:
    """Say what `merge` would do, without doing it: reads headers only."""
    recipe = _recipe(config, options)
    from streammerge import progress
    from streammerge.engine import output_folder
    from streammerge.publication import check_room_for

    with progress.reporter(quiet=as_json, log_format="text") as emit:
        if not config:
            emit(progress.as_file(recipe))
        made = _plan(recipe, options, emit, options["out"])
        if config or options["out"]:  # else it is not known where the output would go
            check_room_for(made, output_folder(recipe, config or recipe, options["out"]))
    each = list(made.tensors()) if tensors else None
    _print(progress.plan_as_json(made, each) if as_json else progress.describe_plan(made, each))


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--base", metavar="DIR", help="The base that an adapter would be applied to.")
@click.option("--allow-pickle", is_flag=True, help=PICKLE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(paths: Sequence[str], base: str | None, allow_pickle: bool, as_json: bool) -> None:
    """Say what model and adapter folders hold, and what hinders a merge of them."""
    from streammerge.commands.inspect import describe, examine
    from streammerge.storage.pickles import Pickles

    problems, pickles = Problems(), Pickles() if allow_pickle else None
    found = [examine(path, base, problems, pickles) for path in paths]
    _print(json.dumps(found) if as_json else "\n\n".join(describe(one) for one in found))
    problems.raise_any()


@cli.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods, or explain one."""
    from streammerge.commands.methods import catalogue, explain, overview

    if as_json:
        _print(json.dumps(catalogue(name)))
    else:
        _print(explain(name) if name else overview())


@cli.command()
@click.argument("out", type=click.Path())
@click.option(
    "--read-data",
    is_flag=True,
    help="Read every tensor and compare its checksum, or the input that it was copied from.",
)
@click.option(
    "--recompute",
    metavar="N",
    type=click.IntRange(min=1),
    help="Derive N tiles again from the inputs and compare them byte for byte.",
)
@click.option(
    "--config",
    metavar="CONFIG",
    help="The recipe whose paths lead to the inputs. Without it, the output's own, whose names are "
    "looked for in the working directory.",
)
@click.option("--memory", metavar="SIZE", help="The most memory to use.")
@click.option("--allow-pickle", is_flag=True, help=PICKLE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(
    out: str,
    read_data: bool,
    recompute: int | None,
    config: str | None,
    memory: str | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Hold the finished output OUT to its own record, and to its inputs."""
    if recompute is None and not read_data and (config or memory or allow_pickle):
        what = "--config, --memory and --allow-pickle go with --recompute or --read-data"
        raise click.UsageError(what)
    _prepare(None)
    from pathlib import Path

    from streammerge.commands.verify import describe
    from streammerge.commands.verify import verify as hold_to_its_record

    found = hold_to_its_record(Path(out), read_data=read_data)
    if recompute is not None or (read_data and found.unsummed):
        from streammerge.commands import recompute as again

        lead = again.Lead(Path(config) if config else None, memory, allow_pickle)
        found = again.compare_copies(found, lead) if read_data and found.unsummed else found
        found = again.recompute(found, recompute, lead) if recompute is not None else found
    _print(json.dumps(found.as_dict()) if as_json else describe(found))


@cli.group()
def cache() -> None:
    """What runs left in a cache; losing it costs nothing but time."""


@cache.command("list")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def cache_list(folder: str, as_json: bool) -> None:
    """List the runs in the cache DIR: whose, how large, at work or not."""
    from pathlib import Path

    from streammerge.commands.cache import describe, examine

    found = examine(Path(folder))
    _print(json.dumps([one.as_dict() for one in found]) if as_json else describe(found))


@cache.command("clean")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("--finished", is_flag=True, help="Those that --keep-cache has kept.")
@click.option("--stale", is_flag=True, help="Those whose process is gone, unchanged for a day.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def cache_clean(
    folder: str, runs: Sequence[str], finished: bool, stale: bool, as_json: bool
) -> None:
    """Remove runs from the cache DIR: nothing but what streammerge has put there."""
    if not (runs or finished or stale):
        raise click.UsageError("name runs, or give --finished or --stale")
    from pathlib import Path

    from streammerge.commands.cache import clean, describe

    gone = clean(Path(folder), runs, finished=finished, stale=stale)
    nothing = "nothing to remove; a run that is named goes at once, unless it is at work"
    removed = f"removed:\n{describe(gone)}" if gone else nothing
    _print(json.dumps([one.as_dict() for one in gone]) if as_json else removed)


def _recipe(config: str | None, options: dict[str, Any]) -> Recipe:
    """The recipe of a file or of the options."""
    given = [k for k in ("base", "adapters", "models", "method", "out_dtype") if options[k]]
    if config and given:
        raise click.UsageError("give a CONFIG, or --base, --adapter and --method; not both")
    if not config and not options["method"]:
        raise click.UsageError("give a CONFIG, or --base, --adapter and --method")
    _prepare(options["cache"])
    from pathlib import Path

    from streammerge.methods import CATALOGUE, WithOwn
    from streammerge.recipe import build_recipe, read_recipe

    problems = Problems()
    if config:
        methods = WithOwn(CATALOGUE, (Path(config).parent, Path.cwd()))
        recipe = read_recipe(Path(config), methods, problems)
    else:
        recipe = build_recipe(
            base=options["base"],
            adapters=options["adapters"],
            models=options["models"],
            method=options["method"],
            out_dtype=options["out_dtype"],
            methods=WithOwn(CATALOGUE, (Path.cwd(),)),
            problems=problems,
        )
    _raise_with_inputs(recipe, problems, options)
    assert recipe is not None
    return _override(recipe, options)


def _raise_with_inputs(recipe: Recipe | None, problems: Problems, options: dict[str, Any]) -> None:
    """Before giving up on a faulty recipe, look for faults of what it names, to say all at once."""
    if not len(problems):
        return
    if recipe is not None:
        from streammerge.memory import chosen_budget
        from streammerge.planning.inputs import open_inputs
        from streammerge.storage.pickles import Pickles

        allowed = options["allow_pickle"]
        pickles = Pickles(chosen_budget(options["memory"])) if allowed else None
        open_inputs(recipe, problems, pickles)
    problems.raise_any()


def _override(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    """Options win over the recipe."""
    from dataclasses import replace

    from streammerge.sizes import parse_size

    changes: dict[str, Any] = {}
    if options["seed"] is not None:
        changes["seed"] = options["seed"]
    if options["shard_size"] is not None:
        changes["shard_bytes"] = parse_size(options["shard_size"], "--shard-size")
    return replace(recipe, **changes) if changes else recipe


def _plan(recipe: Recipe, options: dict[str, Any], emit: Any, out: Path | None) -> Plan:
    from streammerge import engine

    names = ("memory", "threads", "device", "io", "spill", "cache", "keep_cache", "allow_pickle")
    chosen = {name: options[name] for name in names}
    return engine.plan(recipe, out=out, emit=emit, **chosen)


def _prepare(cache: str | None) -> None:
    """What must be settled before numpy is imported, and before memory is measured."""
    from streammerge import system

    system.settle_blas()
    if cache:
        try:
            os.makedirs(cache, exist_ok=True)
        except OSError as error:
            raise OutputRefused(
                f"the cache cannot be created: {error.strerror}",
                where=cache,
                remedy="name a folder that you can write to, or leave --cache out",
            ) from error
        if not os.access(cache, os.W_OK | os.X_OK):
            raise OutputRefused(
                "the cache cannot be written to",
                where=cache,
                remedy="name a folder that you can write to, or leave --cache out",
            )
        os.environ["STREAMMERGE_CACHE"] = cache
    system.tune_allocator()


def _print(result: str) -> None:
    """Write to standard output. The work is done by then, so a reader that left is no failure."""
    try:
        click.echo(result)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor is it one when the interpreter flushes
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        what = f"the result cannot be printed: {error.strerror}"
        raise StorageError(what, where="standard output", found=result) from error


def _say(error: StreammergeError, *, as_json: bool) -> None:
    problems = error.problems if isinstance(error, Refused) else (error,)
    for problem in problems:
        if as_json:
            fields = {"what": problem.what, "where": problem.where and str(problem.where)}
            rest = {"found": problem.found, "expected": problem.expected, "remedy": problem.remedy}
            click.echo(json.dumps({"error": {**fields, **rest}}), err=True)
        else:
            click.echo(f"error: {problem}", err=True)


def main() -> None:
    """The entry point: errors become messages and exit codes (see `streammerge.errors`)."""
    for _ in range(3):  # a closed standard stream: its number must not go to a file of ours
        opened = os.open(os.devnull, os.O_RDWR)
        if opened > 2:
            os.close(opened)
            break
    try:
        _run()
    finally:
        gc.freeze()  # Python, when it ends, would look for garbage among all there is, for 0.3 s


def _run() -> None:
    as_json = any(a == "--log-format=json" or b == ("--log-format", "json") for a, b in _pairs())
    try:
        cli.main(prog_name="streammerge", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _say(Interrupted("interrupted", remedy=_go_on()), as_json=as_json)
        sys.exit(Interrupted.exit_code)
    except StreammergeError as error:
        if isinstance(error, Interrupted):
            error.remedy = _go_on()
        _say(error, as_json=as_json)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        click.echo("this is a bug in streammerge; please report the lines above", err=True)
        sys.exit(BUG)


def _go_on() -> str:
    return f"to go on, run the same command again: {_same_command()}"


def _same_command() -> str:
    return shlex.join(["streammerge", *sys.argv[1:]])


def _pairs() -> list[tuple[str, tuple[str, str]]]:
    arguments = sys.argv[1:]
    return [(one, (one, two)) for one, two in zip(arguments, [*arguments[1:], ""], strict=True)]
