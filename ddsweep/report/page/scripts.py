"""The scripts that draw the charts of a page: Vega, Vega-Lite and Vega-Embed, from the package vl-convert,
inlined."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddsweep.errors import UserError

__all__ = ["bundle", "page_file", "require_charts"]

_HERE = Path(__file__).parent


def require_charts() -> None:
    """Raises `UserError` if the packages of the extra ``report`` are not installed."""
    lacking = [name for name in ("altair", "vl_convert") if find_spec(name) is None]
    if lacking:
        names = " and ".join(name.replace("_", "-") for name in lacking)
        raise UserError(f"a report needs {names}, which come with the extra: pip install 'ddsweep[report]'")


def bundle() -> str:
    """The scripts as one that sets ``window.vegaEmbed``, without any address to load from.

    ``licences.txt`` has the licences of everything in it.
    """
    import vl_convert

    bundled: Any = vl_convert.javascript_bundle  # its types require a snippet
    text: str = bundled()
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def page_file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
