"""What `mkdocs build` does beside mkdocs: pages that live outside docs/, and what only the site or only GitHub shows.

The pages are plain Markdown that GitHub shows too. So the site is made from them as they are, with four changes:

- README, CHANGELOG and other pages of the checkout become pages of the site (`ELSEWHERE`), and links to them follow;
- links to any other file of the checkout show its path, because the site does not have it; those of public names go to
  their documentation on the API page;
- comments that hold only `:::` lines and their options are opened: GitHub hides them, mkdocstrings makes API
  documentation of them. All other comments go;
- code that begins with `>>>` is marked as a Python session.

Nothing is fetched, and nothing is written into docs/.
"""

import posixpath
import re
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "in-short.md",
    "SECURITY.md": "security.md",
    "tl_persona/data/README.md": "bundled-personas.md",
}
"""Pages outside docs/, by their path in the checkout, and what they are called on the site."""

_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_COMMENT = re.compile(r"<!--(.*?)-->\n?", re.DOTALL)
_SESSION = re.compile(r"^```(?:python)?\n(?=>>> )", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside docs/."""
    for path, name in ELSEWHERE.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give one page as the site shows it."""
    markdown = _COMMENT.sub(_opened, markdown)
    markdown = _SESSION.sub("```pycon\n", markdown)
    homes = {name: path for path, name in ELSEWHERE.items()}
    home = homes.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda link: _followed(link, home, page.file.src_uri), markdown)


def _opened(comment: re.Match[str]) -> str:
    lines = comment[1].strip().splitlines()
    return comment[1] if lines and all(line.startswith((":::", "    ")) for line in lines if line) else ""


def _followed(link: re.Match[str], home: str, page: str) -> str:
    """A link as the site has it: `home` is the page's path in the checkout, `page` its path on the site."""
    text, target = link[1], link[2]
    path, _, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link[0]
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
    name = ELSEWHERE.get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
    if name is None:
        if not (ROOT / wanted).exists():
            return link[0]  # mkdocs says what is wrong with it
        if text.strip("`") in _documented():
            return f"[{text}][tl_persona.{text.strip('`')}]"
        return text if text.strip("`") == wanted else f"{text} (`{wanted}`)"
    relative = posixpath.relpath(name, posixpath.dirname(page) or ".")
    return f"[{text}]({relative}{'#' + anchor if anchor else ''})"


@cache
def _documented() -> set[str]:
    """The public names that have docstrings on the API page."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    return set(re.findall(r"^::: tl_persona\.(\w+)$", page, re.MULTILINE))
