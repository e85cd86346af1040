"""Makes the figures of all pictures, saved as PNG or as SVG that takes on a page's colours."""

import html
import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

BLACK = "#000000"  # of letters and lines: in a page they have the colour of the page's own letters


def require_matplotlib() -> None:
    """Raises ValueError if pictures can't be drawn here."""
    if find_spec("matplotlib") is None:
        raise ValueError("Pictures need the package matplotlib: pip install 'retention-gates[demo]'.")


def new_figure(width: float, height: float) -> Any:
    """A figure of its own, so that neither pyplot's state nor its choice of back end is touched. Inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path | IO[bytes], dpi: int = 150) -> None:
    figure.savefig(path, dpi=dpi, format="png")


def svg_of(figure: Any, description: str | None = None) -> str:
    """The figure as an element for a page, see-through, with its black in the page's colour of letters.

    Letters are shapes, so that nothing is clipped where a font is missing; a description is for who cannot see them.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # parts that are named alike in every figure; ids of clip paths, markers and letters are unique or the same
    text = re.sub(r' id="(figure|axes|patch|text|matplotlib\.axis|xtick|ytick|line2d|LineCollection)_\d+"', "", text)
    # what has no colour of its own, as black letters have none, takes the element's
    told = 'aria-hidden="true"' if description is None else f'role="img" aria-label="{html.escape(description)}"'
    return text.replace(BLACK, "currentColor").replace("<svg ", f'<svg fill="currentColor" {told} ', 1)
