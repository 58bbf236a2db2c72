"""Deep Compression: the stages keep what the earlier ones made, and the file gives it back bit for bit."""

import pytest
import torch
from torch import nn

import featherweight as fw
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


def test_the_last_training_moves_the_shared_values_and_no_zero():
    seen = []

    def watched_fit(model, task, **options):
        before = {path: layer.weight.detach().unique() for path, layer in layers(model).items()}
        fit(model, task, **options)
        seen.append((before, {path: layer.weight.detach().unique() for path, layer in layers(model).items()}))
        return model

    options = {**QUICK, "sparsity": 0.8, "conv_bits": 3, "fc_bits": 2, "share_lr": 1e-3}
    entry("deep_compression")(small_cnn(), small_task(fit=watched_fit), **options)
    before, after = seen[-1]
    for path, values in before.items():
        assert len(after[path]) == len(values) <= (5 if path == "8" else 9)
        assert bool(((after[path] != values) == (values != 0)).all()), path


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


def test_the_file_gives_every_bit_back_and_its_size_counts_everything(tmp_path):
    model = bake(compressed(small_cnn(), sparsity=0.8, conv_bits=4, fc_bits=3))
    model.eval()
    saved = fw.save(model, tmp_path / "model.fw", bare=True, coder=entry("deep_compression").coder)
    again = fw.load(tmp_path / "model.fw", into=small_cnn()).eval()
    restored = again.state_dict()
    assert model.state_dict().keys() == restored.keys()
    assert all(torch.equal(value, restored[name]) for name, value in model.state_dict().items())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), again(x))
    assert saved.bytes == (tmp_path / "model.fw").stat().st_size
    # Values and positions cost about their entropy; every entry of a table, bias and norm costs four bytes.
    entropy = sum(m.weight.numel() * bits_per_symbol(m.weight) / 8 for m in layers(model).values())
    tables = sum(4 * (m.weight.unique().numel() - 1) for m in layers(model).values())
    others = 4 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert saved.bytes > tables + others + 0.8 * entropy


def bits_per_symbol(values: torch.Tensor) -> float:
    share = values.unique(return_counts=True)[1] / values.numel()
    return float(-(share * share.log2()).sum())


def test_its_file_is_coded_by_huffman():
    found = entry("deep_compression")
    assert found.coder == "huffman"
    assert found.shrinks == {"weights", "bits"}
    assert entry("deep_compression_prune") == found
