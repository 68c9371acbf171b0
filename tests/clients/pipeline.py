"""transformers' pipeline."""

import os
from pathlib import Path

NAME = "pipeline"
OF = "transformers"
WHAT = '`pipeline("text-generation", FOLDER)`'
REQUIRES = []

if __name__ == "__main__":
    from transformers import pipeline

    write = pipeline("text-generation", str(Path(os.environ["MODELS"]) / "chat"))
    (made,) = write("the red fox", max_new_tokens=8, do_sample=False)
    assert made["generated_text"].startswith("the red fox"), made
    assert type(write.model.hf_quantizer).__name__ == "EvoPressQuantizer"
