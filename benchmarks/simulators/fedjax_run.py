"""FedJAX's own loop: `algorithms.fed_avg` with the networks of its EMNIST benchmark's file, for 3x32x32 and 10 classes.

python fedjax_run.py JOB DATA ROUNDS
"""

import fedjax
import haiku as hk
import jax
import numpy as np
from fedjax.algorithms import fed_avg
from fedjax.models.emnist import ConvDropoutModule
from job import BATCH, CLASSES, CLIENTS, COHORT, LR, PARAMETERS, arguments, read, report


def network(job: str) -> fedjax.Model:
    """The same CNN as the others', channels last; or one linear layer."""

    def forward(batch: dict[str, jax.Array], is_train: bool = True) -> jax.Array:
        if job == "cnn":
            return ConvDropoutModule(CLASSES)(batch["x"], is_train)
        return hk.Linear(CLASSES)(hk.Flatten()(batch["x"]))

    return fedjax.create_model_from_haiku(
        transformed_forward_pass=hk.transform(forward),
        sample_batch={"x": np.zeros((1, 32, 32, 3), np.float32), "y": np.zeros(1, np.int32)},
        train_loss=lambda batch, out: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], out),
        eval_metrics={"loss": fedjax.metrics.CrossEntropyLoss()},
        train_kwargs={"is_train": True},
        eval_kwargs={"is_train": False},
    )


def main() -> None:
    job, data, rounds = arguments()
    rows = read(data)
    x, test_x = (np.moveaxis(rows[name], -3, -1) for name in ("x", "test_x"))
    y, test_y = (rows[name].astype(np.int32) for name in ("y", "test_y"))
    clients = fedjax.InMemoryFederatedData({str(k): {"x": x[k], "y": y[k]} for k in range(CLIENTS)})
    model = network(job)
    algorithm = fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(LR[job]),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1),
    )
    sampler = fedjax.client_samplers.UniformGetClientSampler(clients, COHORT, seed=0)
    state = algorithm.init(model.init(jax.random.PRNGKey(0)))
    if (count := sum(p.size for p in jax.tree_util.tree_leaves(state.params))) != PARAMETERS[job]:
        raise ValueError(f"{job}: {count} parameters, wanted {PARAMETERS[job]}")
    for _ in range(rounds):
        state, _ = algorithm.apply(state, sampler.sample())
    test = fedjax.ClientDataset({"x": test_x, "y": test_y}).padded_batch(batch_size=100)
    report(float(fedjax.evaluate_model(model, state.params, test)["loss"]))


if __name__ == "__main__":
    main()
