"""Mishra and Marr 2018: three schemes; without grids scheme B is distillation, scheme C starts as quantized."""

import copy

import pytest
import torch

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import bake, codes_of
from featherweight.core.task import evaluate
from matches import watched


def test_scheme_b_without_grids_has_the_gradients_of_distillation():
    task, start = small_task(teacher=small_cnn().eval()), small_mlp()
    options = {"epochs": 1, "lr": 0.1, "optimizer": lambda params, lr: torch.optim.SGD(params, lr=lr)}

    def run(name, **more):
        model = copy.deepcopy(start)
        torch.manual_seed(3)
        return entry(name)(model, task, **options, **more)

    from featherweight.core.restart import reinitialise

    ours = run("apprentice", scheme="B", weights=None, acts=None, keep_first_last=False)
    torch.manual_seed(3)
    start = reinitialise(start)
    theirs = run("kd", alpha=0.5, temperature=1.0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_scheme_c_starts_as_the_quantized_network():
    task = small_task()
    model = fit(small_cnn(), task, epochs=6, lr=0.01).eval()
    taught = small_task(teacher=copy.deepcopy(model))
    options = {"weight_bits": 2, "act_bits": 8, "keep_first_last": True}
    mine = entry("apprentice")(copy.deepcopy(model), taught, epochs=0, **options)
    theirs = entry("quantize")(copy.deepcopy(model), task, weights="ternary", acts="minmax", epochs=0, **options)
    assert evaluate(mine, task).value == evaluate(theirs, task).value


@pytest.mark.parametrize("scheme", ["A", "B", "C"])
def test_ends_on_its_grid_and_the_teacher_given_stays(scheme):
    task = small_task()
    teacher = fit(small_cnn(), task, epochs=6, lr=0.01).eval()
    held = copy.deepcopy(teacher.state_dict())
    student = copy.deepcopy(teacher)
    model = entry("apprentice")(student, small_task(teacher=teacher), scheme=scheme, epochs=10, lr=0.01)
    assert all(torch.equal(held[k], v) for k, v in teacher.state_dict().items())
    assert evaluate(model, task).value >= 0.8
    middle = bake(copy.deepcopy(model))[3]
    assert len(codes_of(middle).symbols.unique()) <= 3


def test_schemes_train_what_they_say():
    for scheme, trains in (("A", True), ("B", False), ("C", False)):
        steps, extra = [], []

        def watching(model, task, steps=steps, extra=extra, **options):
            extra.extend(options.pop("also", []))
            return watched(steps)(model, task, **options)

        task = small_task(teacher=small_cnn().eval(), fit=watching)
        start = small_cnn()
        before = start[3].weight.detach().clone()
        model = entry("apprentice")(start, task, scheme=scheme)
        assert bool(extra) is trains
        latent = next(p for name, p in model.named_parameters() if name.startswith("3.parametrizations.weight"))
        assert torch.equal(latent, before) is (scheme == "C")
        terms = steps[0][0](model, next(iter(task.train)), 0.0)
        assert terms.keys() == {"labels", "teacher"}
        sum(terms.values()).backward()
        assert latent.grad is not None
        if trains:
            params, teaching = extra[0]
            assert not {id(p) for p in params} & {id(p) for p in task.teacher.parameters()}
            assert teaching(model, next(iter(task.train)), 0.0)["teacher"].requires_grad
