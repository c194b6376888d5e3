"""Hooks of MkDocs: README.md becomes the front page, recipes become files of the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to but is not below docs/."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for recipe in (ROOT / "train" / "recipes").glob("*.toml"):
        files.append(File.generated(config, f"recipes/{recipe.name}", abs_src_path=str(recipe)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links to recipes into the site."""
    return markdown.replace("](../train/recipes/", "](recipes/")


def on_page_content(html: str, **_: object) -> str:
    """Keep the name of an option in one line, and a figure with its error."""
    html = html.replace(" ± ", "&nbsp;±&nbsp;")
    option, whole = re.compile(r"--[a-z][\w.-]*"), r'<span class="option">\g<0></span>'
    return re.sub(r"<code>[^<]*</code>", lambda code: option.sub(whole, code[0]), html)
