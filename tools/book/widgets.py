"""`{widget} NAME`: the place where a script draws, and the scripts. The directive's text stands there without them."""

from docutils import nodes
from docutils.parsers.rst import Directive

SCRIPTS = {  # of each, in order
    "grid": ["data/samples.js", "widgets/maths.js", "widgets/draw.js", "widgets/grid.js"],
    "sweep": ["data/samples.js", "widgets/maths.js", "widgets/draw.js", "widgets/sweep.js"],
    "roofline": ["data/roofline.js", "widgets/maths.js", "widgets/draw.js", "widgets/roofline.js"],
    "pareto": ["data/pareto.js", "widgets/maths.js", "widgets/draw.js", "widgets/pareto.js"],
}


class Widget(Directive):
    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        env = self.state.document.settings.env
        root = "../" * env.docname.count("/")
        scripts = "".join(f'<script src="{root}_static/{file}"></script>' for file in SCRIPTS[name])
        place = f'<div class="widget" id="widget-{name}" data-root="{root}">{" ".join(self.content)}</div>{scripts}'
        return [nodes.raw("", place, format="html")]
