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
config.setdefault("segment", 20)  # rounds in one job; changes no bit of a result


# Configuration, checked; where everything lies; digests of code
include: "workflows/rules/common.smk"
# Decoded images, rows of every client
include: "workflows/rules/data.smk"
# Predicted bytes, who holds, trains and sends what
include: "workflows/rules/plan.smk"
# Rounds, then accuracy per client
include: "workflows/rules/train.smk"
# Comparison of all runs, one page
include: "workflows/rules/report.smk"


onsuccess:
    shell("python -m fedpipe show {OUT}")


rule all:
    default_target: True
    input:
        STUDY.table,
        STUDY.report,
