"use strict";
// Reads the data (web_data.py writes it) and holds what all pictures share: numbers, elements, colours, roving focus.
var pw = {};

pw.scaled = function (value, base, units) {
  var power = 0, scaled = Math.abs(value);
  while (scaled >= Math.min(base, 999.5) && power < units.length - 1) { scaled /= base; power += 1; }
  if (power === 0) return (Math.round(value) + " " + units[0]).trim();
  return (value < 0 ? "-" : "") + scaled.toFixed(scaled < 9.995 ? 2 : scaled < 99.95 ? 1 : 0) + " " + units[power];
};
pw.count = function (n) { return pw.scaled(n, 1000, ["", "k", "M", "G", "T", "P", "E"]); };
pw.size = function (n) { return pw.scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]); };
pw.duration = function (s) { return pw.scaled(s * 1e9, 1000, ["ns", "µs", "ms", "s", "ks"]); };
pw.exact = function (n) { return String(n).replace(/\B(?=(\d{3})+$)/g, ","); };
pw.percent = function (share) {
  return share > 0 && share < 0.0005 ? "<0.1%" : share >= 0.9995 && share < 1 ? "99.9%" : (100 * share).toFixed(1) + "%";
};
pw.change = function (before, after) {
  if (before === after) return "0%";
  if (!before) return "new";
  var share = 100 * (after - before) / before;
  return (share > 0 ? "+" : "−") + Math.abs(share).toFixed(1) + "%";
};

// An element with attributes and children; text is always text, never markup.
pw.make = function (name, attributes, children) {
  var svg = /^(svg|g|rect|circle|line|path|text|title|defs|marker)$/.test(name);
  var element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (var key in attributes || {}) {
    if (key === "style") for (var rule in attributes.style) element.style.setProperty(rule, attributes.style[rule]);
    else if (attributes[key] !== undefined) element.setAttribute(key, attributes[key]);
  }
  [].concat(children === undefined ? [] : children).forEach(function (child) {
    element.append(child instanceof Node ? child : String(child));
  });
  return element;
};
pw.find = function (id) { return document.getElementById(id); };

// A text cut in its middle to so many characters; its end, which tells layers apart, keeps more.
pw.shorten = function (text, most) {
  if (text.length <= most) return text;
  if (most < 3) return "";
  var head = Math.floor((most - 1) / 3);
  return text.slice(0, head) + "…" + text.slice(text.length - (most - 1 - head));
};

// The colour of a share of the largest cost, from the theme's two ends; CSS mixes it, so that a theme needs no redraw.
pw.paint = function (element, share) {
  var part = Math.round(100 * Math.sqrt(Math.max(0, Math.min(1, share))));
  element.style.setProperty("--part", part + "%");
  element.classList.toggle("mid", part > 50);
  element.classList.toggle("strong", part > 62);
};

pw.COSTS = [
  { key: "macs", label: "MACs", show: pw.count },
  { key: "params", label: "Parameters", show: pw.count },
  { key: "memory", label: "Activations", show: pw.size, title: "Bytes of activations written" },
  { key: "time", label: "Least time", show: pw.duration, title: "Lower bound by the roofline of the device" },
];

// A model of the data with names for its columns, and the costs of every module with all that runs inside.
pw.read = function (data) {
  var model = { name: data.name, inputs: data.inputs, totals: data.totals, roof: data.roof, peak: data.peak };
  model.modules = data.modules.map(function (row, id) {
    return { id: id, name: row[0], parent: row[1], kind: data.texts[row[2]], params: row[3], macs: 0, memory: 0, time: 0,
             children: [], steps: [], own: { macs: 0, params: 0, memory: 0, time: 0 } };
  });
  model.modules.forEach(function (module) {
    var parent = model.modules[module.parent];
    module.path = parent ? (parent.path ? parent.path + "." : "") + module.name : "";
    module.label = module.path || "(model)";
    if (parent) parent.children.push(module);
    module.own.params = module.params;
  });
  model.steps = data.steps.map(function (row, id) {
    var module = model.modules[row[1]];
    var step = { id: id, op: data.texts[row[0]], module: module, leaf: row[2] === 1, shape: data.texts[row[3]],
                 macs: row[4], params: row[5], memory: row[6], time: row[7] * 1e-9, live: row[8],
                 inputs: row.slice(9).map(function (back) { return id - back; }) };
    module.steps.push(step);
    ["macs", "memory", "time"].forEach(function (key) { module[key] += step[key]; module.own[key] += step[key]; });
    return step;
  });
  for (var i = model.modules.length - 1; i > 0; i -= 1) {
    var module = model.modules[i], parent = model.modules[module.parent];
    ["macs", "params", "memory", "time"].forEach(function (key) { parent[key] += module[key]; });
  }
  model.layers = data.layers.map(function (row) {
    var module = model.modules[row[0]];
    var layer = { module: module, path: row[1] || module.label, kernel: data.texts[row[2]], channels: row[3] + "→" + row[4],
                  output: data.texts[row[5]], calls: row[6], params: row[7], macs: row[8], memory: row[9],
                  bound: ["", "compute", "memory"][row[10]], intensity: row[11], time: row[12], hotspot: row[13] === 1,
                  half: data.texts[row[14]], note: data.texts[row[15]], share: data.totals.macs ? row[8] / data.totals.macs : 0 };
    (module.layers = module.layers || []).push(layer);
    return layer;
  });
  model.byPath = {};
  model.modules.forEach(function (module) { model.byPath["/" + module.path] = module; });
  return model;
};

// One tab stop for many elements: arrow keys move the focus as `next(element, key)` says, Enter does `act(element)`.
pw.roving = function (container, next, act) {
  function focus(element) {
    if (!element) return;
    container.querySelectorAll('[tabindex="0"]').forEach(function (old) { old.setAttribute("tabindex", "-1"); });
    element.setAttribute("tabindex", "0");
    element.focus({ preventScroll: container.dataset.pans === "yes" });
  }
  container.addEventListener("keydown", function (event) {
    var element = event.target.closest("[tabindex]");
    if (!element || element === container || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") act(element);
    else {
      var target = next(element, event.key);
      if (target === undefined) return;
      focus(target);
    }
    event.preventDefault();
  });
  return focus;
};
