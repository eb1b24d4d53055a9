"""Sphinx: the repository is the source, so that every document is written once and its links hold on both sides.

make docs  ->  docs/_build/html, warnings are errors
"""

project = "paxattn"
copyright = "the paxattn authors"
root_doc = "docs/index"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["docs/**", "notebooks/*.ipynb", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]
exclude_patterns = ["docs/_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = "paxattn"
html_copy_source = False
html_static_path = []

nb_execution_mode = "off"  # the outputs that are kept are shown; the tests run the notebooks
nb_mime_priority_overrides = [("html", "text/html", 0)]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

default_role = "code"
autodoc_typehints = "none"  # shapes are in the signatures
autodoc_default_options = {"members": True, "undoc-members": False, "member-order": "bysource"}
napoleon_use_rtype = False


def _pictures_stay_pictures(app, what, name, obj, options, lines):
    """A module's docstring is a picture in characters: it is shown as it stands."""
    if what == "module" and lines:
        lines[:] = ["::", "", *("   " + line for line in lines), ""]


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _pictures_stay_pictures)
