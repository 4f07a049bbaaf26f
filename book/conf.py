"""Sphinx's configuration of the book. The source folder is the repository: `make book`, or `python -m tools.book`."""

from tools.book.contents import DOCUMENTS, LEFT_OUT
from tools.book.search import CharacterPairs

project = "LLM 模型壓縮實作課程"
author = "the course's authors"
html_title = project
html_short_title = project
language = "zh_TW"
root_doc = "README"

extensions = ["myst_nb", "sphinx_copybutton", "tools.book.extension"]
include_patterns = DOCUMENTS
exclude_patterns = LEFT_OUT
templates_path = ["templates"]
nb_execution_mode = "off"  # the outputs are those of the last recording
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 6
myst_heading_slug_func = "tools.book.links.slug"
# What GitHub does not know of must not change how a document is read.
myst_disable_syntax = ["myst_line_comment", "myst_block_break", "myst_target", "myst_role", "substitution"]
myst_dmath_double_inline = True
suppress_warnings = ["myst.xref_missing", "myst.header", "myst.iref_ambiguous", "mystnb.unknown_mime_type"]
highlight_language = "none"
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = [
    "search.js",
    "mermaid-start.js",
    ("tables.js", {"defer": "defer"}),
    ("language.js", {"defer": "defer"}),
]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_search_language = CharacterPairs.lang
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
mathjax_path = "vendor/mathjax.js"  # of PyPI's sphinx-mathjax-offline: glyphs are drawn as SVG, so no fonts are fetched
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}
copybutton_selector = "div.highlight:not(.nohighlight) pre"
FONTS = "'Noto Sans TC', 'PingFang TC', 'Microsoft JhengHei', 'Noto Sans CJK TC', 'WenQuanYi Micro Hei', sans-serif"
html_theme_options = {
    "light_css_variables": {
        "font-stack": f"system-ui, -apple-system, 'Segoe UI', {FONTS}",
        "font-stack--monospace": f"ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace, {FONTS}",
    },
    "navigation_with_keys": True,
    "top_of_page_buttons": [],
}
