"""FedAvg. McMahan et al., AISTATS 2017. https://arxiv.org/abs/1602.05629

w <- sum_k (n_k / n) w_k over the cohort, w_k from local SGD on client k's data. Every hook's default is FedAvg's;
a client whose budget does not hold the whole model is left out.
"""

from fedpipe.types import Method

method = Method(name="fedavg")
