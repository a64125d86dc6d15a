"""The recipe: what the user asked for, read from YAML or from options, frozen."""

from streammerge.recipe.options import build_recipe, extraction
from streammerge.recipe.parameters import check_together, check_weights
from streammerge.recipe.read import parse_recipe, read_recipe
from streammerge.recipe.values import Entry, Recipe, Reference
from streammerge.recipe.varying import Case, Varying, at, fixed, plain, told
from streammerge.recipe.write import to_yaml

__all__ = [
    "Case",
    "Entry",
    "Recipe",
    "Reference",
    "Varying",
    "at",
    "build_recipe",
    "check_together",
    "check_weights",
    "extraction",
    "fixed",
    "parse_recipe",
    "plain",
    "read_recipe",
    "to_yaml",
    "told",
]
