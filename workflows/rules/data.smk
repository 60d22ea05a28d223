rule data:
    input:
        run=ancient(of(DATA, "data_spec")),
    output:
        data=f"{OUT}/data/{{data}}/data.arrow",
    log:
        f"{OUT}/logs/data/{{data}}.log",
    cache: SHARED
    threads: 1
    params:
        code=code_of("data", DATA),
    shell:
        "fedpipe data --run {input.run} --data {output.data} 2>&1 | tee {log}"


rule partition:
    input:
        run=ancient(of(PARTITIONS, "partition_spec")),
        data=of(PARTITIONS, "data"),
    output:
        partition=f"{OUT}/partition/{{partition}}/partition.parquet",
        clients=f"{OUT}/partition/{{partition}}/clients.parquet",
        svg=f"{OUT}/partition/{{partition}}/histogram.svg",
        png=f"{OUT}/partition/{{partition}}/histogram.png",
    log:
        f"{OUT}/logs/partition/{{partition}}.log",
    cache: SHARED
    threads: 1
    params:
        code=code_of("partition", PARTITIONS),
    shell:
        "fedpipe partition --run {input.run} --data {input.data}"
        " --partition {output.partition} --clients {output.clients} 2>&1 | tee {log}"
