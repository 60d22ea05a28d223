rule segment:
    input:
        unpack(world),
    output:
        state=temp(directory(f"{OUT}/runs/{{run}}/state/{{t}}")),
        own=temp(directory(f"{OUT}/runs/{{run}}/own/{{t}}")),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
        times=f"{OUT}/runs/{{run}}/rounds/{{t}}.obs.parquet",
        peaks=f"{OUT}/runs/{{run}}/rounds/{{t}}.peaks.obs.parquet",
    log:
        f"{OUT}/logs/segment/{{run}}/{{t}}.log",
    wildcard_constraints:
        t=PASSING,
    threads: THREADS
    params:
        code=code_of_rounds,
    shell:
        "fedpipe segment --run {input.run} --data {input.data}"
        " --partition {input.partition} --plans {input.plans} --route {input.route}"
        " --state {input.state} --own {input.own} --last {wildcards.t}"
        " --next-state {output.state} --next-own {output.own}"
        " --rounds {output.rounds} --curve {output.curve}"
        " --times {output.times} --peaks {output.peaks} 2>&1 | tee {log}"


use rule segment as segment_kept with:
    output:
        state=directory(f"{OUT}/runs/{{run}}/state/{{t}}"),
        own=directory(f"{OUT}/runs/{{run}}/own/{{t}}"),
        rounds=f"{OUT}/runs/{{run}}/rounds/{{t}}.parquet",
        curve=f"{OUT}/runs/{{run}}/curve/{{t}}.parquet",
        times=f"{OUT}/runs/{{run}}/rounds/{{t}}.obs.parquet",
        peaks=f"{OUT}/runs/{{run}}/rounds/{{t}}.peaks.obs.parquet",
    wildcard_constraints:
        t=KEPT,
