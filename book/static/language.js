// The English door. Between a page and its English one: to the section that says the same. Elsewhere: headings in
// English, which an English page has always; it has no button.
(() => {
  "use strict";
  const BILINGUAL = /^(.*?)\s*\(([A-Za-z\d][^()]*(?:\([^()]*\)[^()]*)*)\)((?: · [^·()]+)*)\s*$/s;
  const UNITS = [["分鐘", "min"], ["分", "points"], ["一個晚上", "an evening"]]; // of an exercise
  const button = () => document.querySelector("button.language");
  const English = () => !button() || localStorage.getItem("headings") === "en";

  function headings() {
    const shown = document.querySelectorAll("article h1, article h2, article h3, article h4, .toc-tree a, .sidebar-tree a");
    for (const element of shown) {
      const text = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
      if (!element.dataset.chinese) {
        const whole = text.map((node) => node.textContent).join("").trim();
        const found = whole.match(BILINGUAL);
        if (!found || text.length !== 1) continue;
        const label = (found[1].match(/^(?:(?:Step|Lab|第)[\s\d.]+(?:· \d+)?(?:章)?|\d+(?= ·))/) || [""])[0].replace(/^第\s*([\d.]+)\s*章/, "Chapter $1");
        const rest = UNITS.reduce((said, [chinese, english]) => said.replace(chinese, english), found[3]);
        element.dataset.chinese = whole;
        element.dataset.english = (label ? `${label.trim()}: ${found[2]}` : found[2]) + rest;
      }
      text[0].textContent = English() ? element.dataset.english : element.dataset.chinese;
      element.lang = English() ? "en" : "zh-Hant-TW";
    }
  }

  function place(link, pairs) {
    link.addEventListener("click", () => {
      const passed = [...document.querySelectorAll("article section[id]")].filter((s) => s.getBoundingClientRect().top < innerHeight / 3);
      const known = passed.reverse().flatMap((section) => [section.id, ...[...section.querySelectorAll(":scope > span[id]")].map((s) => s.id)]);
      const found = known.map((id) => pairs[id]).find(Boolean);
      link.hash = found ? `#${found}` : "";
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    const link = document.querySelector("a.language");
    if (link) place(link, JSON.parse(link.dataset.sections));
    headings();
    const pressed = button();
    if (!pressed) return;
    const show = () => {
      pressed.setAttribute("aria-pressed", String(English()));
      pressed.textContent = English() ? "中文標題" : "English headings";
      pressed.lang = English() ? "zh-Hant-TW" : "en";
      headings();
    };
    pressed.addEventListener("click", () => {
      localStorage.setItem("headings", English() ? "zh" : "en");
      show();
    });
    show();
  });
})();
