"""What a merge on a device cannot do: it is done on the CPU."""

from __future__ import annotations

from streammerge.device import Device, choose
from streammerge.errors import ConfigError
from streammerge.planning.spill import SpillOptions
from streammerge.recipe import Recipe


def device_for(
    recipe: Recipe, wanted: str, spill: SpillOptions, before: str | None
) -> tuple[Device, str | None]:
    """The device, and what the user should know of the choice; `before` as in `device.choose`.

    Raises ConfigError where one that is asked for by name cannot be used, or not for this merge.
    """
    why = _why_not(recipe, spill)
    device, note = choose(wanted, before=before, unfit=why)
    if why is None or device.on_host:
        return device, note
    raise ConfigError(
        f"this merge cannot be done on {device.name}",
        found=why,
        expected="rows of full space, and a method of the catalogue or one in torch",
        remedy="--device cpu",
    )


def _why_not(recipe: Recipe, spill: SpillOptions) -> str | None:
    method = recipe.method
    if method.digest and not method.on_torch:
        return f"the method {method.name} is written for numpy"
    if recipe.kind == "adapter" or recipe.space != "full" or method.space == "cores":
        return "merges of factors as factors are small, and done with numpy"
    if spill.mode == "always":
        return "rows that were made on a device are not spilled"
    return None
