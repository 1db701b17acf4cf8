"use strict";
// The module hierarchy by cost: squarified rectangles (Bruls, Huizing & van Wijk 2000), zoomed module by module.
pw.treemap = function (container, crumbs, select) {
  var model = null, cost = null, root = null, width = 0, tiles = {};
  var svg = container.appendChild(pw.make("svg", { role: "tree" }));

  // Rectangles for amounts, largest first, as near to squares as rows of them come.
  function squarify(items, x, y, w, h) {
    var total = items.reduce(function (sum, item) { return sum + item.amount; }, 0), placed = [], i = 0;
    while (i < items.length && total > 0 && w > 0 && h > 0) {
      var side = Math.min(w, h), unit = w * h / total, row = 0, count = 0, worst = Infinity;
      while (i + count < items.length) {
        var sum = row + items[i + count].amount, depth = sum * unit / side;
        var first = items[i].amount * unit / depth, last = items[i + count].amount * unit / depth;
        var ratio = Math.max(first / depth, depth / first, last / depth, depth / last);
        if (ratio > worst) break;
        worst = ratio; row = sum; count += 1;
      }
      var thick = row * unit / side, at = 0;
      for (var j = i; j < i + count; j += 1) {
        var length = items[j].amount * unit / thick;
        placed.push(w >= h ? [items[j], x, y + at, thick, length] : [items[j], x + at, y, length, thick]);
        at += length;
      }
      if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
      total -= row; i += count;
    }
    return placed;
  }

  function parts(module) {
    var items = module.children.map(function (child) { return { module: child, amount: child[cost.key] }; });
    if (module.children.length) items.push({ module: module, amount: module.own[cost.key], own: true });
    items = items.filter(function (item) { return item.amount > 0; });
    return items.sort(function (a, b) { return b.amount - a.amount; });
  }

  function label(module, amount, own) {
    var ops = Array.from(new Set(module.steps.map(function (step) { return step.op; })));
    var name = own ? module.label + ", its own code: " + ops.slice(0, 4).join(", ") : module.label + ", " + module.kind;
    return name + ", " + cost.show(amount) + " " + cost.label + ", " + pw.percent(amount / (model.modules[0][cost.key] || 1));
  }

  function draw(item, x, y, w, h, level, parent, max) {
    if (w < 1.5 || h < 1.5) return;
    var module = item.module, inner = item.own || item.amount <= 0 ? [] : parts(module);
    var group = inner.length > 0, key = module.id + (item.own ? "own" : "");
    var tile = pw.make("g", { class: group ? "tile group" : "tile", role: "treeitem", tabindex: -1, "aria-level": level,
                              "data-key": key, "aria-label": label(module, item.amount, item.own) });
    var rect = tile.appendChild(pw.make("rect", { x: x.toFixed(1), y: y.toFixed(1), width: Math.max(0, w - 1).toFixed(1),
                                                  height: Math.max(0, h - 1).toFixed(1), rx: 2 }));
    tile.appendChild(pw.make("title", {}, label(module, item.amount, item.own)));
    tiles[key] = { element: tile, item: item, parent: parent, children: [], group: group };
    if (parent) tiles[parent].children.push(key);
    svg.appendChild(tile);
    var room = Math.floor((w - 8) / 6.6), name = item.own ? "own code" : module.name || "(model)";
    if (!group) pw.paint(tile, item.amount / max);
    if (h > 16 && room >= 3) {
      tile.appendChild(pw.make("text", { x: (x + 4).toFixed(1), y: (y + 12).toFixed(1) }, pw.shorten(name, room)));
      if (!group && h > 30 && room >= 6) {
        var amount = pw.shorten(cost.show(item.amount), room);
        tile.appendChild(pw.make("text", { class: "amount", x: (x + 4).toFixed(1), y: (y + 26).toFixed(1) }, amount));
      }
    }
    if (!group) return;
    var head = h > 34 && w > 30 ? 16 : 2, pad = w > 12 && h > 12 ? 2 : 0;
    squarify(inner, x + pad, y + head, w - 2 * pad - 1, h - head - pad - 1).forEach(function (place) {
      draw(place[0], place[1], place[2], place[3], place[4], level + 1, key, max);
    });
  }

  function redraw() {
    if (!model) return;
    width = Math.max(280, Math.floor(container.clientWidth || width));
    var height = Math.round(Math.max(300, Math.min(560, width * 0.62)));
    svg.setAttribute("viewBox", "0 0 " + width + " " + height);
    svg.setAttribute("aria-label", "Modules of " + root.label + " by " + cost.label);
    svg.replaceChildren();
    tiles = {};
    var amount = root[cost.key], max = 0;
    model.modules.forEach(function (m) { max = Math.max(max, m.children.length ? m.own[cost.key] : m[cost.key]); });
    if (amount > 0) draw({ module: root, amount: amount }, 0, 0, width, height, 1, null, max || 1);
    else svg.appendChild(pw.make("text", { x: 12, y: 24 }, "nothing here costs any of this"));
    var first = svg.querySelector(".tile");
    if (first) first.setAttribute("tabindex", "0");
    crumbs.replaceChildren();
    for (var module = root; module; module = model.modules[module.parent]) {
      crumbs.prepend(crumb(module));
    }
    mark(api.marked);
  }

  function crumb(module) {
    var button = pw.make("button", { type: "button", title: module.label }, module.name || "(model)");
    if (module === root) button.setAttribute("aria-current", "true");
    button.addEventListener("click", function () { zoom(module); focus(svg.querySelector(".tile")); });
    return pw.make("li", {}, button);
  }

  function zoom(module) {
    root = module;
    redraw();
  }

  function act(element) {
    var tile = tiles[element.dataset.key];
    if (!tile) return;
    select(tile.item.module);
    if (tile.group && tile.item.module !== root) {
      zoom(tile.item.module);
      focus(svg.querySelector(".tile"));
    }
  }

  function next(element, key) {
    var tile = tiles[element.dataset.key], parent = tile && tiles[tile.parent];
    if (!tile) return undefined;
    var row = parent ? parent.children : [element.dataset.key], at = row.indexOf(element.dataset.key);
    if (key === "Escape" || key === "Backspace") {
      var outer = model.modules[root.parent];
      if (!outer) return null;
      zoom(outer);
      return svg.querySelector(".tile");
    }
    var to = { ArrowRight: row[at + 1], ArrowLeft: row[at - 1], ArrowDown: tile.children[0], ArrowUp: tile.parent,
               Home: row[0], End: row[row.length - 1] };
    if (!(key in to)) return undefined;
    return to[key] && tiles[to[key]] ? tiles[to[key]].element : null;
  }

  var focus = pw.roving(svg, next, act);
  svg.addEventListener("click", function (event) {
    var tile = event.target.closest(".tile");
    if (tile) { focus(tile); act(tile); }
  });
  svg.addEventListener("focusin", function (event) {
    var tile = event.target.closest(".tile");
    if (tile && tiles[tile.dataset.key]) select(tiles[tile.dataset.key].item.module);
  });

  function mark(module) {
    api.marked = module;
    svg.querySelectorAll(".marked").forEach(function (old) { old.classList.remove("marked"); });
    for (var m = module; m && m !== root; m = model.modules[m.parent]) {
      if (tiles[m.id]) {
        tiles[m.id].element.classList.add("marked");
        break;
      }
    }
  }

  var api = {
    marked: null,
    mark: mark,
    redraw: redraw,
    show: function (shown, by) {
      var same = root && shown.byPath["/" + root.path];
      root = same || shown.modules[0];
      model = shown;
      cost = by;
      redraw();
    },
  };
  return api;
};
