"""Hooks of the documentation's site: links to files outside of docs/ become plain text, if the file exists."""

import re
from pathlib import Path
from typing import Any

_PROJECT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace each link to a file of the repository by the file's name.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def named(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        if not (_PROJECT / target).exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {target}, which does not exist")
        return f"{text} (`{target}`)" if target not in text else text

    return _OUTSIDE.sub(named, markdown)
