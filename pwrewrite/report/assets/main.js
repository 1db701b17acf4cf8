"use strict";
// Reads the data, fills the page and keeps its pictures together: one cost, one model, one module in all of them.
(function () {
  var data = JSON.parse(pw.find("data").textContent), models = data.models.map(pw.read), last = models[models.length - 1];
  var cost = pw.COSTS[0], current = data.kind === "plan" || !models.length ? models[0] : last, selected = null;

  function parts(name, there) { pw.find("of-" + name).hidden = !there; return there; }
  function radios(field, options, act) {
    options.forEach(function (option, i) {
      var input = pw.make("input", { type: "radio", name: field.id, value: option.key });
      input.checked = option.checked === undefined ? i === 0 : option.checked;
      input.addEventListener("change", function () { act(option); });
      field.append(pw.make("label", { title: option.title }, [input, pw.make("span", {}, option.label)]));
    });
    field.hidden = options.length < 2;
  }

  function theme(option) {
    var dark = option.key === "dark" || (option.key === "auto" && dusk.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  }
  var dusk = matchMedia("(prefers-color-scheme: dark)"), themes = ["auto", "light", "dark"].map(function (key) { return { key: key, label: key }; });
  var chosen = themes[0];
  dusk.addEventListener("change", function () { theme(chosen); });
  radios(pw.find("themes"), themes, function (option) { chosen = option; theme(option); });
  theme(chosen);

  pw.find("title").textContent = data.target;
  pw.find("subtitle").textContent = data.subtitle;
  pw.find("inputs").textContent = models.length ? models[0].inputs.join(" · ") : "";
  (models.length ? [["params", "Parameters", pw.count], ["macs", "MACs", pw.count], ["weights", "Weights", pw.size],
    ["memory", "Activations written", pw.size], ["peak", "Peak activation memory", pw.size], ["time", "Least time", pw.duration]] : []
  ).forEach(function (total) {
    var before = models[0].totals[total[0]], after = last.totals[total[0]], text = total[2](before);
    var amount = models.length < 2 ? [text] : [text + " → " + total[2](after) + " ", pw.make("small", {}, pw.change(before, after))];
    pw.find("totals").append(pw.make("div", { title: total[0] === "time" ? "" : pw.exact(before) + (models.length < 2 ? "" : " → " + pw.exact(after)) },
                                      [pw.make("dt", {}, total[1]), pw.make("dd", {}, amount)]));
  });

  var drawn = models.length > 0, run = drawn && models.every(function (model) { return model.steps.length > 0; }), pictures = {};
  pw.find("costs").hidden = pw.find("models").hidden = pw.find("selected").hidden = !drawn;
  if (parts("treemap", drawn)) pictures.treemap = pw.treemap(pw.find("treemap"), pw.find("crumbs"), select);
  if (parts("graph", run)) pictures.graph = pw.graph(pw.find("graph"), pw.find("graph-tools"), select);
  if (parts("roofline", drawn)) {
    pictures.roofline = pw.roofline(pw.find("roofline"), pw.find("roof-height"), select);
    pw.find("roof-device").textContent = "Profile " + models[0].roof.device + ": " + pw.count(models[0].roof.macs) + " MACs/s, " +
      pw.size(models[0].roof.bytes) + "/s." + (models.length > 1 ? " Rings are before, discs after." : "");
  }
  if (parts("memory", run)) pictures.memory = pw.memory(pw.find("memory"), pw.find("memory-note"), select);
  if (parts("pareto", Boolean(data.frontier && data.frontier.points.length))) pictures.pareto = pw.pareto(pw.find("pareto"), data.frontier);
  if (parts("table", drawn)) {
    pictures.table = pw.table(pw.find("layers"), { search: pw.find("search"), shown: pw.find("shown"), all: pw.find("all") }, select);
  }
  pw.find("words").open = !drawn;

  function select(module, step, model) {
    selected = module;
    var layer = (module.layers || [])[0], kind = step ? step.op + " makes " + step.shape : module.kind, own = step || module;
    var costs = pw.COSTS.map(function (each) { return each.show(own[each.key]) + " " + each.label; }).join(", ");
    pw.find("selected").textContent = module.label + (model && model !== current ? " (" + model.name + ")" : "") + " · " + kind + " · " + costs +
      (layer && layer.note ? " · " + layer.note : "");
    var here = current.byPath["/" + module.path] || null;
    ["treemap", "graph", "roofline", "table"].forEach(function (name) { if (pictures[name]) pictures[name].mark(name === "roofline" ? module : here); });
  }
  function show() {
    document.querySelectorAll(".cost").forEach(function (element) { element.textContent = cost.label; });
    if (pictures.treemap) pictures.treemap.show(current, cost);
    if (pictures.graph) pictures.graph.show(current, cost);
  }
  function showModel() {
    show();
    if (pictures.roofline) pictures.roofline.show(models);
    if (pictures.memory) pictures.memory.show(models, current);
    if (pictures.table) pictures.table.show(current);
    if (selected) select(current.byPath["/" + selected.path] || selected);
  }
  radios(pw.find("costs"), drawn ? pw.COSTS : [], function (option) { cost = option; show(); });
  radios(pw.find("models"), models.map(function (model) {
    return { key: model.name, label: model.name, model: model, checked: model === current };
  }), function (option) { current = option.model; showModel(); });
  if (drawn) showModel();
  if (pictures.pareto) pictures.pareto.redraw();

  var width = innerWidth, waiting = 0;
  addEventListener("resize", function () {
    if (innerWidth === width || waiting) return;
    waiting = requestAnimationFrame(function () {
      waiting = 0;
      width = innerWidth;
      ["treemap", "roofline", "memory", "pareto"].forEach(function (name) { if (pictures[name]) pictures[name].redraw(); });
      if (pictures.graph) pictures.graph.fit();
    });
  });
})();
