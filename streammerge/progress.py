"""How events and results look: a progress bar, plain lines for a batch log, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from streammerge.events import Emit, Event, Note, Progress, Warned, ignore
from streammerge.planning import Plan
from streammerge.planning.spill import SpillTotal
from streammerge.planning.tensors import TensorPlan
from streammerge.planning.traffic import Passes
from streammerge.recipe import Recipe, to_yaml, told
from streammerge.report import Report, describe_missed
from streammerge.sizes import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

# How often a batch log gets a line.
PLAIN_SECONDS = 30.0


@contextmanager
def reporter(*, quiet: bool, log_format: str) -> Iterator[Emit]:
    """Where the engine's events go: JSON lines, a bar on a terminal, or plain lines.

    Only warnings where it is to be quiet.
    """
    stream: TextIO | None = sys.stderr  # None where the process was started without one
    if stream is None:
        yield ignore
    elif log_format == "json":
        yield _warnings(_json_lines(stream)) if quiet else _json_lines(stream)
    elif quiet:
        yield _warnings(_PlainLines(stream).emit)
    elif stream.isatty():
        with _Terminal() as terminal:
            yield terminal.emit
    else:
        yield _PlainLines(stream).emit


def as_file(recipe: Recipe) -> Note:
    """A recipe that was given by options, as a file to keep."""
    return Note(to_yaml(recipe))


def planned(plan: Plan) -> Note:
    """One line before a merge starts."""
    demand, flight = plan.demand, plan.flight
    return Note(
        f"{plan.recipe.method.name}: {demand.merged_tensors} tensors to merge, "
        f"{demand.copied_tensors} to copy; reading {format_size(demand.read_bytes)}, writing "
        f"{format_size(demand.write_bytes)}{_spilling(plan)}; about {_duration(plan.seconds)}, "
        f"{format_size(plan.projected_bytes)} of memory, "
        f"{flight.threads} thread{'s' if flight.threads > 1 else ''}"
    )


def _spilling(plan: Plan) -> str:
    nbytes = plan.demand.spill.nbytes
    return f", spilling {format_size(nbytes)} to {plan.chooser.place}" if nbytes else ""


def plan_as_json(plan: Plan, tensors: Sequence[TensorPlan] | None = None) -> str:
    """The plan for a program, with a list of the tensors where they are given."""
    each = {} if tensors is None else {"each_tensor": [one.as_dict() for one in tensors]}
    return json.dumps({**plan.as_dict(), **each})


def describe_plan(plan: Plan, tensors: Sequence[TensorPlan] | None = None) -> str:
    """The plan for a person, with a line for each of the tensors where they are given."""
    demand, flight = plan.demand, plan.flight
    lines = [f"method    {plan.recipe.method.name}{_shared(plan.recipe)}"]
    lines += [f"output    {line}" for line in _adapter(plan)]
    lines += [f"model     {line}" for line in _models(plan)]
    lines += [f"tensors   {line}" for line in _passes(plan)]
    lines += [
        f"tensors   {demand.copied_tensors} copied as they are",
        f"read      {format_size(demand.read_bytes)}",
        f"write     {format_size(demand.write_bytes)} in {_files(len(plan.layouts))}, of which "
        f"{format_size(demand.copied_bytes)} copied inside the kernel",
        *(f"spill     {line}" for line in _spill(plan)),
        f"memory    {format_size(plan.projected_bytes)} projected peak, of "
        f"{format_size(plan.budget_bytes)} allowed",
        *(f"memory    {line}" for line in _pickles(plan)),
        f"threads   {flight.threads}",
        f"time      about {_duration(plan.seconds)}",
    ]
    lines += [f"note      {note}" for note in plan.notes]
    lines += [f"warning   {warning}" for warning in plan.warnings]
    lines += ["", *_in_columns(map(_tensor_cells, tensors))] if tensors else []
    return "\n".join(lines)


def _tensor_cells(one: TensorPlan) -> tuple[str, ...]:
    shape = " x ".join(map(str, one.spec.shape))
    by = f" from {', '.join(one.models)}" if one.models else ""
    spilled = f", {format_size(one.spilled_bytes)} spilled" if one.spilled_bytes else ""
    moved = f"{format_size(one.traffic.read_bytes)}, {format_size(one.traffic.write_bytes)} written"
    return (
        one.spec.name,
        one.spec.dtype.label,
        shape,
        one.action + by,
        f"read {_times(one.traffic.reads)}{_purposes(one.traffic.passes)}: {moved}{spilled}",
    )


def _in_columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Each column as wide as its longest cell."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield "  ".join(padded).rstrip()


def describe_report(report: Report) -> str:
    """What a finished merge did, where it is, and how to load it."""
    load = f'AutoModelForCausalLM.from_pretrained("{report.out}", dtype="auto")'
    if report.kind == "adapter":
        load = f'PeftModel.from_pretrained(base_model, "{report.out}")'
    if report.already_done:
        lines = ["the output is there already, complete, of this recipe and these inputs"]
        lines += [str(report.half_done)] if report.half_done else []
    else:
        lines = [*map(str, report.changes), *describe_missed(report.missed)]
        if report.resumed_bytes:
            size = format_size(report.resumed_bytes)
            lines.append(f"went on with {size} that an earlier run had written")
        lines.append(
            f"{report.tensors} tensors in {_duration(report.seconds)}: read "
            f"{format_size(report.read_bytes)}, wrote {format_size(report.written_bytes)} "
            f"({format_size(report.copied_bytes)} copied unchanged){_spilled(report)}, peak memory "
            f"{format_size(report.peak_bytes)}"
        )
    return "\n".join([*lines, f"output: {report.out}", f"load:   {load}"])


def _spilled(report: Report) -> str:
    return f", spilled {format_size(report.spilled_bytes)}" if report.spilled_bytes else ""


def _pickles(plan: Plan) -> Iterator[str]:
    if plan.pickles_bytes:
        merge, before = format_size(plan.flight.projected_bytes), format_size(plan.pickles_bytes)
        yield f"{before} before the merge, while torch looks into pickles; {merge} in it"


def _adapter(plan: Plan) -> Iterator[str]:
    if plan.adapter is None:
        return
    factored, whole = plan.adapter.factored, plan.adapter.whole
    ranks = sorted({one.rank for one in factored})
    sketched = sum(one.sketched for one in factored)
    most = "at most " if plan.trims else ""
    span = f"rank {most}{ranks[0]}" if len(ranks) == 1 else f"ranks {most}{ranks[0]} to {ranks[-1]}"
    yield f"adapter: {len(factored)} matrices of {span}, {len(whole)} tensors whole"
    if sketched:
        yield f"{sketched} of the matrices approximate updates of full rank"


def _shared(recipe: Recipe) -> str:
    """The parameters that all models share, where they are not what they are by default."""
    defaults = recipe.method.shared
    own = [(n, value) for n, value in recipe.shared.items() if value != defaults[n].default]
    return f": {', '.join(f'{name} {told(value)}' for name, value in own)}" if own else ""


def _models(plan: Plan) -> Iterator[str]:
    for entry, model in zip(plan.recipe.entries, plan.inputs.models, strict=True):
        knobs = ", ".join(f"{name} {told(value)}" for name, value in entry.knobs.items())
        part = "full model"
        if model.adapter:
            updates = len(model.adapter.updates)
            part = f"{updates} of {updates} tensors applied"
        yield f"{model.name}: {f'{knobs}; ' if knobs else ''}{part}"


def _passes(plan: Plan) -> Iterator[str]:
    """For tensors that are read alike: how often, for what, and how much that is for each."""
    for waves, group in plan.demand.passes.items():
        each = format_size(group.read_bytes // group.tensors)
        yield f"{group.tensors} read {_times(1 + len(waves))}{_purposes(waves)}: {each} each"


def _purposes(waves: Passes) -> str:
    names = [" and ".join(dict.fromkeys(map(_purpose, wave))) for wave in waves]
    return f" for {', then '.join(names)}, then to merge" if names else ""


def _purpose(statistic: str) -> str:
    return "its sources" if statistic.startswith("source ") else statistic


def _spill(plan: Plan) -> Iterator[str]:
    """What is kept on disk between reads, model by model, and why."""
    totals = plan.demand.spill
    if not totals.spilled and not totals.again:
        yield "none: every row is made once"
        return
    if totals.spilled:
        yield (
            f"{format_size(totals.nbytes)} in all, {format_size(plan.spilled_at_once)} at once, "
            f"to {plan.chooser.place}"
        )
    for model, total in totals.spilled.items():
        yield f"{plan.recipe.entries[model].name}: {_why(total)}"
    for model, total in totals.again.items():
        yield f"{plan.recipe.entries[model].name}: none, rows are made again; {_why(total)}"


def _why(total: SpillTotal) -> str:
    """What either way costs, in seconds of one thread."""
    return (
        f"{format_size(total.nbytes)} of {total.tensors} tensors, kept "
        f"{_duration(total.seconds_kept)}, made again {_duration(total.seconds_again)}"
    )


def _times(reads: int) -> str:
    return {1: "once", 2: "twice"}.get(reads, f"{reads} times")


def _files(count: int) -> str:
    return f"{count} file{'s' if count > 1 else ''}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _rate_and_eta(event: Progress) -> str:
    seconds = max(event.seconds, 1e-3)
    done = max(event.done - event.resumed, 1)
    left = (event.total - event.done) * seconds / done
    rate = format_size(int(done / seconds))
    memory = format_size(event.resident_bytes)
    return f"{rate}/s, {_duration(left)} left, {memory} of memory"


def _warnings(emit: Emit) -> Emit:
    def emit_warning(event: Event) -> None:
        if isinstance(event, Warned):
            emit(event)

    return emit_warning


def _json_lines(stream: TextIO) -> Emit:
    def emit(event: Event) -> None:
        fields: dict[str, Any] = {"event": type(event).__name__.lower(), **asdict(event)}
        print(json.dumps(fields), file=stream, flush=True)

    return emit


class _PlainLines:
    """A line now and then, as a batch log wants it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = time.monotonic()

    def emit(self, event: Event) -> None:
        if not isinstance(event, Progress):
            prefix = "warning: " if isinstance(event, Warned) else ""
            print(f"{prefix}{event.text}", file=self._stream, flush=True)
            return
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        share = 100 * event.done / max(event.total, 1)
        written = format_size(event.written_bytes)
        line = f"{share:.0f} %, {written} written, {_rate_and_eta(event)}"
        print(line, file=self._stream, flush=True)


class _Terminal:
    """A progress bar with rate, time left and memory; notes above it."""

    def __enter__(self) -> _Terminal:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = [BarColumn(), TextColumn("{task.percentage:>3.0f} %  {task.description}")]
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Bar = Bar(*columns, console=console, transient=True)
        self._task: TaskID | None = None
        self._bar.start()
        return self

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self._bar.console.print(event.text, markup=False)
        elif isinstance(event, Warned):
            self._bar.console.print(f"warning: {event.text}", style="yellow", markup=False)
        else:
            if self._task is None:
                self._task = self._bar.add_task("")
            self._bar.update(
                self._task,
                completed=event.done,
                total=event.total,
                description=_rate_and_eta(event),
            )

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
