"""Steps of the documentation build.

The page of the command line is written from the options of the commands, and the cards of the
models that ship with the package become pages.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_COMMANDS = "<!-- commands -->"
_MODELS = ("performers-protein-small", "performers-protein-relatives")
_DATA = "src/performers/proteins/data"


def on_files(files: Files, config: Any) -> Files:
    """Add the model cards to the pages."""
    folder = Path(config.config_file_path).parent / _DATA
    for model in _MODELS:
        card = folder / model / "README.md"
        files.append(File.generated(config, f"{model}.md", abs_src_path=str(card)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark of the commands by tables, and paths from and to model cards by pages."""
    markdown = markdown.replace("../../../../../docs/", "")
    for model in _MODELS:
        # Of pages, and of the card of the other model.
        for path in (f"../{_DATA}/{model}", f"../{model}"):
            markdown = markdown.replace(f"{path}/README.md", f"{model}.md")
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
