"""The passes that replace single layers by a form: one class for every `FormPass` of every form.

They differ in nothing but what their form says of itself (`pwrewrite.forms`), so a new form brings its passes along.
"""

from __future__ import annotations

from ..forms import FORMS
from ..forms.form import Form, FormPass
from .base import LayerPass


def _make(form: Form, facts: FormPass) -> type[LayerPass]:
    name = "".join(part.capitalize() for part in facts.name.split("-"))
    says = {key: getattr(facts, key) for key in FormPass.__slots__}
    return type(name, (LayerPass,), {**says, "form": form, "__doc__": f"{facts.summary}.", "__module__": __name__})


FACTORIZING: dict[str, type[LayerPass]] = {
    facts.name: _make(form, facts) for form in FORMS.values() for facts in form.passes
}
"""Every pass that gives layers a form, by its name."""

InsertBottleneck = FACTORIZING["insert-bottleneck"]
InsertReduction = FACTORIZING["insert-reduction"]
InsertExpansion = FACTORIZING["insert-expansion"]
FactorizeSpatial = FACTORIZING["factorize-spatial"]
SeparateDepthwise = FACTORIZING["separate-depthwise"]
FactorizePointwise = FACTORIZING["factorize-pointwise"]
FactorizeLinear = FACTORIZING["factorize-linear"]


FORM_PASSES: dict[str, tuple[type[LayerPass], ...]] = {
    name: tuple(kind for kind in FACTORIZING.values() if kind.form is form) for name, form in FORMS.items()
}
"""The passes that propose a form, by the form's name."""
