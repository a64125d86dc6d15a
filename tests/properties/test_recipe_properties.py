"""What holds for every recipe: writing and reading are inverse, and no text crashes the reader."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.declarations import Knob, MethodSpec
from streammerge.errors import Place, Problems
from streammerge.recipe import Entry, Recipe, Reference, parse_recipe, to_yaml
from streammerge.recipe.varying import Case, Varying
from streammerge.words import DType

TIES = MethodSpec(
    "ties",
    print,
    "deltas",
    "rows",
    {"weight": Knob(1.0), "density": Knob(1.0, above=0, up_to=1, nothing_at=0)},
    {"lambda": Knob(1.0), "normalize": Knob(True)},
    {},
)
FOLDER = Path("/nowhere")
PLACE = Place("cfg.yaml", 1, 1)

# Letters that make text look like numbers, tags, comments, quotes, references and other YAML.
text = st.text("ab1e0.-+@:#!&*[]{}'\"%|> ~,=?é😀", min_size=1, max_size=8) | st.sampled_from(
    [
        "no",
        "null",
        "true",
        "1e3",
        ".5",
        "0777",
        "1:30",
        "<<",
        "~",
        "-",
        "2001-01-01",
        ".nan",
        "=",
        "1_0",
    ]
)
references = st.builds(Reference, text, st.none() | text, st.just(PLACE))
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1, exclude_min=True)


def varying(value: st.SearchStrategy[float]) -> st.SearchStrategy[Varying]:
    """A gradient, or filters and then one, as canonical as the reader makes them."""
    gradients = st.lists(value, min_size=1, max_size=3).map(tuple)
    last, filtered = st.builds(Case, st.none(), gradients), st.builds(Case, text, gradients)
    several = st.lists(filtered.filter(lambda case: case.filter != "*"), max_size=2)
    return st.builds(lambda cases, end: Varying((*cases, end)), several, last)


knobs = st.fixed_dictionaries(
    {"weight": numbers | varying(numbers), "density": shares | varying(st.floats(0, 1))}
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    base = draw(references)
    pairs = st.tuples(st.just(base) | references, references) | st.tuples(references, st.none())
    drawn = [pair for pair in draw(st.lists(pairs, min_size=1, max_size=4)) if pair != (base, None)]
    drawn = drawn or [(base, Reference("lora", None, PLACE))]
    names = draw(st.lists(text, min_size=len(drawn), max_size=len(drawn), unique=True))
    entries = [
        Entry(name, model, adapter, draw(knobs), PLACE, adapter is not None and draw(st.booleans()))
        for name, (model, adapter) in zip(names, drawn, strict=True)
    ]
    adapter = draw(st.booleans())
    rank = draw(st.none() | st.integers(1, 512)) if adapter else None
    space = draw(st.sampled_from(["full", "core", "compressed"] if rank else ["full", "core"]))
    share = st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True)
    return Recipe(
        method=TIES,
        base=base,
        entries=tuple(entries),
        shared={"lambda": draw(numbers), "normalize": draw(st.booleans())},
        out_dtype=draw(st.none() | st.sampled_from([DType.F32, DType.BF16])),
        seed=draw(st.integers(0, 2**63 - 1)),
        output=draw(st.none() | text),
        tokenizer=draw(st.none() | st.just("base")),
        shard_bytes=None if adapter else draw(st.none() | st.integers(1, 2**63 - 1)),
        kind="adapter" if adapter else "model",
        rank=rank,
        energy=draw(share) if adapter else None,
        error=draw(share) if adapter else None,
        saved=draw(st.sampled_from([None, (), ("norms",)])) if adapter else None,
        space=space,  # type: ignore[arg-type]
        isotropize=space != "full" and draw(st.booleans()),
        folder=FOLDER,
        warnings=(),
    )


def parse(written: str) -> tuple[Recipe | None, Problems]:
    problems = Problems()
    return parse_recipe(written, "cfg.yaml", FOLDER, {"ties": TIES}, problems), problems


@settings(max_examples=200, deadline=None)
@given(recipes())
def test_what_is_written_reads_back_to_an_equal_recipe(recipe: Recipe) -> None:
    again, problems = parse(to_yaml(recipe))
    problems.raise_any()
    assert again == recipe


@settings(max_examples=200, deadline=None)
@given(recipes(), st.data())
def test_a_damaged_recipe_is_read_or_refused_with_a_place(
    recipe: Recipe, data: st.DataObject
) -> None:
    whole = to_yaml(recipe)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 5)))
    damage = data.draw(st.text("ab:-{}[]&*!'\"\n\t #1.", max_size=4))
    found, problems = parse(whole[:start] + damage + whole[stop:])
    assert found is not None or len(problems) > 0
    for problem in problems:
        assert isinstance(problem.where, Place) and problem.remedy


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_no_text_crashes_the_reader(anything: str) -> None:
    found, problems = parse(anything)
    assert found is None
    assert len(problems) > 0
    str(list(problems)).encode("utf-8", "backslashreplace")
