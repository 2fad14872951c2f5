"""Hooks of mkdocs: the site also has the folder results/, which lies beside docs/ in the repository.

Pages link to it as the repository needs it (`../results/…`); in the site it lies one folder deeper.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in sorted((REPOSITORY / "results").rglob("*")):
        if file.is_file():
            name = file.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"(\]\((?:\.\./)*)\.\./results/", r"\1results/", markdown)
