rule train:
    input:
        run=ancient(of(RUNS, "spec")),
        data=of(RUNS, "data"),
        partition=of(RUNS, "partition"),
        plans=of(RUNS, "plans"),
        route=of(RUNS, "route"),
        state=world("state"),
        own=world("own"),
    output:
        trained=JOB_FOLDERS(directory(f"{OUT}/runs/{{run}}/train/{{t}}/{{job}}")),
    log:
        f"{OUT}/logs/train/{{run}}/{{t}}-{{job}}.log",
    threads: THREADS
    params:
        code=code_of("train", RUNS),
        jobs=JOBS,
    shell:
        "fedpipe train --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans} --route {input.route}"
        " --state {input.state} --own {input.own} --job {wildcards.job} --jobs {params.jobs}"
        " --out {output.trained} 2>&1 | tee {log}"


rule aggregate:
    input:
        run=ancient(of(RUNS, "spec")),
        data=of(RUNS, "data"),
        partition=of(RUNS, "partition"),
        plans=of(RUNS, "plans"),
        route=of(RUNS, "route"),
        state=world("state"),
        own=world("own"),
        trained=trained_by_jobs,
    output:
        state=temp(directory(f"{OUT}/runs/{{run}}/state/{{t}}")),
        own=temp(directory(f"{OUT}/runs/{{run}}/own/{{t}}")),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
    log:
        f"{OUT}/logs/aggregate/{{run}}/{{t}}.log",
    wildcard_constraints:
        t=PASSING,
    threads: THREADS
    params:
        code=code_of("aggregate", RUNS),
    shell:
        "fedpipe aggregate --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans} --route {input.route}"
        " --state {input.state} --own {input.own} --trained {input.trained}"
        " --next-state {output.state} --next-own {output.own}"
        " --rounds {output.rounds} --curve {output.curve} 2>&1 | tee {log}"


use rule aggregate as aggregate_kept with:
    output:
        state=directory(f"{OUT}/runs/{{run}}/state/{{t}}"),
        own=directory(f"{OUT}/runs/{{run}}/own/{{t}}"),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
    wildcard_constraints:
        t=KEPT,
