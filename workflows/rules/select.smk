rule select:
    input:
        run=ancient(of(SELECTIONS, "select_spec")),
        metrics=of(SELECTIONS, "tuned"),
    output:
        chosen=f"{OUT}/select/{{selection}}/chosen.parquet",
    log:
        f"{OUT}/logs/select/{{selection}}.log",
    threads: 1
    params:
        code=code_of("select", SELECTIONS),
    shell:
        "fedpipe select --run {input.run} --metrics {input.metrics}" " --chosen {output.chosen} 2>&1 | tee {log}"
