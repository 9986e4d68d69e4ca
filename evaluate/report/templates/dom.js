"use strict";
// What the scripts of the pages share: elements, figures, and text with its unseen characters made visible.
const SVG = "http://www.w3.org/2000/svg";
const figures = (v) => v === undefined || v === null || Number.isNaN(v) ? "—" : v === 0 ? "0" : String(Number(Number(v).toPrecision(Math.abs(v) < 0.01 ? 2 : 3))).replace("-", "−");

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) value === null || node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// A token's text with newline and tab made visible; at its edges spaces too where there is no text around it.
function glyphs(text, edges) {
  const out = [];
  text.split(/(\n|\t)/).forEach((part) => {
    if (part === "\n") out.push(el("span", { class: "glyph-char" }, "↵"));
    else if (part === "\t") out.push(el("span", { class: "glyph-char" }, "⇥"));
    else if (edges && /^ +$/.test(part)) out.push(el("span", { class: "glyph-char" }, "␣".repeat(part.length)));
    else if (edges && part.startsWith(" ")) out.push(el("span", { class: "glyph-char" }, "␣"), part.slice(1));
    else if (part) out.push(part);
  });
  return out;
}
