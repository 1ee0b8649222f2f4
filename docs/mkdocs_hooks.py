"""Hooks of the documentation site.

Pages link to files of the repository, such as configs and launch scripts, which are not part of the site. On the site
such a link becomes its text.
"""

import re
from typing import Any

_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+(?:README\.md|CONTRIBUTING\.md|CHANGELOG\.md|configs|launch|tests|dreplica)[^)]*\)"
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links that lead out of the site by their text."""
    return _OUTSIDE.sub(r"\1", markdown)
