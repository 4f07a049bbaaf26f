// One row of weights on a grid.
(() => {
  "use strict";
  const { shape, picture, labelled, choice, check, widget } = window.bookDraw;
  const { quantizeRow } = window.bookMaths;
  const row = window.bookSamples.row;
  const [W, H, LEFT, TOP] = [760, 320, 44, 12];

  function draw(state) {
    const config = { bits: Number(state.bits.value), group: Number(state.group.value), sym: state.sym.checked, mse: state.mse.checked };
    const made = quantizeRow(row, config);
    const most = Math.max(...row.map(Math.abs)) * 1.08;
    const x = (i) => LEFT + ((i + 0.5) * (W - LEFT - 8)) / row.length;
    const y = (w) => TOP + ((most - w) * (H - 2 * TOP)) / (2 * most);
    const svg = picture(W, H, `${row.length} 個權重與它們的格點：${config.bits} 位元，相對誤差 ${made.relative.toPrecision(3)}`);
    made.grids.forEach((grid, g) => {
      const [from, to] = [x(g * made.width) - 2, x((g + 1) * made.width - 1) + 2];
      for (let code = 0; code <= grid.maxCode; code++) {
        const level = (code - grid.zero) * grid.scale;
        if (Math.abs(level) <= most) svg.append(shape("line", { x1: from, x2: to, y1: y(level), y2: y(level), class: code === grid.zero ? "level zero" : "level" }));
      }
      if (g) svg.append(shape("line", { x1: from, x2: from, y1: TOP, y2: H - TOP, class: "between" }));
    });
    row.forEach((w, i) => {
      svg.append(shape("line", { x1: x(i), x2: x(i), y1: y(w), y2: y(made.values[i]), class: "error" }));
      const dot = shape("circle", { cx: x(i), cy: y(w), r: 2.4, class: "weight" });
      dot.append(shape("title", {}, `w[${i}] = ${w.toFixed(4)} → ${made.values[i].toFixed(4)}（格 ${made.codes[i]}）`));
      svg.append(dot);
    });
    for (const tick of [-0.5, 0, 0.5].filter((t) => Math.abs(t) < most)) svg.append(shape("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    const bits = config.bits + (16 + config.bits) / made.width;
    return {
      picture: svg,
      numbers: [
        ["mse", "均方誤差", made.mse],
        ["relative", "相對誤差 ‖w − ŵ‖ / ‖w‖", made.relative],
        ["scale", "第一組的縮放因子", made.grids[0].scale],
        ["zero", "第一組的零點", made.grids[0].zero],
        ["bits", "每個權重實際的位元數", bits],
      ],
    };
  }

  let update = () => {};
  const changed = () => update();
  update = widget(
    document.getElementById("widget-grid"),
    [
      labelled("位元數", choice("bits", [2, 3, 4, 8].map((b) => [b, b]), 4, changed)),
      labelled("群組大小", choice("group", [[16, 16], [32, 32], [64, 64], [-1, `整列 (${row.length})`]], 64, changed)),
      labelled("對稱", check("sym", false, changed)),
      labelled("搜尋截斷的範圍 (mse)", check("mse", false, changed)),
    ],
    draw,
  );
})();
