// GPTQ's sweep over the columns of a small layer, step by step.
(() => {
  "use strict";
  const { element, shape, picture, labelled, choice, check, slider, widget } = window.bookDraw;
  const { sweep, outputError } = window.bookMaths;
  const { weight, hessian } = window.bookSamples;
  const [CELL_W, CELL_H, LEFT, TOP] = [66, 40, 56, 44];

  function draw(state) {
    const config = { bits: Number(state.bits.value), sym: state.sym.checked, act: state.act.checked, damp: Number(state.damp.value) };
    const made = sweep(weight, hessian, config);
    const step = Number(state.step.value);
    const now = made.steps[step];
    const done = new Set(made.order.slice(0, step));
    const most = Math.max(...weight.flat().map(Math.abs));
    const [rows, columns] = [weight.length, weight[0].length];
    const svg = picture(LEFT + columns * CELL_W + 8, TOP + rows * CELL_H + 8, `做完 ${step} 欄之後的權重矩陣；這一步是第 ${now.column === null ? "—" : now.column + 1} 欄`);
    for (let j = 0; j < columns; j++) {
      const state_ = j === now.column ? "這一欄" : done.has(j) ? "已量化" : "";
      svg.append(shape("text", { x: LEFT + (j + 0.5) * CELL_W, y: 16, "text-anchor": "middle" }, `第 ${j + 1} 欄`));
      svg.append(shape("text", { x: LEFT + (j + 0.5) * CELL_W, y: 33, "text-anchor": "middle", class: "small" }, state_));
      for (let i = 0; i < rows; i++) {
        const value = now.matrix[i][j];
        const moved = value - weight[i][j];
        const strength = Math.min(Math.abs(moved) / (0.25 * most), 1);
        const [cx, cy] = [LEFT + j * CELL_W, TOP + i * CELL_H];
        const box = shape("rect", { x: cx, y: cy, width: CELL_W - 2, height: CELL_H - 2, class: `cell ${moved < 0 ? "down" : "up"}`, "fill-opacity": (0.75 * strength).toFixed(3) });
        box.append(shape("title", {}, `原來 ${weight[i][j].toFixed(4)}，現在 ${value.toFixed(4)}`));
        svg.append(box);
        if (done.has(j)) svg.append(shape("rect", { x: cx + 1, y: cy + 1, width: CELL_W - 4, height: CELL_H - 4, class: j === now.column ? "frame-now" : "frame-done" }));
        svg.append(shape("text", { x: cx + CELL_W / 2 - 1, y: cy + CELL_H / 2 + 4, "text-anchor": "middle" }, value.toFixed(3)));
      }
    }
    for (let i = 0; i < rows; i++) svg.append(shape("text", { x: LEFT - 8, y: TOP + (i + 0.5) * CELL_H + 3, "text-anchor": "end" }, `第 ${i + 1} 列`));
    const last = made.steps.at(-1).matrix;
    const partly = weight.map((row, i) => row.map((w, j) => (done.has(j) ? now.matrix[i][j] : w)));
    return {
      picture: svg,
      numbers: [
        ["step", "做完的欄", step],
        ["left", "輸出誤差，若停在這裡：做完的欄加上補償", outputError(weight, now.matrix, hessian)],
        ["uncompensated", "輸出誤差，同樣的欄但其餘不補償", outputError(weight, partly, hessian)],
        ["gptq", "全部做完：GPTQ", outputError(weight, last, hessian)],
        ["rtn", "全部四捨五入：RTN", outputError(weight, made.rounded, hessian)],
      ],
    };
  }

  let update = () => {};
  const changed = () => update();
  const bar = slider("step", 0, weight[0].length, 0, changed);
  const move = (by) => () => {
    bar.value = Number(bar.value) + by;
    update();
  };
  update = widget(
    document.getElementById("widget-sweep"),
    [
      labelled("步", bar),
      element("button", { type: "button", name: "back", onclick: move(-1) }, "上一步"),
      element("button", { type: "button", name: "forward", onclick: move(1) }, "下一步"),
      labelled("位元數", choice("bits", [2, 3, 4].map((b) => [b, b]), 2, changed)),
      labelled("對稱", check("sym", false, changed)),
      labelled("降序激活排序 (act-order)", check("act", false, changed)),
      labelled("阻尼", choice("damp", [0.001, 0.01, 0.1].map((d) => [d, d]), 0.01, changed)),
    ],
    draw,
  );
})();
