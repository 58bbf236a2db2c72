"""Deep Compression: the stages keep what the earlier ones made, and the file gives it back bit for bit."""

import pytest
import torch
from torch import nn

from conftest import small_cnn, small_mlp, small_task
from featherweight.catalogue import entry
from featherweight.core.fit import fit
from featherweight.core.forms import Table, bake, codes_of, forms_of, mask_of
from featherweight.core.task import evaluate
from featherweight.errors import BadOption, UnknownName

QUICK = {"rounds": 2, "epochs": 2, "finetune": 1, "share_epochs": 2, "lr": 0.01}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def compressed(model: nn.Module, **options) -> nn.Module:
    task = small_task()
    fit(model, task, epochs=3, lr=1e-2)
    return entry("deep_compression")(model, task, **{**QUICK, **options})


def test_zeros_of_the_first_stage_survive_the_second():
    model = compressed(small_cnn(), sparsity=0.8, conv_bits=4, fc_bits=2)
    masks = {path: mask_of(layer).clone() for path, layer in layers(model).items()}
    assert [type(f).__name__ for f in forms_of(layers(model)["3"])] == ["Codebook", "Mask"]
    bake(model)
    for path, layer in layers(model).items():
        assert torch.equal(layer.weight != 0, masks[path])
        survivors = layer.weight[masks[path]].unique().numel()
        assert survivors <= (16 if isinstance(layer, nn.Conv2d) else 4)
        codes = codes_of(layer)
        assert isinstance(codes.rule, Table)
        assert torch.equal(codes.decode(), layer.weight)
    total = sum(layer.weight.numel() for layer in layers(model).values())
    assert sum(int((layer.weight == 0).sum()) for layer in layers(model).values()) == int(0.8 * total)


def test_it_still_works_at_a_tenth_of_the_weights():
    model = compressed(small_mlp(), sparsity=0.9, rounds=4, epochs=8, finetune=4)
    assert evaluate(model, small_task()).value >= 0.9


def test_sparsities_by_layer():
    model = bake(compressed(small_mlp(), sparsity={"1": 0.9, "3": 0.5}))
    assert [int((model[i].weight == 0).sum()) for i in (1, 3)] == [int(0.9 * 2048), 64]


def test_bits_of_both_kinds_of_layers_are_checked_before_anything_changes():
    model = small_mlp()
    with pytest.raises(BadOption, match="conv_bits=0"):
        entry("deep_compression")(model, small_task(), conv_bits=0)
    with pytest.raises(UnknownName, match="fc9"):
        entry("deep_compression")(model, small_task(), where="fc9")
    assert not forms_of(model[1])


def test_its_file_is_coded_by_huffman():
    found = entry("deep_compression")
    assert found.coder == "huffman"
    assert found.shrinks == {"weights", "bits"}
    assert entry("deep_compression_prune") == found
