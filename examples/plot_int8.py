"""int8 in ten lines: a trained LeNet-5 becomes integers, in a file of a quarter of the size that a runtime executes.

Takes half a minute; writes runs/int8/ (model.fw, model.onnx, report.html).
"""

import featherweight as fw
from featherweight import zoo

task = zoo.task("mnist5k")
model = fw.fit(zoo.build("lenet5"), task, epochs=6, lr=1e-3).eval()

result = fw.compress(model, task, "int8", out="runs/int8")

before, after = result.report["original"], result.report["result"]
print(f"accuracy {before['metric']:.4f} -> {after['metric']:.4f}")
print(f"model.fw {before['bytes']:,} -> {after['bytes']:,} bytes, model.onnx {result.report['onnx']['bytes']:,} bytes")
for row in result.report["latency"]:
    if row["name"] == "result":
        print(f"{row['runtime']}, batch {row['batch']}: {row['ratio']:.2f}x of the original's time")
