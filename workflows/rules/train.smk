rule segment:
    input:
        run=ancient(of(RUNS, "spec")),
        data=of(RUNS, "data"),
        partition=of(RUNS, "partition"),
        plans=rules.assign.output.plans,
        route=rules.assign.output.route,
        state=before("state"),
        own=before("own"),
    output:
        state=directory(f"{OUT}/runs/{{run}}/state/{{t}}"),
        own=directory(f"{OUT}/runs/{{run}}/own/{{t}}"),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
    log:
        f"{OUT}/logs/segment/{{run}}/{{t}}.log",
    threads: THREADS
    params:
        code=code_of("segment", RUNS),
        last=last_round,
    shell:
        "python -m fedpipe segment --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans} --route {input.route}"
        " --state {input.state} --own {input.own} --last {params.last}"
        " --next-state {output.state} --next-own {output.own}"
        " --rounds {output.rounds} --curve {output.curve} 2>&1 | tee {log}"


rule evaluate:
    input:
        run=ancient(of(RUNS, "spec")),
        data=of(RUNS, "data"),
        partition=of(RUNS, "partition"),
        plans=rules.assign.output.plans,
        assignment=rules.assign.output.assignment,
        state=at_end("state"),
        own=at_end("own"),
    output:
        metrics=f"{OUT}/runs/{{run}}/metrics.parquet",
    log:
        f"{OUT}/logs/evaluate/{{run}}.log",
    threads: THREADS
    params:
        code=code_of("evaluate", RUNS),
    shell:
        "python -m fedpipe evaluate --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans}"
        " --assignment {input.assignment} --state {input.state} --own {input.own}"
        " --metrics {output.metrics} 2>&1 | tee {log}"
