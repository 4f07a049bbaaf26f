// Everything that was measured: perplexity against size or speed, what no other beats, and where each comes from.
(() => {
  "use strict";
  const { element, shape, picture, labelled, choice, widget, shown, log } = window.bookDraw;
  const { front } = window.bookMaths;
  const all = window.bookPoints;
  const [W, H, LEFT, TOP, RIGHT, BOTTOM] = [760, 400, 60, 14, 20, 46];
  const root = document.getElementById("widget-pareto").dataset.root;

  // Only what one protocol measured on one device may share a picture.
  const key = (p) => [p.device, p.source, p.protocol].join("｜");
  const groups = [...new Set(all.map(key))].map((k) => all.filter((p) => key(p) === k)).filter((g) => g.some((p) => p.bytes || p.speed));
  const sized = (group) => group.filter((p) => p.bytes).length; // the page opens with what its first axis can show
  groups.sort((a, b) => sized(b) - sized(a));

  const within = (value, least, most) => (least === "" || (value !== null && value >= Number(least))) && (most === "" || (value !== null && value <= Number(most)));

  function chosen(state) {
    const group = groups[Number(state.group.value)];
    const size = (p) => p.bytes && p.bytes / 1e6;
    return group.filter((p) => within(size(p), "", state.size.value) && within(p.speed, state.speed.value, "") && p.name.toLowerCase().includes(state.text.value.toLowerCase()));
  }

  function draw(state) {
    const speed = state.axis.value === "speed";
    const kept = chosen(state);
    const points = kept.map((p) => ({ ...p, x: speed ? p.speed : p.bytes && p.bytes / 1e6, y: p.perplexity })).filter((p) => p.x);
    const best = new Set(front(points, speed).map((p) => p.name));
    const svg = picture(W, H, `${points.length} 個模型的困惑度與${speed ? "速度" : "大小"}，${best.size} 個在前緣`);
    if (points.length) {
      const xs = points.map((p) => p.x);
      const ys = points.map((p) => p.y);
      const [x0, x1] = [Math.min(...xs) * 0.94, Math.max(...xs) * 1.06];
      const [y0, y1] = [log(Math.min(...ys)) - 0.03, log(Math.max(...ys)) + 0.05];
      const x = (v) => LEFT + ((v - x0) * (W - LEFT - RIGHT)) / (x1 - x0);
      const y = (v) => H - BOTTOM - ((log(v) - y0) * (H - TOP - BOTTOM)) / (y1 - y0);
      for (let i = 0; i <= 4; i++) {
        const [a, b] = [x0 + ((x1 - x0) * i) / 4, 10 ** (y0 + ((y1 - y0) * i) / 4)];
        svg.append(shape("line", { x1: x(a), x2: x(a), y1: TOP, y2: H - BOTTOM, class: "level" }));
        svg.append(shape("line", { x1: LEFT, x2: W - RIGHT, y1: y(b), y2: y(b), class: "level" }));
        svg.append(shape("text", { x: x(a), y: H - BOTTOM + 18, "text-anchor": "middle" }, a.toPrecision(3)));
        svg.append(shape("text", { x: LEFT - 6, y: y(b) + 4, "text-anchor": "end" }, b.toPrecision(3)));
      }
      svg.append(shape("text", { x: (LEFT + W) / 2, y: H - 8, "text-anchor": "middle" }, speed ? "tokens/s, one sequence" : "weights, MB"));
      svg.append(shape("text", { x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` }, "perplexity (log)"));
      const line = front(points, speed).map((p) => `${x(p.x)},${y(p.y)}`);
      svg.append(shape("polyline", { points: line.join(" "), class: "roof" }));
      for (const p of points) {
        const link = shape("a", { href: root + p.page });
        const dot = shape("circle", { cx: x(p.x), cy: y(p.y), r: 6, class: best.has(p.name) ? "chosen" : "weight" });
        dot.append(shape("title", {}, `${p.name}：困惑度 ${p.y.toFixed(2)}，${shown(p.x)} ${speed ? "tokens/s" : "MB"}`));
        link.append(dot);
        svg.append(link);
      }
    }
    const cell = (value, digits) => element("td", {}, value === null ? "—" : value.toFixed(digits));
    const rows = [...kept].sort((a, b) => a.perplexity - b.perplexity).map((p) =>
      element("tr", best.has(p.name) ? { class: "best" } : {},
        element("th", { scope: "row" }, `${best.has(p.name) ? "★ " : ""}${p.name}`), cell(p.perplexity, 2), cell(p.bytes && p.bytes / 1e6, 1), cell(p.speed, 1),
        element("td", {}, element("a", { href: root + p.record }, "紀錄"), " · ", element("a", { href: root + p.page }, "量它的那一步"))),
    );
    const heads = ["模型（★ 在前緣）", "困惑度", "權重，MB", "token/s（一句）", "來源"].map((text) => element("th", { scope: "col" }, text));
    const table = element("div", { class: "table-wrapper", tabindex: "0", role: "region", "aria-label": "圖裡的模型" }, element("table", { class: "docutils" }, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)));
    return { picture: svg, numbers: [["shown", "列出的模型", kept.length], ["drawn", "畫得出的點", points.length], ["front", "在前緣", [...best].join("、") || "—"]], below: [table] };
  }

  let update = () => {};
  const changed = () => update();
  const field = (name, attributes) => element("input", { name, oninput: changed, ...attributes });
  const groupName = (g) => `${g[0].device}：${g[0].source}（${g[0].protocol}；${g.length} 筆）`;
  update = widget(
    document.getElementById("widget-pareto"),
    [
      labelled("裝置、紀錄與協定", choice("group", groups.map((g, i) => [i, groupName(g)]), 0, changed)),
      labelled("橫軸", choice("axis", [["size", "大小"], ["speed", "速度"]], "size", changed)),
      labelled("權重不超過，MB", field("size", { type: "number", min: 0, step: 10, value: "" })),
      labelled("至少，token/s", field("speed", { type: "number", min: 0, step: 10, value: "" })),
      labelled("名稱含有", field("text", { type: "search", value: "" })),
    ],
    draw,
  );
})();
