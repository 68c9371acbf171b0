"""An embedding model in sentence-transformers, its modules brought along."""

import os
from pathlib import Path

NAME = "sentence-transformers"
OF = "sentence-transformers"
WHAT = "`SentenceTransformer(FOLDER).encode`"
REQUIRES = ["sentence-transformers>=5"]

if __name__ == "__main__":
    import sys

    sys.path.pop(0)  # this file has the name of the package
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(os.environ["MODELS"]) / "embed"), device="cpu")
    found = model.encode(["the red fox", "a tall tower"])
    assert found.shape == (2, 64) and abs(found).max() > 0
    assert any("Compressed" in type(module).__name__ for module in model.modules())
