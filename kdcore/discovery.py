"""Discovery: which plugins are installed, read from package metadata without importing any of them."""

from __future__ import annotations

import email
import importlib.metadata
import os
import re
from collections import Counter
from collections.abc import Iterator

import attrs
from attrs import frozen

__all__ = ["GROUP", "PluginInfo", "installed", "restriction"]

GROUP = "kdcore.plugins"


@frozen
class PluginInfo:
    """What a plugin's package metadata says about it.

    :param name: the entry point's name, given to ``--plugin``.
    :param domain: from the keyword ``domain:NAME``; empty when there is none.
    :param paper: the arXiv id from the keyword ``arXiv:ID``; empty when there is none.
    :param version: the distribution's version; for a single file the hash of its text.
    :param distribution: the distribution's name; for a single file its path.
    :param summary: the distribution's one-line description.
    :param entry_point: ``module:class``.
    :param broken: why it cannot be used; empty as long as nothing is known against it.
    """

    name: str
    domain: str
    paper: str
    version: str
    distribution: str
    summary: str
    entry_point: str
    broken: str = ""

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution} {self.version})"


def installed() -> list[PluginInfo]:
    """All installed plugins by name, from metadata alone; names claimed twice are marked as broken.

    The environment variable ``KDCORE_PLUGINS`` (names, comma separated) restricts what is seen.
    """
    found = list(_declared())
    claims = Counter(info.name for info in found)
    plugins = []
    for info in found:
        if claims[info.name] > 1:
            owners = " and ".join(sorted(other.distribution for other in found if other.name == info.name))
            info = attrs.evolve(info, broken=f"the name {info.name!r} is claimed by {owners}: uninstall one of them")
        plugins.append(info)
    if seen := restriction():
        plugins = [info for info in plugins if info.name in seen]
    return sorted(plugins, key=lambda info: (info.name, info.distribution))


def restriction() -> set[str]:
    """The names in ``KDCORE_PLUGINS``; empty when it restricts nothing."""
    return {name.strip() for name in os.environ.get("KDCORE_PLUGINS", "").split(",")} - {""}


def _declared() -> Iterator[PluginInfo]:
    """Read METADATA only of distributions whose entry_points.txt mentions the group."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        except (OSError, ValueError):  # unreadable or undecodable: nobody's plugin
            continue
        headers = {header: " ".join(value.split()) for header, value in email.message_from_string(text).items()}
        name = headers.get("Name", "unnamed")
        if name in seen:  # the first on sys.path is the one that Python imports
            continue
        seen.add(name)
        broken = ""
        try:
            entry_points = [(point.name, point.value) for point in distribution.entry_points if point.group == GROUP]
        except (ValueError, TypeError):
            entry_points = [(name, "")]
            broken = "its entry_points.txt is malformed: install it again"
        for plugin, value in entry_points:
            yield PluginInfo(
                name=plugin,
                domain=_keyword("domain", headers.get("Keywords", "")),
                paper=_keyword("arXiv", headers.get("Keywords", "")),
                version=headers.get("Version", ""),
                distribution=name,
                summary=headers.get("Summary", ""),
                entry_point=value,
                broken=broken,
            )


def _keyword(prefix: str, keywords: str) -> str:
    found = re.search(rf"(?:^|[,\s]){prefix}:([^,\s]+)", keywords, re.IGNORECASE)
    return found[1] if found else ""
