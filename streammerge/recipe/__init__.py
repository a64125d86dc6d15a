"""The recipe: what the user asked for, read from YAML or from options, frozen."""

from streammerge.recipe.options import build_recipe, extraction
from streammerge.recipe.read import parse_recipe, read_recipe
from streammerge.recipe.values import Entry, Recipe, Reference
from streammerge.recipe.write import to_yaml

__all__ = [
    "Entry",
    "Recipe",
    "Reference",
    "build_recipe",
    "extraction",
    "parse_recipe",
    "read_recipe",
    "to_yaml",
]
