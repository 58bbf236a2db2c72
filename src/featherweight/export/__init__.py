"""Files that other programs run: ONNX, in float or with quantize/dequantize pairs from the declared grids."""

from featherweight.export.onnx_file import ExportReport, onnx
from featherweight.export.runtime_session import Session, session

__all__ = ["ExportReport", "Session", "onnx", "session"]
