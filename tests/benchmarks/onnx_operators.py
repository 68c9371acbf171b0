"""Time ONNX Runtime's MatMulNBits of 2, 4 and 8 bits: python tests/benchmarks/onnx_operators.py

One thread, float32 inputs, groups of 64, random codes; the median of 20 calls.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

GROUP = 64


def session_of(bits: int, rows: int, columns: int) -> onnxruntime.InferenceSession:
    """Return a session with one product by a random weight (rows, columns) of `bits` bits."""
    blocks = columns // GROUP
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (rows, blocks, GROUP * bits // 8), dtype=np.uint8)
    scales = rng.random(rows * blocks, dtype=np.float32)
    tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    figures = {"K": columns, "N": rows, "bits": bits, "block_size": GROUP}
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **figures
    )
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", n])]
        for name, n in (("x", columns), ("y", rows))
    )
    graph = helper.make_graph([node], "product", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def milliseconds(session: onnxruntime.InferenceSession, x: np.ndarray) -> float:
    """Return the median time of a call."""
    session.run(None, {"x": x})
    times = []
    for _ in range(20):
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns")
    size = parser.parse_args().size
    print("| bits | tokens | ms |\n|---|---|---|")
    for bits in (2, 4, 8):
        session = session_of(bits, size, size)
        for tokens in (1, 32):
            x = np.random.default_rng(1).standard_normal((tokens, size)).astype(np.float32)
            print(f"| {bits} | {tokens} | {milliseconds(session, x):.1f} |")


if __name__ == "__main__":
    main()
