"""The main job on real input: LeNet-5 learns 5,000 digits; a chain makes it forty times smaller within half a point.

Run it with `make demo`; it writes model.fw, model.onnx and report.json to runs/demo/. The same as one command:
featherweight compress lenet5 --data mnist5k --train 30 --method ... --until 'size<=0.025x' --out runs/demo
"""

import subprocess
import sys

COMMAND = [
    *("compress", "lenet5", "--data", "mnist5k", "--train", "30"),
    *("--method", "magnitude_iterative:sparsity=0.92,epochs=30"),
    *("--method", "kmeans_share:weight_bits=4,epochs=4"),
    *("--until", "size<=0.025x", "--guard", "drop<=0.5pt"),
    *("--out", "runs/demo"),
]
sys.exit(subprocess.run([sys.executable, "-m", "featherweight.cli", *COMMAND], check=False).returncode)
