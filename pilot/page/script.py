"""The script that draws the charts: Vega, Vega-Lite and Vega-Embed out of the package vl-convert-python."""

import functools

from pilot.errors import PilotError

VEGA_LITE = "6.4"  # that the specifications are written for


class NoScript(PilotError):
    """The package that brings the plotting script is not installed."""


@functools.cache
def vega_script() -> str:
    """The three libraries as one script of 0.9 MB, from the installed package; takes seconds of one core."""
    try:
        import vl_convert
    except ImportError:
        raise NoScript(
            "pilot report draws with vl-convert-python, which is not installed here: "
            "uv sync --extra report, or pip install 'pilot[report]'"
        ) from None
    # the package's types forget that `snippet` may be missing: the libraries as globals
    script: str = vl_convert.javascript_bundle(None, vl_version=VEGA_LITE)  # type: ignore[arg-type]
    return script
