// What the widgets share: controls, SVG, numbers.
window.bookDraw = (() => {
  "use strict";
  const SPACE = "http://www.w3.org/2000/svg";

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== false) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function shape(name, attributes = {}, text = "") {
    const made = document.createElementNS(SPACE, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  }

  const picture = (width, height, label) =>
    shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "picture" });

  function labelled(text, control) {
    return element("label", {}, element("span", {}, text), control);
  }

  const choice = (name, options, chosen, change) =>
    element(
      "select",
      { name, onchange: change },
      ...options.map(([value, text]) => element("option", { value, selected: String(value) === String(chosen) }, text)),
    );

  const slider = (name, min, max, value, change, step = 1) =>
    element("input", { type: "range", name, min, max, step, value, oninput: change });

  const check = (name, checked, change) => element("input", { type: "checkbox", name, checked, onchange: change });

  // The numbers beside a picture; each can be read by its name.
  function numbers(values) {
    return values.map(([name, text, value]) =>
      element("div", typeof value === "number" ? {} : { class: "wide" }, element("dt", {}, text), element("dd", { "data-number": name, "data-value": value }, shown(value))),
    );
  }

  function shown(value) {
    if (typeof value !== "number") return String(value);
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(3);
    return String(Number(value.toPrecision(5)));
  }

  // Controls, picture and numbers in a widget's place; `draw(state)` returns {picture, numbers, below}.
  function widget(place, controls, draw) {
    const form = element("form", { class: "controls", onsubmit: (event) => event.preventDefault() }, ...controls);
    const frame = element("div", { class: "frame" });
    const list = element("dl", { class: "numbers", "aria-live": "polite" });
    const below = element("div", { class: "below" });
    place.replaceChildren(form, frame, list, below);
    const update = () => {
      const made = draw(form.elements);
      frame.replaceChildren(made.picture);
      list.replaceChildren(...numbers(made.numbers));
      below.replaceChildren(...(made.below || []));
    };
    update();
    return update;
  }

  const log = (x) => Math.log10(x);
  return { element, shape, picture, labelled, choice, slider, check, widget, shown, log };
})();
