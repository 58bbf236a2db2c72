"""Networks of one stream of several (frames, motion, sound), and networks of single frames as networks of clips."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from featherweight.core.task import prediction
from featherweight.errors import BadData


@final
class OnStream(nn.Module):
    """A network that is handed all streams, and looks at one of them: so teachers of several make one ensemble.

    Args:
        stream: its name, where inputs go by names, or its position.
        network: what it is handed to.
    """

    def __init__(self, stream: str | int, network: nn.Module) -> None:
        super().__init__()
        self.stream, self.network = stream, network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network makes of its stream.

        Raises:
            BadData: the stream is not among the inputs.

        >>> import torch
        >>> OnStream("motion", nn.Identity())(frames=torch.zeros(1), motion=torch.ones(1))
        tensor([1.])
        """
        held: dict[str | int, Any] = dict(enumerate(args)) | dict(kwargs.items())
        if self.stream not in held:
            given = ", ".join(map(repr, held)) or "none"
            raise BadData(
                f"a teacher looks at stream {self.stream!r}, the streams are {given}: pass Task(teacher_split=)"
            )
        return self.network(held[self.stream])


@final
class Segments(nn.Module):
    """A network of single frames as one of clips (batch, segments, ...): the mean of what it says of each segment.

    The order of the segments does not matter.
    Source: Wang et al., Temporal Segment Networks, ECCV 2016, arXiv:1608.00859.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Tensor:
        scores = prediction(self.network(clips.flatten(0, 1)))
        return scores.unflatten(0, clips.shape[:2]).mean(1)
