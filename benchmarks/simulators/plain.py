"""The loop that a researcher writes: one process, one model copied for every client, state dicts averaged.

python plain.py JOB DATA ROUNDS
"""

import copy

import numpy as np
import torch
from job import CLIENTS, COHORT, arguments, report
from nets import loss, net, rows, train
from torch import Tensor


def average(states: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """Mean of state dicts, weighted by numbers of samples."""
    total = sum(sizes)
    return {name: sum(s[name] * (n / total) for s, n in zip(states, sizes, strict=True)) for name in states[0]}


def main() -> None:
    job, data, rounds = arguments()
    found = rows(data)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    server = net(job)
    for _ in range(rounds):
        states, sizes = [], []
        for k in rng.choice(CLIENTS, COHORT, replace=False):
            client = copy.deepcopy(server)
            train(client, found["x"][k], found["y"][k], job)
            states.append(client.state_dict())
            sizes.append(len(found["y"][k]))
        server.load_state_dict(average(states, sizes))
    report(loss(server, found["test_x"], found["test_y"]))


if __name__ == "__main__":
    main()
