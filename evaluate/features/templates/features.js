"use strict";
// Every feature of every run. Data come as scripts, when they are asked for; all text enters through textContent.
(() => {
  const index = JSON.parse(document.getElementById("index").textContent);
  const $ = (id) => document.getElementById(id);
  const NAMES = { density: "density", max_activation: "max", mean_activation: "mean when active", eta_squared: "η²", lag1_autocorrelation: "lag-1 corr.", run_length: "run length", neighbour_cosine: "nearest row", together: "active with", match_cosine: "match" };
  const HEIGHT = 28;
  const state = { run: 0, id: null, order: "id", found: null, shown: [], columns: [], row: null, picked: null, asked: 0 };
  const label = (name) => NAMES[name] || name.replaceAll("_", " ");

  // --- data: a script calls tcsaeData(key, value); each is loaded once
  const loads = new Map(), waiting = new Map();
  window.tcsaeData = (key, value) => { const take = waiting.get(key); if (take) take(value); };
  function load(key) {
    if (!loads.has(key)) {
      loads.set(key, new Promise((take, fail) => {
        waiting.set(key, take);
        const script = el("script", { src: "data/" + key.split("/").map(encodeURIComponent).join("/") + ".js" });
        script.addEventListener("error", () => { loads.delete(key); fail(new Error("data/" + key + ".js is not there: copy the whole folder")); });
        script.addEventListener("load", () => script.remove());
        document.head.append(script);
      }));
    }
    return loads.get(key);
  }
  const columns = new Map();
  async function column(run, name) {
    const key = run + "/c/" + name;
    if (!columns.has(key)) {
      const text = atob(await load(key)), bytes = new Uint8Array(text.length);
      for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
      columns.set(key, new Float32Array(bytes.buffer));
    }
    return columns.get(key);
  }
  async function feature(run, id) {
    const file = await load(run + "/f/" + Math.floor(id / index.perFile));
    return { f: file.f[id % index.perFile], words: file.words };
  }
  function fail(error) {
    console.error(error);
    $("sides").replaceChildren(el("p", { class: "failure" }, error.message));
  }

  // --- the list
  const run = () => index.runs[state.run];
  async function search(query) {
    const words = query.toLowerCase().split(/\s+/).map((word) => word.replace(/^[^\p{L}\p{N}_]+|[^\p{L}\p{N}_]+$/gu, "")).filter(Boolean);
    let found = null;
    for (const word of words) {
      const start = word.slice(0, 2), plain = /^[a-z0-9]{2}$/.test(start);
      const here = new Map(), files = plain ? [start] : word.length < 2 && /^[a-z0-9]$/.test(word) ? [] : ["other"];
      for (const name of files.filter((each) => run().words.includes(each))) {
        for (const [known, features] of await load(state.run + "/w/" + name)) {
          if (!known.startsWith(word)) continue;
          const weight = known === word ? 1 : 0.5;
          for (let i = 0; i < features.length; i += 2) here.set(features[i], Math.max(here.get(features[i]) || 0, weight * features[i + 1]));
        }
      }
      found = found === null ? here : new Map([...here].filter(([id]) => found.has(id)).map(([id, value]) => [id, Math.min(value, found.get(id))]));
    }
    return found || new Map();
  }
  async function refresh(keep = false) {
    const asked = ++state.asked, query = $("pick-text").value.trim();
    const [name, up] = state.order.split(":"), all = run().features;
    state.columns = [...new Set([...index.listed, ...(name === "id" ? [] : [name])])].filter((each) => run().columns.includes(each));
    const values = await Promise.all(state.columns.map((each) => column(state.run, each)));
    let ids, found = null;
    if (/^\d+$/.test(query)) ids = Array.from({ length: all }, (_, i) => i).filter((i) => String(i).startsWith(query));
    else if (query) { found = await search(query); ids = [...found.keys()]; }
    else ids = Array.from({ length: all }, (_, i) => i);
    if (asked !== state.asked) return; // a later question has been asked
    if (name !== "id") {
      const by = values[state.columns.indexOf(name)], sign = up ? 1 : -1;
      ids.sort((a, b) => Number.isNaN(by[a]) ? (Number.isNaN(by[b]) ? a - b : 1) : Number.isNaN(by[b]) ? -1 : sign * (by[a] - by[b]) || a - b);
    } else if (found) ids.sort((a, b) => found.get(b) - found.get(a) || a - b);
    state.shown = ids;
    state.values = values;
    $("list").style.setProperty("--columns", state.columns.length);
    $("list-head").replaceChildren(el("span", {}, "feature"), ...state.columns.map((each) => el("span", { title: index.meanings[each] || "" }, label(each))));
    $("list-space").style.height = ids.length * HEIGHT + "px";
    $("pick-count").textContent = ids.length.toLocaleString("en") + " of " + all.toLocaleString("en") + " features" + (found ? ", by passages" : "");
    drawRows();
    if (!keep && !ids.includes(state.id)) await choose(ids.length ? ids[0] : null, false);
    else reveal();
  }
  function drawRows() {
    const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 8), last = Math.min(state.shown.length, first + Math.ceil(list.clientHeight / HEIGHT) + 18);
    $("list-rows").style.top = first * HEIGHT + "px";
    $("list-rows").replaceChildren(...state.shown.slice(first, last).map((id, i) => el("div", { class: "option", role: "option", id: "option-" + id, "data-id": id, "aria-selected": String(id === state.id), "aria-posinset": first + i + 1, "aria-setsize": state.shown.length, "aria-label": "feature " + id },
      el("span", {}, String(id)), ...state.values.map((each) => el("span", {}, figures(each[id]))))));
    $("list").setAttribute("aria-activedescendant", $("option-" + state.id) ? "option-" + state.id : "");
  }
  function reveal() {
    const at = state.shown.indexOf(state.id), list = $("list"), top = at * HEIGHT;
    if (at >= 0 && (top < list.scrollTop || top + 3 * HEIGHT > list.scrollTop + list.clientHeight)) list.scrollTop = Math.max(0, top - 3 * HEIGHT);
    drawRows();
  }
  function step(by) {
    const at = state.shown.indexOf(state.id), next = state.shown[Math.max(0, Math.min(state.shown.length - 1, (at < 0 ? 0 : at) + by))];
    if (next !== undefined) choose(next);
  }

  // --- one feature, and those of other runs that match it
  async function choose(id, remember = true) {
    state.id = id;
    showFeatures();
    reveal();
    if (remember) history.replaceState(null, "", "#feature=" + id + (state.run ? "&run=" + state.run : ""));
    if (id === null) return $("sides").replaceChildren(el("p", { class: "note" }, "No feature matches."));
    const asked = state.run + "." + id;
    try {
      const own = await feature(state.run, id);
      const others = await Promise.all(own.f.match.map(async ([other, match, cosine]) => [other, await feature(other, match), cosine]));
      if (asked !== state.run + "." + state.id) return;
      const sides = $("sides");
      sides.className = others.length ? "sides two" : "sides";
      sides.dataset.feature = asked;
      sides.replaceChildren(side(state.run, own, null), ...others.map(([other, found, cosine]) => side(other, found, cosine)));
    } catch (error) { fail(error); }
  }
  function link(run_, id) { return el("button", { type: "button", "data-run": run_, "data-goto": id }, String(id)); }
  function side(at, { f, words }, cosine) {
    const about = index.runs[at], role = about.role === "twin" ? "twin" : "tc";
    const out = el("article", { class: "side heat-" + role, "data-run": at, "data-feature": f.id });
    const title = cosine === null ? ["Feature " + f.id] : ["Match: ", link(at, f.id)];
    out.append(el("h2", {}, ...title));
    if (f.label) out.append(el("p", { class: "label", title: "A language model's guess from the passages; see labels in the guide" }, f.label));
    out.append(el("p", { class: "why" }, about.label + (cosine === null ? "" : " · cosine of the decoder rows " + figures(cosine))));
    out.append(el("dl", { class: "vitals" }, ...Object.entries(f.n).map(([name, value]) => el("div", { title: index.meanings[name] || "" }, el("dt", {}, label(name)), el("dd", {}, figures(value))))));
    if (!f.p.length) out.append(el("p", { class: "why" }, "It fires nowhere on this text."));
    f.p.slice(0, 3).forEach((p) => out.append(passage(at, f, p, words)));
    if (f.p.length > 3) out.append(el("details", { class: "rest" }, el("summary", {}, f.p.length - 3 + " more passages"), ...f.p.slice(3).map((p) => passage(at, f, p, words))));
    const minis = [bars(f.h, role), mini(f.lag, "By lag", "lag (tokens)", "autocorrelation", role, true), mini(f.pos, "By position", "position in the row", "mean activation", role, false)].filter(Boolean);
    out.append(el("div", { class: "minis" }, ...minis));
    for (const [title, pairs] of [["Active on the same tokens (correlation)", f.with], ["Nearest decoder rows (cosine)", f.near]]) {
      if (pairs.length) out.append(el("h3", {}, title), el("ul", { class: "links" }, ...pairs.map(([id, value]) => el("li", {}, link(at, id), " " + figures(value)))));
    }
    for (const [title, items] of [["Tokens it makes likelier", f.up], ["Tokens it makes less likely", f.down]]) {
      if (items.length) out.append(el("h3", {}, title), el("ul", { class: "effects" }, ...items.map(([word, effect]) => el("li", {}, ...glyphs(words[word], true), " ", el("small", {}, figures(effect))))));
    }
    return out;
  }
  function steps(share) {
    let path = "M0 1";
    share.forEach((s, i) => { path += "L" + i + " " + (1 - s) + "L" + (i + 1) + " " + (1 - s); });
    return path;
  }
  function spark(share, name) {
    const n = share.length, path = steps(share), at = svg("line", { class: "at", y1: "0", y2: "1" });
    const drawing = svg("svg", { class: "spark", viewBox: "0 0 " + n + " 1", preserveAspectRatio: "none", role: "img", "aria-label": name },
      svg("path", { class: "area", d: path + "L" + n + " 1Z" }), svg("path", { class: "edge", d: path }), at);
    return { drawing, at: (i) => { at.style.visibility = i === null ? "hidden" : "visible"; at.setAttribute("x1", i + 0.5); at.setAttribute("x2", i + 0.5); } };
  }
  // Text that a pointer or the arrow keys move along; show(i) is told the token, or null.
  function walk(tokens, text, drawings, show, start) {
    let cursor = start;
    const go = (i, on) => { cursor = Math.max(0, Math.min(tokens.length - 1, i)); tokens.forEach((token, j) => token.classList.toggle("at", on && j === cursor)); show(on ? cursor : null); };
    text.addEventListener("pointerover", (event) => { const token = event.target.closest(".tok"); if (token) go(Number(token.dataset.i), true); });
    text.addEventListener("pointerleave", () => go(start, false));
    text.addEventListener("focus", () => go(cursor, true));
    text.addEventListener("blur", () => go(cursor, false));
    text.addEventListener("keydown", (event) => { const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key]; if (by) { event.preventDefault(); event.stopPropagation(); go(cursor + by, true); } });
    for (const drawing of drawings) {
      drawing.addEventListener("pointermove", (event) => { const box = drawing.getBoundingClientRect(); go(Math.floor((event.clientX - box.left) / box.width * tokens.length), true); });
      drawing.addEventListener("pointerleave", () => go(start, false));
    }
    go(start, false);
  }
  function passage(at, f, p, words) {
    const share = p.a.map((a) => a / 100), line = spark(share, "activation over positions " + p.s + " to " + (p.s + p.t.length - 1));
    const tokens = p.t.map((word, i) => {
      const token = el("span", { class: "tok" + (i === p.k ? " peak" : ""), "data-i": i }, ...glyphs(words[word], false));
      token.style.setProperty("--a", share[i]);
      return token;
    });
    const read = el("b", {}), text = el("p", { class: "tokens", tabindex: "0", "aria-label": "Passage; left and right arrows move along the tokens" }, ...tokens);
    walk(tokens, text, [line.drawing], (i) => { line.at(i); const k = i === null ? p.k : i; read.textContent = (i === null ? "peak at position " : "position ") + (p.s + k) + ": " + figures(share[k] * f.top); }, p.k);
    const where = p.r < index.rows ? el("button", { type: "button", "data-row": p.r, "data-run": at, "data-goto": f.id }, "row " + p.r) : "row " + p.r;
    return el("figure", { class: "passage" }, el("figcaption", {}, el("span", {}, where, ", document " + p.d + (p.c ? ", a random place where it fires" : "")), read), line.drawing, text);
  }
  const words_ = (x, y, anchor, text, kind) => svg("text", { x, y, "text-anchor": anchor, class: kind }, text);
  function bars(h, role) {
    if (!h.length) return null;
    const L = 10, R = 292, T = 12, B = 96, most = Math.max(...h.map(([, n]) => n)), wide = (R - L) / h.length;
    const drawing = svg("svg", { class: "chart bars ink-" + role, viewBox: "0 0 300 132", role: "img", "aria-label": "Histogram of activations from " + figures(h[0][0]) }, svg("path", { class: "axis", d: "M" + L + " " + B + "H" + R }),
      ...h.map(([, n], i) => svg("rect", { x: L + i * wide + 0.5, width: Math.max(1, wide - 1), y: B - n / most * (B - T), height: n / most * (B - T) })),
      words_(L, B + 16, "start", figures(h[0][0]), "tick"), words_(R, B + 16, "end", figures(h[h.length - 1][0]) + " …", "tick"), words_(150, B + 32, "middle", "activation (logarithmic)", "name"));
    return el("figure", {}, el("h3", {}, "Activations"), drawing, el("figcaption", {}, "tokens, at most " + most.toLocaleString("en")));
  }
  function mini(curve, title, xLabel, yLabel, role, dots) {
    if (!curve) return null;
    const points = curve.x.map((x, i) => [x, curve.y[i]]), real = points.filter(([, y]) => y !== null);
    if (!real.length) return null;
    const xs = real.map(([x]) => x), ys = real.map(([, y]) => y), x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(0, ...ys), y1 = Math.max(...ys, y0 + 1e-12);
    const L = 42, R = 292, T = 12, B = 96, X = (x) => L + (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5) * (R - L), Y = (y) => B - (y - y0) / (y1 - y0) * (B - T);
    let path = "", open = true;
    for (const [x, y] of points) { if (y === null) { open = true; continue; } path += (open ? "M" : "L") + X(x).toFixed(1) + " " + Y(y).toFixed(1); open = false; }
    const drawing = svg("svg", { class: "chart ink-" + role, viewBox: "0 0 300 132", role: "img", "aria-label": title + ": " + yLabel + " against " + xLabel }, svg("path", { class: "axis", d: "M" + L + " " + Y(0) + "H" + R }),
      words_(L - 5, Y(y1) + 4, "end", figures(y1), "tick"), words_(L - 5, Y(0) + 4, "end", "0", "tick"), words_(L, B + 16, "start", figures(x0), "tick"), words_(R, B + 16, "end", figures(x1), "tick"), words_((L + R) / 2, B + 32, "middle", xLabel, "name"),
      svg("path", { class: "stroke", d: path }), ...(dots ? real.map(([x, y]) => svg("circle", { class: "solid", cx: X(x), cy: Y(y), r: 3.2 })) : []));
    return el("figure", {}, el("h3", {}, title), drawing, el("figcaption", {}, yLabel));
  }

  // --- one row of text, with its strongest features over time, run by run
  function showFeatures() { $("features").hidden = false; $("document").hidden = true; state.row = null; }
  async function openRow(row, picked = null, remember = true) {
    row = Math.max(0, Math.min(index.rows - 1, row));
    state.row = row;
    if (remember) history.replaceState(null, "", "#document=" + row);
    const files = await Promise.all(index.runs.map((_, at) => load(at + "/d/" + Math.floor(row / index.rowsPerFile))));
    if (state.row !== row) return;
    const found = files.map((file) => ({ words: file.words, ...file.rows.find((each) => each.r === row) }));
    drawRow(row, found, picked);
    $("features").hidden = true;
    $("document").hidden = false;
    $("pick-row").value = row;
    if (remember) $("document").scrollIntoView({ block: "start" });
  }
  function drawRow(row, found, picked) {
    const first = found[0], n = first.t.length, off = new Set(first.v);
    const tokens = first.t.map((word, i) => el("span", { class: "tok" + (off.has(i) ? " off" : ""), "data-i": i }, ...glyphs(first.words[word], false)));
    const text = el("p", { class: "tokens", tabindex: "0", "aria-label": "Row of text; left and right arrows move along the tokens" }, ...tokens);
    const read = el("p", { class: "note", "aria-live": "polite" }), lines = [], shares = new Map();
    const strips = found.map(({ s }, at) => {
      const about = index.runs[at], role = about.role === "twin" ? "twin" : "tc";
      return el("div", { class: "strips heat-" + role, "data-run": at }, el("h3", {}, about.label), el("p", { class: "why" }, "its strongest features here; a number colours the text, twice it opens the feature"), ...s.map(([id, top, cells]) => {
        const share = new Array(n).fill(0);
        for (let i = 0; i < cells.length; i += 2) share[cells[i]] = cells[i + 1] / 100;
        const line = spark(share, "feature " + id + " over the row");
        lines.push(line);
        shares.set(at + "." + id, { share, top, role });
        return el("div", { class: "strip", "data-key": at + "." + id }, el("button", { type: "button", "data-paint": at + "." + id }, String(id)), line.drawing);
      }));
    });
    let painted = null;
    function paint(key) {
      if (!shares.has(key)) key = shares.keys().next().value;
      if (key === undefined) return;
      painted = key;
      const { share, role } = shares.get(key);
      text.className = "tokens heat-" + role;
      tokens.forEach((token, i) => token.style.setProperty("--a", share[i]));
      strips.forEach((each) => each.querySelectorAll(".strip").forEach((strip) => strip.setAttribute("aria-current", String(strip.dataset.key === key))));
      tell(null);
    }
    function tell(i) {
      lines.forEach((line) => line.at(i));
      if (painted === null) return;
      const { share, top } = shares.get(painted), [at, id] = painted.split(".");
      read.textContent = i === null ? "coloured by feature " + id + " of " + index.runs[at].name : "position " + i + ": feature " + id + " is " + figures(share[i] * top) + "; active: " + [...shares].filter(([, each]) => each.share[i] > 0).length + " of those below";
    }
    const back = el("button", { type: "button", "data-back": "" }, state.id === null ? "features" : "back to feature " + state.id);
    const step_ = (to, name) => to < 0 || to >= index.rows ? null : el("button", { type: "button", "data-row": to }, name);
    const where = first.d[0] === first.d[1] ? "document " + first.d[0] : "documents " + first.d[0] + " to " + first.d[1];
    $("document").replaceChildren(el("nav", { "aria-label": "Rows" }, el("h2", {}, "Row " + row), el("span", { class: "note" }, where), step_(row - 1, "← previous row"), step_(row + 1, "next row →"), back), text, read, el("div", { class: "runs" }, ...strips));
    $("document").dataset.row = row;
    $("document").onclick = (event) => {
      const button = event.target.closest("[data-paint]");
      if (!button) return;
      if (button.dataset.paint === painted) { const [at, id] = painted.split(".").map(Number); go(at, id); } else paint(button.dataset.paint);
    };
    walk(tokens, text, lines.map((line) => line.drawing), tell, 0);
    paint(picked);
  }

  // --- what is clicked, typed and linked
  async function go(at, id) {
    if (at !== state.run) { state.run = at; $("pick-run").value = String(at); fillOrders(); }
    state.id = id;
    if ($("pick-text").value) $("pick-text").value = "";
    await refresh(true);
    await choose(id);
    $("features").scrollIntoView({ block: "nearest" });
  }
  function fillOrders() {
    const kept = state.order;
    $("pick-order").replaceChildren(el("option", { value: "id" }, "feature number"), ...run().columns.flatMap((name) => [el("option", { value: name }, label(name) + ", largest first"), el("option", { value: name + ":up" }, label(name) + ", smallest first")]));
    state.order = [...$("pick-order").options].some((each) => each.value === kept) ? kept : "id";
    $("pick-order").value = state.order;
  }
  async function fromAddress() {
    const about = new URLSearchParams(location.hash.slice(1)), at = Number(about.get("run") || 0);
    const number = (name, most) => /^\d+$/.test(about.get(name) || "") && Number(about.get(name)) < most ? Number(about.get(name)) : null;
    if (at < index.runs.length && at !== state.run && about.has("feature")) { state.run = at; $("pick-run").value = String(at); fillOrders(); }
    const id = number("feature", run().features), row = number("document", index.rows);
    if (row !== null) { await openRow(row, null, false); $("document").scrollIntoView({ block: "start" }); return; }
    if (id !== null) { state.id = id; await refresh(true); await choose(id, false); $("controls").scrollIntoView({ block: "start" }); return; }
    await refresh();
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.row !== undefined) openRow(Number(button.dataset.row), button.dataset.goto ? button.dataset.run + "." + button.dataset.goto : null).catch(fail);
    else if (button.dataset.goto !== undefined) go(Number(button.dataset.run), Number(button.dataset.goto)).catch(fail);
    else if (button.dataset.back !== undefined) state.id === null ? (showFeatures(), refresh().catch(fail)) : refresh(true).then(() => choose(state.id)).catch(fail);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(input|select|textarea)$/i.test(event.target.tagName);
    if (typing) { if (event.key === "Escape") event.target.blur(); return; }
    if (event.key === "/") { event.preventDefault(); $("pick-text").focus(); }
    else if (event.key === "j" || event.key === "k") { const by = event.key === "j" ? 1 : -1; state.row === null ? step(by) : openRow(state.row + by).catch(fail); }
    else if (event.key === "d" && state.row === null) { const first = document.querySelector(".side [data-row]"); if (first) first.click(); else if (index.rows) openRow(0).catch(fail); }
    else if (event.key === "f" && state.row !== null) { const back = document.querySelector("[data-back]"); if (back) back.click(); }
  });
  $("list").addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
  $("list").addEventListener("scroll", drawRows);
  $("list").addEventListener("click", (event) => { const option = event.target.closest("[role=option]"); if (option) choose(Number(option.dataset.id)); });
  $("pick-run").append(...index.runs.map((each, at) => el("option", { value: at }, each.label)));
  $("pick-run").addEventListener("change", (event) => { state.run = Number(event.target.value); fillOrders(); if (state.id !== null && state.id >= run().features) state.id = null; showFeatures(); refresh(true).then(() => choose(state.id === null ? state.shown[0] ?? null : state.id)).catch(fail); });
  $("pick-order").addEventListener("change", (event) => { state.order = event.target.value; showFeatures(); refresh(true).then(() => { $("list").scrollTop = 0; return choose(state.shown[0] ?? null); }).catch(fail); });
  let typed = 0;
  $("pick-text").addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(() => { showFeatures(); refresh().catch(fail); }, 150); });
  $("pick-row").max = Math.max(0, index.rows - 1);
  $("pick-row").closest("label").hidden = !index.rows;
  $("pick-row").addEventListener("change", (event) => { if (event.target.value !== "") openRow(Number(event.target.value)).catch(fail); });
  addEventListener("hashchange", () => fromAddress().catch(fail));
  addEventListener("resize", () => { if (state.values) drawRows(); });
  fillOrders();
  $("controls").hidden = $("features").hidden = false;
  fromAddress().catch(fail).finally(() => { document.documentElement.dataset.features = "ready"; });
})();
