"""A fresh process that imports transformers alone."""

import json
import os
from pathlib import Path

NAME = "transformers"
OF = "transformers"
WHAT = "`AutoModelForCausalLM.from_pretrained`, the same logits to the bit"
REQUIRES = []

if __name__ == "__main__":
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(os.environ["MODELS"]) / "chat"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(torch.arange(1, 17)[None]).logits[0, -1, :8].float().tolist()
    assert found == json.loads((folder / "expected.json").read_text()), found
