"use strict";
// The graph of a model as units that open and close, and its layout by dagre.
//
// A unit is a step or a module with all that runs inside; a module with more than LARGE of them gets units between,
// runs of neighbours, so that a sequence of thousands stays legible and quick. Each open unit is laid out on its own
// (dagre takes minutes for a few hundred nodes in clusters, and milliseconds for those of one) and is a box in the unit
// around it. Of its edges dagre gets those that are short: each rank that an edge crosses costs it a node. The others,
// and those that run backwards since a module is closed, are drawn as arcs beside.
pw.LARGE = 60;
pw.SHOWN = 48;
pw.MOST = 1200;
pw.CROSSED = 150;

pw.units = function (model) {
  var root = unit(model.modules[0], null), byModule = new Map([[model.modules[0], root]]);
  function unit(module, parent, step) {
    return { module: module, parent: parent, step: step || null, children: [], open: false, steps: 0,
             edges: new Map(), macs: 0, params: 0, memory: 0, time: 0, depth: 0 };
  }
  function of(module) {
    var known = byModule.get(module);
    if (!known) {
      var parent = of(model.modules[module.parent]);
      known = unit(module, parent);
      parent.children.push(known);
      byModule.set(module, known);
    }
    return known;
  }
  model.steps.forEach(function (step) {
    var around = step.leaf && step.module.parent >= 0 ? model.modules[step.module.parent] : step.module;
    var parent = of(around), made = unit(step.module, parent, step);
    parent.children.push(made);
    made.first = step.id;
  });
  // Between the children of every unit, and between them and what is outside of it (null), each edge once.
  function connect(root, steps) {
    var unitOf = [];
    (function walk(unit, i) {
      unit.index = i;
      if (unit.step) unitOf[unit.step.id] = unit;
      unit.children.forEach(walk);
    })(root, 0);
    function add(parent, from, to) {
      var key = (from ? from.index : "in") + ">" + (to ? to.index : "out");
      if (!parent.edges.has(key)) parent.edges.set(key, { from: from, to: to, back: from && to && to.index < from.index });
    }
    steps.forEach(function (step) {
      step.inputs.forEach(function (input) {
        var from = unitOf[input], to = unitOf[step.id];
        for (; from.depth > to.depth; from = from.parent) add(from.parent, from, null);
        for (; to.depth > from.depth; to = to.parent) add(to.parent, null, to);
        for (; from.parent !== to.parent; from = from.parent, to = to.parent) {
          add(from.parent, from, null);
          add(to.parent, null, to);
        }
        if (from !== to) add(from.parent, from, to);
      });
    });
  }
  function finish(parent) {
    if (parent.children.length > pw.LARGE) {
      var children = parent.children, length = Math.ceil(Math.sqrt(children.length));
      parent.children = [];
      for (var i = 0; i < children.length; i += length) {
        var run = unit(parent.module, parent), part = children.slice(i, i + length);
        run.run = true;
        run.children = part;
        part.forEach(function (child) { child.parent = run; });
        parent.children.push(run);
      }
    }
    parent.children.forEach(function (child) {
      child.depth = parent.depth + 1;
      if (child.step) {
        child.steps = 1;
        ["macs", "params", "memory", "time"].forEach(function (key) { child[key] = child.step[key]; });
      } else finish(child);
      ["steps", "macs", "params", "memory", "time"].forEach(function (key) { parent[key] += child[key]; });
    });
    parent.first = parent.children.length ? parent.children[0].first : 0;
  }
  finish(root);
  connect(root, model.steps);
  root.open = true;
  pw.deepen(root);
  return root;
};

// The units that are drawn: what is closed or a step, inside what is open.
pw.leaves = function (root) {
  var leaves = [];
  (function walk(unit) {
    if (!unit.open) leaves.push(unit);
    else unit.children.forEach(walk);
  })(root);
  return leaves;
};

// Opens the closed units, level by level, as long as no more than SHOWN are drawn.
pw.deepen = function (root) {
  for (;;) {
    var closed = pw.leaves(root).filter(function (unit) { return !unit.step; });
    var depth = Math.min.apply(null, closed.map(function (unit) { return unit.depth; }));
    var level = closed.filter(function (unit) { return unit.depth === depth; });
    level.forEach(function (unit) { unit.open = true; });
    if (!level.length) return;
    if (pw.leaves(root).length > pw.SHOWN) {
      level.forEach(function (unit) { unit.open = false; });
      return;
    }
  }
};

// Which edges dagre is given: forward ones, the shortest first, until they cross CROSSED ranks in all.
pw.choose = function (unit) {
  var rank = unit.children.map(function () { return 1; }), out = unit.children.map(function () { return []; });
  var edges = Array.from(unit.edges.values());
  edges.forEach(function (edge) { if (edge.from && edge.to && !edge.back) out[edge.from.index].push(edge.to.index); });
  out.forEach(function (targets, from) { // children stand in the order of the run
    targets.forEach(function (to) { rank[to] = Math.max(rank[to], rank[from] + 1); });
  });
  var last = Math.max.apply(null, rank) + 1, crossed = 0;
  edges.forEach(function (edge) {
    edge.span = (edge.to ? rank[edge.to.index] : last) - (edge.from ? rank[edge.from.index] : 0);
  });
  edges.sort(function (a, b) { return a.span - b.span; }).forEach(function (edge) {
    crossed += Math.max(0, edge.span - 1);
    edge.arc = edge.back || (edge.span > 1 && crossed > pw.CROSSED);
  });
  return edges;
};

pw.HEAD = 20;

// Gives every unit inside an open one its place in it, and itself its size.
pw.layout = function (unit, sizeOf) {
  if (!unit.open) {
    var size = sizeOf(unit);
    unit.width = size[0];
    unit.height = size[1];
    return;
  }
  if (unit.laid) return;
  unit.laid = true;
  if (pw.stacked(unit, sizeOf)) return;
  var graph = new dagre.graphlib.Graph(), root = !unit.parent;
  graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 14, edgesep: 8, marginx: root ? 8 : 10, marginy: root ? 8 : 2 });
  unit.children.forEach(function (child, i) {
    pw.layout(child, sizeOf);
    graph.setNode(i, { width: child.width, height: child.height });
  });
  unit.drawn = pw.choose(unit);
  unit.drawn.forEach(function (edge) {
    if (edge.arc || ((!edge.from || !edge.to) && root)) return;
    [edge.from ? "" : "in", edge.to ? "" : "out"].forEach(function (end) {
      if (end) graph.setNode(end, { width: 1, height: 1 });
    });
    graph.setEdge(edge.from ? edge.from.index : "in", edge.to ? edge.to.index : "out", {});
  });
  dagre.layout(graph);
  unit.children.forEach(function (child, i) {
    var node = graph.node(i);
    child.x = node.x - child.width / 2;
    child.y = node.y - child.height / 2 + (root ? 0 : pw.HEAD);
  });
  unit.drawn.forEach(function (edge) {
    var laid = edge.arc ? null : graph.edge(edge.from ? edge.from.index : "in", edge.to ? edge.to.index : "out");
    edge.points = laid ? laid.points.map(function (p) { return [p.x, p.y + (root ? 0 : pw.HEAD)]; }) : null;
  });
  unit.arcs = unit.drawn.some(function (edge) { return edge.arc; });
  unit.width = (graph.graph().width || 1) + (unit.arcs ? 60 : 0);
  unit.height = (graph.graph().height || 1) + (root ? 0 : pw.HEAD + 4);
};

// A unit whose children are a chain needs no dagre: they stand one below the other.
pw.stacked = function (unit, sizeOf) {
  var last = unit.children.length - 1, edges = Array.from(unit.edges.values()), gap = 16;
  var chain = edges.every(function (edge) {
    return edge.from && edge.to ? edge.to.index === edge.from.index + 1
      : edge.from ? edge.from.index === last : edge.to.index === 0;
  });
  if (!chain) return false;
  unit.children.forEach(function (child) { pw.layout(child, sizeOf); });
  var widest = Math.max.apply(null, unit.children.map(function (child) { return child.width; }));
  var x = 10 + widest / 2, y = unit.parent ? pw.HEAD + gap : 8;
  unit.children.forEach(function (child) {
    child.x = x - child.width / 2;
    child.y = y;
    y += child.height + gap;
  });
  unit.width = widest + 20;
  unit.height = y - (unit.parent ? 0 : gap - 8);
  unit.arcs = false;
  unit.drawn = edges;
  edges.forEach(function (edge) {
    if (!unit.parent && !(edge.from && edge.to)) return;
    var top = edge.from ? edge.from.y + edge.from.height : pw.HEAD, bottom = edge.to ? edge.to.y : unit.height;
    edge.arc = false;
    edge.points = [[x, top], [x, bottom]];
  });
  return true;
};

// Takes note that a unit was opened or closed: all around it is laid out anew.
pw.changed = function (unit) {
  for (var each = unit; each; each = each.parent) each.laid = false;
};
