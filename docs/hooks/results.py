"""Puts ``results/`` on the site, so that pages link to it as they do in the repository."""

import re
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[2] / "results"
REPOSITORY_LINK = re.compile(r"\]\((?:\.\./)+results/")


def on_files(files, config):
    """Add every file of ``results/``."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of a page to ``results/`` of the repository lead to the site's."""
    up = "../" * page.file.src_uri.count("/")
    return REPOSITORY_LINK.sub(f"]({up}results/", markdown)
