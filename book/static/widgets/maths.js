// The course's quantization in JavaScript, as common/methods/grid.py, quantization.py and compensation.py have it.
// A test runs both on the same weights.
window.bookMaths = (() => {
  "use strict";
  const f32 = Math.fround;

  // Halves to even, as torch rounds.
  function roundEven(x) {
    const low = Math.floor(x);
    const rest = x - low;
    if (rest !== 0.5) return Math.round(x);
    return low % 2 === 0 ? low : low + 1;
  }

  // The nearest float16: 11 bits of mantissa, exponents from -14 on.
  function f16(x) {
    if (x === 0) return 0;
    const exponent = Math.max(Math.floor(Math.log2(Math.abs(x))), -14);
    const step = 2 ** (exponent - 10);
    return roundEven(x / step) * step;
  }

  // 1.0, 0.98, ... 0.5: how much of the range the search for a clipping limit tries.
  const SHRINK = Array.from({ length: 26 }, (_, i) => f32(i < 13 ? 1 + f32(i * f32(-0.02)) : 0.5 - f32((25 - i) * f32(-0.02))));

  function code(w, { scale, zero }, maxCode) {
    return Math.min(Math.max(roundEven(f32(f32(w / scale) + zero)), 0), maxCode);
  }

  function value(w, grid, maxCode) {
    return f32((code(w, grid, maxCode) - grid.zero) * grid.scale);
  }

  // Scale and zero point of one group of weights.
  function findGrid(weights, { bits, sym, mse }) {
    const maxCode = 2 ** bits - 1;
    let low = Math.min(...weights, 0);
    const high = Math.max(...weights, 0);
    let scale, zero;
    if (sym) {
      scale = f32((2 * Math.max(-low, high)) / maxCode);
      zero = (maxCode + 1) / 2;
    } else {
      low = Math.min(low, f32(-high / (maxCode - 1)));
      scale = f32(f32(high - low) / maxCode);
      zero = Math.min(Math.max(roundEven(f32(-low / Math.max(scale, 1e-12))), 1), maxCode);
    }
    scale = Math.max(scale, f32(1e-7));
    if (mse) {
      let best = Infinity;
      const whole = scale;
      for (const shrink of SHRINK) {
        const candidate = { scale: f32(whole * shrink), zero };
        const error = weights.reduce((sum, w) => sum + (value(w, candidate, maxCode) - w) ** 2, 0);
        if (error < best) [best, scale] = [error, candidate.scale];
      }
    }
    return { scale: f16(scale), zero, maxCode };
  }

  // RTN of one row: its groups' grids, codes, values, and the mean squared error.
  function quantizeRow(row, config) {
    const width = config.group === -1 ? row.length : config.group;
    const grids = [];
    for (let start = 0; start < row.length; start += width) grids.push(findGrid(row.slice(start, start + width), config));
    const at = (i) => grids[Math.floor(i / width)];
    const codes = row.map((w, i) => code(w, at(i), at(i).maxCode));
    const values = codes.map((c, i) => f32((c - at(i).zero) * at(i).scale));
    const error = row.reduce((sum, w, i) => sum + (values[i] - w) ** 2, 0);
    const power = row.reduce((sum, w) => sum + w * w, 0);
    return { width, grids, codes, values, mse: error / row.length, relative: Math.sqrt(error / power) };
  }

  const transpose = (m) => m[0].map((_, j) => m.map((row) => row[j]));

  function cholesky(m) {
    const n = m.length;
    const lower = m.map(() => new Array(n).fill(0));
    for (let i = 0; i < n; i++)
      for (let j = 0; j <= i; j++) {
        let sum = m[i][j];
        for (let k = 0; k < j; k++) sum -= lower[i][k] * lower[j][k];
        lower[i][j] = i === j ? Math.sqrt(sum) : sum / lower[j][j];
      }
    return lower;
  }

  function inverse(m) {
    const n = m.length;
    const work = m.map((row, i) => [...row, ...row.map((_, j) => (i === j ? 1 : 0))]);
    for (let i = 0; i < n; i++) {
      const pivot = work[i][i];
      work[i] = work[i].map((x) => x / pivot);
      for (let k = 0; k < n; k++) {
        if (k === i) continue;
        const factor = work[k][i];
        work[k] = work[k].map((x, j) => x - factor * work[i][j]);
      }
    }
    return work.map((row) => row.slice(n));
  }

  // U of H⁻¹ = UᵀU, H damped.
  function inverseCholesky(hessian, damp) {
    const mean = hessian.reduce((sum, row, i) => sum + row[i], 0) / hessian.length;
    return transpose(cholesky(inverse(hessian.map((row, i) => row.map((x, j) => (i === j ? x + damp * mean : x))))));
  }

  // tr(E H Eᵀ) / tr(W H Wᵀ): how wrong the layer's output is, as a share of it.
  function outputError(weight, replaced, hessian) {
    const form = (rows) =>
      rows.reduce((sum, r) => sum + r.reduce((s, x, i) => s + x * hessian[i].reduce((t, h, j) => t + h * r[j], 0), 0), 0);
    return form(weight.map((row, i) => row.map((w, j) => replaced[i][j] - w))) / form(weight);
  }

  // GPTQ, one state per column: the matrix as it stands after `step` columns, and the column of that step.
  function sweep(weight, hessian, { bits, sym = false, act = false, damp = 0.01 }) {
    const order = hessian.map((_, j) => j);
    if (act) order.sort((a, b) => hessian[b][b] - hessian[a][a]);
    const grids = weight.map((row) => findGrid(row, { bits, sym, mse: false }));
    const factor = inverseCholesky(order.map((i) => order.map((j) => hessian[i][j])), damp);
    const current = weight.map((row) => [...row]);
    const steps = [{ column: null, matrix: current.map((row) => [...row]) }];
    order.forEach((column, i) => {
      current.forEach((row, r) => {
        const replaced = value(row[column], grids[r], grids[r].maxCode);
        const error = (row[column] - replaced) / factor[i][i];
        row[column] = replaced;
        for (let k = i + 1; k < order.length; k++) row[order[k]] -= error * factor[i][k];
      });
      steps.push({ column, matrix: current.map((row) => [...row]) });
    });
    const rounded = weight.map((row, r) => row.map((w) => value(w, grids[r], grids[r].maxCode)));
    return { order, grids, steps, rounded };
  }

  // The roofline: seconds for one weight, reading it or multiplying with it, whichever takes longer.
  const seconds = (batch, bits, { bandwidth, peak }) => Math.max(bits / 8 / bandwidth, (2 * batch) / peak);

  // Of points {x, y}, small y better: those that none beats in both. `more`: large x is better, else small.
  function front(points, more) {
    const sign = more ? -1 : 1;
    const sorted = [...points].sort((a, b) => sign * (a.x - b.x) || a.y - b.y);
    let best = Infinity;
    return sorted.filter((point) => point.y < best && ((best = point.y), true));
  }

  return { findGrid, quantizeRow, sweep, outputError, inverseCholesky, seconds, front, f16, SHRINK };
})();
