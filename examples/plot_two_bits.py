"""Two bits and still right: how far the bits of weights and activations can fall, with training through the grids.

Without training four bits are the end for a LeNet-5; with two epochs through learned steps, under the float network as
teacher, two bits do. Takes about two minutes; writes runs/two_bits/accuracy.png.
"""

from pathlib import Path

import matplotlib as mpl

import featherweight as fw
from featherweight import zoo

mpl.use("Agg")
import matplotlib.pyplot as plt

OUT = Path("runs/two_bits")
BITS = (8, 4, 3, 2)

task = zoo.task("mnist5k")
model = fw.fit(zoo.build("lenet5"), task, epochs=6, lr=1e-3).eval()
float_accuracy = fw.evaluate(model, task).value


def accuracy(bits: int, epochs: int) -> float:
    """On valid, with this many bits for weights and activations (8 in the first and the last layer)."""
    result = fw.compress(
        model,
        task,
        "lsq" if epochs else "quantize",
        **({"epochs": epochs, "teacher_share": 0.7} if epochs else {"acts": "mse", "weights": "symmetric_mse"}),
        weight_bits=bits,
        act_bits=bits,
        first_last_bits=8,
        measure=False,
        onnx=False,
    )
    return result.report["result"]["metric"]


figure, axes = plt.subplots(figsize=(6, 4))
for epochs, name in ((0, "after training"), (2, "two epochs through the grids")):
    found = [accuracy(bits, epochs) for bits in BITS]
    axes.plot(BITS, found, marker="o", label=name)
    print(f"{name}: " + ", ".join(f"{bits} bits {value:.4f}" for bits, value in zip(BITS, found, strict=True)))
axes.axhline(float_accuracy, color="grey", linestyle=":", label="float")
axes.set(xlabel="bits of weights and activations", ylabel="accuracy (valid)", title="LeNet-5, 5,000 digits")
axes.set_xticks(BITS)
axes.legend()
OUT.mkdir(parents=True, exist_ok=True)
figure.savefig(OUT / "accuracy.png", dpi=150, bbox_inches="tight")
