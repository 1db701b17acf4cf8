"""Sums of inputs and gradients equal those of plain loops, and leave the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pwrewrite.capturing import capture
from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import RefusedError
from pwrewrite.decompose.weighting import SideWeight
from pwrewrite.passes.base import spec_of
from pwrewrite.planning.gathering import TEMPERATURE, Gathering, gather
from pwrewrite.planning.running import samples_of
from pwrewrite.planning.statistics import LayerStatistics, Statistics


class Net(nn.Module):
    """A convolution whose output is changed in place, one called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu_()
        y = self.twice(F.relu(self.twice(y)))
        return self.head(y.mean((2, 3)))


def specs(model: Net) -> dict[str, ConvSpec]:
    from pwrewrite.forms.specs import linear_spec

    return {
        "first": ConvSpec.of_module(model.first),
        "twice": ConvSpec.of_module(model.twice),
        "head": linear_spec(4, 5, True),
    }


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def moment(one: LayerStatistics, centred: bool = False) -> Tensor:
    found = one.input_moment(centred=centred)
    assert found is not None
    return found


def chunks(count: int = 3) -> list[tuple[tuple[Tensor], dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    return [((torch.randn(4, 3, 6, 6, generator=generator),), {}) for _ in range(count)]


def test_inputs_are_second_moments_of_all_patches(model: Net) -> None:
    found = gather(model, specs(model), chunks(), Gathering(None))
    rows = torch.cat([F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27) for (x,), _ in chunks()]).double()
    one = found.layers["first"]
    torch.testing.assert_close(moment(one)[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    centred = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    torch.testing.assert_close(moment(one, True)[0], centred, rtol=1e-5, atol=1e-6)
    assert found.positions("first") == 36
    assert found.positions("twice") == 72
    assert found.positions("head") == 1
    assert found.samples == 12
    assert one.gradient_moment() is None


class InCode(nn.Module):
    """The same network, with weights of its own in functions."""

    def __init__(self, like: Net) -> None:
        super().__init__()
        self.first, self.twice = like.first.weight, like.twice.weight
        self.bias, self.head = like.first.bias, like.head

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.first, self.bias, padding=1).relu_()
        y = F.conv2d(F.relu(F.conv2d(y, weight=self.twice, padding=1)), self.twice, padding=1)
        return F.linear(input=y.mean((2, 3)), weight=self.head.weight, bias=self.head.bias)


@pytest.mark.parametrize("gradients", [False, True])
def test_functions_are_seen_as_modules_are(model: Net, gradients: bool) -> None:
    how = Gathering("logits" if gradients else None, seed=5)
    expected = gather(model, specs(model), chunks(), how)
    functions = {"first": "first", "twice": "twice", "head": "head.weight"}
    found = gather(
        InCode(model), specs(model), chunks(), Gathering("logits" if gradients else None, 5, functions=functions)
    )
    for path, one in expected.layers.items():
        other = found.layers[path]
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.means, other.means)
        assert (one.weight, one.rows) == (other.weight, other.rows)
        if gradients:
            assert one.gradients is not None
            assert other.gradients is not None
            assert torch.equal(one.gradients, other.gradients)


def test_gradients_are_those_of_autograd(model: Net) -> None:
    found = gather(model, {"first": specs(model)["first"]}, chunks(), Gathering(seed=5))
    total = torch.zeros(4, 4, dtype=torch.float64)
    for number, ((x,), _) in enumerate(chunks()):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + number)
        with torch.no_grad():
            output = model.first(x)
        output.requires_grad_()
        logits = model.head(model.twice(F.relu(model.twice(output.clone().relu()))).mean((2, 3)))
        tempered = logits / TEMPERATURE
        labels = torch.multinomial(tempered.detach().softmax(-1), 1, generator=generator)[:, 0]
        scores = logits - logits.mean(1, keepdim=True)
        noise = (
            torch.randn(scores.shape, generator=generator) / (scores.shape[1] * scores.detach().square().mean()).sqrt()
        )
        (F.cross_entropy(tempered, labels, reduction="sum") + (scores * noise).sum()).backward()
        assert output.grad is not None
        rows = output.grad.flatten(2).transpose(1, 2).reshape(-1, 4).double()
        total += rows.T @ rows
    gradient = found.layers["first"].gradient_moment()
    assert gradient is not None
    torch.testing.assert_close(gradient[0], total / (12 * 36), rtol=1e-4, atol=1e-12)
    assert found.outcome == "classes"


def test_the_loss_predicts_what_noise_in_a_layer_does() -> None:
    """½ · positions · tr(G ΔW C ΔWᵀ) is the KL divergence of halved scores that a small random change of weights makes.

    And half the squared relative error of the scores off their mean.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 10)).double().eval()
    data = [((torch.randn(64, 3, 6, 6, dtype=torch.float64),), {}) for _ in range(8)]
    spec = ConvSpec.of_module(model[0])  # type: ignore[arg-type]
    found = gather(model, {"0": spec}, data)
    one = found.layers["0"]
    inputs, gradient = moment(one)[0], one.gradient_moment()
    assert gradient is not None
    ratios = []
    for seed in range(12):
        delta = 1e-3 * torch.randn(8, 27, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        predicted = 0.5 * found.positions("0") * float((gradient[0] @ delta @ inputs @ delta.T).trace())
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed[0].weight += delta.reshape(8, 3, 3, 3)  # type: ignore[operator]
            kl = 0.0
            for (x,), _ in data:
                p, q = ((m(x) / TEMPERATURE).log_softmax(-1) for m in (model, changed))
                kl += float((p.exp() * (p - q)).sum()) / 512
                a, b = (scores - scores.mean(1, keepdim=True) for scores in (p, q))
                kl += float((a - b).square().sum() / a.square().sum()) / 2 / len(data)
        ratios.append(kl / predicted)
    assert 0.5 < sum(ratios) / len(ratios) < 2


def test_the_surrogate_predicts_relative_output_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)).double().eval()
    data = [((torch.randn(16, 3, 9, 9, dtype=torch.float64),), {}) for _ in range(16)]
    found = gather(model, {"2": ConvSpec.of_module(model[2])}, data)  # type: ignore[arg-type]
    one = found.layers["2"]
    delta = 1e-2 * torch.randn(4, 72, dtype=torch.float64)
    gradient = one.gradient_moment()
    assert gradient is not None
    assert found.outcome == "values"
    predicted = 0.5 * found.positions("2") * float((gradient[0] @ delta @ moment(one)[0] @ delta.T).trace())
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[2].weight += delta.reshape(4, 8, 3, 3)  # type: ignore[operator]
        error = sum(float((model(x) - changed(x)).square().sum()) for (x,), _ in data)
        power = sum(float(model(x).square().sum()) for (x,), _ in data)
    assert predicted == pytest.approx(0.5 * error / power, rel=0.15)


def test_the_model_stays_as_it_was(model: Net) -> None:
    model.train()
    model.head.eval()
    model.first.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    gather(model, specs(model), chunks())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values()):
        assert torch.equal(a, b), name


class Caches(Net):
    """Keeps what it worked out, as LeViT's attention does its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if "bias" not in self.kept:
            self.kept["bias"] = self.head.bias[[4, 3, 2, 1, 0]]
        return super().forward(x) + self.kept["bias"]


def test_what_the_model_keeps_goes() -> None:
    torch.manual_seed(0)
    model = Caches()
    state = torch.get_rng_state()
    gather(model, specs(model), chunks())
    assert model.kept == {}
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_gathering_goes_on_where_it_was(model: Net) -> None:
    whole = gather(model, specs(model), chunks(4))

    def breaking() -> Iterator[tuple[tuple[Tensor], dict[str, Tensor]]]:
        yield from chunks(4)[:2]
        raise KeyboardInterrupt

    part = Statistics()
    with pytest.raises(KeyboardInterrupt):
        gather(model, specs(model), breaking(), start=part)
    assert part.chunks == 2
    gather(model, specs(model), chunks(4), start=part)
    for path, one in whole.layers.items():
        assert torch.equal(part.layers[path].inputs, one.inputs)
        assert part.layers[path].gradients is not None
        assert torch.equal(part.layers[path].gradients, one.gradients)  # type: ignore[arg-type]


def test_large_maps_are_sampled_and_still_counted_whole() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(8, 2, 40, 40)
    found = gather(layer, {"": ConvSpec.of_module(layer)}, [((x,), {})], Gathering(expected=8))
    one = found.layers[""]
    assert one.rows < 8 * 1600
    assert found.positions("") == pytest.approx(1600)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18).double()
    torch.testing.assert_close(moment(one)[0].diagonal(), rows.square().mean(0), rtol=0.15, atol=0)


def test_values_that_are_not_finite_are_refused(model: Net) -> None:
    with torch.no_grad():
        model.first.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(RefusedError, match="not finite"):
        gather(model, specs(model), chunks())


def test_what_counts_as_a_sample() -> None:
    assert samples_of(([torch.zeros(3, 8, 8)] * 2,), {}) == 2
    assert samples_of((), {"x": torch.zeros(5, 3)}) == 5


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 1e-2])
def test_inputs_that_hardly_vary_have_a_moment_off_their_mean(spread: float) -> None:
    one = LayerStatistics.empty(ConvSpec.of_module(nn.Conv2d(16, 4, 1)), torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(16, generator=draw) + spread * torch.randn(1, 5_000, 16, generator=draw)
    one.add_inputs(rows, 1.0)
    found = Statistics({"conv": one}, samples=500)
    found.round()
    centred = moment(one, centred=True)
    SideWeight(centred, 1).roots()  # refuses what has a negative eigenvalue
    assert float(torch.linalg.eigvalsh(centred).min()) >= 0


def test_very_long_rows_keep_their_mean_square_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from pwrewrite.planning import statistics

    monkeypatch.setattr(statistics, "LARGEST_ROW", 20)
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(16, 3, 6, 6)
    one = gather(layer, {"": ConvSpec.of_module(layer)}, [((x,), {})]).layers[""]
    assert one.inputs.shape == (1, 27)
    assert one.input_moment() is None
    rows = F.unfold(x, 3)
    assert one.level() == pytest.approx(float(rows.square().mean()), rel=1e-5)
    assert one.level(centred=True) == pytest.approx(float(rows.var((0, 2), correction=0).mean()), rel=1e-4)


def test_a_model_that_is_sure_of_everything_still_says_what_matters() -> None:
    """On inputs that a model has learnt by heart the Fisher information is next to nothing; its scores still count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)).eval()
    data = [((torch.randn(64, 3, 6, 6),), {}) for _ in range(8)]
    levels = []
    for sureness in (1.0, 1e4):
        with torch.no_grad():
            model[3].weight *= sureness  # type: ignore[operator]
            model[3].bias *= sureness  # type: ignore[operator]
        gradient = gather(model, {"0": ConvSpec.of_module(model[0])}, data).layers["0"].gradient_moment()  # type: ignore[arg-type]
        assert gradient is not None
        levels.append(float(gradient.diagonal(dim1=1, dim2=2).sum()))
    assert levels[1] > 0.5 * levels[0]


def test_what_is_computed_again_on_the_way_back_counts_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.again = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), True

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            y = checkpoint(self.inner, y, use_reentrant=False) if self.again else self.inner(y)
            return y.mean((2, 3))

    torch.manual_seed(0)
    model, chunks = Checkpointed().eval(), [((torch.randn(4, 3, 6, 6),), {})]
    specs = {path: spec_of(layer) for layer in capture(model, chunks[0][0]).layers for path in (layer.path,)}
    found = []
    for model.again in (True, False):
        sums = gather(model, specs, chunks, Gathering("values")).layers["inner"]
        found.append((sums.rows, sums.weight, sums.gradient_weight))
    assert found[0] == found[1]
