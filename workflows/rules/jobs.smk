rule train:
    input:
        unpack(world),
    output:
        trained=JOB_FOLDERS(directory(f"{OUT}/runs/{{run}}/train/{{t}}/{{job}}")),
    log:
        f"{OUT}/logs/train/{{run}}/{{t}}-{{job}}.log",
    threads: THREADS
    params:
        code=code_of("train", RUNS),
    # The number of jobs is no param: another one would run again what is done.
    shell:
        "fedpipe train --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans} --route {input.route}"
        " --state {input.state} --own {input.own} --out {output.trained}"
        f" --job {{wildcards.job}} --jobs {JOBS} 2>&1 | tee {{log}}"


rule aggregate:
    input:
        unpack(world),
        trained=trained_by_jobs,
    output:
        state=temp(directory(f"{OUT}/runs/{{run}}/state/{{t}}")),
        own=temp(directory(f"{OUT}/runs/{{run}}/own/{{t}}")),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
        times=f"{OUT}/runs/{{run}}/rounds/{{t}}.obs.parquet",
        peaks=f"{OUT}/runs/{{run}}/rounds/{{t}}.peaks.obs.parquet",
    log:
        f"{OUT}/logs/aggregate/{{run}}/{{t}}.log",
    wildcard_constraints:
        t=PASSING,
    threads: THREADS
    params:
        code=code_of_rounds,
    shell:
        "fedpipe aggregate --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans} --route {input.route}"
        " --state {input.state} --own {input.own} --trained {input.trained}"
        " --next-state {output.state} --next-own {output.own}"
        " --rounds {output.rounds} --curve {output.curve}"
        " --times {output.times} --peaks {output.peaks} 2>&1 | tee {log}"


use rule aggregate as aggregate_kept with:
    output:
        state=directory(f"{OUT}/runs/{{run}}/state/{{t}}"),
        own=directory(f"{OUT}/runs/{{run}}/own/{{t}}"),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
        times=f"{OUT}/runs/{{run}}/rounds/{{t}}.obs.parquet",
        peaks=f"{OUT}/runs/{{run}}/rounds/{{t}}.peaks.obs.parquet",
    wildcard_constraints:
        t=KEPT,
