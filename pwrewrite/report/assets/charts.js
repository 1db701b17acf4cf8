"use strict";
// The roofline, the memory over time, and the frontier.
pw.scale = function (low, high, from, to, log) {
  var a = log ? Math.log(low) : low, b = log ? Math.log(high) : high;
  return function (value) { return from + (to - from) * ((log ? Math.log(value) : value) - a) / (b - a || 1); };
};
pw.ticks = function (low, high, log) {
  var ticks = [], step;
  if (log) {
    for (step = Math.pow(10, Math.ceil(Math.log10(low) - 1e-9)); step <= high * 1.0001; step *= 10) ticks.push(step);
    return ticks;
  }
  step = Math.pow(10, Math.floor(Math.log10((high - low) / 4 || 1)));
  [5, 2].some(function (factor) { if ((high - low) / (step * factor) >= 4) { step *= factor; return true; } return false; });
  for (var value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) ticks.push(value);
  return ticks;
};

// A frame with axes: { svg, x, y, width, height } with scales from values to places.
pw.frame = function (container, x, y, label) {
  var width = Math.max(280, container.clientWidth || 600), height = Math.round(Math.max(240, Math.min(360, width * 0.56)));
  var left = 74, bottom = 44, right = 14, top = 12;
  var svg = pw.make("svg", { viewBox: "0 0 " + width + " " + height, "aria-label": label });
  var at = { svg: svg, width: width, height: height, left: left, right: width - right, top: top, bottom: height - bottom,
             x: pw.scale(x.low, x.high, left, width - right, x.log), y: pw.scale(y.low, y.high, height - bottom, top, y.log) };
  var many = Math.max(2, Math.floor((width - left - right) / 70));
  function thin(ticks, most) {
    var every = Math.ceil(ticks.length / most);
    return ticks.filter(function (_, i) { return i % every === 0; });
  }
  thin(x.ticks || pw.ticks(x.low, x.high, x.log), many).forEach(function (value) {
    var place = at.x(value);
    svg.append(pw.make("line", { class: "grid", x1: place, x2: place, y1: top, y2: at.bottom }),
               pw.make("text", { class: "tick", x: place, y: at.bottom + 16, "text-anchor": "middle" }, x.show(value)));
  });
  thin(y.ticks || pw.ticks(y.low, y.high, y.log), 7).forEach(function (value) {
    var place = at.y(value);
    svg.append(pw.make("line", { class: "grid", x1: left, x2: at.right, y1: place, y2: place }),
               pw.make("text", { class: "tick", x: left - 6, y: place + 4, "text-anchor": "end" }, y.show(value)));
  });
  svg.append(pw.make("text", { class: "axis", x: (left + at.right) / 2, y: height - 6, "text-anchor": "middle" }, x.label),
             pw.make("text", { class: "axis", transform: "translate(12 " + (top + at.bottom) / 2 + ") rotate(-90)",
                               "text-anchor": "middle" }, y.label));
  container.replaceChildren(svg);
  return at;
};

// Dots with one tab stop: arrow keys go through them from left to right.
pw.dots = function (at, dots, act) {
  at.svg.setAttribute("role", "listbox");
  var elements = dots.map(function (dot, i) {
    var element = pw.make("circle", { class: "dot " + dot.kind, cx: dot.x.toFixed(1), cy: dot.y.toFixed(1), r: dot.r.toFixed(1),
                                      role: "option", tabindex: i ? -1 : 0, "aria-label": dot.label, "aria-selected": "false" },
                                pw.make("title", {}, dot.label));
    element.dot = dot;
    return element;
  });
  elements.slice().sort(function (a, b) { return b.dot.r - a.dot.r; }).forEach(function (e) { at.svg.append(e); });
  var order = elements.slice().sort(function (a, b) { return a.dot.x - b.dot.x || a.dot.y - b.dot.y; });
  pw.roving(at.svg, function (element, key) {
    var i = order.indexOf(element);
    var to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: order.length - 1 }[key];
    return to === undefined ? undefined : order[to] || null;
  }, function (element) { act(element.dot); });
  at.svg.addEventListener("focusin", function (event) { if (event.target.dot) act(event.target.dot); });
  return elements;
};

pw.roofline = function (container, height, select) {
  var models = [], shown = null, elements = [];
  function redraw() {
    if (!models.length) return;
    var layers = [], byTime = height.value === "time";
    models.forEach(function (model) {
      model.layers.forEach(function (layer) { if (layer.time > 0 && layer.intensity > 0) layers.push([model, layer]); });
    });
    if (!layers.length) { container.replaceChildren("no layer does any MACs"); return; }
    var roof = models[0].roof, ridge = roof.macs / roof.bytes;
    var rate = function (x) { return Math.min(roof.macs, x * roof.bytes); };
    var xs = layers.map(function (pair) { return pair[1].intensity; }).concat([ridge]);
    var low = Math.min.apply(null, xs) / 1.6, high = Math.max.apply(null, xs) * 1.6, times = layers.map(function (p) { return p[1].time; });
    var slowest = Math.max.apply(null, times);
    var y = byTime ? { low: Math.min.apply(null, times) / 1.6, high: slowest * 1.6, log: true, show: pw.duration, label: "least time of the layer" }
      : { low: rate(low) / 2, high: roof.macs * 1.8, log: true, show: pw.count, label: "MACs per second, at best" };
    var at = pw.frame(container, { low: low, high: high, log: true, show: number, label: "MACs per byte moved" }, y,
                      "Roofline of " + roof.device + " with " + layers.length + " layers");
    var d = byTime ? "M" + at.x(ridge) + " " + at.top + "V" + at.bottom
      : "M" + [at.x(low), at.y(rate(low)), "L" + at.x(ridge), at.y(roof.macs), "L" + at.right, at.y(roof.macs)].join(" ");
    at.svg.append(pw.make("path", { class: "roof", d: d }));
    if (at.x(ridge) > at.left + 100) at.svg.append(pw.make("text", { class: "tick", x: at.x(ridge) - 6, y: byTime ? at.top + 12 : at.bottom - 8, "text-anchor": "end" }, "bound by memory"));
    if (at.x(ridge) < at.right - 110) at.svg.append(pw.make("text", { class: "tick", x: at.x(ridge) + 6, y: byTime ? at.top + 12 : at.bottom - 8 }, "bound by arithmetic"));
    elements = pw.dots(at, layers.map(function (pair) {
      var layer = pair[1], when = pair[0].name;
      return { x: at.x(layer.intensity), y: at.y(byTime ? layer.time : rate(layer.intensity)), r: 3 + 6 * Math.sqrt(layer.time / slowest),
               kind: when === "before" ? "before" : "after", module: layer.module, model: pair[0],
               label: layer.path + (when ? " (" + when + ")" : "") + ", " + number(layer.intensity) + " MACs per byte, bound by " +
                 (layer.bound === "compute" ? "arithmetic" : layer.bound) + ", at least " + pw.duration(layer.time) };
    }), function (dot) { select(dot.module, null, dot.model); });
    mark(shown);
  }
  function number(value) { return String(Number(value.toPrecision(2))); }
  function mark(module) {
    shown = module;
    elements.forEach(function (element) {
      var on = Boolean(module) && element.dot.module.path === module.path;
      element.classList.toggle("marked", on);
      element.setAttribute("aria-selected", String(on));
    });
  }
  height.addEventListener("change", redraw);
  return { redraw: redraw, mark: mark, show: function (all) { models = all; redraw(); } };
};

pw.memory = function (container, caption, select) {
  var models = [], current = null;
  function redraw() {
    if (!current || !current.steps.length) return;
    var most = Math.max.apply(null, models.map(function (m) { return m.totals.peak; })) || 1;
    var unit = Math.pow(1024, Math.min(6, Math.floor(Math.log(most) / Math.log(1024))));
    var ticks = pw.ticks(0, most * 1.06 / unit, false).map(function (value) { return value * unit; });
    var last = current.steps.length - 1, at = pw.frame(container,
      { low: 0, high: Math.max(1, last), ticks: pw.ticks(0, Math.max(1, last), false).filter(Number.isInteger), show: pw.exact, label: "operation, in the order of the run" },
      { low: 0, high: most * 1.06, ticks: ticks, show: pw.size, label: "activations alive" }, "Activation memory over the run");
    models.forEach(function (model) {
      var n = Math.max(1, model.steps.length - 1), main = model === current, d = "";
      model.steps.forEach(function (step, i) {
        d += (i ? "H" : "M") + at.x(i / n * last).toFixed(1) + (i ? "V" : " ") + at.y(step.live).toFixed(1);
      });
      if (main) d += "V" + at.bottom + "H" + at.left + "Z";
      at.svg.append(pw.make("path", { class: main ? "area" : "other", d: d }));
    });
    var peak = current.steps.reduce(function (best, step) { return step.live > best.live ? step : best; }, current.steps[0]);
    var right = at.x(peak.id) > (at.left + at.right) / 2;
    at.svg.append(pw.make("circle", { class: "peak", cx: at.x(peak.id), cy: at.y(peak.live), r: 4.5 }),
      pw.make("text", { class: "note", x: at.x(peak.id) + (right ? -9 : 9), y: at.y(peak.live) + 4, "text-anchor": right ? "end" : "start" },
              "peak " + pw.size(peak.live)));
    var cursor = at.svg.appendChild(pw.make("line", { class: "cursor", y1: at.top, y2: at.bottom, x1: at.x(peak.id), x2: at.x(peak.id) }));
    var where = peak.id;
    function say(i) {
      var step = current.steps[i], text = "operation " + i + " of " + last + ", " + step.op + " in " + step.module.label + ": " + pw.size(step.live) + " alive";
      where = i;
      cursor.setAttribute("x1", at.x(i));
      cursor.setAttribute("x2", at.x(i));
      at.svg.setAttribute("aria-valuenow", i);
      at.svg.setAttribute("aria-valuetext", text);
      caption.textContent = text + (i === peak.id && current.peak.length ? ": " + current.peak.slice(0, 4).map(function (t) { return t[0] + " " + t[1] + " " + pw.size(t[2]); }).join(" + ") : "");
      return step;
    }
    at.svg.setAttribute("role", "slider");
    at.svg.setAttribute("tabindex", "0");
    at.svg.setAttribute("aria-valuemin", "0");
    at.svg.setAttribute("aria-valuemax", String(last));
    say(peak.id);
    at.svg.addEventListener("keydown", function (event) {
      var page = Math.max(1, Math.round(last / 10));
      var to = { ArrowRight: where + 1, ArrowUp: where + 1, ArrowLeft: where - 1, ArrowDown: where - 1, PageUp: where + page,
                 PageDown: where - page, Home: 0, End: last, p: peak.id }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      var step = say(Math.max(0, Math.min(last, to)));
      select(step.module, step);
    });
    function stepAt(event) {
      var box = at.svg.getBoundingClientRect(), x = (event.clientX - box.left) * at.width / box.width;
      return Math.max(0, Math.min(last, Math.round((x - at.left) / (at.right - at.left) * last)));
    }
    at.svg.addEventListener("pointermove", function (event) { say(stepAt(event)); });
    at.svg.addEventListener("click", function (event) { var step = say(stepAt(event)); select(step.module, step); });
  }
  return { redraw: redraw, show: function (all, model) { models = all; current = model; redraw(); } };
};

pw.pareto = function (container, data) {
  var names = { macs: "MACs", params: "parameters", bytes: "bytes of weights", latency: "time" }, chosen = data.chosen;
  function redraw() {
    var points = data.points, most = Math.max.apply(null, points.map(function (p) { return p[2]; }).concat(chosen ? [chosen[2]] : [])) || 1;
    var root = function (loss) { return Math.sqrt(Math.max(0, loss)); }, ticks = [0, 0.2, 0.4, 0.6, 0.8, 1].map(function (part) { return part * root(most); });
    var at = pw.frame(container, { low: 0, high: 1, ticks: [0, 0.2, 0.4, 0.6, 0.8, 1], show: pw.percent, label: (names[data.cost] || data.cost) + " left, of the original's" },
                      { low: 0, high: root(most) * 1.05, ticks: ticks, show: function (v) { return String(Number((v * v).toPrecision(2))); }, label: "least predicted loss (root scale)" },
                      "Frontier of loss against " + (names[data.cost] || data.cost));
    at.svg.append(pw.make("path", { class: "roof", d: "M" + points.map(function (p) { return at.x(p[0]).toFixed(1) + " " + at.y(root(p[2])).toFixed(1); }).join("L") }));
    var dots = points.map(function (p) {
      return { x: at.x(p[0]), y: at.y(root(p[2])), r: 4, kind: "after",
               label: pw.percent(p[0]) + " of the " + (names[data.cost] || data.cost) + ": loss " + Number(p[2].toPrecision(3)) + ", " + p[3] + (p[3] === 1 ? " layer" : " layers") };
    });
    if (chosen) dots.push({ x: at.x(chosen[0]), y: at.y(root(chosen[2])), r: 7, kind: "chosen", label: "the plan: " + pw.percent(chosen[0]) + ", loss " + Number(chosen[2].toPrecision(3)) + ", " + chosen[3] + (chosen[3] === 1 ? " layer" : " layers") });
    pw.dots(at, dots, function (dot) { pw.find("pareto-note").textContent = dot.label; });
    pw.find("pareto-note").textContent = dots[dots.length - 1].label;
  }
  return { redraw: redraw };
};
