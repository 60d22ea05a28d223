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
        "fedpipe evaluate --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans}"
        " --assignment {input.assignment} --state {input.state} --own {input.own}"
        " --metrics {output.metrics} 2>&1 | tee {log}"
