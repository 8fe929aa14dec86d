"""Hooks of the site: links from its pages to files outside docs/ work there as they do on disk.

A linked file becomes a page or a picture under repository/; a folder becomes a list of its files.
CONTRIBUTING.md and CHANGELOG.md are pages of their own; a link to README.md leads to the home page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {".gif", ".jpg", ".png", ".svg", ".webp"}
LANGUAGES = {".cpp": "cpp", ".h": "cpp", ".json": "json", ".py": "python", ".toml": "toml"}
#: Files of the root that have a page of their own.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FENCE = re.compile(r"^(```+).*?^\1`*\s*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?=[#)])")


def site_path(path: str) -> str:
    """Path in the site's sources of a file or folder of the repository, both with slashes."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    is_page = Path(path).suffix in {*PICTURES, ".md"}
    return f"repository/{path}" if is_page else f"repository/{path}.md"


def linked(text: str, folder: str) -> Iterator[tuple[re.Match[str], str]]:
    """Links of a page to existing files: the match, and the target's path in the repository.

    Args:
        text: Markdown; links in code blocks are passed over.
        folder: the folder of the page in the repository, relative to its root.
    """
    blocks = [found.span() for found in FENCE.finditer(text)]
    for found in LINK.finditer(text):
        inside = any(start <= found.start() < end for start, end in blocks)
        target = found["target"]
        if inside or urlsplit(target).scheme:
            continue
        path = posixpath.normpath(posixpath.join(folder, target))
        if not path.startswith("..") and (ROOT / path).exists():
            yield found, path


def rewritten(text: str, source: str) -> str:
    """The page at `source` in the repository, with its links as the site has them."""
    folder = posixpath.dirname(source)
    here = posixpath.dirname(site_path(source))
    parts, end = [], 0
    for found, path in linked(text, folder):
        parts += [text[end : found.start()], posixpath.relpath(site_path(path), here or ".")]
        end = found.end()
    return "".join((*parts, text[end:]))


def content_of(path: str) -> str:
    """Markdown of the page that shows a file or folder of the repository."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(
            one.name + "/" * one.is_dir() for one in file.iterdir() if one.name != "__pycache__"
        )
        return "\n".join((f"# {path}/", "", *(f"- `{name}`" for name in names)))
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return rewritten(text, path)
    language = LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n`````{language}\n{text}\n`````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside docs/, and what those files link to."""
    pages = [f"docs/{one.src_uri}" for one in files.documentation_pages()]
    waiting, seen = [*pages, *ROOT_PAGES], {*pages, *ROOT_PAGES}
    while waiting:
        source = waiting.pop()
        if not source.startswith("docs/") and source != "README.md":
            uri = site_path(source)
            if Path(source).suffix in PICTURES:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
            else:
                files.append(File.generated(config, uri, content=content_of(source)))
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            targets = {path for _, path in linked(text, posixpath.dirname(source))}
            outside = {path for path in targets if not path.startswith("docs/")} - seen
            waiting += sorted(outside)
            seen |= outside
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Point a page of docs/ at the copies of the files that it links to."""
    if page.file.generated_by:
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}")
