"""README leads to every page of docs by one click, and names no file that is not there."""

import re
from pathlib import Path

from tasks.params.run_params import load_params

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)#]+)", README)


def test_every_page_is_one_click_away():
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - set(LINKS) == set()


def test_what_it_links_to_is_there():
    assert [link for link in LINKS if not (ROOT / link).exists()] == []


def test_the_round_whose_stage_it_makes_anew_is_one_that_keeps_its_weights():
    params = load_params(ROOT / "params/tiny-nft.yaml")
    (number,) = re.findall(r"rerun tiny-nft round-(\d{4})/update", README)
    # The update starts from the round before it.
    assert params.rounds - params.retention.keep_last < int(number) < params.rounds
