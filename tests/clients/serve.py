"""`transformers serve`, asked over HTTP, as `transformers chat` asks it."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

NAME = "transformers serve"
OF = "transformers"
WHAT = "`transformers serve`, a chat completion over HTTP"
REQUIRES = ["transformers[serving]"]

if __name__ == "__main__":
    model = str(Path(os.environ["MODELS"]) / "chat")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["transformers", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    )
    asked = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps({**asked, "stream": False}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(request, timeout=300) as reply:
                    said = json.loads(reply.read())
                break
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError):
                    raise SystemExit(error.read().decode()) from error
                time.sleep(1)
        assert said["choices"][0]["message"]["role"] == "assistant", said
    finally:
        server.terminate()
        server.wait(30)
