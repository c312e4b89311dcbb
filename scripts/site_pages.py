"""Pages of the site that no file in docs/ holds: README, CONTRIBUTING and the examples.

mkdocs calls these hooks while ``make docs`` builds; ``--strict`` then checks every link.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Files outside of docs/ that are pages, and what they are called there.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "weaver/resources/corpus/README.md": "corpus.md",
}
EXAMPLES = "examples.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from files outside of docs/."""
    texts = {name: (ROOT / file).read_text(encoding="utf-8") for file, name in PAGES.items()}
    for name, text in {**texts, EXAMPLES: examples()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links out of docs/ to the pages of the site."""
    return relinked(markdown)


def relinked(text: str) -> str:
    """The text with its links as they are on the site."""

    def page(match: re.Match[str]) -> str:
        target = match[1].rstrip("/").removeprefix("../")
        named = EXAMPLES if target == "examples" else PAGES.get(target, target)
        return f"]({named.removeprefix('docs/')}{match[2] or ''})"

    return re.sub(r"\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)", page, text)


def examples() -> str:
    """Every example as a page section; of a notebook its cells."""
    parts = ["# Examples", ""]
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix == ".py":
            parts += [f"## {path.name}", "", fenced(path.read_text(encoding="utf-8")), ""]
        elif path.suffix == ".ipynb":
            parts += [f"## {path.name}", ""]
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                source = "".join(cell["source"])
                parts += [fenced(source) if cell["cell_type"] == "code" else source, ""]
    return "\n".join(parts)


def fenced(code: str) -> str:
    """A block of Python."""
    return f"```python\n{code.rstrip()}\n```"
