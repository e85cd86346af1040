"""Brings other Markdown files of the repository into the documentation, with links that work there."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
CHOSEN = ("*.md", "kernels/**/*.md", "checkpoints/README.md", "recipes/serving/*.md")
PAGES = "/generated/repository"  # where they lie, from the documentation's folder
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def chosen_files() -> list[str]:
    """Returns the paths of the files outside `docs` that become pages, from the repository's root."""
    found = {path.relative_to(ROOT).as_posix() for pattern in CHOSEN for path in ROOT.glob(pattern)}
    return sorted(found)


def repository_pages() -> dict[str, str]:
    """Returns path -> text of the pages, with links that work where they lie."""
    return {path: with_page_links((ROOT / path).read_text(encoding="utf-8"), ROOT / path) for path in chosen_files()}


def with_page_links(text: str, file: Path) -> str:
    """Returns a file's Markdown with links to Markdown files of the repository as links to pages.

    Other files of the repository, such as code, have no page: they are named and not linked.

    Raises:
        ValueError: for a link to a file that does not exist.
    """
    pages = set(chosen_files())

    def page_link(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith(("mailto:", "/")):
            return match[0]
        path = (file.parent / target).resolve()
        if path.is_relative_to(DOCS):
            within = path.relative_to(DOCS).as_posix()
            written_later = within.startswith("generated/")
            if not (path.exists() or written_later):
                raise ValueError(f"{file} links to {target}, which does not exist.")
            return f"{image}[{label}](/{within}{anchor})"
        if not path.exists() or not path.is_relative_to(ROOT):
            raise ValueError(f"{file} links to {target}, which does not exist in the repository.")
        within = path.relative_to(ROOT).as_posix()
        if within in pages:
            return f"{image}[{label}]({PAGES}/{within}{anchor})"
        if image or path.suffix == ".png":
            return f"{image}[{label}](<{relative(path)}>)"
        return label if label.strip("`") == within else f"{label} (`{within}`)"

    parts = BLOCK.split(text)  # code blocks are the odd ones
    return "".join(part if index % 2 else LINK.sub(page_link, part) for index, part in enumerate(parts))


def relative(path: Path) -> str:
    """Returns a file outside the documentation's folder as Sphinx finds it from there."""
    return f"/../{path.relative_to(ROOT).as_posix()}"
