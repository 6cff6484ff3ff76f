"""Small repairs of the built pages."""

import re


def on_page_content(html: str, **kwargs: object) -> str:
    """Docstrings name classes as [`Name`]; without a page of definitions the brackets would stay."""
    return re.sub(r"\[(<code>[\w.]+</code>)\]", r"\1", html)
