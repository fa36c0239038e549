"""Write the reference pages that follow from the code.

    python docs/generate.py [--check]

With ``--check`` nothing is written; stale pages are named and the exit status is 1. The penstock that is imported is
documented, so run it in the environment the package is installed in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from reference.api import management_page
from reference.contract import hooks_page
from reference.names import api_page, testing_page, tools_page
from reference.permissions import permissions_page
from reference.settings import configuration_page
from reference.wire import cli_page, endpoints_page, errors_page

DOCS = Path(__file__).parent
NOTE = "<!-- Written by `python docs/generate.py`; change the code and run it again. -->\n"
Page = Callable[[], str]
PAGES: dict[str, Page] = {
    "api.md": management_page,
    "cli.md": cli_page,
    "configuration.md": configuration_page,
    "endpoints.md": endpoints_page,
    "errors.md": errors_page,
    "permissions.md": permissions_page,
    "plugins/api.md": api_page,
    "plugins/hooks.md": hooks_page,
    "plugins/testing-api.md": testing_page,
    "plugins/tools.md": tools_page,
}


def stale_pages() -> dict[str, str]:
    """Return what each page that differs from its file should hold."""
    stale = {}
    for name, page in PAGES.items():
        path, text = DOCS / name, NOTE + page()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale[name] = text
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the reference pages that follow from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    options = parser.parse_args()
    stale = stale_pages()
    for name, text in stale.items():
        if options.check:
            sys.stderr.write(f"docs/{name} is stale: run python docs/generate.py\n")
        else:
            (DOCS / name).write_text(text, encoding="utf-8")
            sys.stderr.write(f"wrote docs/{name}\n")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
