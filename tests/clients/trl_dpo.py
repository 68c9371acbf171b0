"""TRL's DPO trainer by its command line: a LoRA adapter over the packed layers."""

import os
import subprocess
from pathlib import Path

NAME = "TRL, DPO"
OF = "trl"
WHAT = "`trl dpo --model_name_or_path FOLDER --use_peft`, two steps"
REQUIRES = ["trl[peft]>=1.0"]

if __name__ == "__main__":
    models = Path(os.environ["MODELS"])
    subprocess.run(
        ["trl", "dpo", "--model_name_or_path", str(models / "chat"),
         "--dataset_name", str(models / "dpo"), "--use_peft",
         "--lora_target_modules", "q_proj", "v_proj",
         "--max_steps", "2", "--per_device_train_batch_size", "2", "--output_dir", "out",
         "--max_length", "64", "--use_cpu", "--bf16", "False", "--report_to", "none"],
        check=True,
    )  # fmt: skip
    assert list(Path("out").rglob("adapter_model.safetensors"))
