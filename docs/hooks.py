"""Steps of the documentation build.

The page of the command line is written from the options of the commands, and the card of the
model that ships with the package becomes a page.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_COMMANDS = "<!-- commands -->"
_CARD = "src/performers/proteins/data/performers-protein-small/README.md"
_CARD_PAGE = "performers-protein-small.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the model card to the pages."""
    card = Path(config.config_file_path).parent / _CARD
    files.append(File.generated(config, _CARD_PAGE, abs_src_path=str(card)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark of the commands by tables, and paths of the model card by its page."""
    markdown = markdown.replace(f"../{_CARD}", _CARD_PAGE)
    if _COMMANDS in markdown:
        from typer.main import get_command

        from performers.cli.app import app

        text = "\n".join(_sections(get_command(app), "performers"))
        markdown = markdown.replace(_COMMANDS, text)
    return markdown


def _sections(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for child, subcommand in command.commands.items():
            yield from _sections(subcommand, f"{name} {child}")
        return
    positional = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option"]
    usage = " ".join([name, *map(_name, positional), "[OPTIONS]"])
    yield f"\n## {name}\n\n{command.help}\n\n```\n{usage}\n```\n\n| | default | |\n|---|---|---|"
    for item in [*positional, *options]:
        yield f"| `{_name(item)}` | {_default(item)} | {_cell(item.help or '')} |"


def _name(item: Any) -> str:
    if item.param_type_name == "option":
        return ", ".join([*item.opts, *item.secondary_opts])
    return str(item.metavar or item.name.upper())


def _default(item: Any) -> str:
    if item.required:
        return "required"
    return "" if item.default in (None, False, "") else f"`{item.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
