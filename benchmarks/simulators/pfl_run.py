"""pfl-research's own loop, as in its CIFAR-10 benchmark: FederatedAveraging on a SimulatedBackend, one process.

python pfl_run.py JOB DATA ROUNDS

Its `Dataset` hands out batches in the order of rows, and it evaluates the clients of round 0 whatever is asked of it.
"""

import types

import numpy as np
import torch
from job import BATCH, CLIENTS, COHORT, LR, arguments, report
from nets import loss, net, rows
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F


def client_loss(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    self.train()
    return F.cross_entropy(self(x), y)


@torch.no_grad()
def metrics(self: nn.Module, x: Tensor, y: Tensor) -> dict[str, Weighted]:
    self.eval()
    return {"loss": Weighted(F.cross_entropy(self(x), y, reduction="sum").item(), len(y))}


def main() -> None:
    job, data, rounds = arguments()
    found = rows(data)
    torch.manual_seed(0)
    np.random.seed(0)
    clients = [(found["x"][k], found["y"][k]) for k in range(CLIENTS)]
    # Of pfl's samplers the one that draws no client twice in a round: in turn, from a shuffled list.
    sampler = get_user_sampler("minimize_reuse", np.random.permutation(CLIENTS).tolist())
    module = net(job)
    module.loss, module.metrics = types.MethodType(client_loss, module), types.MethodType(metrics, module)
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    federated = FederatedDataset.from_slices(clients, sampler)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=COHORT,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=federated, val_data=federated, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(local_learning_rate=LR[job], local_num_epochs=1, local_batch_size=BATCH),
        model_eval_params=NNEvalHyperParams(local_batch_size=100),
        callbacks=[],
    )
    report(loss(module, found["test_x"], found["test_y"]))


if __name__ == "__main__":
    main()
