"""Weight sharing by k-means: close to the best partition of a line, and trained values repair the model."""

import itertools

import torch

from conftest import small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import bake
from featherweight.ingredients.cluster.lloyd import lloyd
from featherweight.ingredients.start.starts import linear_span
from featherweight.share import nearest


def best(values: torch.Tensor, k: int) -> float:
    """The least sum of squares over all partitions of the sorted values into k intervals."""
    ordered = values.double().sort().values
    cuts = itertools.combinations(range(1, len(ordered)), k - 1)
    parts = ([ordered[a:b] for a, b in itertools.pairwise((0, *cut, len(ordered)))] for cut in cuts)
    return min(sum(float((p - p.mean()).square().sum()) for p in part) for part in parts)


def test_the_exact_optimum_bounds_lloyd():
    for _ in range(5):
        values = torch.randn(12)
        centroids = lloyd(values, linear_span(values, 3))
        reached = float((values.double() - centroids[nearest(values, centroids)]).square().sum())
        assert best(values, 3) <= reached + 1e-12
        assert reached <= 4 * best(values, 3) + 1e-12


def test_planted_clusters_are_found():
    planted = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    values = (planted.view(-1, 1) + 0.01 * torch.randn(4, 100)).flatten()
    assert torch.allclose(lloyd(values, linear_span(values, 4)).float(), planted, atol=0.01)


def test_trained_values_are_better_than_values_left_alone():
    model, task = small_mlp(), small_task()
    fit(model, task, epochs=4, lr=1e-2)

    def loss() -> float:
        with torch.no_grad():
            return float(torch.stack([task.loss(model(x), y) for x, y in task.train]).mean())

    method = entry("kmeans_share")
    method(model, task, weight_bits=1, epochs=0)
    left_alone = loss()
    method(model, task, weight_bits=1, epochs=4, lr=5e-3)
    assert loss() < left_alone
    bake(model)
    assert [model[i].weight.unique().numel() for i in (1, 3)] == [2, 2]


def test_training_moves_the_shared_values_and_leaves_every_weight_at_its_own():
    seen = []

    def watched_fit(model, task, **options):
        before = [model[i].weight.detach().unique(return_inverse=True) for i in (1, 3)]
        fit(model, task, **options)
        seen.append((before, [model[i].weight.detach().unique(return_inverse=True) for i in (1, 3)]))
        return model

    entry("kmeans_share")(small_mlp(), small_task(fit=watched_fit), weight_bits=2, epochs=3, lr=1e-3)
    ((before, after),) = seen
    for (values, index), (trained, later) in zip(before, after, strict=True):
        assert len(trained) == len(values) == 4
        assert bool((trained != values).all())
        assert torch.equal(later, index)
