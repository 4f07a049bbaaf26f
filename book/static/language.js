// The English door. Between the two first pages: to the section that says the same. Elsewhere: headings in English.
(() => {
  "use strict";
  const BILINGUAL = /^(.*?)\s*\(([A-Za-z][^()]*(?:\([^()]*\)[^()]*)*)\)\s*$/s;
  const English = () => localStorage.getItem("headings") === "en";

  function headings() {
    const shown = document.querySelectorAll("article h1, article h2, article h3, article h4, .toc-tree a, .sidebar-tree a");
    for (const element of shown) {
      const text = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
      if (!element.dataset.chinese) {
        const whole = text.map((node) => node.textContent).join("").trim();
        const found = whole.match(BILINGUAL);
        if (!found || text.length !== 1) continue;
        const label = (found[1].match(/^(?:Step|Lab|第)[\s\d.]+(?:· \d+)?(?:章)?/) || [""])[0].replace(/^第\s*([\d.]+)\s*章/, "Chapter $1");
        element.dataset.chinese = whole;
        element.dataset.english = label ? `${label.trim()}: ${found[2]}` : found[2];
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
    const button = document.querySelector("button.language");
    if (!button) return;
    const show = () => {
      button.setAttribute("aria-pressed", String(English()));
      button.textContent = English() ? "中文標題" : "English headings";
      button.lang = English() ? "zh-Hant-TW" : "en";
      headings();
    };
    button.addEventListener("click", () => {
      localStorage.setItem("headings", English() ? "zh" : "en");
      show();
    });
    show();
  });
})();
