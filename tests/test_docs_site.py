"""`make docs`: the site is whole, its links lead somewhere, and commands and params are in it."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("material", reason="builds with MkDocs: install the extra docs")

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def build(folder, out):
    """Build the site of a checkout in `folder`; returns what MkDocs warned of."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    config = load_config(str(folder / "mkdocs.yml"), site_dir=str(out), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    except Abort as error:
        return str(error)
    finally:
        config.plugins.on_shutdown()
    return ""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    assert build(ROOT, out) == ""
    return out


def test_each_command_has_a_page_out_of_its_help(site):
    from flows.cli.main import command_parser

    (commands,) = (a.choices for a in command_parser()._actions if hasattr(a, "_name_parser_map"))
    pages = {path.stem for path in (site / "commands").glob("*.html")}
    assert pages == {*commands, "index"}
    assert "--held-out" in (site / "commands/data.html").read_text()
    assert "--vlm-model-path" in (site / "commands/reward-server.html").read_text()


def test_each_key_of_the_params_stands_on_the_page_of_its_section(site):
    from tasks.params.listing import find_keys

    for key in find_keys():
        section = key.name.partition(".")[0] if "." in key.name else "run"
        assert f"<code>{key.name}</code>" in (site / f"params/{section}.html").read_text(), key.name


def test_the_home_page_is_the_readme_and_the_search_knows_the_glossary(site):
    home = (site / "index.html").read_text()
    assert 'href="formats.html' in home
    assert 'src="docs/images/demo.png"' not in home
    assert 'src="images/demo.png"' in home
    found = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert any("fingerprint" in entry["text"] for entry in found if "glossary" in entry["location"])


def test_each_broken_link_is_a_warning_that_ends_the_build(tmp_path):
    for path in ROOT.iterdir():
        if path.name == "docs":
            shutil.copytree(path, tmp_path / "docs")
        elif path.suffix != ".yml" and path.name not in ("site", ".git"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs/glossary.md").open("a") as page:
        page.write("\n[a](nowhere.md)\n[b](data.md#nowhere)\n[c](../tasks/nothing.py)\n")
    assert build(tmp_path, tmp_path / "out") == "Aborted with 3 warnings in strict mode!"
