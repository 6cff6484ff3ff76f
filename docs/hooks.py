"""Small repairs of the built pages, and what is on them of the command line."""

import argparse
import re

from face_fusion_pipeline.cli import HelpFormatter, build_parser


LIST, HELP = "<!-- list of all commands -->", "<!-- help of all commands -->"


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """All commands and their options, from the parsers, for the page that has the marks."""
    if HELP not in markdown:
        return markdown
    parser = build_parser()
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return markdown.replace(LIST, list_of_commands(subparsers)).replace(HELP, help_of_commands(subparsers))


def list_of_commands(subparsers: argparse._SubParsersAction) -> str:  # type: ignore[type-arg]
    """Markdown: a table of the commands with one line about each, which leads to its options."""
    rows = [f"| [{c.dest}](#face-fusion-{c.dest}) | {c.help} |" for c in subparsers._choices_actions]
    return "\n".join(["| `face-fusion` | |", "|---|---|", *rows])


def help_of_commands(subparsers: argparse._SubParsersAction) -> str:  # type: ignore[type-arg]
    """Markdown: a heading and the help of each command, as wide as a page."""
    sections = []
    for name, command in subparsers.choices.items():
        command.formatter_class = lambda prog: HelpFormatter(prog, width=95)
        sections.append(f"## face-fusion {name}\n\n```text\n{command.format_help().strip()}\n```")
    return "\n\n".join(sections)


def on_page_content(html: str, **kwargs: object) -> str:
    """Docstrings name classes as [`Name`]; without a page of definitions the brackets would stay."""
    return re.sub(r"\[(<code>[\w.]+</code>)\]", r"\1", html)
