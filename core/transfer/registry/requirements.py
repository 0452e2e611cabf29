"""Whether what a distribution says that it requires is installed: read from metadata, nothing is imported."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from transfer.errors import Problem

if TYPE_CHECKING:
    from packaging.requirements import Requirement

CORE_DISTRIBUTION = "transferkit"
"""The distribution that contains the package ``transfer``."""


@cache
def unmet(distribution: str, extras: tuple[str, ...]) -> Problem | None:
    """Say what keeps a part of an installed distribution from being imported, and the remedy; None: nothing does.

    What an extra asks for must be there in the version that it asks for. Of what the distribution always requires only
    what is not installed at all counts: another version than its metadata allow may well do, and is pip's to refuse.
    Another version of transfer itself does not do: it is that of the contracts.

    Args:
        distribution: Its name.
        extras: Those that the part needs, as its entry point names them.
    """
    missing, other = [], []
    package = f"{distribution}[{','.join(extras)}]" if extras else distribution
    for written, requirement, optional in _requirements(distribution, extras):
        if requirement.name == "transfer":  # on the package index another project has this name: never suggest it
            return Problem(
                f"it requires {written}, and the distribution of this framework is called {CORE_DISTRIBUTION}",
                fix=f"install a version of {distribution} that requires {CORE_DISTRIBUTION}",
            )
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{written}, which is not installed")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        if requirement.name == CORE_DISTRIBUTION and not fits:  # the version of the contracts that it was written for
            return Problem(
                f"it is written for {written}, and {CORE_DISTRIBUTION} {version} is installed",
                fix=f"pip install {shlex.quote(written)}, or a version of {distribution} "
                f"for {CORE_DISTRIBUTION} {version}",
            )
        if optional and not fits:
            other.append(f"{written}, where {version} is installed")
    if not missing and not other:
        return None
    place = " in an environment of its own" if other else ""  # here it would take the place of what others need
    return Problem(f"it needs {', and '.join(missing + other)}", fix=f"pip install {shlex.quote(package)}{place}")


def _requirements(distribution: str, extras: tuple[str, ...]) -> Iterator[tuple[str, Requirement, bool]]:
    """Yield each requirement that holds here: as it is written, parsed, and whether one of the extras adds it."""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in metadata.requires(distribution) or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # of another time; its distribution was installed nevertheless
            continue
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always or (marker is not None and any(marker.evaluate({"extra": extra}) for extra in extras)):
            yield line.partition(";")[0].strip(), requirement, not always
