# Federated-learning studies under memory budgets, as cached steps:
#
#   data ─ partition ─ measure ─ assign ─ segment (rounds of train and aggregate) ─ evaluate ─ table ─ report
#
#   snakemake -c2                                                the default study
#   snakemake -c2 --config study=workflows/studies/FILE.yaml     another one
#   snakemake -c2 --config rounds=3 seeds=[0]                    with other settings: any key of a study file
from snakemake.utils import min_version

min_version("9.20")


config.setdefault("study", "workflows/studies/quickstart.yaml")
# How the work is cut into jobs and what is kept on disk: neither changes a bit of a result
config.setdefault("segment", 20)  # rounds in one job
config.setdefault("jobs_per_round", "none")  # J: so many train jobs a round, and aggregate as its own; none: segments
config.setdefault("worker", False)  # jobs by one warm process of this machine, for many small ones
config.setdefault("keep", "last")  # states: the last | segments (and evaluations) | all


# Configuration, checked; where everything lies; digests of code
include: "workflows/rules/common.smk"
# Decoded images, rows of every client
include: "workflows/rules/data.smk"
# Predicted bytes, who holds, trains and sends what
include: "workflows/rules/plan.smk"
# Rounds: many in one job, train and aggregate as jobs of their own, or whole runs as single jobs that a cache can share
include: f"workflows/rules/{ROUNDS}.smk"
# Accuracy per client
include: "workflows/rules/evaluate.smk"
# Values of grids, chosen on validation rows
include: "workflows/rules/select.smk"
# Comparison of all runs, one page
include: "workflows/rules/report.smk"
# Speed of the kernels on this machine, apart from any study
include: "workflows/rules/kernels.smk"


if workflow.is_main_process:
    logger.info(way())


onstart:
    if WORKER:
        start = "import sys; from fedpipe.worker import start; start(sys.argv[1])"
        shell(f"python -c '{start}' {OUT} </dev/null >{OUT}/.worker.log 2>&1 &")


onerror:
    if WORKER:
        worker.ask(OUT, None)  # has it end


onsuccess:
    if WORKER:
        worker.ask(OUT, None)  # has it end
    if STUDY.table.is_file():
        shell("fedpipe show {OUT}")


rule all:
    default_target: True
    input:
        everything,
