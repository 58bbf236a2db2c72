"""Scores and their intervals: samples are paired only where both models saw the same, aggregates are bootstrapped."""

import json

import pytest
import torch

from conftest import Batches, blobs, small_mlp, small_task
from featherweight.core.task import Metric, Task, accuracy, cross_entropy, drop, evaluate, paired_drop, score


def outputs(values: torch.Tensor, targets: torch.Tensor, size: int = 50):
    return zip(values.split(size), targets.split(size), strict=True)


def noisy(share: float, n: int = 400) -> list[tuple[torch.Tensor, torch.Tensor]]:
    target = torch.arange(n) % 3
    logits = torch.nn.functional.one_hot(target, 3).float()
    wrong = torch.rand(n) < share
    logits[wrong] = logits[wrong].roll(1, 1)
    return list(outputs(logits, target))


def test_the_interval_of_a_mean_is_about_the_drop():
    before, after = score(accuracy, noisy(0.1)), score(accuracy, noisy(0.3))
    low, high = paired_drop(before, after)
    assert low < drop(before, after) < high
    assert high - low < 0.15
    assert paired_drop(before, after, accuracy) == (low, high)


def spread(values: torch.Tensor) -> float:
    return 10 * float(values.double().quantile(0.9))


@pytest.mark.parametrize("higher", [True, False])
def test_the_interval_of_an_aggregate_is_about_the_aggregate(higher):
    metric = Metric("p90", per_sample=lambda o, t: (o - t).abs(), aggregate=spread, higher_is_better=higher)
    zeros = torch.zeros(600)
    noise = torch.randn(600)
    before, after = (score(metric, outputs(v, zeros)) for v in (noise, 1.5 * noise))
    low, high = paired_drop(before, after, metric)
    assert low < drop(before, after) < high
    state = torch.get_rng_state()
    assert paired_drop(before, after, metric) == (low, high)
    assert torch.equal(torch.get_rng_state(), state)
    assert paired_drop(before, after) is None  # the values of the samples alone say nothing about it


def test_accuracy_of_maps_counts_samples_not_positions():
    target = torch.randint(3, (8, 5, 5))
    logits = torch.nn.functional.one_hot(target, 3).permute(0, 3, 1, 2).float()
    logits[0] = -logits[0]
    found = score(accuracy, [(logits, target)])
    assert found.n == 8
    assert found.per_sample.tolist() == [0.0] + [1.0] * 7
    logits[1, :, 0, 0] = -logits[1, :, 0, 0]
    found = score(accuracy, [(logits, target)])
    assert found.interval == "bootstrap"
    assert found.k is None
    assert found.value == pytest.approx((6 + 24 / 25) / 8)


def test_a_loader_that_shuffles_gives_no_pairs():
    x, y = blobs((1, 8, 8))
    shuffled = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=32, shuffle=True)
    model, task = small_mlp(), Task(valid=shuffled)
    first, second = evaluate(model, task), evaluate(model, task)
    assert first.value == second.value
    assert paired_drop(first, second) is None
    still = Task(valid=Batches(x, y))
    assert paired_drop(evaluate(model, still), evaluate(model, still)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1, 2]), torch.tensor([2, 1])),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        ({"a": torch.ones(2, 2), "b": ["x"]}, {"a": torch.ones(2, 2), "b": ["y"]}),
        (torch.ones(2).numpy(), torch.zeros(2).numpy()),
    ],
)
def test_targets_of_any_kind_tell_the_samples(one, other):
    metric = Metric("m", per_sample=lambda o, t: o)
    scores = [score(metric, [(torch.tensor([0.5, 0.7]), t)]) for t in (one, one, other, None)]
    assert scores[0].targets == scores[1].targets
    assert len({s.targets for s in scores}) == 3
    assert paired_drop(scores[0], scores[1]) is not None
    assert paired_drop(scores[0], scores[2]) is None


def test_what_a_score_says_beside_its_samples_is_json():
    found = evaluate(small_mlp(), small_task())
    json.dumps({k: v for k, v in vars(found).items() if k != "per_sample"})


def test_a_batch_in_which_no_label_counts_has_no_loss():
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, -100, 2, -100])
    loss = cross_entropy(logits, target)
    assert torch.equal(loss, cross_entropy(logits[::2], target[::2]))
    nothing = cross_entropy(logits, torch.full((4,), -100))
    nothing.backward()
    assert nothing.item() == 0
    assert not logits.grad.any()
