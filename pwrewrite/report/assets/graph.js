"use strict";
// Draws the graph: boxes that open and close, arrows, panning and zooming, by pointer and by keyboard.
pw.graph = function (container, tools, select) {
  var model = null, cost = null, root = null, drawn = new Map(), view = { x: 0, y: 0, scale: 1 };
  var svg = container.appendChild(pw.make("svg", { role: "tree", "data-pans": "yes" }));
  var canvas = svg.appendChild(pw.make("g", {}));
  var status = tools.querySelector("output");

  function name(unit) {
    if (unit.run) return range(unit);
    if (unit.step && unit.step.leaf) return unit.module.name || unit.step.op;
    return unit.step ? unit.step.op : unit.module.name || "(model)";
  }
  function range(unit) {
    var first = unit.children[0], last = unit.children[unit.children.length - 1];
    return name(first) + " … " + name(last);
  }
  function detail(unit) {
    var amount = unit[cost.key] ? cost.show(unit[cost.key]) : "";
    var what = unit.step ? (unit.step.leaf && unit.module.name ? unit.step.op : unit.step.shape) : unit.steps + " steps";
    return amount ? what + " · " + amount : what;
  }
  function sizeOf(unit) {
    var longest = Math.max(pw.shorten(name(unit), 26).length * 6.9, detail(unit).length * 5.9);
    return [Math.max(74, Math.ceil(longest) + 16), 34];
  }
  function label(unit) {
    var kind = unit.step ? unit.step.op + ", makes " + unit.step.shape : (unit.run ? "part of " : "") + unit.module.kind;
    var text = (unit.run ? range(unit) + " in " : "") + unit.module.label + ", " + kind;
    return text + ", " + cost.show(unit[cost.key]) + " " + cost.label;
  }

  function line(points) {
    var path = "M" + points[0].map(Math.round).join(" ");
    if (points.length < 3) return path + "L" + points[points.length - 1].map(Math.round).join(" ");
    for (var i = 1; i < points.length - 1; i += 1) { // through the middles, so that corners are round
      var end = i === points.length - 2 ? points[i + 1]
        : [(points[i][0] + points[i + 1][0]) / 2, (points[i][1] + points[i + 1][1]) / 2];
      path += "Q" + points[i].map(Math.round).join(" ") + " " + end.map(Math.round).join(" ");
    }
    return path;
  }

  function arc(unit, edge) {
    var from = edge.from ? [edge.from.x + edge.from.width, edge.from.y + edge.from.height / 2] : [unit.width / 2, pw.HEAD];
    var to = edge.to ? [edge.to.x + edge.to.width, edge.to.y + edge.to.height / 2] : [unit.width / 2, unit.height];
    var out = Math.min(unit.width - 4, Math.max(from[0], to[0]) + 12 + Math.min(48, edge.span * 2));
    return "M" + from.map(Math.round).join(" ") + "C" + [out, from[1], out, to[1], to[0], to[1]].map(Math.round).join(" ");
  }

  function draw(unit, into, level, most) {
    var opens = !unit.step && unit.parent;
    var box = pw.make("g", { class: unit.open ? "box open" : unit.step ? "box step" : "box", role: "treeitem",
                             tabindex: -1, "aria-level": level, "aria-label": label(unit),
                             "aria-expanded": opens ? String(unit.open) : undefined,
                             transform: unit.parent ? "translate(" + unit.x.toFixed(1) + " " + unit.y.toFixed(1) + ")" : "" });
    drawn.set(box, unit);
    unit.element = box;
    if (unit.parent) {
      box.appendChild(pw.make("rect", { width: unit.width, height: unit.height, rx: unit.step ? 4 : 9 }));
      box.appendChild(pw.make("title", {}, label(unit)));
    }
    into.appendChild(box);
    if (!unit.open) {
      pw.paint(box, unit[cost.key] / most);
      var middle = unit.width / 2;
      box.appendChild(pw.make("text", { x: middle, y: 14, class: "name" }, pw.shorten(name(unit), 26)));
      box.appendChild(pw.make("text", { x: middle, y: 27, class: "amount" }, detail(unit)));
      return;
    }
    if (unit.parent) {
      var room = Math.floor((unit.width - 16) / 6.4), text = "− " + name(unit);
      box.appendChild(pw.make("text", { x: 8, y: 14, class: "head" }, pw.shorten(text, room)));
    }
    unit.drawn.forEach(function (edge) {
      if (!edge.arc && !edge.points) return;
      if (edge.arc && (!edge.from || !edge.to) && !unit.parent) return;
      var d = edge.arc ? arc(unit, edge) : line(edge.points);
      edge.element = box.appendChild(pw.make("path", { class: edge.arc ? "edge arc" : "edge", d: d }));
      if (edge.to) edge.element.setAttribute("marker-end", "url(#arrow)");
    });
    unit.children.forEach(function (child) { draw(child, box, level + 1, most); });
  }

  function redraw() {
    if (!model) return;
    var leaves = pw.leaves(root);
    var most = Math.max.apply(null, leaves.map(function (unit) { return unit[cost.key]; })) || 1;
    pw.layout(root, sizeOf);
    canvas.replaceChildren();
    drawn.clear();
    draw(root, canvas, 0, most);
    root.element.removeAttribute("role");
    root.element.setAttribute("class", "whole");
    root.element.removeAttribute("tabindex");
    root.element.removeAttribute("aria-label");
    var first = canvas.querySelector(".box");
    if (first) first.setAttribute("tabindex", "0");
    status.textContent = leaves.length + " boxes for " + model.steps.length + " operations";
    svg.setAttribute("aria-label", "Graph of " + leaves.length + " boxes, coloured by " + cost.label);
    mark(api.marked);
  }

  // ---------------------------------------------------------------------------------------------- the view
  function place() {
    canvas.setAttribute("transform", "translate(" + view.x.toFixed(1) + " " + view.y.toFixed(1) + ") scale(" + view.scale.toFixed(4) + ")");
  }
  function zoom(factor, x, y) {
    var scale = Math.min(3, Math.max(0.02, view.scale * factor));
    if (x === undefined) { x = container.clientWidth / 2; y = container.clientHeight / 2; }
    view.x = x - (x - view.x) * scale / view.scale;
    view.y = y - (y - view.y) * scale / view.scale;
    view.scale = scale;
    place();
  }
  // The whole graph; where that would be illegible, its beginning as wide as it fits.
  function fit(whole) {
    var width = container.clientWidth || 600, height = container.clientHeight || 400;
    var all = Math.min(width / root.width, height / root.height, 1.2);
    var wide = Math.min(1, Math.max(0.35, width / root.width));
    view.scale = whole === true || all > 0.55 ? all : wide;
    view.x = (width - root.width * view.scale) / 2;
    view.y = Math.max(0, (height - root.height * view.scale) / 2);
    if (root.width * view.scale > width && whole !== true) view.x = 0;
    place();
  }
  function into(element) { // moves the view so that an element is seen
    var box = element.getBoundingClientRect(), frame = container.getBoundingClientRect();
    var x = box.left + Math.min(box.width, frame.width) / 2 - frame.left;
    var y = box.top + Math.min(box.height, frame.height) / 2 - frame.top;
    if (x < 40 || x > frame.width - 40) view.x += frame.width / 2 - x;
    if (y < 30 || y > frame.height - 30) view.y += frame.height / 2 - y;
    place();
  }

  function toggle(unit, open) {
    if (unit.step || !unit.parent || unit.open === open) return;
    unit.open = open;
    if (open && pw.leaves(root).length > pw.MOST) {
      unit.open = false;
      status.textContent = "more than " + pw.MOST + " boxes: close something first";
      return;
    }
    pw.changed(unit);
    redraw();
    into(unit.element);
    focus(unit.element);
  }

  // Opens or closes the outermost level that is closed, or the innermost that is open.
  function level(open) {
    var units = [];
    (function walk(unit) {
      if (unit.step) return;
      if (unit.open) unit.children.forEach(walk);
      if (unit.parent && unit.open !== open) units.push(unit);
    })(root);
    var depths = units.map(function (unit) { return unit.depth; });
    var depth = open ? Math.min.apply(null, depths) : Math.max.apply(null, depths);
    units = units.filter(function (unit) { return unit.depth === depth; });
    units.forEach(function (unit) { unit.open = open; });
    if (pw.leaves(root).length > pw.MOST) {
      units.forEach(function (unit) { unit.open = !open; });
      status.textContent = "this would be more than " + pw.MOST + " boxes: open single ones";
      return;
    }
    units.forEach(pw.changed);
    redraw();
    fit();
  }

  function act(element) {
    var unit = drawn.get(element);
    if (unit) toggle(unit, !unit.open);
  }
  function next(element, key) {
    var boxes = Array.from(canvas.querySelectorAll(".box")), at = boxes.indexOf(element), unit = drawn.get(element);
    if (key === "+" || key === "=") zoom(1.25);
    else if (key === "-") zoom(0.8);
    else if (key === "0") fit(true);
    else if (key === "ArrowDown") return boxes[at + 1] || null;
    else if (key === "ArrowUp") return boxes[at - 1] || null;
    else if (key === "Home") return boxes[0];
    else if (key === "End") return boxes[boxes.length - 1];
    else if (key === "ArrowRight") {
      if (unit && unit.open) return unit.children[0].element;
      if (unit) toggle(unit, true);
    } else if (key === "ArrowLeft") {
      if (unit && !unit.open) return unit.parent !== root ? unit.parent.element : null;
      if (unit) toggle(unit, false);
    } else return undefined;
    return null;
  }

  function light(unit) { // the edges of one box
    canvas.querySelectorAll(".edge.lit").forEach(function (edge) { edge.classList.remove("lit"); });
    if (!unit || !unit.parent) return;
    unit.parent.drawn.forEach(function (edge) {
      if ((edge.from === unit || edge.to === unit) && edge.element) edge.element.classList.add("lit");
    });
  }

  function mark(module) {
    api.marked = module;
    canvas.querySelectorAll(".marked").forEach(function (old) { old.classList.remove("marked"); });
    if (!module) return;
    var boxes = Array.from(drawn.values());
    for (var m = module; m; m = model.modules[m.parent]) {
      var unit = boxes.find(function (each) { return each.module === m && each.parent && !each.run && !(each.step && !each.step.leaf); });
      if (unit) {
        unit.element.classList.add("marked");
        light(unit);
        return;
      }
    }
  }

  var focus = pw.roving(svg, next, act);
  var drag = null, pointers = new Map();
  svg.addEventListener("focusin", function (event) {
    var unit = drawn.get(event.target);
    if (!unit) return;
    into(unit.element);
    select(unit.module, unit.step);
    light(unit);
  });
  svg.addEventListener("pointerdown", function (event) {
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    drag = { x: event.clientX - view.x, y: event.clientY - view.y, moved: 0, apart: apart() };
  });
  svg.addEventListener("pointermove", function (event) {
    if (!drag || !pointers.has(event.pointerId)) return;
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    drag.moved += Math.abs(event.movementX) + Math.abs(event.movementY);
    if (drag.moved < 4) return;
    if (!svg.hasPointerCapture(event.pointerId)) svg.setPointerCapture(event.pointerId);
    if (pointers.size === 2) {
      var now = apart(), frame = container.getBoundingClientRect();
      if (drag.apart) zoom(now / drag.apart, event.clientX - frame.left, event.clientY - frame.top);
      drag.apart = now;
      return;
    }
    view.x = event.clientX - drag.x;
    view.y = event.clientY - drag.y;
    place();
  });
  function apart() {
    var at = Array.from(pointers.values());
    return at.length === 2 ? Math.hypot(at[0][0] - at[1][0], at[0][1] - at[1][1]) : 0;
  }
  ["pointerup", "pointercancel"].forEach(function (name) {
    svg.addEventListener(name, function (event) { pointers.delete(event.pointerId); });
  });
  svg.addEventListener("click", function (event) {
    var box = event.target.closest(".box");
    if (!box || (drag && drag.moved > 4)) return;
    focus(box);
    act(box);
  });
  svg.addEventListener("wheel", function (event) {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    var frame = container.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), event.clientX - frame.left, event.clientY - frame.top);
  }, { passive: false });
  tools.addEventListener("click", function (event) {
    var button = event.target.closest("button");
    if (!button || !root) return;
    ({ in: function () { zoom(1.25); }, out: function () { zoom(0.8); }, fit: function () { fit(true); },
       more: function () { level(true); }, less: function () { level(false); } })[button.value]();
  });

  var api = {
    marked: null,
    mark: mark,
    fit: fit,
    show: function (shown, by) {
      cost = by;
      if (model !== shown) {
        model = shown;
        model.units = model.units || pw.units(model);
        root = model.units;
        (function relaid(unit) { unit.laid = false; unit.children.forEach(relaid); })(root);
        redraw();
        fit();
      } else {
        (function relaid(unit) { unit.laid = false; unit.children.forEach(relaid); })(root);
        redraw();
      }
    },
  };
  return api;
};
