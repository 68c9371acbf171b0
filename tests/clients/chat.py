"""`transformers chat` over `transformers serve`, with what is typed given as a file."""

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

NAME = "transformers chat"
OF = "transformers"
WHAT = "`transformers chat FOLDER`, one question, then `!exit`"
REQUIRES = ["transformers[serving]"]

# it asks whether to go on after an answer that reached its limit; what is left over is not read
TYPED = "hello\nn\n!exit\n!exit\n"

if __name__ == "__main__":
    model = str(Path(os.environ["MODELS"]) / "chat")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    server = subprocess.Popen(
        ["transformers", "serve", model, "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        # offline, the client refuses to talk to this machine, too
        online = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        chat = subprocess.run(
            ["transformers", "chat", model, f"{url}/v1", "max_new_tokens=8", "do_sample=False"],
            env=online, input=TYPED, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        print(chat.stdout, chat.stderr)
        assert chat.returncode == 0
        said = "".join(chat.stdout.split())  # the terminal breaks lines anywhere
        assert f"<{model}>:" in said and "tokensin" in said, said
    finally:
        server.terminate()
        server.wait(30)
