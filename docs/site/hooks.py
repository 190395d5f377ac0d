"""What MkDocs does not do by itself: pages out of README, of the commands and of the params.

A link from a page to a file beside docs (code, params) becomes the file's name, after a look
whether it is there: the site shows no code.
"""

import argparse
import inspect
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
HOME = "README.md"
_LINK = re.compile(r"\[([^\]]*)\]\(((?!https?:|#)[^)\s]+)\)")
logger = logging.getLogger("mkdocs.hooks")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the generated pages in the navigation."""
    assert config.nav is not None
    config.nav += [{"Commands": list(command_pages())}, {"Params": list(params_pages())}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, the commands and the params."""
    pages = {HOME: (ROOT / HOME).read_text()} | command_pages() | params_pages()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site, or name a file of the repository."""
    where = ROOT if page.file.src_uri == HOME else ROOT / "docs" / page.file.src_uri
    folder = where if where.is_dir() else where.parent

    def link(match: re.Match[str]) -> str:
        text, (path, hash_, anchor) = match[1], match[2].partition("#")
        target = Path(os.path.normpath(folder / path))
        if not target.exists():
            logger.warning("%s links to %s, which is not there", page.file.src_uri, path)
            return text
        if target == ROOT / HOME:
            there = HOME
        elif target.is_relative_to(ROOT / "docs"):
            there = str(target.relative_to(ROOT / "docs"))
        else:
            return text if text.startswith("`") else f"{text} (`{target.relative_to(ROOT)}`)"
        return f"[{text}]({os.path.relpath(there, Path(page.file.src_uri).parent)}{hash_}{anchor})"

    return _LINK.sub(link, markdown)


def command_pages() -> dict[str, str]:
    """Return a page for each command, out of what `--help` prints."""
    from flows.cli.main import command_parser
    from reward_server.processes.launch import server_parser

    os.environ["COLUMNS"] = "100"
    root = command_parser()
    pages = {"commands/index.md": f"# Commands\n\n{_printed(root)}"}
    for name, parser in _below(root):
        parsers = [(name, server_parser())] if name == "reward-server" else [(name, parser)]
        parsers += [(f"{name} {part}", inner) for part, inner in _below(parser)]
        sections = [f"## calligrapher {title}\n\n{_printed(p)}" for title, p in parsers]
        if len(sections) == 1:
            sections = [sections[0].removeprefix("#")]
        else:
            sections.insert(0, f"# calligrapher {name}")
        pages[f"commands/{name}.md"] = "\n\n".join(sections)
    return pages


def params_pages() -> dict[str, str]:
    """Return a page for each section of a params file, out of its class."""
    from tasks.params.errors import section_of
    from tasks.params.listing import find_keys
    from tasks.params.run_params import RunParams

    sections: dict[str, list[str]] = {}
    for key in find_keys():
        section = key.name.partition(".")[0] if "." in key.name else "run"
        default = "must be given" if key.default is None else f"`{key.default}`"
        row = (f"`{key.name}`", default, key.values.replace("|", "or"), key.meaning)
        sections.setdefault(section, []).append(f"| {' | '.join(_escaped(c) for c in row)} |")
    pages = {}
    for section, rows in sections.items():
        field = RunParams.model_fields.get(section)
        about = RunParams if field is None else section_of(field.annotation)
        text = [f"# {section}", "", inspect.getdoc(about) or "", ""]
        text += ["| key | default | values | meaning |", "|---|---|---|---|", *rows]
        pages[f"params/{section}.md"] = "\n".join(text)
    return pages


def _below(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from sorted(action.choices.items())


def _printed(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.format_help()}```"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
