"""He et al. 2018: every episode holds the budget, the agent finds what chance does not, layers are refitted."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from conftest import Batches, blobs, small_cnn, small_task
from featherweight.core.channels import channel_groups
from featherweight.core.cost import cost
from featherweight.core.ddpg import Ddpg, truncated_normal
from featherweight.core.fit import fit
from featherweight.core.ledger import recording
from featherweight.core.task import Task, evaluate
from featherweight.errors import BadOption, CompressionError
from featherweight.recipes.amc import Environment, Layout, Refits, amc, read_norms, rewarded, search
from featherweight.zoo.networks import build

KEEPS = [1 - 0.1 * i for i in range(9)]
PRICE, NEED = [0.3, 0.1, 0.25, 0.1, 0.25], [0.2, 2.0, 0.3, 3.0, 0.4]


def spent(choice) -> float:
    return sum(p * KEEPS[i] for p, i in zip(PRICE, choice, strict=True))


def worth(choice) -> float:
    return 1 - sum(n * (1 - KEEPS[i]) ** 2 for n, i in zip(NEED, choice, strict=True)) / 3


def toy(budget: float = 0.5) -> Environment:
    """Cheap layers that the network needs, dear ones that it does not; the best allocation is known."""
    features = torch.tensor([[t / 4, p / 0.3] for t, p in enumerate(PRICE)])
    return Environment(features, [KEEPS] * 5, spent, worth, budget)


def run(seed: int, episodes: int, warmup: int) -> list[float]:
    torch.manual_seed(seed)
    env = toy()
    agent = Ddpg(len(env.state(0, [])), batch=32)
    found = list(search(env, agent, episodes=episodes, warmup=warmup, least=0.2, noise_decay=0.985))
    assert all(episode.cost <= 0.5 + 1e-9 for episode in found), "every episode holds the budget"
    return [episode.reward for episode in found]


def test_the_agent_beats_chance_and_the_same_for_every_layer():
    agents, chances = ([run(seed, 120, warmup) for seed in (0, 1)] for warmup in (40, 120))
    best = max(worth(c) for c in itertools.product(range(9), repeat=5) if spent(c) <= 0.5)
    mean = lambda rewards: sum(map(sum, rewards)) / sum(map(len, rewards))  # noqa: E731
    learnt = mean([rewards[-20:] for rewards in agents])
    assert learnt > mean(chances) + 0.2, "what it does at last is better than what it would do by chance"
    assert learnt > worth([5] * 5) + 0.2, "and than the same fraction of every layer"
    for agent, chance in zip(agents, chances, strict=True):
        assert max(agent) > max(chance), "the best of equally many episodes"
        assert best - max(agent) < 0.03


def test_the_same_seed_gives_the_same_search():
    assert run(3, 8, 5) == run(3, 8, 5)


def test_the_wall_leaves_the_rest_room_and_rounds_down():
    env = toy()
    assert env.wall([]) == 0
    assert env.wall([0, 0]) > 0
    choice = []
    for _ in range(5):
        choice.append(env.place(choice, 1.0))  # as much as there may be
    assert spent(choice) <= 0.5
    for t in range(5):
        if choice[t]:
            wider = [*choice[:t], choice[t] - 1]
            assert spent(env.smallest(wider)) > 0.5, "one more would leave no room for those to come"
    assert toy(1.0).place([], 0.75) == 2  # 0.8: rounded up where nothing binds
    with pytest.raises(CompressionError, match=r"below 0\.2, what the smallest widths cost"):
        next(search(toy(0.1), Ddpg(5), episodes=1, warmup=1, least=0.2))


def test_transitions_hold_the_final_reward_and_end_without_a_bootstrap():
    agent = Ddpg(2, hidden=8, batch=32)
    states = [torch.tensor([float(i), 1.0]) for i in range(3)]
    agent.remember([(s, 0.5) for s in states], 0.7)
    assert [r for *_, r in agent.memory] == [0.7] * 3
    assert [after is None for _, _, after, _ in agent.memory] == [False, False, True]
    agent.learn()
    assert agent.baseline == pytest.approx(0.7)
    agent.remember([(s, 0.5) for s in states], 1.7)
    agent.learn()
    assert 0.7 < agent.baseline < 1.7


def test_a_constant_reward_is_worth_nothing_beyond_the_baseline():
    """With R = b everywhere the critic's target is 0 at the end of every episode, and 0 before it."""
    torch.manual_seed(0)
    agent = Ddpg(1, hidden=16, rates=(1e-3, 1e-2))
    for _ in range(20):
        agent.remember([(torch.rand(1), float(torch.rand(()))) for _ in range(3)], 0.9)
    for _ in range(400):
        agent.learn()
    assert float(agent.critic(torch.rand(50, 1), torch.rand(50, 1)).detach().abs().mean()) < 0.05


def test_noise_is_truncated():
    drawn = [truncated_normal(0.3, 0.5, 0.2, 1.0) for _ in range(400)]
    assert min(drawn) >= 0.2
    assert max(drawn) <= 1
    assert 0.45 < sum(drawn) / len(drawn) < 0.65
    assert truncated_normal(0.5, 1e-9, 0.2, 1.0) == pytest.approx(0.5)


def test_the_log_form_rewards_both_a_smaller_error_and_a_smaller_network():
    left = {"macs": 1e6, "params": 1e4}
    assert rewarded("log_macs", 0.9, left) == pytest.approx(-0.1 * math.log(1e6))
    assert rewarded("log_macs", 0.95, left) > rewarded("log_macs", 0.9, left)
    assert rewarded("log_macs", 0.9, {**left, "macs": 5e5}) > rewarded("log_macs", 0.9, left)
    assert rewarded("log_params", 0.9, {**left, "macs": 1.0}) == rewarded("log_params", 0.9, left)
    assert rewarded("metric", 0.1, left, higher_is_better=False) > rewarded("metric", 0.2, left, higher_is_better=False)


def trained() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    x, y = blobs((1, 8, 8), n=256, noise=0.8)
    task = Task(train=Batches(x[:128], y[:128]), valid=Batches(x[128:], y[128:]))
    return fit(small_cnn(), task, epochs=8, lr=0.01).eval(), task


def test_the_refit_halves_the_error_of_what_is_read():
    model, task = trained()
    channels = channel_groups(model, task.inputs())
    gone = channels.outputs["0"][read_norms(model, channels)[channels.outputs["0"]].argsort()[:4]]
    errors = []
    for ridge in (1e-4, 1e9):
        refits = Refits.of(model, task, channels, 10, ridge)
        smaller = refits.without(gone)
        with torch.no_grad():
            x = torch.cat([batch[0] for batch in task.valid])
            errors.append(float((smaller[:4](x) - model[:4](x)).square().mean()))
    assert errors[0] < 0.5 * errors[1]  # endless ridge: the old weights


def test_channels_that_are_read_least_go_first():
    model, task = trained()
    with torch.no_grad():
        model[3].weight[:, 5] = 0
    norms = read_norms(model, channels := channel_groups(model, task.inputs()))
    assert int(norms[channels.outputs["0"]].argmin()) == 5
    assert norms[channels.outputs["3"]] == pytest.approx(model[8].weight.detach().abs().sum(0).double())


def test_what_an_episode_costs_is_what_the_network_costs():
    model, task = build("resnet:depth=8,width=0.5").eval(), small_task((1, 28, 28), classes=10)
    counted = cost(model, task.inputs())
    layout = Layout.of(model, task, counted, None, least=0.2, round_to=1)
    assert layout.features.shape == (len(layout.keeps), 8)
    assert layout.features.min() == 0
    assert layout.features.max() == 1
    assert len(layout.keeps) == len(channel_groups(model, task.inputs()).groups), "coupled layers have one action"
    torch.manual_seed(0)
    choice = [int(torch.randint(len(keeps), ())) for keeps in layout.keeps]
    refits = Refits(model, layout.channels, {}, 0.0)
    after = cost(refits.without(layout.doomed(choice)), task.inputs())
    assert layout.left(choice)["macs"] == pytest.approx(after.macs, rel=1e-3)
    assert layout.left(choice)["params"] == after.params
    assert all(keeps[-1] >= 0.2 for keeps in layout.keeps)


def test_it_finds_a_network_within_the_budget_and_says_which():
    model, task = trained()
    before = cost(model, task.inputs())
    with recording() as ledger:
        result = amc(copy.deepcopy(model), task, budget="macs<=0.4x", episodes=12, warmup=6, hidden=16,
                     search_batches=2, calibration_batches=4, finetune=2, round_to=1)  # fmt: skip
    assert cost(result, task.inputs()).macs <= 0.4 * before.macs
    assert evaluate(result, task).value > 0.8
    assert any(note.startswith("best of 12 episodes: reward") for note in ledger.notes)


def test_what_it_refuses():
    model, task = trained()
    with pytest.raises(BadOption, match="for a latency choose netadapt"):
        amc(model, task, budget="latency<=0.5x")
    with pytest.raises(CompressionError, match=r"below .* what the smallest widths cost: lower least=0\.9"):
        amc(model, task, budget="macs<=0.5x", least=0.9, episodes=1, warmup=1, calibration_batches=1)
