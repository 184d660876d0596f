"""An object store behind a proxy that fails when it is told to, and seeded schedules of such failures."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flaky_proxy import Outage
from journeys import free_ports, wait_until
from pyarrow import fs

from shearing.storage import Store, open_store

PROXY = Path(__file__).with_name("flaky_proxy.py")
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "bucket"
# What is on its way when an outage begins, in the order of a run. `run` is the folder of the workspace.
MOMENTS = {
    "read": r"GET /bucket/corpora/.*/prune/",
    "decision of mask learning": r"PUT /bucket/run/mixture/pruning/",
    "checkpoint of mask learning": r"PUT /bucket/run/checkpoints/pruning/step-.*weights",
    "log of mask learning": r"PUT /bucket/run/metrics/pruning",
    "snapshot of checkpoints": r"PUT /bucket/run/checkpoints/pruning/checkpoint_manager_snapshot",
    "mark of a stage": r"PUT /bucket/run/stages/extraction",
    "pruned model": r"PUT /bucket/run/pruned/",
    "decision of continued pretraining": r"PUT /bucket/run/mixture/recovery/",
    "checkpoint of continued pretraining": r"PUT /bucket/run/checkpoints/recovery/step-.*weights",
    "log of continued pretraining": r"PUT /bucket/run/metrics/recovery",
}
KINDS = ("refuse", "busy", "error", "hang", "cut", "mute", "slow")
WHOLE = ("refuse", "hang")
ONCE = ("mark of a stage", "pruned model")
SECONDS = (6.0, 20.0)
REQUESTS = {
    "PUT of a folder": r"PUT [^?]*/$",
    "PUT of a part": r"PUT .*partNumber",
    "PUT": r"PUT ",
    "LIST": r"GET .*list-type",
    "GET": r"GET ",
    "HEAD": r"HEAD ",
    "DELETE": r"DELETE |POST .*\?delete",
    "POST": r"POST ",
}


@dataclass(frozen=True)
class ObjectStore:
    """A bucket that is reached through the proxy, or beside it."""

    folder: Path
    proxy: int
    port: int

    def uri(self, path: str, *, beside: bool = False) -> str:
        port = self.port if beside else self.proxy
        return f"s3://{BUCKET}/{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"

    def store(self, path: str) -> Store:
        return open_store(self.uri(path, beside=True))

    def arm(self, outage: Outage) -> None:
        """From now on this outage, and no other, is about to begin, or is on."""
        file = self.folder / "outage.json"
        file.with_suffix(".new").write_text(json.dumps(asdict(outage)))
        file.with_suffix(".new").replace(file)

    def log(self) -> list[dict[str, Any]]:
        lines = (self.folder / "requests.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def begun(self, number: int) -> float:
        """When an outage began, in Unix seconds; 0 where it has not."""
        return max((row["time"] for row in self.log() if row.get("outage") == number), default=0.0)

    def requests(self) -> Counter[str]:
        """How many requests of each kind were made."""
        lines = [f"{row['method']} {row['target']}" for row in self.log() if "method" in row]
        return Counter(next(kind for kind, pattern in REQUESTS.items() if re.match(pattern, line)) for line in lines)


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """moto's server and the proxy before it, each a process of its own, with an empty bucket."""
    folder.mkdir(parents=True)
    port, proxy = free_ports(2)
    commands = [
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        [
            sys.executable,
            str(PROXY),
            str(proxy),
            str(port),
            str(folder / "outage.json"),
            str(folder / "requests.jsonl"),
        ],
    ]
    with (folder / "servers.txt").open("w") as out, contextlib.ExitStack() as ending:
        for command in commands:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | KEYS)
            ending.callback(process.wait)
            ending.callback(process.kill)

        def answers() -> bool:
            client = fs.S3FileSystem(
                endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
            )
            with contextlib.suppress(OSError):
                client.create_dir(BUCKET)
                return True
            return False

        wait_until(answers, "moto's server answers", timeout_s=60)
        wait_until((folder / "requests.jsonl").exists, "the proxy answers", timeout_s=60)
        yield ObjectStore(folder, proxy, port)


def drawn(seed: int) -> list[tuple[str, Outage]]:
    """One outage for each moment, every kind before one comes twice, with a word on the moment."""
    dice = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < len(MOMENTS):
        kinds += dice.sample(KINDS, len(KINDS))
    outages = []
    for number, (kind, (what, begins)) in enumerate(zip(kinds, MOMENTS.items(), strict=False), 1):
        passed = 0 if what in ONCE else dice.randrange(2)
        seconds, share = round(dice.uniform(*SECONDS), 1), 1.0 if kind in WHOLE else 0.7
        outages.append((what, Outage(number, kind, begins, passed, seconds, share, dice.randrange(1000))))
    return outages
