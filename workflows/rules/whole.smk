# With --cache: a run from its plans to its metrics as one job, taken from the cache where any workflow has made it.
ruleorder: whole > assign
ruleorder: whole > evaluate


rule whole:
    input:
        run=ancient(of(RUNS, "spec")),
        chosen=of(RUNS, "chosen"),
        data=of(RUNS, "data"),
        partition=of(RUNS, "partition"),
        clients=of(RUNS, "clients"),
        prediction=of(RUNS, "prediction"),
    output:
        plans=f"{OUT}/runs/{{run}}/plans.parquet",
        assignment=f"{OUT}/runs/{{run}}/assignment.parquet",
        route=f"{OUT}/runs/{{run}}/route.parquet",
        state0=directory(f"{OUT}/runs/{{run}}/state/000000"),
        own0=directory(f"{OUT}/runs/{{run}}/own/000000"),
        state=directory(f"{OUT}/runs/{{run}}/state/{EVERY:06d}"),
        own=directory(f"{OUT}/runs/{{run}}/own/{EVERY:06d}"),
        rounds=f"{OUT}/runs/{{run}}/rounds/{EVERY:06d}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{EVERY:06d}.parquet",
        times=f"{OUT}/runs/{{run}}/rounds/{EVERY:06d}.obs.parquet",
        peaks=f"{OUT}/runs/{{run}}/rounds/{EVERY:06d}.peaks.obs.parquet",
        metrics=f"{OUT}/runs/{{run}}/metrics.parquet",
    log:
        f"{OUT}/logs/whole/{{run}}.log",
    cache: SHARED
    threads: THREADS
    params:
        assign=code_of("assign", RUNS),
        rounds=code_of_rounds,
        evaluate=code_of("evaluate", RUNS),
        last=EVERY,
        platform=host(),
    shell:
        "(fedpipe assign --run {input.run} --data {input.data}"
        " --clients {input.clients} --prediction {input.prediction}"
        " --plans {output.plans} --assignment {output.assignment} --route {output.route}"
        " --state {output.state0} --own {output.own0}"
        " && fedpipe segment --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {output.plans} --route {output.route}"
        " --state {output.state0} --own {output.own0} --last {params.last}"
        " --next-state {output.state} --next-own {output.own}"
        " --rounds {output.rounds} --curve {output.curve}"
        " --times {output.times} --peaks {output.peaks}"
        " && fedpipe evaluate --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {output.plans}"
        " --assignment {output.assignment} --state {output.state} --own {output.own}"
        " --metrics {output.metrics}) 2>&1 | tee {log}"
