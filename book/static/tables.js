// Tables: a click on a column's name sorts by it; where columns are of several devices, one device at a time.
(() => {
  "use strict";
  const number = (text) => {
    const found = text.replace(/[,\s]/g, "").replace(/−/g, "-").match(/^[^\d\-+]*([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)/i);
    return found ? Number(found[1]) : NaN;
  };

  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // what has no number stands last
    return Number.isNaN(x) ? a.localeCompare(b, "zh-Hant") : x - y;
  };

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 3 || rows.some((row) => row.cells.length !== heads.length)) return;
    heads.forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const numeric = rows.filter((row) => !Number.isNaN(number(row.cells[column].textContent))).length > rows.length / 2;
      const values = rows.map((row) => row.cells[column].textContent.trim());
      if (!numeric && Math.max(...values.map((value) => value.length)) > 40) return; // prose has no order
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.title = "依這一欄排序";
      const inner = head.querySelector("p") || head;
      button.append(...inner.childNodes);
      inner.append(button);
      button.addEventListener("click", () => {
        const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const blank = (row) => Number.isNaN(number(row.cells[column].textContent));
        const sorted = [...rows].sort((a, b) => {
          if (numeric && blank(a) !== blank(b)) return blank(a) ? 1 : -1;
          return sign * compare(a.cells[column].textContent.trim(), b.cells[column].textContent.trim());
        });
        table.tBodies[0].append(...sorted);
      });
    });
  }

  function byDevice(table) {
    const heads = [...table.tHead.rows[0].cells];
    const device = heads.map((head) => (head.textContent.trim().match(/[（(]([^（）()]*(?:CPU|NVIDIA|GPU )[^（）()]*)[）)]$/) || [])[1] || "");
    const devices = [...new Set(device.filter(Boolean))];
    if (devices.length < 2) return;
    const choice = document.createElement("div");
    choice.className = "devices";
    choice.setAttribute("role", "group");
    choice.setAttribute("aria-label", "只看一個裝置");
    const buttons = ["", ...devices].map((name) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name || "全部裝置";
      button.setAttribute("aria-pressed", String(!name));
      button.addEventListener("click", () => {
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        for (const row of table.rows)
          device.forEach((of, column) => (row.cells[column].hidden = Boolean(name && of && of !== name)));
      });
      return button;
    });
    choice.append(...buttons);
    (table.closest(".table-wrapper") || table).before(choice);
  }

  document.addEventListener("DOMContentLoaded", () => {
    for (const table of document.querySelectorAll("article table")) {
      if (!table.tHead || !table.tBodies.length || table.closest(".highlight")) continue;
      byDevice(table);
      sortable(table);
      const wrapper = table.closest(".table-wrapper");
      if (wrapper && wrapper.scrollWidth > wrapper.clientWidth) {
        wrapper.tabIndex = 0; // so that arrow keys scroll it
        wrapper.setAttribute("role", "region");
        wrapper.setAttribute("aria-label", "可左右捲動的表格");
      }
    }
  });
})();
