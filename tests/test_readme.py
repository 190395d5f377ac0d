"""README leads to every page of docs by one click, and names no file that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINKS = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())


def test_every_page_is_one_click_away():
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - set(LINKS) == set()


def test_what_it_links_to_is_there():
    assert [link for link in LINKS if not (ROOT / link).exists()] == []
