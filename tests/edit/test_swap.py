"""Replacing modules by identity, and finding what else refers to them."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from pwrewrite.edit.swap import held_elsewhere, names_of, replace_module


def model() -> Any:
    shared = nn.ReLU()
    return nn.ModuleDict({"a": nn.Sequential(shared, nn.Linear(2, 2)), "b": shared, "c": nn.ModuleList([shared])})


def test_every_place_is_found_and_keeps_its_order() -> None:
    made = model()
    old, new = made["b"], nn.Tanh()
    assert names_of(made, old) == ("a.0", "b", "c.0")
    assert replace_module(made, old, new) is made
    assert names_of(made, new) == ("a.0", "b", "c.0")
    assert names_of(made, old) == ()
    assert list(made) == ["a", "b", "c"]


def test_the_root_is_replaced_by_returning_the_new_one() -> None:
    made, new = model(), nn.Tanh()
    assert replace_module(made, made, new) is new


def test_a_wrapper_keeps_what_it_wraps() -> None:
    made = model()
    old = made["a"]
    wrapper = nn.Sequential(old)
    replace_module(made, old, wrapper)
    assert made["a"] is wrapper
    assert wrapper[0] is old


def test_an_ordinary_model_holds_nothing_elsewhere() -> None:
    made = model()
    made["a"][1].register_forward_hook(lambda *_: None)
    assert held_elsewhere(copy.deepcopy(made), made) == {}


def test_what_holds_it_is_described() -> None:
    made = model()
    made["a"].others = {"x": [made["b"]]}
    made.run = made["a"][1].forward
    copied = copy.deepcopy(made)
    found = held_elsewhere(copied, made)
    assert found == {id(copied["b"]): "a list (a.others)", id(copied["a"][1]): "a bound method forward (run)"}


def test_a_closure_over_the_model_shadows_all_of_it() -> None:
    made = model()
    made.run = lambda x: made["a"](x)
    copied = copy.deepcopy(made)
    found = held_elsewhere(copied, made)
    assert set(found) == {id(module) for module in copied.modules()}
    assert set(found.values()) == {"a closure <lambda> (run)"}


def test_cycles_and_empty_cells() -> None:
    made = model()

    def run() -> Any:
        return later

    made.run = run
    made.loop = [made]
    made.loop.append(made.loop)
    copied = copy.deepcopy(made)
    assert set(held_elsewhere(copied, made)) == {id(copied)}
    later = 1
