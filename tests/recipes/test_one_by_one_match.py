"""The thesis's 1x1 matching: nothing with the identity for its weight, gone from the student that comes out."""

import torch
from torch import nn

from conftest import small_cnn, small_task
from featherweight.catalogue import entry, fill
from featherweight.ingredients.match.gram_matrices import gram_matrices
from matches import loss


def test_identity_changes_nothing():
    match = fill("adapter", "one_by_one_match")
    f, t = [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)], [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)]
    adapter = match(f[0], t[0])
    with torch.no_grad():
        adapter.weight.copy_(torch.eye(6).view(6, 6, 1, 1))
        torch.testing.assert_close(loss(gram_matrices, [adapter(m) for m in f], t), loss(gram_matrices, f, t))


def test_learned_beside_a_narrow_student_and_dropped():
    made = []

    def adapter(ours, theirs):
        made.append(fill("adapter", "one_by_one_match")(ours, theirs))
        made.append(made[-1].weight.detach().clone())
        return made[-2]

    narrow = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(),
                           nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))  # fmt: skip
    names = list(narrow.state_dict())
    student = entry("cross_layer_matrix")(narrow, small_task(teacher=small_cnn()), adapter=adapter, epochs=1)
    assert [tuple(m.weight.shape[:2]) for m in made[::2]] == [(8, 3), (8, 3), (16, 5)]
    assert all(not torch.equal(layer.weight, before) for layer, before in zip(made[::2], made[1::2], strict=True))
    assert list(student.state_dict()) == names


def test_vectors_and_tokens_have_linear_layers():
    match = fill("adapter", "one_by_one_match")
    assert match(torch.zeros(2, 5, 8), torch.zeros(2, 5, 12))(torch.zeros(2, 5, 8)).shape == (2, 5, 12)
    assert sum(p.numel() for p in match(torch.zeros(2, 8), torch.zeros(2, 12)).parameters()) == 96
