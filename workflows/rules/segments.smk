rule segment:
    input:
        run=ancient(of(RUNS, "spec")),
        data=of(RUNS, "data"),
        partition=of(RUNS, "partition"),
        plans=of(RUNS, "plans"),
        route=of(RUNS, "route"),
        state=world("state"),
        own=world("own"),
    output:
        state=temp(directory(f"{OUT}/runs/{{run}}/state/{{t}}")),
        own=temp(directory(f"{OUT}/runs/{{run}}/own/{{t}}")),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
    log:
        f"{OUT}/logs/segment/{{run}}/{{t}}.log",
    wildcard_constraints:
        t=PASSING,
    threads: THREADS
    params:
        code=code_of("segment", RUNS),
        last=last_round,
    shell:
        "fedpipe segment --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans} --route {input.route}"
        " --state {input.state} --own {input.own} --last {params.last}"
        " --next-state {output.state} --next-own {output.own}"
        " --rounds {output.rounds} --curve {output.curve} 2>&1 | tee {log}"


use rule segment as segment_kept with:
    output:
        state=directory(f"{OUT}/runs/{{run}}/state/{{t}}"),
        own=directory(f"{OUT}/runs/{{run}}/own/{{t}}"),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
    wildcard_constraints:
        t=KEPT,
