"use strict";
// The layers: sorted by any column, searched by words, the first FEW of them until all are wanted.
pw.FEW = 100;
pw.table = function (table, tools, select) {
  var head = table.tHead, body = table.tBodies[0], model = null, columns = [], all = false, marked = null;
  var sort = { key: "macs", down: true };

  function columnsOf(layers) {
    var possible = [
      { key: "path", label: "Layer", text: true, kind: "path" },
      { key: "kernel", label: "Kernel", text: true },
      { key: "channels", label: "Channels", value: function (layer) { return parseFloat(layer.channels); } },
      { key: "output", label: "Output", text: true },
      { key: "calls", label: "Calls" },
      { key: "params", label: "Parameters", show: pw.count },
      { key: "macs", label: "MACs", show: pw.count },
      { key: "share", label: "Share", show: pw.percent },
      { key: "memory", label: "Activations", show: pw.size },
      { key: "time", label: "Least time", show: pw.duration },
      { key: "intensity", label: "MACs/byte", show: function (value) { return value ? String(Number(value.toPrecision(3))) : "–"; } },
      { key: "bound", label: "Bound by", text: true },
      { key: "half", label: "Half width", text: true },
      { key: "note", label: model.name === "before" ? "What was done" : "Note", text: true, kind: "note" },
    ];
    return possible.filter(function (column) {
      if (column.key === "calls") return layers.some(function (layer) { return layer.calls !== 1; });
      return !/^(half|note)$/.test(column.key) || layers.some(function (layer) { return layer[column.key]; });
    });
  }
  function compare(a, b) {
    var column = columns.find(function (each) { return each.key === sort.key; }) || columns[0];
    var value = column.value || function (layer) { return layer[column.key]; };
    var x = value(a), y = value(b), order = column.text ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return (sort.down ? -order : order) || a.index - b.index;
  }
  function matching() {
    var words = tools.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    return model.layers.filter(function (layer) {
      layer.text = layer.text || [layer.path, layer.module.kind, layer.kernel, layer.channels, layer.output, layer.bound, layer.note,
                                  layer.hotspot ? "hotspot" : ""].join(" ").toLowerCase();
      return words.every(function (word) { return layer.text.includes(word); });
    });
  }
  function redraw() {
    var layers = matching().sort(compare), few = all ? layers : layers.slice(0, pw.FEW);
    body.replaceChildren.apply(body, few.map(function (layer, i) {
      var cells = columns.map(function (column) {
        var value = layer[column.key], kind = [column.kind, column.text && column.key !== "kernel" && column.key !== "output" ? "left" : ""];
        return pw.make("td", { class: kind.filter(Boolean).join(" ") || undefined }, column.show ? column.show(value) : value === "" ? "–" : value);
      });
      var row = pw.make("tr", { tabindex: i ? -1 : 0, class: layer.hotspot ? "hotspot" : undefined }, cells);
      row.layer = layer;
      return row;
    }));
    tools.shown.textContent = layers.length === model.layers.length ? pw.exact(layers.length) + (layers.length === 1 ? " layer" : " layers")
      : pw.exact(layers.length) + " of " + pw.exact(model.layers.length) + " layers";
    tools.all.hidden = few.length === layers.length;
    tools.all.textContent = "Show all " + pw.exact(layers.length);
    mark(marked);
  }
  function titles() {
    head.replaceChildren(pw.make("tr", {}, columns.map(function (column) {
      var button = pw.make("button", { type: "button" }, column.label), sorted = sort.key === column.key;
      button.addEventListener("click", function () {
        sort = { key: column.key, down: sort.key === column.key ? !sort.down : !column.text };
        titles();
        redraw();
        Array.from(head.querySelectorAll("th")).find(function (th) { return th.ariaSort; }).firstChild.focus();
      });
      return pw.make("th", { scope: "col", class: column.text && column.key !== "kernel" && column.key !== "output" ? "left" : undefined,
                             "aria-sort": sorted ? (sort.down ? "descending" : "ascending") : undefined }, button);
    })));
  }
  function mark(module) {
    marked = module;
    Array.from(body.rows).forEach(function (row) {
      row.classList.toggle("marked", Boolean(module) && row.layer.module.path === module.path);
    });
  }

  tools.search.addEventListener("input", redraw);
  tools.all.addEventListener("click", function () { all = true; redraw(); });
  var focus = pw.roving(body, function (row, key) {
    var rows = body.rows, at = Array.from(rows).indexOf(row);
    var to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[key];
    return to === undefined ? undefined : rows[to] || null;
  }, function (row) { select(row.layer.module); });
  body.addEventListener("click", function (event) {
    var row = event.target.closest("tr");
    if (row && !String(getSelection())) { focus(row); select(row.layer.module); }
  });
  body.addEventListener("focusin", function (event) { if (event.target.layer) select(event.target.layer.module); });

  return {
    mark: mark,
    show: function (shown) {
      model = shown;
      model.layers.forEach(function (layer, i) { layer.index = i; });
      columns = columnsOf(model.layers);
      if (!columns.some(function (column) { return column.key === sort.key; })) sort = { key: "macs", down: true };
      titles();
      redraw();
    },
  };
};
