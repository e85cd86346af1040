"""Settings of the documentation, which `make docs` builds into out/docs."""

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import reference_pages  # noqa: E402  files beside this one
from repository_links import with_page_links  # noqa: E402

import retention_gates  # noqa: E402

project = "retention-gates"
author = "The maintainers of retention-gates"
release = version = retention_gates.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["*.py"]
html_theme = "furo"
html_title = f"retention-gates {release}"
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False}

myst_heading_anchors = 3
myst_links_external_new_tab = False

default_role = "literal"  # docstrings write code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # arguments are described in words, and the signatures would be pages long
autodoc_preserve_defaults = True

# No page is fetched from another project while these are built.
nitpick_ignore_regex = [("py:.*", r"(torch|transformers|peft|collections|pathlib|typing|numpy)\b.*")]

# The notebook is run as it is built, and an error in it fails the build.
nb_execution_mode = "force"
nb_execution_timeout = 170
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars


def read_source(app: Any, name: str, source: list[str]) -> None:
    """Turns links to the repository's other files into links between pages; written pages have theirs already."""
    if not name.startswith(("generated/", "notebooks/")):
        source[0] = with_page_links(source[0], FOLDER / f"{name}.md")


def setup(app: Any) -> None:
    app.connect("builder-inited", lambda app: reference_pages.write(FOLDER / "generated"))
    app.connect("source-read", read_source)
