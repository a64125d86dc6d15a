"""A recipe's YAML -> a Recipe; every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from streammerge.declarations import MethodSpec
from streammerge.errors import ConfigError, Place, Problems, StreammergeError
from streammerge.recipe.document import Document, parse
from streammerge.recipe.entries import SLICE, Draft, Drafts, unique_names
from streammerge.recipe.files import read_text
from streammerge.recipe.parameters import Parameters, check_together, check_weights
from streammerge.recipe.references import identity
from streammerge.recipe.schema import OutputShape, RecipeShape, TokenizerShape, missing, shaped
from streammerge.recipe.setting import Setting, settings
from streammerge.recipe.values import Entry, Recipe, Reference
from streammerge.recipe.varying import Parameter, fixed
from streammerge.recipe.wording import KeyPath, nearest, quoted
from streammerge.sizes import parse_size
from streammerge.words import FLOAT_NAMES, DType


def read_recipe(path: Path, methods: Mapping[str, MethodSpec], problems: Problems) -> Recipe | None:
    """The recipe of a YAML file.

    Adds InputMissing or StorageError when the file cannot be read, and a ConfigError with its place
    for everything that is wrong in it. With problems, the recipe returned is what could be made
    out: good for looking at its folders, not for merging. None when it is not even that.
    """
    text = read_text(path, problems)
    if text is None:
        return None
    return parse_recipe(text, str(path), path.parent, methods, problems)


def parse_recipe(
    text: str, file: str, folder: Path, methods: Mapping[str, MethodSpec], problems: Problems
) -> Recipe | None:
    """The recipe of a YAML text, as `read_recipe`; `file` is what places call it."""
    found = Problems()
    document = parse(text, file, found)
    shape = shaped(RecipeShape, document, (), found) if document else None
    recipe = None
    if document and shape:
        recipe = _Reading(document, shape, folder, methods, found).recipe()
    for problem in sorted(found, key=_order):
        problems.add(problem)
    return recipe


def _order(problem: StreammergeError) -> tuple[int, int]:
    """From the top of the file to its end."""
    place = problem.where
    return (place.line, place.column) if isinstance(place, Place) else (0, 0)


class _Reading:
    """One document on its way to a Recipe."""

    def __init__(
        self,
        document: Document,
        shape: RecipeShape,
        folder: Path,
        methods: Mapping[str, MethodSpec],
        problems: Problems,
    ) -> None:
        self._document = document
        self._shape = shape
        self._folder = folder
        self._methods = methods
        self._problems = problems
        self._warnings: list[tuple[Place, str]] = []
        self._whole = True  # whether every entry could be made out

    def recipe(self) -> Recipe | None:
        reader = Drafts(self._document, self._folder, self._problems)
        base = reader.base(self._shape)
        drafts = reader.all(self._shape, base)
        self._whole = len(drafts) == self._listed()
        output, shard_bytes = self._output()
        self._check_isotropize()
        self._check_compressed(output)
        method = self._method()
        if method is None:
            return None
        drafts = self._without_base(drafts, base, method)
        self._check_count(len(drafts), method)
        if method.needs_base and not self._given("base_model") and not self._shape.adapters:
            self._problems.add(missing(self._document, ("base_model",), "the model to add to"))
        entries, shared = self._parameters(drafts, method)
        if self._shape.name is not None:
            place = self._document.spot(("name",)).key
            self._warnings.append((place, "`name` has no effect: the output's folder names it"))
        return Recipe(
            method=method,
            base=base,
            entries=entries,
            shared=shared,
            out_dtype=self._out_dtype(),
            seed=self._shape.seed or 0,
            tokenizer=self._tokenizer(),
            output=output.path,
            shard_bytes=shard_bytes,
            kind=output.kind,
            rank=output.rank,
            energy=output.energy,
            error=output.error,
            saved=None if output.save is None else tuple(output.save),
            space=self._shape.space or "full",
            isotropize=self._shape.isotropize or False,
            folder=self._folder,
            warnings=tuple(f"{place}: {text}" for place, text in sorted(self._warnings)),
        )

    def _listed(self) -> int:
        """How many entries the document has."""
        paths: tuple[KeyPath, ...] = (("models",), ("adapters",), (*SLICE, "sources"))
        here = [self._document.at(path) for path in paths if path in self._document.spots]
        return sum(len(listed) for listed in here if isinstance(listed, list))

    def _given(self, key: str) -> bool:
        return self._document.root.get(key) is not None

    def _method(self) -> MethodSpec | None:
        name, names = self._shape.merge_method, ", ".join(sorted(self._methods))
        if name is None:
            if not self._given("merge_method"):
                self._problems.add(missing(self._document, ("merge_method",), f"one of {names}"))
            return None
        try:
            found = self._methods.get(name)
        except StreammergeError as problem:
            problem.where = problem.where or self._document.spot(("merge_method",)).value
            self._problems.add(problem)
            return None
        if found is None:
            near = nearest(name, self._methods)
            self._problems.add(
                ConfigError(
                    "merge_method names a method that is not here",
                    where=self._document.spot(("merge_method",)).value,
                    found=quoted(name),
                    expected=f"one of {names}, or a Python file",
                    remedy=f"did you mean `{near}`?" if near else "choose one of these",
                )
            )
            return self._methods[near] if near else None  # by its rules, to show the rest as well
        return found

    def _without_base(
        self, drafts: list[Draft], base: Reference | None, method: MethodSpec
    ) -> list[Draft]:
        """Without the base listed as a model, whose difference from itself is zero."""
        if base is None or not method.on_deltas(has_base=True):
            return drafts
        same = identity(base, self._folder)
        rest = []
        for draft in drafts:
            if draft.adapter or identity(draft.model, self._folder) != same:
                rest.append(draft)
            elif draft.layers is None:  # in a slice it must be listed
                why = f"{method.name} takes it as the base"
                text = f"the base listed as a model has no effect: {why}"
                self._warnings.append((draft.place, text))
        return rest

    def _check_count(self, count: int, method: MethodSpec) -> None:
        fewest, most = method.models
        # Where something else is wrong, too few are most likely a consequence of it.
        enough = count >= fewest or len(self._problems) > 0
        if enough and (most is None or count <= most):
            return
        path = next(
            (key for key in ("models", "adapters", "slices") if getattr(self._shape, key)), None
        )
        listed = "the slice" if self._shape.slices else "`models` and `adapters`"
        limits = f"{fewest} or more" if most is None else f"{fewest} to {most}"
        self._problems.add(
            ConfigError(
                f"{method.name} cannot merge this number of models",
                where=self._document.spot((path,) if path else ()).key,
                found=f"{count} in {listed}, not counting the base",
                expected=f"exactly {fewest}" if most == fewest else limits,
                remedy="list them under `models:` or `adapters:`"
                if count < fewest
                else "remove some, or choose another merge_method",
            )
        )

    def _parameters(
        self, drafts: list[Draft], method: MethodSpec
    ) -> tuple[tuple[Entry, ...], dict[str, Parameter]]:
        parameters = Parameters(method, self._methods, self._problems)
        common = [parameters.of_all(given) for given in self._common()]
        shared = parameters.shared(common, self._document.spot(("parameters",)).value)
        entries = tuple(
            Entry(
                name,
                draft.model,
                draft.adapter,
                parameters.of_model(draft.own, common, draft.place),
                draft.place,
                draft.assume_residual_base,
                draft.layers,
            )
            for name, draft in zip(unique_names(drafts), drafts, strict=True)
        )
        self._warnings += parameters.warnings()
        self._check(entries, shared, method)
        return entries, shared

    def _common(self) -> Iterator[list[Setting]]:
        """The parameters for all models, the innermost first."""
        for place in (SLICE, ()):
            path: KeyPath = (*place, "parameters")
            if path in self._document.spots and isinstance(self._document.at(path), dict):
                yield settings(self._document, path, self._document.at(path))

    def _check(
        self, entries: tuple[Entry, ...], shared: Mapping[str, Parameter], method: MethodSpec
    ) -> None:
        """Whether values go together; planning checks those that differ from tensor to tensor."""
        knobs = [(fixed(entry.knobs), entry.place) for entry in entries]
        for one, place in knobs:
            self._try(partial(check_together, method, one, place))
        weights = [float(one["weight"]) for one, _ in knobs if "weight" in one]
        if self._whole and weights and len(weights) == len(entries):
            place = entries[0].place
            self._try(lambda: check_weights(method, weights, fixed(shared), place))

    def _try(self, check: Callable[[], None]) -> None:
        try:
            check()
        except ConfigError as problem:
            self._problems.add(problem)

    def _out_dtype(self) -> DType | None:
        name = self._shape.out_dtype or self._shape.dtype
        return FLOAT_NAMES[name] if name else None

    def _tokenizer(self) -> str | None:
        """Its source, in whichever of the two forms."""
        if self._shape.tokenizer is None:
            return self._shape.tokenizer_source
        if self._shape.tokenizer_source is not None:
            self._problems.add(
                ConfigError(
                    "tokenizer and tokenizer_source exclude each other",
                    where=self._document.spot(("tokenizer",)).key,
                    found="both",
                    expected="one of them",
                    remedy="remove one of the two",
                )
            )
        longer = shaped(TokenizerShape, self._document, ("tokenizer",), self._problems)
        return longer.source if longer else None

    def _output(self) -> tuple[OutputShape, int | None]:
        """What `output` says, and its shard size in bytes."""
        given = self._shape.output
        if not isinstance(given, dict):
            return OutputShape.model_validate({"path": given}), None
        output = shaped(OutputShape, self._document, ("output",), self._problems)
        if output is None:
            return OutputShape.model_validate({}), None
        of_adapters = ("rank", "energy", "error", "save")
        unfit = ("shard_size",) if output.kind == "adapter" else of_adapters
        wrong = [key for key in unfit if getattr(output, key) is not None]
        for key in wrong:
            self._problems.add(self._unfit(key, output.kind))
        return output, None if wrong else self._shard_bytes(output.shard_size)

    def _unfit(self, key: str, kind: str) -> ConfigError:
        other = "model" if kind == "adapter" else "adapter"
        return ConfigError(
            f"output.{key} does not go with kind: {kind}",
            where=self._document.spot(("output", key)).key,
            found=f"the key {key!r}",
            expected="one file of factors" if kind == "adapter" else "tensors of the base's shapes",
            remedy=f"remove it, or write `kind: {other}`",
        )

    def _shard_bytes(self, size: int | str | None) -> int | None:
        try:
            return None if size is None else parse_size(str(size))
        except ConfigError as problem:
            place = self._document.spot(("output", "shard_size")).value
            self._problems.add(
                ConfigError(
                    f"output.shard_size: {problem.what}",
                    where=place,
                    found=problem.found,
                    expected=problem.expected,
                    remedy=problem.remedy,
                )
            )
            return None

    def _check_isotropize(self) -> None:
        if not self._shape.isotropize or self._shape.space in ("core", "compressed"):
            return
        self._problems.add(
            ConfigError(
                "isotropize needs core space",
                where=self._document.spot(("isotropize",)).key,
                found="isotropize: true without space: core",
                remedy="add `space: core`: there the singular values are few, and known exactly",
            )
        )

    def _check_compressed(self, output: OutputShape) -> None:
        if self._shape.space != "compressed" or (output.kind == "adapter" and output.rank):
            return
        lacks = "a rank" if output.kind == "adapter" else "kind: adapter and a rank"
        self._problems.add(
            ConfigError(
                "compressed space is that of an adapter as output, of its rank",
                where=self._document.spot(("space",)).value,
                found=f"space: compressed without {lacks} under `output`",
                remedy="write `output: {kind: adapter, rank: 32}`, or `space: core`",
            )
        )
