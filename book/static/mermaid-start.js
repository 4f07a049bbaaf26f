// Draws the page's mermaid diagrams, if it has any; the library lies beside the book.
(() => {
  "use strict";
  const here = document.currentScript.src;
  document.addEventListener("DOMContentLoaded", () => {
    if (!document.querySelector("pre.mermaid")) return;
    const script = document.createElement("script");
    script.src = new URL("vendor/mermaid.js", here).href;
    script.addEventListener("load", async () => {
      window.mermaid.initialize({ startOnLoad: false, theme: "neutral", fontFamily: getComputedStyle(document.body).fontFamily });
      await window.mermaid.run();
      document.documentElement.dataset.diagrams = "drawn";
    });
    document.head.append(script);
  });
})();
