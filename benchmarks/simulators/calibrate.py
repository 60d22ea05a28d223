"""How fast this machine is: CPU-seconds of a fixed amount of work, 2000 products of 512x512 float32 matrices.

python calibrate.py
"""

import json
import os
import time

import torch


def main() -> None:
    torch.set_num_threads(1)
    a, b = torch.rand(2, 512, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    for _ in range(50):
        a @ b
    begin = time.process_time()
    for _ in range(2000):
        a @ b
    used = time.process_time() - begin
    on_gpu = os.environ.get("SIMULATORS_DEVICE") == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    print(json.dumps({"cpu": used, "device": device}))


if __name__ == "__main__":
    main()
