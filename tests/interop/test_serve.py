"""``transformers serve`` on a mixture's folder, in its own process, with the official client of OpenAI."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

for name in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(name, reason=f"the package {name} is not installed; make test-interop installs it")

import openai  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from dylo_moe import DyLoRA_MoE  # noqa: E402

MESSAGES = [{"role": "user", "content": "def f(x):"}]
NEW_TOKENS = 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(f"{address}/health", timeout=2):
                return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"the server does not answer: {log.read_text()}")


@pytest.fixture(scope="module", params=[[], ["--continuous-batching"]], ids=["one by one", "continuous batching"])
def address(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server of the folder, yield its address, and stop it."""
    home, port = tmp_path_factory.mktemp("home"), free_port()
    log = home / "log"
    place = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--trust-remote-code"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *place, *request.param],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)


def test_a_chat_completion_is_what_generate_gives(address: str, folder: Path) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0) as client:
        answer = client.chat.completions.create(
            model=str(folder), messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0
        )
    model, tokenizer = DyLoRA_MoE.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = made[0, asked["input_ids"].shape[1] :]
    assert len(new) > 1
    assert answer.choices[0].message.content == tokenizer.decode(new, skip_special_tokens=True)
