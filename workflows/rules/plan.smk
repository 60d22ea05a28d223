rule measure:
    input:
        run=ancient(of(MEASURES, "measure_spec")),
        chosen=of(MEASURES, "chosen"),
        data=of(MEASURES, "data"),
    output:
        prediction=f"{OUT}/measure/{{measure}}/prediction.parquet",
        tried=f"{OUT}/measure/{{measure}}/measure.obs.parquet",
    log:
        f"{OUT}/logs/measure/{{measure}}.log",
    cache: SHARED
    threads: THREADS
    params:
        code=code_of("measure", MEASURES),
    shell:
        "fedpipe measure --run {input.run} --data {input.data}"
        " --prediction {output.prediction} --tried {output.tried} 2>&1 | tee {log}"


rule assign:
    input:
        run=ancient(of(RUNS, "spec")),
        chosen=of(RUNS, "chosen"),
        data=of(RUNS, "data"),
        clients=of(RUNS, "clients"),
        prediction=of(RUNS, "prediction"),
    output:
        plans=f"{OUT}/runs/{{run}}/plans.parquet",
        assignment=f"{OUT}/runs/{{run}}/assignment.parquet",
        route=f"{OUT}/runs/{{run}}/route.parquet",
        state=directory(f"{OUT}/runs/{{run}}/state/000000"),
        own=directory(f"{OUT}/runs/{{run}}/own/000000"),
    log:
        f"{OUT}/logs/assign/{{run}}.log",
    threads: THREADS
    params:
        code=code_of("assign", RUNS),
    shell:
        "fedpipe assign --run {input.run} --data {input.data}"
        " --clients {input.clients} --prediction {input.prediction}"
        " --plans {output.plans} --assignment {output.assignment} --route {output.route}"
        " --state {output.state} --own {output.own} 2>&1 | tee {log}"
