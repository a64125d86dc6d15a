"""The options that `merge` and `plan` share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

PICKLE_HELP = "Read tensors, and nothing else, from .bin files where there are no safetensors."
_F = TypeVar("_F", bound=Callable[..., Any])


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:0, cuda:1, ...")
    return value


def recipe_options(command: _F) -> _F:
    """Give a command the recipe, and how it is to be merged."""
    options = [
        click.argument("config", required=False, type=click.Path()),
        click.option("--base", metavar="DIR", help="The base model, instead of a CONFIG."),
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            metavar="DIR[=WEIGHT]",
            help="A LoRA adapter of the base; may be given several times.",
        ),
        click.option(
            "--model",
            "models",
            multiple=True,
            metavar="DIR[=WEIGHT]",
            help="A full model to merge; may be given several times.",
        ),
        click.option("--method", metavar="NAME", help="One of `streammerge methods`, or a file."),
        click.option("--dtype", "out_dtype", metavar="NAME", help="Of the output: bfloat16, ..."),
        click.option("--out", metavar="DIR", help="Where the merged model goes."),
        click.option(
            "--cache",
            metavar="DIR",
            envvar="STREAMMERGE_CACHE",
            help="Where rows are spilled to; default: beside the output.",
        ),
        click.option(
            "--spill",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            show_default=True,
            help="Whether rows that are wanted again are kept on disk; auto: where it pays.",
        ),
        click.option("--keep-cache", is_flag=True, help="Leave there what was spilled."),
        click.option(
            "--memory",
            metavar="SIZE",
            help="The most memory to use, e.g. 512MiB or 2GiB. Default: half of what is free.",
        ),
        click.option(
            "--device",
            metavar="auto|cpu|cuda[:N]",
            callback=_device,
            default="auto",
            show_default=True,
            help="Where to compute; auto: on a CUDA device where torch is installed and finds one.",
        ),
        click.option("--threads", type=click.IntRange(min=1), help="Default: all usable CPUs."),
        click.option(
            "--io",
            type=click.Choice(["auto", "mmap", "read"]),
            default="auto",
            show_default=True,
            help="Read inputs into buffers, or map them into memory; auto reads, which is faster.",
        ),
        click.option("--allow-pickle", is_flag=True, help=PICKLE_HELP),
        click.option(
            "--shard-size", metavar="SIZE", help="Largest output file; default: as the base."
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**63 - 1),
            help="For methods that draw random numbers. Default: the recipe's, else 0.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
