"use strict";
// The feature browser. Everything from the text enters the page through textContent; nothing is fetched.
(() => {
  const data = JSON.parse(document.getElementById("browser-data").textContent);
  const $ = (id) => document.getElementById(id);
  const NAMES = { density: "density", max_activation: "max", mean_activation: "mean when active", eta_squared: "η²", lag1_autocorrelation: "lag-1 corr.", run_length: "run length", position_p: "p (position)", position_q: "q (position)" };
  const LISTED = ["density", "eta_squared", "lag1_autocorrelation", "max_activation"];
  const state = { sae: 0, id: null, order: "id", text: "" };
  const label = (name) => NAMES[name] || name.replaceAll("_", " ");

  const sae = () => data.saes[state.sae];
  const feature = () => sae().features.find((f) => f.id === state.id);
  const listed = () => LISTED.filter((name) => data.numbers.includes(name));

  function matches(f) {
    const query = state.text.trim().toLowerCase();
    if (!query) return true;
    if (/^\d+$/.test(query)) return String(f.id).startsWith(query);
    if (f.why.toLowerCase().includes(query)) return true;
    return f.up.some(([word]) => data.words[word].toLowerCase().includes(query)) || f.p.some((p) => p.t.some((word, i) => p.a[i] > 0 && data.words[word].toLowerCase().includes(query)));
  }
  function inOrder() {
    const [name, up] = state.order.split(":");
    const found = sae().features.filter(matches);
    if (name === "id") return found;
    const value = (f) => f.n[name] ?? null;
    return found.sort((a, b) => value(a) === null ? 1 : value(b) === null ? -1 : (up ? 1 : -1) * (value(a) - value(b)) || a.id - b.id);
  }

  function drawList() {
    const found = inOrder(), columns = listed();
    $("feature-list").style.setProperty("--columns", columns.length);
    const head = el("div", { class: "option head", "aria-hidden": "true" }, el("span", {}, "feature"), ...columns.map((name) => el("span", {}, label(name))));
    const options = found.map((f) => el("div", { class: "option", role: "option", id: "option-" + f.id, "data-id": f.id, "aria-selected": String(f.id === state.id), "aria-label": "feature " + f.id + ", " + f.why },
      el("span", {}, String(f.id)), ...columns.map((name) => el("span", {}, figures(f.n[name])))));
    $("feature-list").replaceChildren(head, ...options);
    $("pick-count").textContent = found.length + " of " + sae().features.length + " features";
    mark();
  }
  function mark() {
    for (const option of $("feature-list").querySelectorAll("[role=option]")) option.setAttribute("aria-selected", String(Number(option.dataset.id) === state.id));
    const current = state.id === null ? null : $("option-" + state.id);
    $("feature-list").setAttribute("aria-activedescendant", current ? current.id : "");
    if (current) {
      const list = $("feature-list"), top = current.offsetTop - list.offsetTop;
      if (top < list.scrollTop + 40 || top + current.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - 60;
    }
  }
  function choose(id, remember = true) {
    state.id = id;
    mark();
    drawDetail();
    if (remember) history.replaceState(null, "", "#feature=" + state.sae + "." + id);
  }

  function drawDetail() {
    const f = feature();
    if (!f) return $("feature-detail").replaceChildren(el("p", { class: "why" }, "No feature matches."));
    const vitals = Object.entries(f.n).map(([name, value]) => el("div", {}, el("dt", {}, label(name)), el("dd", {}, figures(value))));
    for (const [id, cosine] of f.near) {
      const here = sae().features.some((other) => other.id === id);
      const name = here ? el("button", { type: "button", "data-goto": id }, String(id)) : String(id);
      vitals.push(el("div", {}, el("dt", {}, "nearest decoder row"), el("dd", {}, name, " (cos " + figures(cosine) + ")")));
    }
    const parts = [el("h3", {}, "Feature " + f.id), el("p", { class: "why" }, sae().label + " · " + f.why), el("dl", { class: "vitals" }, ...vitals)];
    parts.push(el("h4", {}, "Where it fires on the text"));
    if (!f.p.length) parts.push(el("p", { class: "why" }, "No passage of this feature was kept."));
    f.p.forEach((p) => parts.push(passage(f, p)));
    const minis = [mini(f.pos, "By position in the row", false), mini(f.lag, "By lag", true)].filter(Boolean);
    if (minis.length) parts.push(el("h4", {}, "Over time"), el("div", { class: "minis" }, ...minis));
    if (f.up.length + f.down.length) parts.push(el("h4", {}, "Tokens it makes likelier"), effects(f.up), el("h4", {}, "Tokens it makes less likely"), effects(f.down));
    const detail = $("feature-detail");
    detail.className = "detail heat-" + sae().role;
    detail.dataset.feature = state.sae + "." + f.id;
    detail.replaceChildren(...parts);
  }
  function effects(items) {
    return el("ul", { class: "effects" }, ...items.map(([word, effect]) => el("li", {}, ...glyphs(data.words[word], true), " ", el("small", {}, figures(effect)))));
  }

  // One passage: the activation over positions as a stepped area, then the text with a bar over each token.
  function passage(f, p) {
    const n = p.t.length, share = p.a.map((a) => (a || 0) / 100);
    let path = "M0 1";
    share.forEach((s, i) => { path += "L" + i + " " + (1 - s) + "L" + (i + 1) + " " + (1 - s); });
    const at = svg("line", { class: "at", y1: "0", y2: "1" });
    const spark = svg("svg", { class: "spark", viewBox: "0 0 " + n + " 1", preserveAspectRatio: "none", role: "img", "aria-label": "activation over positions " + p.s + " to " + (p.s + n - 1) },
      svg("path", { class: "area", d: path + "L" + n + " 1Z" }), svg("path", { class: "edge", d: path }), at);
    const tokens = p.t.map((word, i) => {
      const token = el("span", { class: "tok" + (i === p.k ? " peak" : ""), "data-i": i }, ...glyphs(data.words[word], false));
      token.style.setProperty("--a", share[i]);
      return token;
    });
    const read = el("b", {});
    const text = el("p", { class: "tokens", tabindex: "0", "aria-label": "Passage; left and right arrows move along the tokens" }, ...tokens);
    let cursor = p.k;
    const show = (i, visible) => {
      cursor = Math.max(0, Math.min(n - 1, i));
      tokens.forEach((token, j) => token.classList.toggle("at", visible && j === cursor));
      at.style.visibility = visible ? "visible" : "hidden";
      at.setAttribute("x1", cursor + 0.5); at.setAttribute("x2", cursor + 0.5);
      const value = p.a[cursor] === null ? "undefined" : figures(share[cursor] * f.top);
      read.textContent = (visible ? "position " : "peak at position ") + (p.s + cursor) + ": " + value;
    };
    text.addEventListener("pointerover", (event) => { const token = event.target.closest(".tok"); if (token) show(Number(token.dataset.i), true); });
    text.addEventListener("pointerleave", () => show(p.k, false));
    text.addEventListener("focus", () => show(cursor, true));
    text.addEventListener("blur", () => show(p.k, false));
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); show(cursor + step, true); }
    });
    spark.addEventListener("pointermove", (event) => { const box = spark.getBoundingClientRect(); show(Math.floor((event.clientX - box.left) / box.width * n), true); });
    spark.addEventListener("pointerleave", () => show(p.k, false));
    show(p.k, false);
    const where = "document " + p.d + ", positions " + p.s + "–" + (p.s + n - 1) + (p.c ? ", a random place where it fires" : "");
    return el("figure", { class: "passage" }, el("figcaption", {}, el("span", {}, where), read), spark, text);
  }

  // A small line chart of [x, y] with nulls left open.
  function mini(curve, title, dots) {
    if (!curve) return null;
    const points = curve.x.map((x, i) => [x, curve.y[i]]), real = points.filter(([x, y]) => x !== null && y !== null);
    if (!real.length) return null;
    const xs = real.map(([x]) => x), ys = real.map(([, y]) => y);
    const x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(0, ...ys), y1 = Math.max(...ys, y0 + 1e-12);
    const L = 42, R = 292, T = 12, B = 96, X = (x) => L + (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5) * (R - L), Y = (y) => B - (y - y0) / (y1 - y0) * (B - T);
    let path = "", open = true;
    for (const [x, y] of points) { if (y === null || x === null) { open = true; continue; } path += (open ? "M" : "L") + X(x).toFixed(1) + " " + Y(y).toFixed(1); open = false; }
    const words = (x, y, anchor, text, kind) => svg("text", { x, y, "text-anchor": anchor, class: kind }, text);
    const drawing = svg("svg", { class: "chart ink-" + sae().role, viewBox: "0 0 300 132", role: "img", "aria-label": title + ": " + curve.yl + " against " + curve.xl },
      svg("path", { class: "grid", d: "M" + L + " " + Y(y1) + "H" + R + "M" + L + " " + Y(y0) + "H" + R }), svg("path", { class: "axis", d: "M" + L + " " + Y(0) + "H" + R }),
      words(L - 5, Y(y1) + 4, "end", figures(y1), "tick"), words(L - 5, Y(0) + 4, "end", "0", "tick"),
      words(L, B + 16, "start", figures(x0), "tick"), words(R, B + 16, "end", figures(x1), "tick"), words((L + R) / 2, B + 32, "middle", curve.xl, "name"),
      svg("path", { class: "stroke", d: path }), ...(dots ? real.map(([x, y]) => svg("circle", { class: "solid", cx: X(x), cy: Y(y), r: 3.6 })) : []));
    return el("figure", {}, el("h4", {}, title), drawing, el("figcaption", {}, curve.yl));
  }

  function openSae(index, id = null, remember = true) {
    state.sae = index;
    $("pick-sae").value = String(index);
    drawList();
    const found = inOrder();
    choose(id !== null && sae().features.some((f) => f.id === id) ? id : found.length ? found[0].id : null, remember);
  }
  function fromAddress() {
    const match = /^#feature=(\d+)\.(\d+)$/.exec(location.hash);
    if (match && Number(match[1]) < data.saes.length) { openSae(Number(match[1]), Number(match[2]), false); $("browse").scrollIntoView(); return true; }
    return false;
  }

  $("pick-sae").append(...data.saes.map((s, i) => el("option", { value: i }, s.label)));
  $("pick-order").append(el("option", { value: "id" }, "feature number"));
  for (const name of data.numbers) $("pick-order").append(el("option", { value: name }, label(name) + ", largest first"), el("option", { value: name + ":up" }, label(name) + ", smallest first"));
  $("pick-sae").addEventListener("change", (event) => openSae(Number(event.target.value), state.id));
  $("pick-order").addEventListener("change", (event) => { state.order = event.target.value; openSae(state.sae); });
  $("pick-text").addEventListener("input", (event) => { state.text = event.target.value; drawList(); const found = inOrder(); if (!found.some((f) => f.id === state.id)) choose(found.length ? found[0].id : null, false); });
  $("feature-list").addEventListener("click", (event) => { const option = event.target.closest("[role=option]"); if (option) choose(Number(option.dataset.id)); });
  $("feature-list").addEventListener("keydown", (event) => {
    const found = inOrder(), now = found.findIndex((f) => f.id === state.id);
    const next = { ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: found.length - 1, PageDown: now + 10, PageUp: now - 10 }[event.key];
    if (next === undefined || !found.length) return;
    event.preventDefault();
    choose(found[Math.max(0, Math.min(found.length - 1, next))].id);
  });
  $("feature-detail").addEventListener("click", (event) => { const button = event.target.closest("[data-goto]"); if (button) { state.text = $("pick-text").value = ""; drawList(); choose(Number(button.dataset.goto)); } });
  addEventListener("hashchange", fromAddress);
  $("browser").hidden = false;
  if (!fromAddress()) openSae(0, null, false);
  document.documentElement.dataset.browser = "ready";
})();
