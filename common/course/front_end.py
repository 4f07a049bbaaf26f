"""Whether somebody is there to move a slider: a notebook shows sliders in Jupyter, pictures when it is recorded."""

import os
from collections.abc import Callable

SERVED_BY = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")  # set by Jupyter's server, VS Code and Colab


def has_front_end() -> bool:
    """Whether a front end that displays widgets started this kernel; a program that runs notebooks is none."""
    return any(os.environ.get(name) for name in SERVED_BY)


def sliders(draw: Callable, examples: list[dict], **ranges) -> None:
    """Let the reader call `draw` by sliders; without a front end it is called with each of `examples`.

    ranges: argument → what `ipywidgets.interact` makes a slider or a menu of: (lowest, highest, step), or choices.
    """
    if not has_front_end():
        for example in examples:
            draw(**example)
        return
    from ipywidgets import interact

    interact(draw, **ranges)
