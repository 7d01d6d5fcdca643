"""Lets mkdocs see the repository as its files link to one another, above docs/ as well.

Pages of PAGES become pages of the site, pictures that they show are copied, and any other file that a page links to is
shown as a page of its source.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "training/README.md": "training/index.md",
    "training/paper/README.md": "training/paper/index.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)(?=[#)])")


def _place(path: str) -> str:
    """The place in the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path) or (path if path.endswith(".png") else f"source/{path}.md")


def _relinked(markdown: str, page: str) -> tuple[str, set[str]]:
    """The text of a page of the repository with links as the site has them, and the files that it links to."""
    linked = set()

    def replace(match: re.Match) -> str:
        path = os.path.normpath(PurePosixPath(page).parent / match[0])
        if not (ROOT / path).is_file():
            return match[0]  # mkdocs warns
        linked.add(path)
        return os.path.relpath(_place(path), PurePosixPath(_place(page)).parent)

    return LINK.sub(replace, markdown), linked


def _source(path: str) -> str:
    text, kind = (ROOT / path).read_text(), Path(path).suffix[1:]
    return text if kind == "md" else f"# {path}\n\n````{kind}\n{text}\n````\n"


def on_files(files, config):
    """Adds what lies outside docs/: the pages, and whatever pages link to."""
    own = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    linked = set().union(*(_relinked((ROOT / page).read_text(), page)[1] for page in [*PAGES, *own]))
    for path in sorted({*PAGES, *linked}):
        if not path.startswith("docs/"):
            text = {} if path.endswith(".png") else {"content": _source(path)}
            files.append(File.generated(config, _place(path), **(text or {"abs_src_path": str(ROOT / path)})))
    return files


def on_page_markdown(markdown, page, **_):
    """Turns links between files of the repository into links between pages of the site."""
    where = {place: path for path, place in PAGES.items()}
    path = where.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("source/"):
        path = page.file.src_uri.removeprefix("source/").removesuffix(".md")
        return markdown if not path.endswith(".md") else _relinked(markdown, path)[0]
    return _relinked(markdown, path)[0]
