"""A script of its own under `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

NAME = "accelerate"
OF = "accelerate"
WHAT = "`accelerate launch` of a script that loads and runs a model"
REQUIRES = []

SCRIPT = """
import os, torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(os.environ["MODELS"] + "/chat"))
with torch.no_grad():
    assert model(torch.arange(1, 17)[None]).logits.isfinite().all()
"""

if __name__ == "__main__":
    Path("script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    subprocess.run(
        [*launch, "script.py"], check=True, env={**os.environ, "ACCELERATE_USE_CPU": "1"}
    )
