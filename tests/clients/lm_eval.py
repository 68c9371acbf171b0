"""lm-evaluation-harness by its command line, on a task of its own that needs no network."""

import json
import os
import subprocess
from pathlib import Path

NAME = "lm-eval"
OF = "lm-eval"
WHAT = "`lm_eval --model hf --model_args pretrained=FOLDER --tasks ...`"
REQUIRES = ["lm-eval[hf]>=0.4.9"]

TASK = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""

if __name__ == "__main__":
    models, here = Path(os.environ["MODELS"]), Path.cwd()
    rows = [
        {"question": "the fox is", "choices": [" red", " tall"], "answer": i % 2} for i in range(4)
    ]
    (here / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (here / "tasks").mkdir(exist_ok=True)
    (here / "tasks" / "colours.yaml").write_text(TASK.format(data=here / "test.jsonl"))
    subprocess.run(
        ["lm_eval", "--model", "hf", "--model_args", f"pretrained={models / 'chat'},dtype=bfloat16",
         "--tasks", "colours", "--include_path", "tasks", "--device", "cpu", "--batch_size", "2",
         "--output_path", "out"],
        check=True,
    )  # fmt: skip
    (found,) = (here / "out").rglob("results*.json")
    assert "acc,none" in json.loads(found.read_text())["results"]["colours"]
