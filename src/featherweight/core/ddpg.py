"""Deep deterministic policy gradient for short episodes: an action is one number in 0..1, one reward comes at the end.

Timothy Lillicrap et al., "Continuous control with deep reinforcement learning", ICLR 2016, arXiv:1509.02971, in the
form that He et al. (AMC, ECCV 2018) give it: every transition of an episode is stored with the episode's final reward
`R`, a moving average `b` of the rewards of the batches is taken from it, nothing is discounted:

    y_i = R_i - b + Q'(s_{i+1}, mu'(s_{i+1})),  without the last term at the end of an episode
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Transition = tuple[Tensor, float, Tensor | None, float]
"""(state, action, next state or None at the end, reward of the episode)."""


@final
class Critic(nn.Module):
    """Q(s, a): both enter the first hidden layer."""

    def __init__(self, states: int, hidden: int) -> None:
        super().__init__()
        self.state, self.action = nn.Linear(states, hidden), nn.Linear(1, hidden)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.rest(self.state(state) + self.action(action))


@final
class Ddpg:
    """Actor, critic, their slowly following copies, and a memory of transitions. Draws from torch's generator.

    Args:
        states: numbers in a state.
        hidden: units of both hidden layers of both networks.
        memory: how many transitions are remembered.
        batch: how many of them an update looks at.
        rates: learning rates of actor and critic.
        follow: how far the copies follow at every update, tau.
        average: how far the baseline follows the mean reward of a batch.
    """

    def __init__(
        self,
        states: int,
        *,
        hidden: int = 300,
        memory: int = 2000,
        batch: int = 64,
        rates: tuple[float, float] = (1e-4, 1e-3),
        follow: float = 0.01,
        average: float = 0.5,
    ) -> None:
        layers = [nn.Linear(states, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)]
        self.actor, self.critic = nn.Sequential(*layers, nn.Sigmoid()), Critic(states, hidden)
        self.slow_actor, self.slow_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=rates[0])
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=rates[1])
        self.memory: deque[Transition] = deque(maxlen=memory)
        self.batch, self.follow, self.average = batch, follow, average
        self.baseline: float | None = None

    @torch.no_grad()
    def act(self, state: Tensor, noise: float, low: float) -> float:
        """The actor's action with normal noise of a deviation, truncated to [low, 1]."""
        mean = float(self.actor(state))
        return truncated_normal(mean, noise, low, 1.0) if noise > 0 else min(max(mean, low), 1.0)

    def remember(self, episode: Sequence[tuple[Tensor, float]], reward: float) -> None:
        """Stores an episode: its states and actions in order, each with the reward at the end."""
        following = [state for state, _ in episode[1:]] + [None]
        for (state, action), after in zip(episode, following, strict=True):
            self.memory.append((state, action, after, reward))

    def learn(self) -> None:
        """One update of critic and actor on a batch drawn from the memory."""
        picked = [self.memory[i] for i in torch.randint(len(self.memory), (self.batch,)).tolist()]
        state = torch.stack([s for s, *_ in picked])
        action = torch.tensor([[a] for _, a, *_ in picked])
        reward = torch.tensor([[r] for *_, r in picked])
        going_on = torch.tensor([[after is not None] for _, _, after, _ in picked])
        after = torch.stack([s if after is None else after for s, _, after, _ in picked])
        mean = float(reward.mean())
        self.baseline = mean if self.baseline is None else self.baseline + self.average * (mean - self.baseline)
        with torch.no_grad():
            target = reward - self.baseline + going_on * self.slow_critic(after, self.slow_actor(after))
        _step(self.critic_optimizer, F.mse_loss(self.critic(state, action), target))
        _step(self.actor_optimizer, -self.critic(state, self.actor(state)).mean())
        for slow, fast in ((self.slow_actor, self.actor), (self.slow_critic, self.critic)):
            for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
                p.data.lerp_(q.data, self.follow)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def truncated_normal(mean: float, deviation: float, low: float, high: float) -> float:
    """A draw from a normal distribution, given that it lies in [low, high]."""
    ends = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64) - mean) / deviation)
    share = ends[0] + (ends[1] - ends[0]) * torch.rand((), dtype=torch.float64)
    return min(max(mean + deviation * float(torch.special.ndtri(share)), low), high)
