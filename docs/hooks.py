"""Small repairs of the built pages, and what is on them of the command line."""

import argparse
import re

from face_fusion_pipeline.cli import HelpFormatter, build_parser


COMMANDS = "<!-- help of all commands -->"


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """The options of all commands, for the page that has the mark."""
    return markdown.replace(COMMANDS, help_of_commands()) if COMMANDS in markdown else markdown


def help_of_commands() -> str:
    """Markdown: a heading and the help of each command, as wide as a page."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sections = []
    for name, command in commands.choices.items():
        command.formatter_class = lambda prog: HelpFormatter(prog, width=95)
        sections.append(f"## face-fusion {name}\n\n```text\n{command.format_help().strip()}\n```")
    return "\n\n".join(sections)


def on_page_content(html: str, **kwargs: object) -> str:
    """Docstrings name classes as [`Name`]; without a page of definitions the brackets would stay."""
    return re.sub(r"\[(<code>[\w.]+</code>)\]", r"\1", html)
