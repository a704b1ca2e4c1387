"""Cases that several processes run together, over gloo: once for a file of tests, since starting them takes longest.

A file of cases has ``CASES``, functions without arguments by name. Each process calls all of them in this order; what
is asserted must come behind what the processes do together.
"""

import importlib
import json
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(cases: str, ranks: int, folder: Path) -> dict[str, list[str]]:
    """For each case in that module, what failed in it, "" for nothing, by rank."""
    mp.start_processes(_run, (cases, ranks, str(folder)), ranks, start_method="spawn")
    outcomes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}


def _run(rank: int, cases: str, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    outcomes = {}
    for name, case in importlib.import_module(cases).CASES.items():
        outcomes[name] = ""
        try:
            case()
        except AssertionError:
            outcomes[name] = traceback.format_exc(limit=-4)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
