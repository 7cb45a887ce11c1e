"""The documentation builds as a site: strictly, without a network, and a browser needs none to show it."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from places import RANKS, TO_COME

import tl_persona

ROOT = Path(__file__).resolve().parents[2]

_OFFLINE = """
import socket, sys
def refuse(*address):
    raise RuntimeError(f"the build opened a connection: {address}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


class _Resources(HTMLParser):
    """Collects what a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        loads = tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object")
        if tag == "link":
            loads = found.get("rel") not in ("canonical", "next", "prev")
        if loads:
            self.fetched += [value for name in ("src", "href", "data", "srcset") if (value := found.get(name))]


def _read(page: Path) -> _Resources:
    parser = _Resources()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", _OFFLINE, "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_a_network(site: Path) -> None:
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert {"index.html", "tutorial.html", "reference/api.html", "security.html", "contributing.html"} <= pages


def test_every_page_has_a_place_in_the_navigation() -> None:
    named = re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert len(named) == len(set(named))
    assert pages - set(named) == set(), "pages without a place under nav: in mkdocs.yml"


@pytest.mark.slow
def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    fetched = [(page.name, address) for page in pages for address in _read(page).fetched]
    assert any(address.endswith(".css") for _, address in fetched)
    assert [found for found in fetched if re.match(r"(https?:)?//", found[1])] == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s+)['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
def test_the_api_page_documents_every_public_class_and_function(site: Path) -> None:
    from test_public_docstrings import NO_EXAMPLE_OF_ITS_OWN, OBJECTS

    ids = _read(site / "reference" / "api.html").ids
    wanted = {f"tl_persona.{name}" for name in OBJECTS if name not in NO_EXAMPLE_OF_ITS_OWN}
    assert len(wanted) > 20 and wanted <= ids
    assert {"tl_persona.errors.TLPersonaError", "tl_persona.errors.CorruptFileError"} <= ids
    assert set(tl_persona.__all__) >= set(NO_EXAMPLE_OF_ITS_OWN)


@pytest.mark.slow
def test_no_hidden_test_code_is_shown(site: Path) -> None:
    pages = [page.read_text(encoding="utf-8") for page in site.rglob("*.html")]
    assert not [page for page in pages if "build_tiny" in re.sub("<[^>]+>", "", page)]


def test_the_drawing_of_the_architecture_has_the_places_by_their_ranks() -> None:
    drawing = ET.parse(ROOT / "docs" / "contributing" / "architecture.svg")
    texts = [
        text.text or "" for text in drawing.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "places"
    ]
    ranks = [[place for place in places if place not in TO_COME] for places in RANKS]
    assert [text.split() for text in texts] == [places for places in ranks if places], (
        "docs/contributing/architecture.svg: add a new place's name to the line of its rank"
    )
