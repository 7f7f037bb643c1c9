"""Sphinx configuration of the documentation site.

To build it, run `sphinx-build -W -c docs . work/site` in the checkout's root.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "fairseq_evomoe"
root_doc = "docs/index"
# the pages stay in the folders where a code host shows them
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", "recipes/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
default_role = "code"


def setup(app):
    """Escape | in docstrings, so that norms |z| do not become reStructuredText substitutions."""

    def escape(app, what, name, obj, options, lines):
        lines[:] = [line.replace("|", "\\|") for line in lines]

    app.connect("autodoc-process-docstring", escape)
