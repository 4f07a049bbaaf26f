"""The book's widgets in a real Chromium: a control changes the picture, and the numbers are those of `common`."""

import itertools
import math

import pytest
import torch

from common.methods.compensation import inverse_cholesky
from common.methods.grid import SHRINK_STEPS
from common.methods.quantization import QuantizeConfig, gptq, rtn
from tests.book_tools import open_page, require_sphinx

require_sphinx()

from tools.book import measured, samples

pytestmark = pytest.mark.slow
PARETO_FIELDS = ("device", "source", "protocol")


@pytest.fixture
def widget(site, page):
    """widget(name): the page that has it, and functions to set a control, to read a number and the picture."""

    class Opened:
        def __init__(self, name: str):
            open_page(page, site / "book" / f"{name}.html")
            self.place = page.locator(f"#widget-{name}")

        def set(self, **values):
            for name, value in values.items():
                control = self.place.locator(f"[name={name}]")
                if isinstance(value, bool):
                    control.set_checked(value)
                elif control.evaluate("c => c.tagName") == "SELECT":
                    control.select_option(str(value))
                else:
                    control.fill(str(value))

        def number(self, name: str) -> float:
            return float(self.text(name))

        def text(self, name: str) -> str:
            return self.place.locator(f"[data-number={name}]").get_attribute("data-value")

        def picture(self) -> str:
            return self.place.locator("svg.picture").inner_html()

    yield Opened
    assert page.complaints == []


def test_one_row_is_quantized_as_common_does(widget):
    opened = widget("grid")
    row = torch.tensor([samples.read()["row"]])
    for bits, group, sym, mse in itertools.product((2, 3, 4, 8), (16, 64, -1), (False, True), (False, True)):
        opened.set(bits=bits, group=group, sym=sym, mse=mse)
        quantized = rtn(row, QuantizeConfig(bits=bits, group_size=group, sym=sym, mse=mse))
        wrong = quantized.dequantize() - row
        # 1e-5: sums of float32 squares, in another order.
        assert opened.number("mse") == pytest.approx(wrong.square().mean().item(), rel=1e-5)
        assert opened.number("relative") == pytest.approx((wrong.norm() / row.norm()).item(), rel=1e-5)
        assert opened.number("scale") == quantized.scale[0, 0].item()
        assert opened.number("zero") == quantized.zero[0, 0].item()


def test_each_control_changes_the_picture_of_the_row(widget):
    opened = widget("grid")
    usual = {"bits": 2, "group": 64, "sym": False, "mse": False}
    opened.set(**usual)
    before = opened.picture()
    for change in ({"bits": 3}, {"group": -1}, {"sym": True}, {"mse": True}):
        opened.set(**change)
        assert opened.picture() != before, change
        opened.set(**usual)
        assert opened.picture() == before


def test_the_search_for_a_range_tries_what_common_tries(widget, page):
    widget("grid")
    assert page.evaluate("bookMaths.SHRINK") == pytest.approx(SHRINK_STEPS, rel=1e-7)


def test_the_sweep_ends_where_gptq_ends(widget, page):
    opened = widget("sweep")
    data = samples.read()
    weight, hessian = torch.tensor(data["weight"]), torch.tensor(data["hessian"])
    power = ((weight @ hessian) * weight).sum()

    def error(matrix):
        wrong = matrix - weight
        return (((wrong @ hessian) * wrong).sum() / power).item()

    for bits, sym, act, damp in itertools.product((2, 3, 4), (False, True), (False, True), (0.01, 0.1)):
        opened.set(bits=bits, sym=sym, act=act, damp=damp)
        config = QuantizeConfig(bits=bits, group_size=-1, sym=sym, desc_act=act, mse=False, damp_percent=damp)
        ours = gptq(weight, hessian, config).dequantize()
        theirs = page.evaluate(
            "c => bookMaths.sweep(bookSamples.weight, bookSamples.hessian, c).steps.at(-1).matrix",
            {"bits": bits, "sym": sym, "act": act, "damp": damp},
        )
        assert torch.allclose(torch.tensor(theirs), ours, rtol=1e-5, atol=1e-7)
        # 1e-3: the errors of the sum are those of float32 in `common`, of float64 in the browser.
        assert opened.number("gptq") == pytest.approx(error(ours), rel=1e-3)
        assert opened.number("rtn") == pytest.approx(error(rtn(weight, config).dequantize()), rel=1e-3)
    factor = page.evaluate("bookMaths.inverseCholesky(bookSamples.hessian, 0.01)")
    assert torch.allclose(torch.tensor(factor), inverse_cholesky(hessian, 0.01), rtol=1e-3, atol=1e-4)


def test_the_sweep_goes_step_by_step(widget):
    opened = widget("sweep")
    pictures = {opened.picture()}
    for step in range(1, 11):
        opened.place.locator("[name=forward]").click()
        assert opened.number("step") == step
        pictures.add(opened.picture())
    assert len(pictures) == 11
    assert opened.number("left") == pytest.approx(opened.number("gptq"), rel=1e-12)


def test_the_roofline_is_that_of_the_theorys_figure(widget):
    opened = widget("roofline")
    figure = measured.figure()
    pictures = set()
    for power, bits in itertools.product((0, 5, 8, 11), (16, 8, figure.BITS)):
        opened.set(batch=power, bits=bits)
        seconds = figure.seconds(2**power, bits)
        assert opened.number("seconds") == pytest.approx(seconds, rel=1e-12)
        assert opened.number("gain") == pytest.approx(figure.seconds(2**power, 16) / seconds, rel=1e-12)
        pictures.add(opened.picture())
    assert len(pictures) == 12


def front(points, more: bool) -> set[str]:
    """Those that no other beats: at least as good in both, and better in one."""
    better = (lambda a, b: a >= b) if more else (lambda a, b: a <= b)
    return {
        name
        for name, x, y in points
        if not any(better(x2, x) and y2 <= y and (x2, y2) != (x, y) for _, x2, y2 in points)
    }


def test_the_front_is_what_no_other_beats_and_filters_narrow_it(widget):
    opened = widget("pareto")
    chosen = opened.place.locator("[name=group] option:checked").inner_text()
    group = [p for p in measured.points() if all(p[field] in chosen for field in PARETO_FIELDS)]
    points = [(p["name"], p["bytes"] / 1e6, p["perplexity"]) for p in group if p["bytes"]]
    assert opened.number("drawn") == len(points) > 10
    assert set(opened.text("front").split("、")) == front(points, more=False)
    before = opened.picture()
    opened.set(size=150)
    small = [p for p in points if p[1] <= 150]
    assert opened.number("drawn") == len(small) < len(points)
    assert set(opened.text("front").split("、")) == front(small, more=False)
    assert opened.picture() != before
    opened.set(text="gptq")
    assert 0 < opened.number("shown") == sum("gptq" in name for name, _, _ in small)


def test_by_speed_the_fastest_is_in_front(widget):
    opened = widget("pareto")
    opened.set(axis="speed")
    labels = opened.place.locator("[name=group] option").all_inner_texts()
    number = next(i for i, label in enumerate(labels) if "quantization · 04-Deploy" in label)
    opened.set(group=number)
    group = [p for p in measured.points() if all(p[field] in labels[number] for field in PARETO_FIELDS)]
    points = [(p["name"], p["speed"], p["perplexity"]) for p in group if p["speed"]]
    assert set(opened.text("front").split("、")) == front(points, more=True)


def test_the_widgets_layer_is_the_embedded_models():
    committed, fresh = samples.read(), samples.samples()
    assert {key: fresh[key] for key in fresh if key != "hessian"} == {k: committed[k] for k in fresh if k != "hessian"}
    # 1e-3: activations of ten blocks in float32, whose sums each processor orders in its own way.
    assert torch.allclose(torch.tensor(committed["hessian"]), torch.tensor(fresh["hessian"]), rtol=1e-3, atol=1e-4)


def test_every_point_leads_to_its_record_and_its_step(site):
    points = measured.points()
    assert len(points) > 100
    ids = {}
    for point in points:
        for target in (point["record"], point["page"]):
            file, _, place = target.partition("#")
            text = ids.setdefault(file, (site / file).read_text(encoding="utf-8"))
            assert not place or f'id="{place}"' in text, target
    assert all(math.isfinite(point["perplexity"]) for point in points)
