"""Flower's simulation engine: a ServerApp with FedAvg, 100 virtual nodes, clients run by Ray actors of one CPU each.

python flower_run.py JOB DATA ROUNDS
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from job import CLIENTS, COHORT, arguments, report
from nets import DEVICE, loss, net, rows, train

JOB, DATA, ROUNDS = arguments()
client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def local(message: Message, context: Context) -> Message:
    client = int(context.node_config["partition-id"])
    x, y = rows(DATA)["x"][client], rows(DATA)["y"][client]
    model = net(JOB)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(model, x, y, JOB)
    found = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
    return Message(content=RecordDict(found), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    strategy = FedAvg(fraction_train=COHORT / CLIENTS, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
    model = net(JOB)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=ROUNDS)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    report(loss(model, rows(DATA)["test_x"], rows(DATA)["test_y"]))


if __name__ == "__main__":
    gpus = 0.5 if DEVICE.type == "cuda" else 0.0
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": gpus}, "init_args": {"num_cpus": 2}},
    )
