"use strict";
// A legend button hides or shows its run in every panel of its figure.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const part of button.closest(".figure").querySelectorAll("figure [data-series]")) {
      if (part.dataset.series === button.dataset.series) part.style.display = shown ? "" : "none";
    }
  });
}

// The words of a mark, at once and under a finger too: browsers show a title late, and only to a mouse.
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
for (const title of document.querySelectorAll("figure title")) {
  const mark = title.parentNode, words = title.textContent;
  title.remove();
  mark.setAttribute("aria-label", words);
  mark.addEventListener("pointerenter", (event) => {
    tip.textContent = words;
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.pageX + 12, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.pageY + 14}px`;
  });
  mark.addEventListener("pointerleave", () => { tip.hidden = true; });
}

// Nobody can unfold paper.
const folded = [...document.querySelectorAll("details:not([open])")];
window.addEventListener("beforeprint", () => { for (const details of folded) details.open = true; });
window.addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
