// The roofline: where batch and bits move a decoding step.
(() => {
  "use strict";
  const { shape, picture, labelled, choice, slider, widget, log } = window.bookDraw;
  const { seconds } = window.bookMaths;
  const { cards, measured } = window.bookRoofline;
  const [W, H, LEFT, TOP, RIGHT, BOTTOM] = [760, 360, 60, 16, 16, 46];
  const [LOW, HIGH] = [0.3, 20000];

  function draw(state) {
    const card = cards[Number(state.card.value)];
    const batch = 2 ** Number(state.batch.value);
    const bits = Number(state.bits.value);
    const [floor, roof] = [LOW * card.bandwidth, card.peak * 2];
    const x = (i) => LEFT + ((log(i) - log(LOW)) * (W - LEFT - RIGHT)) / (log(HIGH) - log(LOW));
    const y = (f) => H - BOTTOM - ((log(f) - log(floor)) * (H - TOP - BOTTOM)) / (log(roof) - log(floor));
    const svg = picture(W, H, `屋頂線：批次 ${batch}、${bits} 位元時，每讀一個位元組做 ${((16 * batch) / bits).toPrecision(3)} 次運算`);
    const ridge = card.peak / card.bandwidth;
    const line = [[LOW, LOW * card.bandwidth], [ridge, card.peak], [HIGH, card.peak]].map(([i, f]) => `${x(i)},${y(f)}`);
    svg.append(shape("polyline", { points: line.join(" "), class: "roof" }));
    for (const tick of [1, 10, 100, 1000, 10000]) {
      svg.append(shape("line", { x1: x(tick), x2: x(tick), y1: TOP, y2: H - BOTTOM, class: "level" }));
      svg.append(shape("text", { x: x(tick), y: H - BOTTOM + 18, "text-anchor": "middle" }, String(tick)));
    }
    for (let f = 1e12; f < roof; f *= 10) {
      if (f < floor) continue;
      svg.append(shape("line", { x1: LEFT, x2: W - RIGHT, y1: y(f), y2: y(f), class: "level" }));
      svg.append(shape("text", { x: LEFT - 6, y: y(f) + 4, "text-anchor": "end" }, String(f / 1e12)));
    }
    svg.append(shape("text", { x: (LEFT + W) / 2, y: H - 8, "text-anchor": "middle" }, "FLOP per byte of weights"));
    svg.append(shape("text", { x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` }, "TFLOP/s at most"));
    for (const [b, name] of [[16, "weight"], [bits, "chosen"]]) {
      const intensity = (16 * batch) / b;
      svg.append(shape("circle", { cx: x(intensity), cy: y(Math.min(intensity * card.bandwidth, card.peak)), r: name === "chosen" ? 8 : 6, class: name }));
    }
    const gain = seconds(batch, 16, card) / seconds(batch, bits, card);
    const near = measured.filter((m) => m.batch === batch && bits > 4 && bits < 5);
    return {
      picture: svg,
      numbers: [
        ["batch", "批次", batch],
        ["intensity", "每讀一個位元組的運算次數", (16 * batch) / bits],
        ["ridge", "從這裡起受計算限制", ridge],
        ["seconds", "每個權重至少要多少秒", seconds(batch, bits, card)],
        ["gain", "比 16 位元最多快幾倍", gain],
        ["measured", "同樣批次量到的倍數", near.length ? near.map((m) => `${m.name}：${m.gain.toFixed(2)}`).join("；") : "沒有紀錄"],
      ],
    };
  }

  let update = () => {};
  const changed = () => update();
  update = widget(
    document.getElementById("widget-roofline"),
    [
      labelled("卡", choice("card", cards.map((c, i) => [i, c.name]), 0, changed)),
      labelled("批次（2 的次方）", slider("batch", 0, 11, 0, changed)),
      labelled("每個權重的位元數", choice("bits", [[16, "16"], [8, "8"], [window.bookRoofline.bits, `4，群組 64 (${window.bookRoofline.bits})`], [3.296875, "3，群組 64 (3.296875)"]], window.bookRoofline.bits, changed)),
    ],
    draw,
  );
})();
