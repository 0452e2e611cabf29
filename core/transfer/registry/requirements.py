"""Whether the requirements of an installed distribution are installed, read from its metadata without imports."""

from __future__ import annotations

import re
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


_PINNED = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(\[[A-Za-z0-9._,-]+\])?==[0-9][0-9A-Za-z.+!-]*")


def install_hint(requirement: str, otherwise: str) -> str:
    """Return the command that installs the package of a plugin, as a file names it.

    Args:
        requirement: Requirement from a file, which may have been edited: anything but a name with a version, such as an
            address or an option of pip, is not repeated. Empty if the plugin was registered by a script.
        otherwise: Text if the requirement is empty.
    """
    if not requirement:
        return otherwise
    if not _PINNED.fullmatch(requirement):
        return "ask for the package of the plugin where the folder comes from: the file does not name a valid one"
    return f"pip install {shlex.quote(requirement)}"


@cache
def unmet(distribution: str, extras: tuple[str, ...]) -> Problem | None:
    """Return the reason that a part of an installed distribution cannot be imported, and the fix; None if it can be.

    An extra's requirements must be installed in a matching version. The other requirements must only be installed: pip
    reports wrong versions of them, which often work. Core's own version must match, because it defines the contracts.

    Args:
        distribution: Name of the distribution.
        extras: Extras that the part needs, from its entry point.
    """
    missing, other = [], []
    package = f"{distribution}[{','.join(extras)}]" if extras else distribution
    for written, requirement, optional in _requirements(distribution, extras):
        if requirement.name == "transfer":  # another project on the package index: never suggest to install it
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
        if requirement.name == CORE_DISTRIBUTION and not fits:  # written for another version of the contracts
            return Problem(
                f"it is written for {written}, and {CORE_DISTRIBUTION} {version} is installed",
                fix=f"pip install {shlex.quote(written)}, or a version of {distribution} "
                f"for {CORE_DISTRIBUTION} {version}",
            )
        if optional and not fits:
            other.append(f"{written}, and {version} is installed")
    if not missing and not other:
        return None
    environment = " in a separate environment" if other else ""  # here it would replace versions that others need
    return Problem(f"it needs {', and '.join(missing + other)}", fix=f"pip install {shlex.quote(package)}{environment}")


def _requirements(distribution: str, extras: tuple[str, ...]) -> Iterator[tuple[str, Requirement, bool]]:
    """Yield the requirements that apply here: the text, the parsed requirement, and whether an extra adds it."""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in metadata.requires(distribution) or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # an old format; the distribution is installed nevertheless
            continue
        marker = requirement.marker
        # An extra's requirements have a marker such as `extra == "onnx"`, which is false without that extra.
        always = marker is None or marker.evaluate({"extra": ""})
        if always or (marker is not None and any(marker.evaluate({"extra": extra}) for extra in extras)):
            yield line.partition(";")[0].strip(), requirement, not always
