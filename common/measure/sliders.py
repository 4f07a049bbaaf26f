"""A picture that follows a slider where somebody can move it, and otherwise a few of its positions."""

import os
from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure


def live() -> bool:
    """Whether a Jupyter server started this kernel: then a front end can move a slider; a script cannot."""
    return "JPY_SESSION_NAME" in os.environ


def explore(draw: Callable[[float], Figure], name: str, positions: list[float], step: float = 0.05) -> None:
    """Show draw(value) for a slider from the first to the last of `positions`; without a front end at each of them."""
    if not live():
        for value in positions:
            draw(value)
            plt.show()
        return

    def show(value: float) -> None:
        draw(value)
        plt.show()

    middle = positions[len(positions) // 2]
    limits = {"min": positions[0], "max": positions[-1], "step": step, "value": middle}
    slider = ipywidgets.FloatSlider(**limits, description=name, continuous_update=False)
    display(ipywidgets.interactive(show, value=slider))
