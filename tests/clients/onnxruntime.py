"""An export to ONNX, and its graph run by ONNX Runtime in a process that has nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

NAME = "ONNX Runtime"
OF = "onnxruntime"
WHAT = "`export FOLDER --format onnx`, greedy text by ONNX Runtime alone as by transformers"
REQUIRES = ["onnx>=1.21", "onnxruntime>=1.24", "onnxscript>=0.7"]

# run by python -c, so that this file, which has the name of the package, is not found
ALONE = """
import json, sys
import numpy as np, onnxruntime
folder, prompts, n_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
found = []
for ids in prompts:
    start = len(ids)
    new = ids
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
             for i in session.get_inputs() if "cache" in i.name}
    for _ in range(n_tokens):
        n = len(ids)
        inputs = {"input_ids": np.array([new]), "attention_mask": np.ones((1, n), np.int64),
                  "position_ids": np.arange(n - len(new), n)[None]}
        out = dict(zip(names, session.run(None, {**inputs, **cache})))
        cache = {name: out[name.replace("input.", "output.", 1)] for name in cache}
        new = [int(out["logits"][0, -1].argmax())]
        ids = ids + new
    found.append(ids[start:])
assert not {"torch", "transformers", "hf_evopress"} & set(sys.modules)
print(json.dumps(found))
"""

if __name__ == "__main__":
    import greedy  # which takes this folder off the path

    for name in ("served", "smollm2"):
        folder, out = Path(os.environ["MODELS"]) / name, Path(f"{name}-onnx")
        if not folder.is_dir():
            continue
        export = ["hf-evopress", "export", str(folder), "--format", "onnx", "--out", str(out)]
        subprocess.run(export, check=True)
        prompts, n_tokens = json.dumps(greedy.prompts(folder)), str(greedy.N_TOKENS)
        alone = [sys.executable, "-c", ALONE, str(out), prompts, n_tokens]
        run = subprocess.run(alone, check=True, stdout=subprocess.PIPE, text=True)
        found, wanted = json.loads(run.stdout), greedy.by_transformers(folder, "float32")
        assert found == wanted, f"{name}: {found} is not {wanted}"
        size = sum(f.stat().st_size for f in out.glob("model.onnx*"))
        packed = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(f"{name}: {size} bytes in the graph's files, {packed} packed")
